"""Schemes: what the weights and activations of a layer become, and the names that say so.

``int8``, ``nf4``, ``bf16`` ... quantize weights only; ``w4a8`` gives weights 4 bits and activations 8.
Suffixes: ``-g32`` groups of 32, ``-tensor`` or ``-channel`` one scale for the tensor or per output channel,
``-asym`` weights with a zero point, ``-dynamic`` activation ranges per row and call, ``-mse`` (or another
observer) for the range of the weights, ``-act_mse`` for that of the activations, ``-dq`` scales of groups in
8 bits (double quantization).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rlquant.errors import InputError, unknown_name
from rlquant.quant.formats import FORMATS, MAX_INT_BITS, MIN_INT_BITS, Format, get_format, unsigned
from rlquant.quant.granularity import Granularity
from rlquant.quant.ranges import OBSERVERS

__all__ = ["SCHEME_EXAMPLES", "Scheme", "scheme_choices"]

SCHEME_EXAMPLES = ("w8a8", "w4a8", "w4a8-g32-asym", "w8a8-dynamic", "int4-g32-mse", "w2a3")
# QLoRA's block size; four bits of a float or codebook are too coarse for a whole channel.
DEFAULT_GROUPS = {"nf4": 64, "fp4_e2m1": 64}
CHANNEL = Granularity("channel")
_ACTIVATION = "act_"


@dataclass(frozen=True)
class Scheme:
    """What a layer's weights and activations become.

    ``weights`` is a format of ``FORMATS``; ``activations`` is None (left in float) or an unsigned format,
    since activations are always asymmetric. ``symmetric`` is about the weights. ``observer`` names the range
    rule of the weights, ``activation_observer`` that of static activations; ``dynamic`` takes activation
    ranges per row at every call instead; ``double`` keeps the scales of groups in 8 bits. Raises InputError
    for a combination that means nothing.
    """

    weights: Format
    activations: Format | None = None
    granularity: Granularity = CHANNEL
    symmetric: bool = True
    observer: str = "minmax"
    activation_observer: str = "minmax"
    dynamic: bool = False
    double: bool = False

    def __post_init__(self) -> None:
        for observer in (self.observer, self.activation_observer):
            if observer not in OBSERVERS:
                raise unknown_name("observer", observer, OBSERVERS)
        if self.weights not in FORMATS.values():
            raise unknown_name("weight format", self.weights.name, FORMATS)
        if not self.symmetric and self.weights.kind != "int":
            raise InputError(f"{self.weights.name} has no asymmetric form: '-asym' needs integer weights")
        if self.activations is None and (self.dynamic or self.activation_observer != "minmax"):
            raise InputError(
                "'-dynamic' and '-act_…' speak of activations: name their bits, as in 'w8a8-dynamic'"
            )
        if self.dynamic and self.activation_observer != "minmax":
            raise InputError(
                "'-dynamic' takes the range of each row as it comes: it has no activation observer"
            )
        if self.activations is not None and (self.activations.signed or self.weights.kind != "int"):
            raise InputError("activations are unsigned integers beside integer weights, as in 'w4a8'")
        if self.double and self.granularity.group_size is None:
            raise InputError("'-dq' quantizes the scales of groups: name a group, as in 'int4-g64-dq'")
        plain = self.granularity == CHANNEL and self.observer == "minmax"
        if not self.weights.is_scaled and not plain:
            raise InputError(f"{self.weights.name} is a plain cast without scales: it takes no suffix")

    @classmethod
    def parse(cls, name: str) -> Scheme:
        """The scheme called ``name``, such as ``int8``, ``nf4`` or ``w4a8-g32-asym``.

        Raises InputError that lists the choices and suggests the nearest.
        """
        head, *suffixes = name.strip().lower().split("-")
        match = re.fullmatch(r"w(\d+)a(\d+)", head)
        if match:
            weights, activations = (_int_bits(name, int(bits)) for bits in match.groups())
            fields: dict[str, object] = {
                "weights": get_format(f"int{weights}"),
                "activations": unsigned(activations),
            }
        elif head in FORMATS:
            fields = {"weights": FORMATS[head]}
            if head in DEFAULT_GROUPS:
                fields["granularity"] = Granularity("group", DEFAULT_GROUPS[head])
        else:
            raise unknown_name("scheme", name, scheme_choices())
        given: dict[str, str] = {}
        for suffix in suffixes:
            field, value = _read_suffix(name, suffix)
            if field in given:
                raise InputError(f"scheme {name!r} says '-{given[field]}' and '-{suffix}': keep one of them")
            given[field] = suffix
            fields[field] = value
        return cls(**fields)  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        """The canonical name; ``Scheme.parse(scheme.name) == scheme``."""
        head = f"w{self.weights.bits}a{self.activations.bits}" if self.activations else self.weights.name
        default = DEFAULT_GROUPS.get(self.weights.name)
        suffixes = []
        if self.granularity.group_size is not None and self.granularity.group_size != default:
            suffixes.append(f"g{self.granularity.group_size}")
        elif self.granularity.kind == "tensor" or (self.granularity.kind == "channel" and default):
            suffixes.append(self.granularity.kind)
        if not self.symmetric:
            suffixes.append("asym")
        if self.dynamic:
            suffixes.append("dynamic")
        if self.double:
            suffixes.append("dq")
        if self.observer != "minmax":
            suffixes.append(self.observer)
        if self.activation_observer != "minmax":
            suffixes.append(_ACTIVATION + self.activation_observer)
        return "-".join([head, *suffixes])

    @property
    def is_identity(self) -> bool:
        """Whether the scheme changes nothing (fp32)."""
        return self.weights.name == "fp32"

    @property
    def needs_calibration(self) -> bool:
        """Whether activation ranges must be observed before use."""
        return self.activations is not None and not self.dynamic

    @property
    def stored(self) -> Format:
        """The format of the stored weight codes: unsigned where the map is asymmetric."""
        return self.weights if self.symmetric else unsigned(self.weights.bits)

    def __str__(self) -> str:
        return self.name


def scheme_choices() -> tuple[str, ...]:
    """Names to offer a user: every weight-only format and some examples of the rest."""
    return (*FORMATS, *SCHEME_EXAMPLES)


def _int_bits(name: str, bits: int) -> int:
    if not MIN_INT_BITS <= bits <= MAX_INT_BITS:
        raise InputError(
            f"scheme {name!r} asks for {bits} bits: wXaY takes {MIN_INT_BITS} to {MAX_INT_BITS} bits for "
            f"weights and activations, such as {', '.join(SCHEME_EXAMPLES[:2])}"
        )
    return bits


def _read_suffix(name: str, suffix: str) -> tuple[str, object]:
    """The field that a suffix sets and its value."""
    group = re.fullmatch(r"g(\d+)", suffix)
    if group:
        return "granularity", Granularity("group", int(group[1]))
    known: dict[str, tuple[str, object]] = {
        "tensor": ("granularity", Granularity("tensor")),
        "channel": ("granularity", CHANNEL),
        "asym": ("symmetric", False),
        "dynamic": ("dynamic", True),
        "dq": ("double", True),
    }
    known |= {observer: ("observer", observer) for observer in OBSERVERS}
    known |= {_ACTIVATION + observer: ("activation_observer", observer) for observer in OBSERVERS}
    if suffix not in known:
        raise unknown_name(
            f"suffix of scheme {name!r}:", f"-{suffix}", ["-g32", *(f"-{key}" for key in known)]
        )
    return known[suffix]
