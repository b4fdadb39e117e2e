"""Bit packing: ``n`` codes of ``bits`` bits in ``ceil(n * bits / 8)`` bytes, nothing wasted between them.

The stream is little-endian: code ``i`` occupies bits ``i * bits`` up to ``(i + 1) * bits - 1``, where bit
``k`` is bit ``k % 8`` of byte ``k // 8``. Eight codes of any width fill ``bits`` whole bytes, so eight codes
at a time are moved with shifts and no loop over the data.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rlquant.errors import InputError

__all__ = ["pack", "packed_size", "unpack"]


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (any shape, integers in ``0 .. 2**bits - 1``) -> uint8 ``[packed_size]``, in row-major order."""
    _check_bits(bits)
    flat = codes.reshape(-1)
    if bits == 8:
        return flat.to(torch.uint8)
    octets = -(-flat.numel() // 8)
    padded = torch.zeros(octets * 8, dtype=torch.int32, device=flat.device)
    padded[: flat.numel()] = flat
    padded = padded.view(octets, 8)
    packed = torch.zeros(octets, bits, dtype=torch.int32, device=flat.device)
    for code, byte, shift in _overlaps(bits):
        packed[:, byte] |= _shift_left(padded[:, code], shift) & 0xFF
    return packed.to(torch.uint8).reshape(-1)[: packed_size(flat.numel(), bits)].clone()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` codes of a packed stream: uint8 ``[bytes]`` -> int32 ``[count]``.

    Raises InputError where the stream is shorter than ``count`` codes.
    """
    _check_bits(bits)
    if packed.numel() < packed_size(count, bits):
        raise InputError(
            f"{packed.numel()} bytes hold fewer than {count} codes of {bits} bits "
            f"({packed_size(count, bits)} bytes): the packed tensor is truncated"
        )
    if bits == 8:
        return packed[:count].to(torch.int32)
    if 8 % bits == 0:  # no code straddles bytes: a few operations on bytes do
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        whole = packed[: packed_size(count, bits), None].bitwise_right_shift(shifts).bitwise_and_(2**bits - 1)
        return whole.reshape(-1)[:count].to(torch.int32)
    octets = -(-count // 8)
    padded = torch.zeros(octets * bits, dtype=torch.uint8, device=packed.device)
    padded[: packed_size(count, bits)] = packed[: packed_size(count, bits)]
    padded = padded.view(octets, bits)
    codes = torch.zeros(octets, 8, dtype=torch.int32, device=packed.device)
    for code, byte, shift in _overlaps(bits):
        codes[:, code] |= _shift_left(padded[:, byte].to(torch.int32), -shift)
    return codes.bitwise_and(2**bits - 1).reshape(-1)[:count]


def _overlaps(bits: int) -> Iterator[tuple[int, int, int]]:
    """``(code, byte, shift)`` for every byte that a code of an octet touches; shift moves code to byte."""
    for code in range(8):
        first = code * bits
        for byte in range(first // 8, (first + bits - 1) // 8 + 1):
            yield code, byte, first - 8 * byte


def _shift_left(x: Tensor, shift: int) -> Tensor:
    return torch.bitwise_left_shift(x, shift) if shift >= 0 else torch.bitwise_right_shift(x, -shift)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 16:
        raise InputError(f"cannot pack codes of {bits} bits: 1 to 16 are supported")
