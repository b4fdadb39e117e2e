"""Quantized Linear and Conv2d against torch's float operations on independently decoded weights."""

import copy
import io
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rlquant.quant import FORMATS, QuantConv2d, QuantizedWeight, QuantLinear, Scheme, get_format, quantize_

WEIGHT_ONLY = [name for name in FORMATS if name != "fp32"]
SUFFIXED = [
    "int4-g32-asym",
    "int3-g7",
    "int8-tensor",
    "int5-asym-tensor",
    "int4-g8-mse",
    "fp8_e4m3-g5",
    "nf4-channel",
]
ACTIVATION = ["w8a8", "w4a8-g16-asym", "w2a3", "w8a8-dynamic", "w16a16", "w6a5-act_percentile"]
ALL = [*WEIGHT_ONLY, *SUFFIXED, *ACTIVATION]


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(inputs: int = 37, outputs: int = 11, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias)


def decode_by_hand(weight: QuantizedWeight) -> np.ndarray:
    """The real weight from the raw buffers, with big integers, one element at a time."""
    scheme, stored = weight.scheme, weight.scheme.stored
    bits = stored.bits

    def codes(packed: torch.Tensor, count: int) -> list[int]:
        number = int.from_bytes(bytes(packed.tolist()), "little")
        return [(number >> (i * bits)) & (2**bits - 1) for i in range(count)]

    rows, columns = weight.shape[0], int(np.prod(weight.shape[1:]))
    values = stored.decode(torch.arange(2**bits)).numpy()
    result = np.zeros((rows, columns), dtype=np.float32)
    patterns = codes(weight.codes, rows * columns)
    points = None if weight.zero_point is None else codes(weight.zero_point, weight.scale.numel())
    for row, column in itertools.product(range(rows), range(columns)):
        value = np.float32(values[patterns[row * columns + column]])
        if weight.scale is not None:
            scale_row = 0 if scheme.granularity.kind == "tensor" else row
            group = column // scheme.granularity.group_size if scheme.granularity.group_size else 0
            if points is not None:
                value -= np.float32(points[scale_row * weight.scale.shape[1] + group])
            value *= np.float32(weight.scale[scale_row, group])
        result[row, column] = value
    return result.reshape(weight.shape)


@pytest.mark.parametrize("scheme", ALL)
def test_buffers_decode_by_hand_to_the_weight_in_use(scheme: str) -> None:
    layer = quantize_(linear(), scheme, calibration=seeded(8, 37))
    assert isinstance(layer, QuantLinear)
    expected = decode_by_hand(layer.packed)
    np.testing.assert_array_equal(layer.weight.numpy(), expected)
    np.testing.assert_array_equal(layer.packed.dequantize().numpy(), expected)


@pytest.mark.parametrize("scheme", [*WEIGHT_ONLY, *SUFFIXED])
def test_weight_only_forward_is_the_float_operation_on_the_decoded_weight(scheme: str) -> None:
    float_layer, x = linear(), seeded(5, 37)
    layer = quantize_(copy.deepcopy(float_layer), scheme)
    assert torch.equal(layer(x), F.linear(x, layer.packed.dequantize(), float_layer.bias))
    assert layer(x).requires_grad is False


@pytest.mark.parametrize(("scheme", "bits"), [("w8a8", 8), ("w2a3", 3), ("w4a8-g16-asym", 8), ("w16a16", 16)])
def test_static_forward_fake_quantizes_the_input(scheme: str, bits: int) -> None:
    float_layer, x = linear(), seeded(64, 37)
    layer = quantize_(copy.deepcopy(float_layer), scheme, calibration=[x])
    low, high = float(x.min()), float(x.max())
    step = np.float32(high / (2**bits - 1) - low / (2**bits - 1))
    assert float(layer.input_quant.scale) == pytest.approx(step, rel=1e-6)
    outside = 3 * x  # clipped, as calibration said
    fake = torch.fake_quantize_per_tensor_affine(
        outside, float(layer.input_quant.scale), int(layer.input_quant.zero_point), 0, 2**bits - 1
    )
    assert torch.equal(layer(outside), F.linear(fake, layer.packed.dequantize(), float_layer.bias))
    assert fake.unique().numel() <= 2**bits


