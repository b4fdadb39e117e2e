"""Small C functions that generated policies use; a source holds only those that it calls."""

from __future__ import annotations

import re

import numpy as np

from rlquant.deploy.head import TANH_DENOMINATOR, TANH_LIMIT, TANH_NUMERATOR

__all__ = ["C_NAMES", "helpers_for", "hexadecimal"]


def hexadecimal(value: float | np.float32) -> str:
    """A C99 literal of a float32 that has the same value in any evaluation format."""
    return f"{float(np.float32(value)).hex()}f"


def _horner(name: str, coefficients: tuple[np.float32, ...]) -> list[str]:
    first, *rest = map(hexadecimal, coefficients)
    return [f"rounded {name} = {first};"] + [
        f"{name} = {name} * square;\n    {name} = {name} + {c};" for c in rest
    ]


_LIMIT = hexadecimal(TANH_LIMIT)
_TANH = "\n    ".join(
    [
        f"const float limited = clampf(x, -{_LIMIT}, {_LIMIT});",
        "rounded square = limited * limited;",
        *_horner("above", TANH_NUMERATOR),
        *_horner("below", TANH_DENOMINATOR),
        "above = above * limited;",
        "above = above / below;",
        "return above;",
    ]
).replace("+ -", "- ")

# One operation per statement, to a `rounded` number: with excess precision (x87) nothing else rounds.
_HELPERS = {
    "round_even": """
/* to the nearest integer, half to even, for |x| < 2^22 */
static int32_t round_even(float x)
{
    rounded shifted = x + 12582912.0f;
    shifted = shifted - 12582912.0f;
    return (int32_t)shifted;
}""",
    "clampf": """
static float clampf(float x, float low, float high)
{
    x = x < low ? low : x;
    return x > high ? high : x;
}""",
    "shifted": """
/* total / 2^shift, between low and high */
static int32_t shifted(int64_t total, int shift, int32_t low, int32_t high)
{
    total >>= shift; /* of a negative number too the floor, as every compiler for such chips has it */
    return total < low ? low : total > high ? high : (int32_t)total;
}""",
    "tanh32": f"""
/* tanh, the same to the bit on every machine: separate multiplications and additions, one division */
static float tanh32(float x)
{{
    {_TANH}
}}""",
    "sigmoid32": """
/* the logistic function, likewise */
static float sigmoid32(float x)
{
    rounded y = 0.5f * x;
    y = tanh32(y);
    y = 0.5f * y;
    y = y + 0.5f;
    return y;
}""",
    "relu": "\nstatic float relu(float x) { return x > 0.0f ? x : 0.0f; }",
    "sigmoid": "\nstatic float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }",
    "elu": "\nstatic float elu(float x) { return x > 0.0f ? x : expm1f(x); }",
    "leaky_relu": "\nstatic float leaky_relu(float x) { return x > 0.0f ? x : 0.01f * x; }",
    "silu": "\nstatic float silu(float x) { return x / (1.0f + expf(-x)); }",
    "gelu": "\nstatic float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }",
    "selu": ("\nstatic float selu(float x) { return 1.0507010f * (x > 0.0f ? x : 1.6732632f * expm1f(x)); }"),
    "softplus": (
        "\nstatic float softplus(float x) { return (x > 0.0f ? x : 0.0f) + log1pf(expf(-fabsf(x))); }"
    ),
    "mish": "\nstatic float mish(float x) { return x * tanhf(softplus(x)); }",
    "softsign": "\nstatic float softsign(float x) { return x / (1.0f + fabsf(x)); }",
    "hardswish": "\nstatic float hardswish(float x) { return x * clampf(x + 3.0f, 0.0f, 6.0f) / 6.0f; }",
    "relu6": "\nstatic float relu6(float x) { return clampf(x, 0.0f, 6.0f); }",
}

for _bits in (2, 3, 4, 5, 6, 7, *range(9, 17)):
    _wide = f" | ((uint32_t)w[(bit >> 3) + 1] << 8){' | ((uint32_t)w[(bit >> 3) + 2] << 16)' if _bits > 9 else ''}"
    _window = "w[bit >> 3]" if 8 % _bits == 0 else f"((uint32_t)w[bit >> 3]{_wide})"
    _HELPERS[f"code{_bits}"] = f"""
/* the signed {_bits}-bit code at an index of a packed stream */
static int32_t code{_bits}(const uint8_t *w, uint32_t index)
{{
    uint32_t bit = index * {_bits}u, code = ({_window} >> (bit & 7u)) & {2**_bits - 1}u;
    return (int32_t)(code ^ {2 ** (_bits - 1)}u) - {2 ** (_bits - 1)};
}}"""

C_NAMES = {
    "ReLU": "relu", "Tanh": "tanh32", "Sigmoid": "sigmoid", "ELU": "elu", "LeakyReLU": "leaky_relu",
    "SiLU": "silu", "GELU": "gelu", "SELU": "selu", "Softplus": "softplus", "Mish": "mish",
    "Softsign": "softsign", "Hardswish": "hardswish", "ReLU6": "relu6",
}  # fmt: skip
"""From torch's names of activations to those of their functions here."""


def helpers_for(text: str) -> str:
    """The functions that ``text`` calls, and those that they call, each before its use."""
    called: set[str] = set()
    pending = [text]
    while pending:
        words = set(re.findall(r"\w+(?=\()", pending.pop()))
        new = (words & _HELPERS.keys()) - called
        called |= new
        pending += [_HELPERS[name].split("{", 1)[1] for name in new]
    order = ("round_even", "clampf", "softplus")
    names = sorted(called, key=lambda name: (name not in order, list(_HELPERS).index(name)))
    return "\n".join(_HELPERS[name] for name in names)
