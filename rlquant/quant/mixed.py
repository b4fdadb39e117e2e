"""Mixed precision: one scheme for a network, and others for single layers.

A name is the scheme's, then ``+LAYER=SCHEME`` for each exception: ``w4a8+trunk.0=w8a8+trunk.4=int8``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlquant.errors import InputError
from rlquant.quant.scheme import Scheme

__all__ = ["MixedScheme"]


@dataclass(frozen=True)
class MixedScheme:
    """What the layers of a network become.

    Attributes:
        base: of every layer that is not named.
        layers: (qualified name or pattern, its scheme), as ``schemes`` of :func:`~rlquant.quant.quantize_`.
    """

    base: Scheme
    layers: tuple[tuple[str, Scheme], ...] = ()

    @classmethod
    def of(cls, scheme: str | Scheme | MixedScheme) -> MixedScheme:
        """A scheme of any form. Raises InputError as :meth:`Scheme.parse`."""
        if isinstance(scheme, MixedScheme):
            return scheme
        return cls(scheme) if isinstance(scheme, Scheme) else cls.parse(scheme)

    @classmethod
    def parse(cls, name: str) -> MixedScheme:
        """The mixed scheme called ``name``; the name of a plain scheme is one too.

        Raises:
            InputError: a part is no scheme, or names no layer.
        """
        base, *rest = name.split("+")
        layers = []
        for part in rest:
            layer, equals, scheme = part.partition("=")
            if not (layer and equals):
                raise InputError(
                    f"scheme {name!r} has a part {part!r} that is not LAYER=SCHEME, as in {base or 'w4a8'}+trunk.0=w8a8"
                )
            layers.append((layer, Scheme.parse(scheme)))
        return cls(Scheme.parse(base), tuple(layers))

    @property
    def name(self) -> str:
        """The canonical name; ``MixedScheme.parse(mixed.name) == mixed``."""
        return "+".join([self.base.name, *(f"{layer}={scheme.name}" for layer, scheme in self.layers)])

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """Every scheme in it."""
        return (self.base, *(scheme for _, scheme in self.layers))

    @property
    def exceptions(self) -> Mapping[str, Scheme]:
        """``layers`` as a mapping; of two of one name the last counts."""
        return dict(self.layers)

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing."""
        return all(scheme.is_identity for scheme in self.schemes)

    @property
    def quantizes_activations(self) -> bool:
        """Whether any layer's input is quantized."""
        return any(scheme.activations is not None for scheme in self.schemes)

    @property
    def needs_calibration(self) -> bool:
        """Whether activation ranges must be observed before use."""
        return any(scheme.needs_calibration for scheme in self.schemes)

    def __str__(self) -> str:
        return self.name
