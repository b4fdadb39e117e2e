"""Quantized LSTM and GRU: packed weights; inputs and hidden states are fake-quantized by scheme.

Weight-only schemes run torch's own fused kernels on the dequantized weights. Where activations are quantized
too, the steps are spelled out, because the hidden state passes through its grid at every step; the cell state
of an LSTM and the gates stay float. Equations and gate order are those of ``torch.nn.LSTM`` and
``torch.nn.GRU``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlquant.errors import InputError
from rlquant.quant.activations import activation_quantizer
from rlquant.quant.affine import finite_extremes
from rlquant.quant.layers import QuantizedLayer
from rlquant.quant.scheme import Scheme
from rlquant.quant.tensor import QuantizedWeight

__all__ = ["QuantGRU", "QuantLSTM", "run_float_layers"]


class _QuantRNN(QuantizedLayer):
    """Layers of one recurrent kind.

    Buffers of layer k: ``packed_ih_lk.*``, ``packed_hh_lk.*``, ``bias_ih_lk``, ``bias_hh_lk`` and, for static
    schemes, ``input_quant_lk.*`` and ``hidden_quant_lk.*``.
    """

    def __init__(self, layer: nn.LSTM | nn.GRU, scheme: Scheme) -> None:
        """An empty layer of ``layer``'s sizes. Raises InputError for bidirectional or projected layers."""
        super().__init__()
        _refuse_unsupported(layer)
        self.scheme = scheme
        self.input_size, self.hidden_size = layer.input_size, layer.hidden_size
        self.num_layers, self.batch_first, self.bias = layer.num_layers, layer.batch_first, layer.bias
        for k in range(self.num_layers):
            for part in ("ih", "hh"):
                shape = getattr(layer, f"weight_{part}_l{k}").shape
                setattr(self, f"packed_{part}_l{k}", QuantizedWeight(tuple(shape), scheme))
                bias = getattr(layer, f"bias_{part}_l{k}") if layer.bias else None
                self.register_buffer(
                    f"bias_{part}_l{k}", None if bias is None else torch.zeros_like(bias.detach())
                )
            setattr(self, f"input_quant_l{k}", activation_quantizer(scheme))
            setattr(self, f"hidden_quant_l{k}", activation_quantizer(scheme))

    def load_float(
        self, layer: nn.LSTM | nn.GRU, packed: Mapping[str, QuantizedWeight] | None = None
    ) -> None:
        """Take the layer's weights, rounded to nearest, or those of ``packed`` by name (``packed_ih_l0``)."""
        for k in range(self.num_layers):
            for part in ("ih", "hh"):
                name = f"{part}_l{k}"
                weight = getattr(layer, f"weight_{name}")
                chosen = (packed or {}).get(f"packed_{name}") or QuantizedWeight.from_float(
                    weight, self.scheme, f"weight_{name}"
                )
                setattr(self, f"packed_{name}", chosen)
                if self.bias:
                    bias = getattr(layer, f"bias_{name}")
                    finite_extremes(bias, f"bias_{name}")
                    setattr(self, f"bias_{name}", bias.detach().clone())

    def extra_repr(self) -> str:
        """Sizes, for ``repr``."""
        sizes = f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"
        return f"{sizes}, batch_first={self.batch_first}"

    def _weights(self, k: int, dtype: torch.dtype) -> list[Tensor]:
        """Layer k's weights and biases in the order torch's kernels take them."""
        weights = [getattr(self, f"packed_{part}_l{k}").cached(dtype) for part in ("ih", "hh")]
        return weights + ([getattr(self, f"bias_{part}_l{k}") for part in ("ih", "hh")] if self.bias else [])

    def _run(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``x`` ``[T, N, input_size]``, states ``[num_layers, N, hidden_size]`` -> output and last states."""
        if self.scheme.activations is None:
            flat = [tensor for k in range(self.num_layers) for tensor in self._weights(k, x.dtype)]
            return _fused(x, state, flat, self.num_layers, self.bias)
        lasts = []
        for k in range(self.num_layers):
            x, last = self._run_layer(k, x, tuple(part[k] for part in state))
            lasts.append(last)
        return x, tuple(torch.stack(parts) for parts in zip(*lasts, strict=True))

    def _run_layer(self, k: int, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        w_ih, w_hh, *biases = self._weights(k, x.dtype)
        b_ih, b_hh = biases or (None, None)
        hidden_quant = getattr(self, f"hidden_quant_l{k}")
        from_input = F.linear(getattr(self, f"input_quant_l{k}")(x), w_ih, b_ih)
        outputs = []
        for step in from_input:
            state = self._step(step, F.linear(hidden_quant(state[0]), w_hh, b_hh), state)
            outputs.append(state[0])
        return torch.stack(outputs), state

    def _step(self, from_input: Tensor, from_hidden: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """One time step from the two affine maps ``[N, gates * hidden_size]``."""
        raise NotImplementedError

    def _call(
        self, x: Tensor, state: tuple[Tensor, ...] | None, states: int
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Bring input and state into the layout of :meth:`_run` and the results back."""
        if not isinstance(x, Tensor):
            raise InputError(
                f"a quantized recurrent layer takes a tensor, not {type(x).__name__}: pad the sequences"
            )
        batched = x.dim() == 3
        output, last = self._run(*_time_major(x, state, self, states))
        if not batched:
            return output.squeeze(1), tuple(part.squeeze(1) for part in last)
        return output.transpose(0, 1) if self.batch_first else output, last


class QuantLSTM(_QuantRNN):
    """``nn.LSTM`` with quantized weights and, by scheme, quantized inputs and hidden states.

    Same call as ``nn.LSTM``: ``(x, (h, c)) -> (output, (h, c))``, batched or not. Dropout is not applied.
    """

    def forward(
        self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run the sequence ``x`` from state ``hx`` (zeros where None)."""
        output, (hidden, cell) = self._call(x, hx, states=2)
        return output, (hidden, cell)

    def _step(self, from_input: Tensor, from_hidden: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        i, f, g, o = (from_input + from_hidden).chunk(4, dim=-1)
        cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(cell), cell


class QuantGRU(_QuantRNN):
    """``nn.GRU`` with quantized weights and, by scheme, quantized inputs and hidden states.

    Same call as ``nn.GRU``: ``(x, h) -> (output, h)``, batched or not. Dropout is not applied.
    """

    def forward(self, x: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the sequence ``x`` from state ``hx`` (zeros where None)."""
        output, (hidden,) = self._call(x, None if hx is None else (hx,), states=1)
        return output, hidden

    def _step(self, from_input: Tensor, from_hidden: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        r_in, z_in, n_in = from_input.chunk(3, dim=-1)
        r_hidden, z_hidden, n_hidden = from_hidden.chunk(3, dim=-1)
        new = torch.tanh(n_in + torch.sigmoid(r_in + r_hidden) * n_hidden)
        update = torch.sigmoid(z_in + z_hidden)
        return ((1 - update) * new + update * state[0],)


def _refuse_unsupported(layer: nn.LSTM | nn.GRU) -> None:
    """Raise InputError for a recurrent layer that is bidirectional or projects its hidden state."""
    if layer.bidirectional or layer.proj_size:
        what = "bidirectional" if layer.bidirectional else "projected (proj_size)"
        raise InputError(
            f"a {what} {type(layer).__name__} cannot be quantized: name it in skip to leave it in fp32"
        )


def run_float_layers(
    layer: nn.LSTM | nn.GRU, x: Tensor, hx: tuple[Tensor, Tensor] | Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """What calibration must see of a float layer: (input, hidden states that enter a step) per layer."""
    given = (hx,) if isinstance(hx, Tensor) else hx
    x, state = _time_major(x, given, layer, 2 if isinstance(layer, nn.LSTM) else 1)
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if layer.bias else ("weight_ih", "weight_hh")
    seen = []
    for k in range(layer.num_layers):
        weights = [getattr(layer, f"{kind}_l{k}") for kind in kinds]
        entering = tuple(part[k : k + 1] for part in state)
        output, _ = _fused(x, entering, weights, 1, layer.bias)
        seen.append((x, torch.cat([entering[0], output[:-1]])))
        x = output
    return seen


def _time_major(
    x: Tensor, state: tuple[Tensor, ...] | None, layer: nn.LSTM | nn.GRU | _QuantRNN, states: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Input ``[T, N, input_size]`` and states ``[num_layers, N, hidden_size]``, zeros where none were given."""
    batched = x.dim() == 3
    if not batched:
        x = x.unsqueeze(1)
    elif layer.batch_first:
        x = x.transpose(0, 1)
    if state is None:
        return x, (x.new_zeros(layer.num_layers, x.shape[1], layer.hidden_size),) * states
    return x, state if batched else tuple(part.unsqueeze(1) for part in state)


def _fused(
    x: Tensor, state: tuple[Tensor, ...], flat: list[Tensor], num_layers: int, bias: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """torch's kernel: two states make an LSTM, one a GRU."""
    if len(state) == 2:
        output, hidden, cell = torch.lstm(x, state, flat, bias, num_layers, 0.0, False, False, False)
        return output, (hidden, cell)
    output, hidden = torch.gru(x, state[0], flat, bias, num_layers, 0.0, False, False, False)
    return output, (hidden,)
