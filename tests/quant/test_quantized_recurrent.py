"""Quantized LSTM and GRU against torch's modules and a literal NumPy recurrence."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from rlquant.errors import InputError
from rlquant.quant import QuantGRU, QuantLSTM, prepare_empty_, quantize_

KINDS = [nn.LSTM, nn.GRU]
INPUTS, HIDDEN, STEPS, BATCH = 6, 10, 7, 4


def make(kind: type, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return kind(INPUTS, HIDDEN, **options)


def sequence(batch_first: bool = False, seed: int = 0) -> torch.Tensor:
    shape = (BATCH, STEPS, INPUTS) if batch_first else (STEPS, BATCH, INPUTS)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def states(kind: type, layers: int = 1, seed: int = 5):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.rand(layers, BATCH, HIDDEN, generator=generator) - 0.5 for _ in range(2)]
    return tuple(drawn) if kind is nn.LSTM else drawn[0]


def flat(result: tuple) -> list[torch.Tensor]:  # type: ignore[type-arg]
    output, last = result
    return [output, *(last if isinstance(last, tuple) else (last,))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2}, {"bias": False}, {"batch_first": True, "num_layers": 2}]
)
@pytest.mark.parametrize("given", [False, True])
def test_sixteen_bits_are_close_and_weight_only_is_exactly_torch(
    kind: type, options: dict, given: bool
) -> None:
    reference = make(kind, **options)
    x = sequence(options.get("batch_first", False))
    hx = states(kind, options.get("num_layers", 1)) if given else None
    expected = flat(reference(x, hx))
    for scheme, tolerance in (("int16", 2e-4), ("w16a16", 5e-4), ("w16a16-dynamic", 5e-4)):
        layer = quantize_(copy.deepcopy(reference), scheme, calibration=[(x, hx)])
        assert isinstance(layer, QuantLSTM if kind is nn.LSTM else QuantGRU)
        for ours, theirs in zip(flat(layer(x, hx)), expected, strict=True):
            assert ours.shape == theirs.shape
            assert torch.allclose(ours, theirs, atol=tolerance)
    layer = quantize_(copy.deepcopy(reference), "int3-g4-asym")
    with torch.no_grad():
        for name in dict(reference.named_parameters()):
            if name.startswith("weight"):
                packed = getattr(layer, name.replace("weight", "packed"))
                getattr(reference, name).copy_(packed.dequantize())
        for ours, theirs in zip(flat(layer(x, hx)), flat(reference(x, hx)), strict=True):
            assert torch.equal(ours, theirs)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def fake(quantizer: nn.Module, x: np.ndarray) -> np.ndarray:
    """Quantize on the stored grid, in float64."""
    scale, zero_point = float(quantizer.scale), int(quantizer.zero_point)
    codes = np.clip(np.rint(x / scale) + zero_point, 0, quantizer.fmt.max)
    return (codes - zero_point) * scale


@pytest.mark.parametrize("kind", KINDS)
def test_static_recurrence_equals_a_literal_one(kind: type) -> None:
    layer = quantize_(make(kind), "w4a5", calibration=sequence())
    x, h = sequence(seed=3).double().numpy(), np.zeros((BATCH, HIDDEN))
    cell = np.zeros((BATCH, HIDDEN))
    w_ih, w_hh = (
        layer.get_submodule(f"packed_{part}_l0").dequantize().double().numpy() for part in ("ih", "hh")
    )
    b_ih, b_hh = (getattr(layer, f"bias_{part}_l0").double().numpy() for part in ("ih", "hh"))
    outputs = []
    for step in x:
        a = fake(layer.input_quant_l0, step) @ w_ih.T + b_ih
        b = fake(layer.hidden_quant_l0, h) @ w_hh.T + b_hh
        if kind is nn.LSTM:
            i, f, g, o = np.split(a + b, 4, axis=1)
            cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(cell)
        else:
            (r_a, z_a, n_a), (r_b, z_b, n_b) = np.split(a, 3, axis=1), np.split(b, 3, axis=1)
            z = sigmoid(z_a + z_b)
            h = (1 - z) * np.tanh(n_a + sigmoid(r_a + r_b) * n_b) + z * h
        outputs.append(h)
    difference = np.abs(layer(sequence(seed=3))[0].numpy() - np.stack(outputs))
    # A state within float32 rounding of a boundary may fall on the other side of it; that is rare.
    assert np.quantile(difference, 0.9) < 1e-5
    assert len(np.unique(fake(layer.hidden_quant_l0, np.stack(outputs)))) <= 32


@pytest.mark.parametrize("kind", KINDS)
def test_calibration_sees_the_hidden_states_that_enter_a_step(kind: type) -> None:
    reference = make(kind, num_layers=2)
    x, hx = sequence(), states(kind, 2)
    layer = quantize_(copy.deepcopy(reference), "w8a8", calibration=[(x, hx)])
    first = make(kind)
    first.load_state_dict({k: v for k, v in reference.state_dict().items() if k.endswith("l0")})
    h0 = hx[0] if kind is nn.LSTM else hx
    first_state = tuple(part[:1] for part in hx) if kind is nn.LSTM else hx[:1]
    output = first(x, first_state)[0].detach()
    entering = torch.cat([h0[:1], output[:-1]])
    for quantizer, seen in ((layer.hidden_quant_l0, entering), (layer.input_quant_l1, output)):
        assert float(quantizer.scale) == pytest.approx(float(seen.max() - seen.min()) / 255, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["int8", "w8a8", "w4a8-dynamic"])
def test_step_by_step_equals_the_whole_sequence(kind: type, scheme: str) -> None:
    layer = quantize_(make(kind, num_layers=2), scheme, calibration=sequence())
    x, state = sequence(), None
    whole = flat(layer(x))
    outputs = []
    for step in x:
        output, state = layer(step[None], state)
        outputs.append(output)
    for ours, theirs in zip(flat((torch.cat(outputs), state)), whole, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["int8", "w16a16"])
def test_unbatched_sequences(kind: type, scheme: str) -> None:
    reference = make(kind, batch_first=True)
    x = sequence(batch_first=True)[0]
    hx = states(kind)
    hx = tuple(part[:, 0] for part in hx) if kind is nn.LSTM else hx[:, 0]
    layer = quantize_(copy.deepcopy(reference), scheme, calibration=[(x, hx)])
    for ours, theirs in zip(flat(layer(x, hx)), flat(reference(x, hx)), strict=True):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, atol=0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["int3-asym", "nf4", "bf16", "w8a8", "w8a8-dynamic"])
def test_state_dict_round_trip_is_bit_exact(kind: type, scheme: str) -> None:
    layer = quantize_(make(kind, num_layers=2), scheme, calibration=sequence())
    stored = io.BytesIO()
    torch.save(layer.state_dict(), stored)
    stored.seek(0)
    torch.manual_seed(9)
    restored = prepare_empty_(kind(INPUTS, HIDDEN, num_layers=2), scheme)
    restored.load_state_dict(torch.load(stored, weights_only=True))
    for ours, theirs in zip(flat(restored(sequence())), flat(layer(sequence())), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("options", "message"), [({"bidirectional": True}, "bidirectional LSTM"), ({"proj_size": 3}, "projected")]
)
def test_unsupported_layers_are_refused_by_name(options: dict, message: str) -> None:
    module = nn.ModuleDict({"memory": nn.LSTM(INPUTS, HIDDEN, **options), "head": nn.Linear(3, 2)})
    with pytest.raises(InputError, match=f"layer 'memory': a {message}.*name it in skip"):
        quantize_(module, "int8")
    assert isinstance(module["head"], nn.Linear)
    quantize_(module, "int8", skip=["memory"])
    assert isinstance(module["memory"], nn.LSTM)


def test_packed_sequences_are_refused() -> None:
    layer = quantize_(make(nn.LSTM), "int8")
    packed = nn.utils.rnn.pack_sequence([torch.zeros(3, INPUTS), torch.zeros(2, INPUTS)])
    with pytest.raises(InputError, match="not PackedSequence: pad the sequences"):
        layer(packed)


def test_bad_weights_are_named() -> None:
    layer = make(nn.GRU)
    with torch.no_grad():
        layer.weight_hh_l0[0, 0] = float("inf")
    with pytest.raises(InputError, match="weight_hh_l0 holds NaN or Inf"):
        quantize_(layer, "int8")