def test_dynamic_forward_takes_the_range_of_each_row() -> None:
    x = seeded(6, 37) * torch.logspace(-3, 3, 6)[:, None]
    layer = quantize_(linear(bias=False), "w8a8-dynamic")
    for row, fake in zip(x, layer.input_quant(x), strict=True):
        low, high = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
        assert (fake - row).abs().max() <= (high - low) / 255 * 0.501
    assert torch.equal(layer(x), F.linear(layer.input_quant(x), layer.packed.dequantize()))


def test_dynamic_convolutions_take_one_range_for_an_image() -> None:
    images = seeded(2, 3, 12, 12)
    fake = quantize_(nn.Conv2d(3, 2, 3), "w8a3-dynamic").input_quant(images)
    for image, original in zip(fake, images, strict=True):
        assert image.unique().numel() == 8
        step = float(original.max() - original.min()) / 7
        assert (image - original).abs().max() <= step * 0.501


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic", "w3a4-dynamic"])
def test_the_rows_of_a_batch_do_not_touch_each_other(scheme: str) -> None:
    x = seeded(9, 37)
    quantizer = quantize_(linear(), scheme, calibration=x).input_quant
    alone = torch.cat([quantizer(row[None]) for row in x])
    assert torch.equal(quantizer(x), alone)
    assert torch.equal(quantizer(x.view(3, 3, 37)), alone.view(3, 3, 37))
    images = seeded(4, 3, 6, 6) * torch.tensor([1.0, 10.0, 0.1, 5.0]).view(4, 1, 1, 1)
    quantizer = quantize_(nn.Conv2d(3, 2, 3), scheme, calibration=images).input_quant
    assert torch.equal(quantizer(images), torch.cat([quantizer(image[None]) for image in images]))
    assert torch.equal(quantizer(images)[0], quantizer(images[0]))


CONVOLUTIONS = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": (1, 2), "padding": (2, 0), "dilation": 2},
    {"groups": 2, "bias": False},
    {"padding": "same"},
    {"padding": 2, "padding_mode": "reflect"},
    {"padding": (1, 2), "padding_mode": "circular", "stride": 2},
    {"padding": "same", "padding_mode": "replicate"},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("scheme", ["int4-g10", "int8-asym", "bf16", "w8a8", "w4a8-dynamic"])
def test_convolutions_equal_torchs(options: dict, scheme: str) -> None:
    torch.manual_seed(0)
    reference = nn.Conv2d(4, 6, 3, **options)
    x = seeded(3, 4, 12, 13)
    layer = quantize_(copy.deepcopy(reference), scheme, calibration=[x])
    assert isinstance(layer, QuantConv2d)
    weight = decode_by_hand(layer.packed)
    assert weight.shape == (6, 4 // reference.groups, 3, 3)
    with torch.no_grad():
        reference.weight.copy_(torch.from_numpy(weight))
        fake = layer.input_quant(x)
        assert torch.equal(layer(x), reference(fake))
        assert torch.equal(layer(x[0]), reference(fake[0]))
    assert layer.packed.scale is None or layer.packed.scale.shape[0] in (1, 6)


@pytest.mark.parametrize("scheme", ALL)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_state_dict_round_trip_is_bit_exact(scheme: str, kind: str) -> None:
    from rlquant.quant import prepare_empty_

    def fresh(seed: int) -> tuple[nn.Module, torch.Tensor]:
        torch.manual_seed(seed)
        if kind == "linear":
            return nn.Sequential(nn.Linear(9, 20), nn.Tanh(), nn.Linear(20, 3, bias=False)), seeded(7, 9)
        return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU()), seeded(2, 3, 9, 9)

    module, x = fresh(0)
    module = quantize_(module, scheme, calibration=[x])
    expected = module(x)
    stored = io.BytesIO()
    torch.save(module.state_dict(), stored)
    stored.seek(0)
    restored = prepare_empty_(fresh(1)[0], scheme)
    assert not torch.equal(restored(x), expected)  # also fills the cache with the wrong weight
    restored.load_state_dict(torch.load(stored, weights_only=True))
    assert torch.equal(restored(x), expected)
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), restored.buffers(), strict=True))


