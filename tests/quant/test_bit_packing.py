"""Bit packing against Python's big integers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlquant.errors import InputError
from rlquant.quant import pack, packed_size, unpack
from rlquant.quant.granularity import Granularity, as_matrix, row_chunks


@st.composite
def codes_and_bits(draw: st.DrawFn) -> tuple[list[int], int]:
    bits = draw(st.integers(1, 16))
    return draw(st.lists(st.integers(0, 2**bits - 1), max_size=70)), bits


@given(codes_and_bits())
def test_the_stream_is_one_little_endian_integer(drawn: tuple[list[int], int]) -> None:
    codes, bits = drawn
    packed = pack(torch.tensor(codes, dtype=torch.int32), bits)
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    size = (len(codes) * bits + 7) // 8
    assert packed.dtype == torch.uint8
    assert bytes(packed.tolist()) == number.to_bytes(size, "little")
    assert packed.numel() == packed_size(len(codes), bits) == size


@given(codes_and_bits())
def test_unpacking_restores_the_codes(drawn: tuple[list[int], int]) -> None:
    codes, bits = drawn
    assert unpack(pack(torch.tensor(codes, dtype=torch.int32), bits), bits, len(codes)).tolist() == codes


def test_three_bits_a_weight_take_three_bits() -> None:
    assert pack(torch.zeros(64, 256, dtype=torch.uint8), 3).numel() == 64 * 256 * 3 // 8


def test_shape_does_not_matter_and_dtype_is_free() -> None:
    codes = torch.arange(24).remainder(8).view(2, 3, 4)
    assert torch.equal(pack(codes, 3), pack(codes.reshape(-1).to(torch.uint8), 3))


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="truncated"):
        unpack(torch.zeros(2, dtype=torch.uint8), 3, 8)
    for bits in (0, 17):
        with pytest.raises(InputError, match="1 to 16"):
            pack(torch.zeros(3), bits)


@given(rows=st.integers(1, 6), columns=st.integers(1, 40), n=st.integers(1, 45))
def test_blocks_cover_every_column_once_in_order(rows: int, columns: int, n: int) -> None:
    matrix = torch.arange(rows * columns).view(rows, columns)
    granularity = Granularity("group", n)
    groups = torch.cat([block.reshape(rows, -1) for block in granularity.blocks(matrix)], dim=1)
    assert torch.equal(groups, matrix)
    assert max(block.shape[1] for block in granularity.blocks(matrix)) <= n
    shape = granularity.scale_shape(rows, columns)
    assert sum(len(block) for block in granularity.blocks(matrix)) == shape[0] * shape[1]
    numbers = torch.arange(shape[0] * shape[1]).view(shape)
    expanded = granularity.expand(numbers, columns).expand(rows, columns)
    for column in range(columns):
        assert torch.equal(expanded[:, column], numbers[:, column // n])


def test_granularity_shapes() -> None:
    assert Granularity("tensor").scale_shape(6, 70) == (1, 1)
    assert Granularity("channel").scale_shape(6, 70) == (6, 1)
    assert Granularity("group", 32).scale_shape(6, 70) == (6, 3)
    assert as_matrix(torch.zeros(8, 3, 5, 5)).shape == (8, 75)
    for kind, size in (("channel", 4), ("group", None), ("group", 0)):
        with pytest.raises(InputError, match="group"):
            Granularity(kind, size)


def test_row_chunks_cover_all_rows() -> None:
    chunks = list(row_chunks(10, 2**21))
    assert [row for chunk in chunks for row in range(10)[chunk]] == list(range(10))
    assert len(chunks) == 5
