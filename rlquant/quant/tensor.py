"""A quantized weight: packed codes, scales and zero points, exactly as an artifact stores them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlquant.errors import InputError
from rlquant.quant.affine import QParams, dequantize, finite_extremes, quantize
from rlquant.quant.double import double_dequantize, double_quantize
from rlquant.quant.granularity import as_matrix, row_chunks
from rlquant.quant.observers import weight_qparams
from rlquant.quant.packing import pack, packed_size, unpack
from rlquant.quant.scheme import Scheme

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "Float32Scale",
    "QuantizedWeight",
    "join_rows",
    "nearest_codes",
    "nearest_qparams",
    "spread_qparams",
]


_DOUBLE = ("scale_codes", "scale_ranges", "scale_offset")


class Float32Scale(nn.Module):
    """Keeps its ``scale`` float32 under ``.half()`` and the like: a rounded scale is another map."""

    scale: Tensor | None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: buffer for name, buffer in self._buffers.items() if name.startswith("scale")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, scale in before.items():
            after = self._buffers[name]
            if scale is not None and after is not None and after.dtype != scale.dtype:
                self._buffers[name] = scale.to(after.device)
        return self


class QuantizedWeight(Float32Scale):
    """A weight ``[out, ...]`` under a scheme. The constructor makes an empty one of the right sizes.

    Buffers, which are also its state dict:

    - ``codes``: uint8 ``[ceil(numel * bits / 8)]``, the packed codes in row-major order
    - ``scale``: float32 ``[scale_rows, groups]``; absent for plain casts (fp16, bf16)
    - ``scale_codes``, ``scale_ranges``, ``scale_offset``: instead of ``scale`` where the scheme is double; see
      :mod:`~rlquant.quant.double`
    - ``zero_point``: uint8, packed at ``bits`` bits in the order of the scales; asymmetric schemes only

    Attributes:
        caches: whether :meth:`cached` keeps the dense weight. Language models, whose dense weights are what does
            not fit, set it to False.

    Scales are float32, so that an integer runtime requantizes with the very numbers used here; float16 would
    save 16 bits a group but underflows for weights below 1e-5.
    """

    codes: Tensor
    zero_point: Tensor | None

    def __init__(self, shape: tuple[int, ...], scheme: Scheme) -> None:
        super().__init__()
        if scheme.is_identity:
            raise InputError(f"{scheme.name} leaves weights as they are: there is nothing to store quantized")
        self.shape = tuple(shape)
        self.scheme = scheme
        rows, columns = as_matrix(torch.empty(self.shape, device="meta")).shape
        scale_shape = scheme.granularity.scale_shape(rows, columns)
        bits = scheme.stored.bits
        zero_point_bytes = packed_size(math.prod(scale_shape), bits)
        self.register_buffer("codes", torch.zeros(packed_size(rows * columns, bits), dtype=torch.uint8))
        single = scheme.stored.is_scaled and not scheme.double
        self.register_buffer("scale", torch.ones(scale_shape) if single else None)
        if scheme.double:
            for name, part in zip(_DOUBLE, double_quantize(torch.ones(scale_shape)), strict=True):
                self.register_buffer(name, part)
        self.register_buffer(
            "zero_point", None if scheme.symmetric else torch.zeros(zero_point_bytes, dtype=torch.uint8)
        )
        self.caches = True
        self._cache: Tensor | None = None

    @classmethod
    def from_float(cls, weight: Tensor, scheme: Scheme, what: str = "the weight") -> QuantizedWeight:
        """Round ``weight`` to nearest with the qparams of the scheme's observer.

        Raises InputError naming ``what`` for NaN, Inf, and values that overflow a plain cast.
        """
        qparams = nearest_qparams(weight, scheme, what)
        codes = nearest_codes(as_matrix(weight.detach()), qparams, scheme)
        return cls.from_codes(codes.view(weight.shape), qparams, scheme)

    @classmethod
    def from_codes(cls, codes: Tensor, qparams: QParams | None, scheme: Scheme) -> QuantizedWeight:
        """Pack codes ``[out, ...]`` that were chosen elsewhere; ``qparams`` have the scheme's scale shape."""
        with codes.device:
            self = cls(tuple(codes.shape), scheme)
        bits = scheme.stored.bits
        self.codes = pack(codes, bits)
        if qparams is not None:
            self._set_scale(qparams.scale)
            if qparams.zero_point is not None:
                self.zero_point = pack(qparams.zero_point, bits)
        return self

    def _set_scale(self, scale: Tensor) -> None:
        if not self.scheme.double:
            self.scale = scale.to(torch.float32).contiguous()
            return
        for name, part in zip(_DOUBLE, double_quantize(scale), strict=True):
            self.register_buffer(name, part)

    def unpacked(self) -> Tensor:
        """The codes: int32 of the weight's shape, bit patterns in ``0 .. 2**bits - 1``."""
        return unpack(self.codes, self.scheme.stored.bits, math.prod(self.shape)).view(self.shape)

    def qparams(self) -> QParams | None:
        """Scale and zero point ``[scale_rows, groups]``; None for plain casts."""
        scale = self.scale
        if self.scheme.double:
            shape = self.scheme.granularity.scale_shape(
                *as_matrix(torch.empty(self.shape, device="meta")).shape
            )
            scale = double_dequantize(*(self.get_buffer(name) for name in _DOUBLE)).view(shape)
        if scale is None or self.zero_point is None:
            return None if scale is None else QParams(scale)
        zero_point = unpack(self.zero_point, self.scheme.stored.bits, scale.numel())
        return QParams(scale, zero_point.view(scale.shape))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The real weight, of the weight's shape, computed afresh in float32, some rows at a time."""
        rows, columns = as_matrix(torch.empty(self.shape, device="meta")).shape
        real = torch.empty(rows, columns, dtype=dtype, device=self.codes.device)
        qparams = self.qparams()
        for part in row_chunks(rows, columns):
            # Eight rows at a time begin with a whole byte.
            part = slice(part.start // 8 * 8, rows if part.stop == rows else part.stop // 8 * 8)
            real[part] = self._real(part, columns, qparams)
        return real.view(self.shape)

    def _real(self, rows: slice, columns: int, qparams: QParams | None) -> Tensor:
        """Rows of the real matrix, float32; they begin with a whole byte."""
        bits, stored = self.scheme.stored.bits, self.scheme.stored
        count = (rows.stop - rows.start) * columns
        first = rows.start * columns * bits // 8
        stream = self.codes[first : first + packed_size(count, bits)]
        codes = unpack(stream, bits, count).view(-1, columns)
        if qparams is None:
            return stored.decode(codes)
        return dequantize(codes, spread_qparams(qparams, self.scheme, columns, rows), stored)

    def rows(self, index: Tensor) -> Tensor:
        """The real values of some rows of a matrix: int64 ``[n]`` -> float32 ``[n, columns]``."""
        total, columns = self.shape
        bits = self.scheme.stored.bits
        if columns * bits % 8:
            return self.dequantize()[index]
        packed = self.codes.view(total, -1)[index]
        codes = unpack(packed.reshape(-1), bits, len(index) * columns).view(-1, columns)
        qparams = self.qparams()
        if qparams is None:
            return self.scheme.stored.decode(codes)
        if self.scheme.granularity.kind != "tensor":
            point = qparams.zero_point
            qparams = QParams(qparams.scale[index], None if point is None else point[index])
        return dequantize(codes, spread_qparams(qparams, self.scheme, columns), self.scheme.stored)

    def cached(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """:meth:`dequantize` in ``dtype``, kept until the buffers change; not part of the state dict."""
        if not self.caches:
            return self.dequantize(dtype)
        if self._cache is None or self._cache.dtype != dtype:
            # An inference tensor in the cache would break a later forward that records gradients.
            with torch.inference_mode(False), torch.no_grad():
                self._cache = self.dequantize(dtype)
        return self._cache

    def extra_repr(self) -> str:
        """Scheme and shape, for ``repr``."""
        return f"{self.scheme.name}, shape={self.shape}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._cache = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *args: Any) -> None:
        super()._load_from_state_dict(state_dict, *args)
        self._cache = None


def nearest_qparams(
    weight: Tensor, scheme: Scheme, what: str = "the weight", observer: str | None = None
) -> QParams | None:
    """The qparams that the scheme's observer (or ``observer``) chooses; None for plain casts.

    Raises InputError naming ``what`` for NaN, Inf, and values that overflow a plain cast.
    """
    stored = scheme.stored
    if stored.is_scaled:
        return weight_qparams(weight, stored, scheme.granularity, observer or scheme.observer, what)
    if (largest := float(finite_extremes(weight, what).abs().max())) > stored.max:
        raise InputError(f"{what} reaches {largest:g}, beyond the {stored.max:g} of {stored.name}: take bf16")
    return None


def nearest_codes(matrix: Tensor, qparams: QParams | None, scheme: Scheme) -> Tensor:
    """The nearest code of every element of a float ``[rows, columns]`` weight, in the format's code dtype."""
    stored = scheme.stored
    codes = torch.empty(matrix.shape, dtype=stored.code_dtype, device=matrix.device)
    for rows in row_chunks(*matrix.shape):
        part = matrix[rows].to(torch.float32)
        if qparams is None:
            codes[rows] = stored.encode(part)
        else:
            codes[rows] = quantize(part, spread_qparams(qparams, scheme, matrix.shape[1], rows), stored)
    return codes


def spread_qparams(qparams: QParams, scheme: Scheme, columns: int, rows: slice = slice(None)) -> QParams:
    """The qparams of some rows of the weight matrix, spread to broadcast against those rows."""
    if scheme.granularity.kind == "tensor":
        return qparams
    expand = scheme.granularity.expand
    zero_point = None if qparams.zero_point is None else expand(qparams.zero_point[rows], columns)
    return QParams(expand(qparams.scale[rows], columns), zero_point)


def join_rows(parts: list[tuple[Tensor, QParams | None]]) -> tuple[Tensor, QParams | None]:
    """Codes and qparams of one matrix from those of its parts, rows below rows."""
    codes = torch.cat([codes for codes, _ in parts])
    qparams = [each for _, each in parts if each is not None]
    if not qparams:
        return codes, None
    points = [each.zero_point for each in qparams if each.zero_point is not None]
    return codes, QParams(torch.cat([each.scale for each in qparams]), torch.cat(points) if points else None)