def test_weights_are_really_stored_in_few_bits() -> None:
    state = quantize_(linear(64, 32), "int3").state_dict()
    assert {key: (value.dtype, tuple(value.shape)) for key, value in state.items()} == {
        "packed.codes": (torch.uint8, (64 * 32 * 3 // 8,)),
        "packed.scale": (torch.float32, (32, 1)),
        "bias": (torch.float32, (32,)),
    }
    state = quantize_(linear(64, 32), "w4a8-g16-asym", calibration=seeded(2, 64)).state_dict()
    assert {key: (value.dtype, tuple(value.shape)) for key, value in state.items()} == {
        "packed.codes": (torch.uint8, (64 * 32 // 2,)),
        "packed.scale": (torch.float32, (32, 4)),
        "packed.zero_point": (torch.uint8, (32 * 4 // 2,)),
        "bias": (torch.float32, (32,)),
        "input_quant.scale": (torch.float32, ()),
        "input_quant.zero_point": (torch.int32, ()),
    }
    assert not list(quantize_(linear(), "int8").parameters())


def test_nf4_codes_and_scales_are_the_blockwise_ones_of_qlora() -> None:
    layer = quantize_(linear(128, 4), "nf4")
    blocks = linear(128, 4).weight.detach().reshape(-1, 64)
    absmax = blocks.abs().amax(dim=1)
    assert torch.equal(layer.packed.scale.reshape(-1), absmax)
    table = get_format("nf4").values()
    distance = (blocks[:, :, None] / absmax[:, None, None] - table).abs()
    assert torch.equal(layer.packed.unpacked().reshape(-1, 64), distance.argmin(dim=2).int())


def test_scales_stay_float32_and_the_cache_follows_the_dtype() -> None:
    layer = quantize_(linear(), "w8a8", calibration=seeded(4, 37))
    x = seeded(3, 37)
    reference = layer(x)
    scales = [layer.packed.scale.clone(), layer.input_quant.scale.clone()]
    layer.to(torch.bfloat16)
    assert torch.equal(layer.packed.scale, scales[0])
    assert torch.equal(layer.input_quant.scale, scales[1])
    output = layer(x.bfloat16())
    assert output.dtype == torch.bfloat16
    assert torch.allclose(output.float(), reference, atol=0.05)
    layer.double()
    assert layer(x.double()).dtype == torch.float64


def test_a_cache_filled_in_inference_mode_serves_gradients_later() -> None:
    layer = quantize_(linear(), "w8a8", calibration=seeded(4, 37))
    x = seeded(3, 37)
    with torch.inference_mode():
        layer(x)
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, layer.weight.sum(dim=0).expand(3, -1))


def test_copies_and_pickles_agree() -> None:
    layer = quantize_(linear(), "int4-g8")
    x = seeded(2, 37)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    stored = io.BytesIO()
    torch.save(layer, stored)
    stored.seek(0)
    assert torch.equal(torch.load(stored, weights_only=False)(x), expected)


def test_fp16_refuses_weights_it_cannot_hold() -> None:
    from rlquant.errors import InputError

    layer = linear()
    with torch.no_grad():
        layer.weight[0, 0] = 70000.0
    with pytest.raises(InputError, match=r"the weight reaches 70000, beyond the 65504 of fp16: take bf16"):
        quantize_(layer, "fp16")
    assert quantize_(layer, "bf16").weight[0, 0] == pytest.approx(70000.0, rel=0.01)


def test_chunked_quantization_equals_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlquant.quant import granularity

    weight = seeded(50, 30)
    for name in ("int4-g7-asym-mse", "int3-tensor", "bf16", "nf4", "int8-percentile"):
        whole = QuantizedWeight.from_float(weight, Scheme.parse(name))
        monkeypatch.setattr(granularity, "CHUNK_ELEMENTS", 100)
        chunked = QuantizedWeight.from_float(weight, Scheme.parse(name))
        monkeypatch.undo()
        assert torch.equal(whole.codes, chunked.codes)
        assert torch.equal(whole.dequantize(), chunked.dequantize())
