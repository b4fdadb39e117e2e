"""Quantizes one agent again and again: collects inputs once, trains a student once.

What ``rlquant evaluate``, ``quantize`` and ``tune`` share. A student takes minutes, so it is kept among the
run's pieces and an interrupted run does not train it again.
"""

from __future__ import annotations

import base64

from rlquant.control.agent import Agent
from rlquant.control.artifact import agent_from_files, artifact_files
from rlquant.control.choose import candidates, choose_method
from rlquant.control.closed_loop import ClosedLoop, quantize_in_closed_loop
from rlquant.control.collect import CALIBRATION_SEED, Inputs, collect
from rlquant.control.distill import TRAINED, distill
from rlquant.control.methods import AUTO, parse_method
from rlquant.control.pieces import Memory, Pieces
from rlquant.control.quantize import quantize_agent
from rlquant.control.rollout import EnvPool
from rlquant.errors import InputError
from rlquant.quant import MixedScheme

__all__ = ["Quantizer"]


class Quantizer:
    """Quantized copies of one agent, by any method.

    Args:
        agent: in fp32.
        pool: its environments.
        seed: of the evaluation that will follow; calibration and training stay away from its episodes.
        calibration_episodes: on-policy episodes of the agent.
        closed_loop: rounds in which the quantized agent plays and is calibrated again; 0 for none.
        pieces: keeps trained students and chosen methods; by default in memory.

    Attributes:
        loops: what closed-loop calibration found, by the quantized agent's (scheme, method) names.
    """

    def __init__(
        self,
        agent: Agent,
        pool: EnvPool,
        *,
        seed: int = 0,
        calibration_episodes: int = 8,
        closed_loop: int = 0,
        pieces: Pieces | None = None,
    ) -> None:
        self.agent, self.pool, self.seed = agent, pool, seed
        self.pieces = pieces or Memory()
        self.calibration_episodes, self.closed_loop = calibration_episodes, closed_loop
        self.loops: dict[tuple[str, str], ClosedLoop] = {}
        self._inputs: Inputs | None = None
        self._made: dict[tuple[str, str], Agent] = {}

    def quantize(self, scheme: MixedScheme, method: str) -> Agent:
        """The agent under a scheme; itself under fp32. Its ``method`` says what ``auto`` has chosen.

        Raises:
            InputError: as :func:`~rlquant.control.quantize_agent` and :func:`~rlquant.control.distill`.
        """
        if scheme.is_identity:
            return self.agent
        key = scheme.name, method
        if key not in self._made:
            self._made[key] = self._quantized(scheme, method)
        return self._made[key]

    def _quantized(self, scheme: MixedScheme, method: str) -> Agent:
        parsed = parse_method(method)
        if parsed.trains:
            return self._student(scheme, method)
        if method == AUTO:
            return self.quantize(scheme, self._chosen(scheme))
        if not (scheme.quantizes_activations or parsed.needs_inputs):
            return quantize_agent(self.agent, scheme, method=method)
        if not self.closed_loop:
            return quantize_agent(self.agent, scheme, method=method, inputs=self.inputs())
        found = quantize_in_closed_loop(
            self.agent,
            scheme,
            method=method,
            rounds=self.closed_loop,
            episodes=self.calibration_episodes,
            seed=self.seed,
            pool=self.pool,
            inputs=self.inputs(),
        )
        self.loops[scheme.name, method] = found
        return found.agent

    def inputs(self) -> Inputs:
        """On-policy inputs of the fp32 agent, on calibration seeds."""
        if self._inputs is None:
            seed = self.seed + CALIBRATION_SEED
            self._inputs = collect(self.agent, self.calibration_episodes, seed=seed, pool=self.pool)
        return self._inputs

    def calibration(self, scheme: MixedScheme, method: str) -> Inputs | None:
        """The inputs that :meth:`quantize` has calibrated an agent with; None where it needed none."""
        loop = self.loops.get((scheme.name, method))
        if loop is not None:
            return loop.inputs
        return self.inputs() if scheme.quantizes_activations else None

    def _chosen(self, scheme: MixedScheme) -> str:
        name = f"choice-{scheme.name}"
        kept = self.pieces.piece(name)
        if kept is None:
            chosen = choose_method(
                self.agent,
                candidates(self.agent, scheme),
                lambda each: self.quantize(scheme, each),
                self.inputs(),
                seed=self.seed,
                pool=self.pool,
            )
            kept = {"method": chosen}
            self.pieces.save_piece(name, kept)
        return str(kept["method"])

    def _student(self, scheme: MixedScheme, method: str) -> Agent:
        name = f"student-{scheme.name}-{method}"
        kept = self.pieces.piece(name)
        if kept is not None:
            files = {file: base64.b64decode(content) for file, content in kept.items()}
            actor = agent_from_files(files, self.agent.source).actor
            return self.agent.with_actor(actor, scheme.name, method)
        student = distill(self.agent, scheme, settings=TRAINED[method], seed=self.seed, pool=self.pool)
        self._keep(name, student)
        return student

    def _keep(self, name: str, student: Agent) -> None:
        try:
            files = artifact_files(student)
        except InputError:  # a custom module, which no artifact can tell: it would be trained again
            return
        self.pieces.save_piece(
            name, {file: base64.b64encode(content).decode() for file, content in files.items()}
        )
