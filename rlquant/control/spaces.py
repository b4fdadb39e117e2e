"""Observation and action spaces as plain data.

A :class:`Space` is what an SB3 checkpoint tells of a space in plain JSON and what an artifact stores. It is
read without unpickling anything and compared with the space of the environment before a single step is taken.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlquant.errors import InputError

__all__ = ["Space", "flat_size"]

_KINDS = {
    "Box": "box",
    "Discrete": "discrete",
    "MultiDiscrete": "multidiscrete",
    "MultiBinary": "multibinary",
    "Dict": "dict",
}


@dataclass(frozen=True)
class Space:
    """A gymnasium space as plain data.

    Attributes:
        kind: ``box``, ``discrete``, ``multidiscrete``, ``multibinary`` or ``dict``.
        shape: shape of one observation or action; ``()`` for ``discrete``, empty for ``dict``.
        dtype: NumPy dtype name.
        low, high: bounds of a box, flattened to ``prod(shape)`` floats, or None where they are not known.
        sizes: number of choices: ``(n,)`` for ``discrete``, one per branch for ``multidiscrete``.
        spaces: the parts of a ``dict``, by key, in the order of their keys.
    """

    kind: str
    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    sizes: tuple[int, ...] = ()
    spaces: dict[str, Space] = field(default_factory=dict)

    @property
    def is_image(self) -> bool:
        """Whether SB3 treats it as an image: uint8, three dimensions, bounds 0 and 255."""
        if self.kind != "box" or len(self.shape) != 3 or self.dtype != "uint8":
            return False
        return self.low is None or (min(self.low) == 0 and max(self.high or (255,)) == 255)

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bounds, each float32 of ``shape``. Raises InputError where they are not known."""
        if self.low is None or self.high is None:
            raise InputError("the bounds of this space are not known; name the environment with --env")
        low = np.asarray(self.low, np.float32).reshape(self.shape)
        return low, np.asarray(self.high, np.float32).reshape(self.shape)

    def describe(self) -> str:
        """One short phrase for messages: ``box(17)``, ``discrete(4)``."""
        if self.kind == "dict":
            return "dict(" + ", ".join(f"{key}: {part.describe()}" for key, part in self.spaces.items()) + ")"
        inside = ", ".join(map(str, self.sizes or self.shape))
        return f"{self.kind}({inside})"

    @classmethod
    def from_gym(cls, space: Any) -> Space:
        """The plain form of a gymnasium space. Raises InputError for a kind that policies here cannot have."""
        name = type(space).__name__
        if name == "Dict":
            return cls("dict", spaces={key: cls.from_gym(part) for key, part in space.spaces.items()})
        if name == "Box":
            low, high = (tuple(np.asarray(b, np.float64).ravel().tolist()) for b in (space.low, space.high))
            return cls("box", tuple(space.shape), str(space.dtype), low, high)
        if name == "Discrete" and space.start != 0:
            raise InputError(f"a Discrete space that starts at {space.start} is not supported; SB3 has none")
        if name == "Discrete":
            return cls("discrete", (), "int64", sizes=(int(space.n),))
        if name == "MultiDiscrete":
            return cls("multidiscrete", tuple(space.shape), "int64", sizes=tuple(int(n) for n in space.nvec))
        if name == "MultiBinary":
            return cls("multibinary", tuple(space.shape), "int8")
        raise InputError(f"the space {name} is not supported; supported: {', '.join(_KINDS)}")

    @classmethod
    def from_sb3(cls, data: dict[str, Any]) -> Space:
        """The plain form of the JSON that SB3 writes beside each pickled space."""
        match = re.search(r"\.(\w+)'>$", str(data.get(":type:", "")))
        kind = _KINDS.get(match.group(1) if match else "")
        if kind is None:
            raise InputError(f"the checkpoint holds an unknown space {data.get(':type:')!r}")
        if kind == "dict":
            return cls("dict", spaces=_parse_dict_repr(str(data.get("spaces", ""))))
        shape = tuple(data.get("_shape", data.get("shape")) or ())
        dtype = str(data.get("dtype"))
        if kind == "box":
            low, high = _parse_array(data.get("low"), shape), _parse_array(data.get("high"), shape)
            return cls("box", shape, dtype, low, high)
        if kind == "discrete":
            return cls("discrete", (), "int64", sizes=(int(data["n"]),))
        if kind == "multidiscrete":
            sizes = _parse_array(data.get("nvec"), shape) or ()
            return cls("multidiscrete", shape, "int64", sizes=tuple(int(n) for n in sizes))
        n = shape or (int(data["n"]),)
        return cls("multibinary", n, "int8")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, as an artifact stores it."""
        doc: dict[str, Any] = {"kind": self.kind, "shape": list(self.shape), "dtype": self.dtype}
        if self.low is not None and self.high is not None:
            # JSON has no infinity: its name stands for it.
            doc["low"], doc["high"] = ([repr(x) for x in bound] for bound in (self.low, self.high))
        if self.sizes:
            doc["sizes"] = list(self.sizes)
        if self.spaces:
            doc["spaces"] = {key: part.to_json() for key, part in self.spaces.items()}
        return doc

    @classmethod
    def from_json(cls, doc: dict[str, Any]) -> Space:
        """The inverse of :meth:`to_json`."""
        low, high = (tuple(map(float, doc[b])) if b in doc else None for b in ("low", "high"))
        parts = {key: cls.from_json(part) for key, part in doc.get("spaces", {}).items()}
        return cls(
            doc["kind"], tuple(doc["shape"]), doc["dtype"], low, high, tuple(doc.get("sizes", ())), parts
        )


def flat_size(space: Space) -> int:
    """How many numbers a policy sees of an observation: one-hot for discrete parts, flattened boxes."""
    if space.kind == "dict":
        return sum(flat_size(part) for part in space.spaces.values())
    if space.kind in ("discrete", "multidiscrete"):
        return sum(space.sizes)
    return int(np.prod(space.shape, dtype=np.int64))


def _parse_array(text: Any, shape: tuple[int, ...]) -> tuple[float, ...] | None:
    """Numbers of a printed NumPy array; None where the print was shortened with an ellipsis."""
    if not isinstance(text, str) or "..." in text:
        return None
    try:
        numbers = [float(token) for token in re.sub(r"[\[\],]", " ", text).split()]
    except ValueError:
        return None
    size = int(np.prod(shape, dtype=np.int64))
    if len(numbers) == 1:
        numbers *= size
    return tuple(numbers) if len(numbers) == size else None


def _parse_dict_repr(text: str) -> dict[str, Space]:
    """Parts of a printed ``Dict`` space.

    ``{'img': Box(0, 255, (3, 36, 36), uint8), 'd': Discrete(3)}``, or in old versions
    ``OrderedDict([('img', Box([0. 0.], [1. 1.], (2,), float32))])``.
    """
    key = r"(?P<quote>['\"])(?P<key>.+?)(?P=quote)[:,]\s*"
    box = r"Box\((?P<low>[^()]*?),\s*(?P<high>[^()]*?),\s*\((?P<shape>[\d, ]*)\),\s*(?P<dtype>\w+)\)"
    discrete = r"Discrete\((?P<n>\d+)(?:, start=0)?\)"
    others = r"MultiBinary\((?P<bits>[\d, ()\[\]]+?)\)|MultiDiscrete\(\[(?P<nvec>[\d, ]+)\][^)]*\)"
    parts = {
        match["key"]: _parse_part(match)
        for match in re.finditer(rf"{key}(?:{box}|{discrete}|{others})", text)
    }
    named = re.findall(
        r"(?<!\w)(?:Box|Discrete|MultiDiscrete|MultiBinary|Dict|Tuple|Text|Graph|Sequence)\(", text
    )
    if not parts or len(parts) != len(named):
        raise InputError(f"the checkpoint's Dict observation space cannot be read: {text[:200]}")
    return parts


def _parse_part(match: re.Match[str]) -> Space:
    if match["n"]:
        return Space("discrete", (), "int64", sizes=(int(match["n"]),))
    numbers = {
        name: tuple(int(n) for n in re.findall(r"\d+", match[name] or ""))
        for name in ("shape", "bits", "nvec")
    }
    if match["bits"]:
        return Space("multibinary", numbers["bits"], "int8")
    if match["nvec"]:
        return Space("multidiscrete", (len(numbers["nvec"]),), "int64", sizes=numbers["nvec"])
    shape = numbers["shape"]
    low, high = _parse_array(match["low"], shape), _parse_array(match["high"], shape)
    return Space("box", shape, match["dtype"], low, high)
