"""Method names of agents: those of ``rlquant.quant`` and what only a policy allows.

``center`` subtracts from the last layer's rows their mean over actions before anything is rounded. It is exact
for an argmax, which a common offset cannot change, and value heads carry a large one. It combines with the
others by ``+``: ``center+gptq+bias``.

``qat`` and ``distill`` train the quantized policy to act as its fp32 teacher does, on the teacher's episodes
(``qat``) or on its own as well (``distill``); see :mod:`~rlquant.control.distill`. ``auto`` tries the methods
that do not train and keeps the best, see :mod:`~rlquant.control.choose`. These stand alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlquant.errors import InputError, unknown_name
from rlquant.quant import METHODS, MixedScheme, get_method

__all__ = ["AGENT_METHODS", "AUTO", "TRAINED_METHODS", "AgentMethod", "parse_method"]

AUTO = "auto"
TRAINED_METHODS = ("qat", "distill")
AGENT_METHODS = (*METHODS, "center", AUTO, *TRAINED_METHODS)


@dataclass(frozen=True)
class AgentMethod:
    """A parsed method name.

    Attributes:
        name: as given.
        trains: whether the quantized policy is trained.
        center: whether the head is centred first.
        layers: the method of ``rlquant.quant`` for the layers.
    """

    name: str
    trains: bool
    center: bool
    layers: str

    @property
    def is_plain(self) -> bool:
        """Whether it needs neither training nor a choice."""
        return not self.trains and self.name != AUTO

    @property
    def needs_inputs(self) -> bool:
        """Whether it needs on-policy inputs whatever the scheme."""
        return get_method(self.layers).needs_calibration

    def check(self, scheme: MixedScheme) -> None:
        """Raise InputError, naming the methods that can, where it cannot do a scheme."""
        for each in scheme.schemes:
            if each.is_identity:
                continue
            if self.trains and each.weights.kind != "int":
                raise InputError(
                    f"method {self.name!r} trains on integer grids and cannot do {each.name}; "
                    f"these can: {', '.join(name for name, part in METHODS.items() if part.can(each))}"
                )
            get_method(self.layers).check(each)

    def can(self, scheme: MixedScheme) -> bool:
        """Whether it can do a scheme."""
        try:
            self.check(scheme)
        except InputError:
            return False
        return True


def parse_method(name: str) -> AgentMethod:
    """The method called ``name``. Raises InputError that lists the parts, or says which do not combine."""
    parts = name.split("+")
    unknown = next((part for part in parts if part not in AGENT_METHODS), None)
    if unknown is not None:
        raise unknown_name("method", unknown, AGENT_METHODS)
    alone = [part for part in parts if part in (AUTO, *TRAINED_METHODS)]
    if alone and len(parts) > 1:
        raise InputError(f"method {name!r}: {alone[0]!r} combines with nothing")
    if alone:
        return AgentMethod(name, name in TRAINED_METHODS, False, "rtn")
    layers = "+".join(part for part in parts if part != "center") or "rtn"
    get_method(layers)
    return AgentMethod(name, False, "center" in parts, layers)
