"""What is measured of a quantized agent besides its scores: bytes, agreement, latency, weight histograms."""

from __future__ import annotations

from typing import Any

from rlquant.control.agent import Agent
from rlquant.control.artifact import artifact_files
from rlquant.control.collect import Inputs, collect, raw_observations
from rlquant.control.program_session import actor_in
from rlquant.control.quantize import float_twin, weight_histograms
from rlquant.control.rollout import EnvPool
from rlquant.control.runtimes import is_simulated
from rlquant.errors import InputError
from rlquant.measure import Agreement, Latency, action_agreement, measure_latency, plain, q_gap, single_thread
from rlquant.quant import MixedScheme, weight_bytes

__all__ = ["Profiler"]

_AGREEMENT_EPISODES = 8


class Profiler:
    """Profiles quantized agents against one reference, on observations that the reference meets.

    Args:
        reference: the fp32 agent.
        pool: its environments.
        seed: of the evaluation episodes, which calibration has not seen.
        episodes: how many of them may be used.
        device: where the network runs, in torch.
    """

    def __init__(
        self,
        reference: Agent,
        pool: EnvPool,
        *,
        seed: int,
        episodes: int,
        device: str,
    ) -> None:
        self.reference = reference
        self.device = device
        # Always the same episodes in the same batch, whatever the user's batch and workers.
        self._inputs = collect(reference, min(episodes, _AGREEMENT_EPISODES), seed=seed, pool=pool)
        self._outputs = self._inputs.outputs(reference.actor.cpu())
        self._observations = raw_observations(reference, seed=seed, pool=pool)

    def profile(self, agent: Agent, runtime: str) -> dict[str, Any]:
        """Plain JSON: ``weights_bytes``, ``artifact_bytes``, ``agreement``, ``latency_us``, empty ``weights``.

        Args:
            agent: the quantized agent.
            runtime: what is timed: ``torch``, or one of ``rlquant.deploy.RUNTIMES``.
        """
        return {
            "weights_bytes": weight_bytes(agent.actor),
            "artifact_bytes": _artifact_bytes(agent),
            "agreement": plain(self._agreement(agent)),
            "weights": [],
            "latency_us": plain(self.latency(agent, runtime)),
        }

    def histograms(
        self, agent: Agent, scheme: MixedScheme, calibration: Inputs | None, *, center: bool
    ) -> list[dict[str, Any]]:
        """Plain JSON: a histogram per quantized weight, before and after.

        Args:
            agent: the quantized agent.
            scheme: what it was quantized to.
            calibration: the inputs that it was quantized with, if any.
            center: whether its head was centred.
        """
        self.reference.actor.cpu()
        before = float_twin(self.reference, scheme, calibration, center=center)
        return list(plain(weight_histograms(before, agent.actor.cpu())))

    def _agreement(self, agent: Agent) -> Agreement:
        head, before = agent.head, self._outputs
        after = self._inputs.outputs(agent.actor.cpu())
        if not head.discrete:
            low, high = head.space.bounds()
            return action_agreement(head(before), head(after), False, low=low, high=high)
        found = action_agreement(
            head(before), head(after), True, reference_outputs=before, candidate_outputs=after
        )
        gap = q_gap(before, after) if agent.values_actions else None
        return Agreement(found.action, found.max_abs, gap)

    def latency(self, agent: Agent, runtime: str) -> Latency:
        """Of one action on one thread; see :func:`~rlquant.measure.measure_latency`.

        Args:
            agent: the quantized agent.
            runtime: ``torch``, or one of ``rlquant.deploy.RUNTIMES``.
        """
        act = actor_in(agent, runtime, self.device)
        with single_thread():
            return measure_latency(act, self._observations, simulated=is_simulated(agent, runtime))


def _artifact_bytes(agent: Agent) -> int | None:
    """Bytes on disk; None where the network is a custom module that no artifact can tell."""
    try:
        return sum(map(len, artifact_files(agent).values()))
    except InputError:
        return None
