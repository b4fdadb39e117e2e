"""Method names of agents: those of ``rlquant.quant`` and what only a policy's head allows.

``center`` subtracts from the last layer's rows their mean over actions before anything is rounded. It is exact
for an argmax, which a common offset cannot change, and value heads carry a large one. It combines with the
others by ``+``: ``center+gptq+bias``.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlquant.errors import InputError, unknown_name
from rlquant.quant import METHODS, Scheme, get_method

__all__ = ["AGENT_METHODS", "AgentMethod", "parse_method"]

AGENT_METHODS = (*METHODS, "center")


@dataclass(frozen=True)
class AgentMethod:
    """A parsed method name.

    Attributes:
        name: as given.
        center: whether the head is centred first.
        layers: the method of ``rlquant.quant`` for the layers.
    """

    name: str
    center: bool
    layers: str

    @property
    def needs_inputs(self) -> bool:
        """Whether it needs on-policy inputs whatever the scheme."""
        return get_method(self.layers).needs_calibration

    def can(self, scheme: Scheme) -> bool:
        """Whether it can do a scheme."""
        try:
            get_method(self.layers).check(scheme)
        except InputError:
            return False
        return True


def parse_method(name: str) -> AgentMethod:
    """The method called ``name``. Raises InputError that lists the parts."""
    parts = name.split("+")
    unknown = next((part for part in parts if part not in AGENT_METHODS), None)
    if unknown is not None:
        raise unknown_name("method", unknown, AGENT_METHODS)
    layers = "+".join(part for part in parts if part != "center") or "rtn"
    get_method(layers)
    return AgentMethod(name, "center" in parts, layers)
