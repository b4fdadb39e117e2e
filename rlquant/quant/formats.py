"""Number formats: what the bits of one stored value mean.

A code is the bit pattern of one value, read as an unsigned integer in ``0 .. 2**bits - 1`` (two's complement
for signed integers, sign-exponent-mantissa for floats, the index into the table for NF4). Codes of every
format therefore pack the same way. Rounding is to the nearest value, ties to the even code (IEEE 754); NF4
sends a tie to the smaller value, as bitsandbytes does.

Out of range: integers, fp8, fp4 and NF4 saturate at their largest finite value, infinities included, because
a clipped weight is a small error and a NaN is a dead policy. (``Tensor.to(torch.float8_e5m2)`` gives inf
instead, and ``float8_e4m3fn`` gives NaN or saturates, by torch version.) fp16 and bf16 overflow to infinity,
as torch does.

Sources: fp8, Micikevicius et al. 2022 (arXiv:2209.05433), where e4m3 has no infinities; fp4 e2m1, the OCP
Microscaling specification 1.0 (2023); NF4, Dettmers et al. 2023 (QLoRA, arXiv:2305.14314, appendix E).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from rlquant.errors import InputError, unknown_name

__all__ = ["FORMATS", "MAX_INT_BITS", "MIN_INT_BITS", "Format", "get_format", "unsigned"]

MIN_INT_BITS = 2
MAX_INT_BITS = 16

# Quantiles of a standard normal, scaled to [-1, 1], with an exact zero.
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
FP4_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

_TORCH_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
_BIT_VIEWS = {8: torch.uint8, 16: torch.int16, 32: torch.int32}


@dataclass(frozen=True)
class Format:
    """A number format of ``bits`` bits.

    ``bias`` is the exponent bias of a float; ``largest`` is the largest finite value.
    """

    name: str
    bits: int
    kind: Literal["float", "int", "codebook"]
    largest: float
    exponent_bits: int = 0
    mantissa_bits: int = 0
    bias: int = 0
    signed: bool = True

    @property
    def max(self) -> float:
        """The largest finite value."""
        return self.largest

    @property
    def min(self) -> float:
        """The lowest finite value."""
        if self.kind == "int":
            return -self.largest - 1 if self.signed else 0.0
        return -self.largest

    @property
    def smallest_step(self) -> float:
        """The smallest positive value: the first subnormal of a float, 1 for integers."""
        if self.kind == "float":
            return 2.0 ** (1 - self.bias - self.mantissa_bits)
        return 1.0 if self.kind == "int" else min(value for value in NF4_VALUES if value > 0)

    @property
    def layout(self) -> str:
        """The bits from the most significant down, in words."""
        if self.kind == "float":
            return f"1 sign, {self.exponent_bits} exponent, {self.mantissa_bits} mantissa"
        if self.kind == "codebook":
            return f"{self.bits} index into {2**self.bits} values"
        return f"{self.bits} two's complement" if self.signed else f"{self.bits} unsigned"

    @property
    def is_scaled(self) -> bool:
        """Whether a tensor in this format needs a scale (fp32, fp16 and bf16 are plain casts)."""
        return self.kind != "float" or self.bits <= 8

    @property
    def code_dtype(self) -> torch.dtype:
        """The dtype of codes: uint8 up to 8 bits, int32 up to 16, int64 for fp32."""
        return torch.uint8 if self.bits <= 8 else torch.int32 if self.bits <= 16 else torch.int64

    def values(self) -> Tensor:
        """Every finite value the format represents, ascending, each once: float32 ``[count]``."""
        if self.bits > 16:
            raise InputError(f"{self.name} has 2^{self.bits} values; they are listed up to 16 bits only")
        decoded = self.decode(torch.arange(2**self.bits))
        distinct: Tensor = torch.unique(decoded[decoded.isfinite()] + 0.0)  # + 0.0 turns -0 into 0
        return distinct

    def cast(self, x: Tensor) -> Tensor:
        """``x`` rounded to the nearest representable value: any shape, float -> float32, same shape."""
        x = x.to(torch.float32)
        if self.kind == "int":
            self._refuse_nan(x)
            return x.round().clamp_(self.min, self.max)
        if self.name in _TORCH_DTYPES:
            return self._to_torch_float(x).to(torch.float32)
        return self.decode(self.encode(x))

    def encode(self, x: Tensor) -> Tensor:
        """The codes of the values nearest to ``x``: any shape, float -> :attr:`code_dtype`, same shape.

        Raises InputError for NaN in a format that has none (integers, fp4, NF4).
        """
        x = x.to(torch.float32)
        if self.name in _TORCH_DTYPES:
            pattern = self._to_torch_float(x).view(_BIT_VIEWS[self.bits])
            return pattern if self.bits <= 8 else pattern.to(self.code_dtype).bitwise_and(2**self.bits - 1)
        self._refuse_nan(x)
        if self.kind == "int":
            rounded = x.round().clamp_(self.min, self.max).to(torch.int32)
            return rounded.bitwise_and(2**self.bits - 1).to(self.code_dtype)
        if self.kind == "codebook":
            return torch.bucketize(x, _nf4_boundaries(x.device), out_int32=True).to(torch.uint8)
        magnitude = torch.bucketize(x.abs(), _fp4_boundaries(x.device), out_int32=True).to(torch.uint8)
        return magnitude.bitwise_or(torch.signbit(x).to(torch.uint8) << 3)

    def decode(self, codes: Tensor) -> Tensor:
        """The values of ``codes`` (any integer dtype and shape) as float32 of the same shape."""
        if self.kind == "int":
            values = codes.to(torch.int32)
            if self.signed:
                values = values - ((values >> (self.bits - 1)) << self.bits)
            return values.to(torch.float32)
        if self.name in _TORCH_DTYPES:
            return codes.to(_BIT_VIEWS[self.bits]).view(_TORCH_DTYPES[self.name]).to(torch.float32)
        return _table(self.name, codes.device)[codes.long()]

    def _to_torch_float(self, x: Tensor) -> Tensor:
        if self.bits <= 8:
            x = x.clamp(self.min, self.max)
        return x.to(_TORCH_DTYPES[self.name])

    def _refuse_nan(self, x: Tensor) -> None:
        if torch.isnan(x).any():
            raise InputError(f"cannot encode NaN: {self.name} has no code for it")


@cache
def _table(name: str, device: torch.device) -> Tensor:
    """The value of every code of NF4 or fp4, float32 ``[16]``."""
    if name == "nf4":
        return torch.tensor(NF4_VALUES, device=device)
    magnitudes = torch.tensor(FP4_MAGNITUDES, device=device)
    return torch.cat([magnitudes, -magnitudes])


@cache
def _nf4_boundaries(device: torch.device) -> Tensor:
    """Midpoints between neighbours, float32 ``[15]``; ``bucketize`` sends a tie to the smaller value."""
    values = torch.tensor(NF4_VALUES, dtype=torch.float64, device=device)
    return ((values[1:] + values[:-1]) / 2).to(torch.float32)


@cache
def _fp4_boundaries(device: torch.device) -> Tensor:
    """Midpoints between magnitudes, float32 ``[7]``; those below an even code are moved down one ulp.

    ``bucketize`` sends a tie to the smaller value; the nudge sends it to the larger one where that has the
    even mantissa.
    """
    magnitudes = torch.tensor(FP4_MAGNITUDES, device=device)
    middle = (magnitudes[1:] + magnitudes[:-1]) / 2
    upper_is_even = torch.arange(1, 8, device=device) % 2 == 0
    return torch.where(upper_is_even, torch.nextafter(middle, torch.zeros_like(middle)), middle)


def _float(name: str, exponent_bits: int, mantissa_bits: int, largest: float) -> Format:
    bits, bias = 1 + exponent_bits + mantissa_bits, 2 ** (exponent_bits - 1) - 1
    return Format(name, bits, "float", largest, exponent_bits, mantissa_bits, bias)


def _integer(bits: int) -> Format:
    return Format(f"int{bits}", bits, "int", float(2 ** (bits - 1) - 1))


FORMATS: dict[str, Format] = {
    fmt.name: fmt
    for fmt in (
        _float("fp32", 8, 23, torch.finfo(torch.float32).max),
        _float("fp16", 5, 10, 65504.0),
        _float("bf16", 8, 7, torch.finfo(torch.bfloat16).max),
        _float("fp8_e4m3", 4, 3, 448.0),
        _float("fp8_e5m2", 5, 2, 57344.0),
        _float("fp4_e2m1", 2, 1, 6.0),
        Format("nf4", 4, "codebook", 1.0),
        *(_integer(bits) for bits in range(MIN_INT_BITS, MAX_INT_BITS + 1)),
    )
}


def get_format(name: str) -> Format:
    """The format called ``name`` (also ``uint2`` .. ``uint16``). Raises InputError for another name."""
    match = re.fullmatch(r"uint(\d+)", name)
    if match and MIN_INT_BITS <= int(match[1]) <= MAX_INT_BITS:
        return unsigned(int(match[1]))
    if name not in FORMATS:
        raise unknown_name("number format", name, FORMATS)
    return FORMATS[name]


def unsigned(bits: int) -> Format:
    """Unsigned integers of ``bits`` bits: what asymmetric maps store (activations, ``-asym`` weights)."""
    return Format(f"uint{bits}", bits, "int", float(2**bits - 1), signed=False)
