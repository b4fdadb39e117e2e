"""Device memory of inference and of QLoRA training, from a model's config alone, before anything loads.

The peak is that of ``torch.cuda.max_memory_allocated``. Of each stage of a step everything that lives at once is
added up; the largest stage is the peak. What is assumed (transformers 5, peft, bitsandbytes and TRL 1.16 do so):

- Training is LoRA on every linear layer of a frozen base, under bf16 autocast unless all is float32. A checkpointed
  block keeps its input and is computed again in the backward pass. Attention is fused, no dropout.
- Log-probabilities come in tiles; ``full_logits`` makes all logits at once, as a plain transformers loss does.
- DPO runs chosen and rejected as one batch, so twice the rows, and again with the adapters off: its reference.
- GRPO generates with a KV cache, then trains on prompt and completion and scores the completion.
- PPO likewise; its critic and its reward model are adapters on the same base (the reward model's are frozen), the
  reference is the base, and policy and critic take turns in the backward pass.
- Inference is ``generate``: a prompt that is read at once, then one token after the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlquant.errors import InputError, unknown_name
from rlquant.llm.activations import Activations
from rlquant.llm.architecture import Architecture
from rlquant.llm.cards import CONTEXT, FRAGMENTATION, Card
from rlquant.llm.precision import Precision

__all__ = ["OPTIMIZERS", "PARTS", "TASKS", "MemoryPlan", "Workload", "plan_memory"]

TASKS = ("infer", "sft", "dpo", "reward", "grpo", "ppo")
PAIRED = ("dpo", "reward")
ROLLED_OUT = ("grpo", "ppo")
OPTIMIZERS = ("adamw", "adamw8bit")
ADAPTER_BYTES = {"fp32": 4, "bf16": 2}
# bitsandbytes' 8-bit Adam: two bytes a weight and two float32 a block; small tensors stay in float32.
_ADAM8_BLOCK, _ADAM8_SMALLEST = 256, 4096
PARTS = ("weights", "adapters", "gradients", "optimizer", "kv_cache", "activations", "logits", "workspace")
# Stages without gradients.
_PASSIVE = ("prompt", "generation", "logits")


@dataclass(frozen=True)
class Workload:
    """What runs.

    Attributes:
        task: one of :data:`TASKS`.
        batch: sequences at once; pairs in DPO and reward modelling; completions in GRPO and PPO.
        seq: tokens of a sequence, prompt and completion together.
        completion: how many of them are generated (infer, grpo, ppo) [default: half].
        rollout: sequences that are generated at once (grpo, ppo) [default: the batch].
        cached: whether the KV cache of rollouts stays while training goes on, as the engine's does (grpo, ppo).
        dense: bytes of a weight of the sums of base and adapters that sample (grpo, ppo), kept beside the base.
        kv: of the KV cache: ``bf16``, or a scheme of :mod:`rlquant.llm.kv_cache`.
        rank: of the adapters.
        adapters: dtype of adapters, their gradients and their optimizer state: ``fp32`` or ``bf16``.
        optimizer: one of :data:`OPTIMIZERS`.
        checkpointing: gradient checkpointing of every block.
        full_logits: all logits at once, instead of tiles (training) or the last token's (inference).
        padded: whether sequences of a batch differ in length.
    """

    task: str = "infer"
    batch: int = 4
    seq: int = 1024
    completion: int | None = None
    rollout: int | None = None
    cached: bool = False
    dense: int = 0
    kv: str = "bf16"
    rank: int = 16
    adapters: str = "fp32"
    optimizer: str = "adamw"
    checkpointing: bool = True
    full_logits: bool = False
    padded: bool = False

    def __post_init__(self) -> None:
        for kind, value, choices in (
            ("task", self.task, TASKS),
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("adapter dtype", self.adapters, ADAPTER_BYTES),
        ):
            if value not in choices:
                raise unknown_name(kind, value, choices)
        for option, number in (("--batch", self.batch), ("--seq", self.seq), ("--rank", self.rank)):
            if number < 1:
                raise InputError(f"{option} is {number}: it must be at least 1")
        if self.completion is not None and not 0 < self.completion <= self.seq:
            raise InputError(
                f"--completion is {self.completion}: it must be between 1 and the {self.seq} of --seq"
            )

    @property
    def trains(self) -> bool:
        """Whether there are adapters to train."""
        return self.task != "infer"

    @property
    def rows(self) -> int:
        """Sequences in a batch."""
        return self.batch * (2 if self.task in PAIRED else 1)

    @property
    def generated(self) -> int:
        """Tokens of a sequence that are generated."""
        return self.completion or max(self.seq // 2, 1)

    @property
    def scored(self) -> int:
        """Tokens of a sequence whose log-probability is needed: the completion where one was generated."""
        return self.generated if self.task in ROLLED_OUT else self.seq


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a workload takes.

    Attributes:
        model, precision, workload: what was planned.
        parts: bytes by kind, at the peak; they sum to :attr:`peak`.
        stage: when the peak is: ``generation``, ``log-probabilities``, ``backward`` ...
        stages: the peak of each stage.
    """

    model: Architecture
    precision: Precision
    workload: Workload
    parts: dict[str, int]
    stage: str
    stages: dict[str, int]

    @property
    def peak(self) -> int:
        """Most bytes allocated at once: what ``torch.cuda.max_memory_allocated`` reports."""
        return sum(self.parts.values())

    @property
    def needed(self) -> int:
        """Bytes that a card must have: the peak, the allocator's gaps and CUDA's context."""
        return int(self.peak * (1 + FRAGMENTATION)) + CONTEXT


def plan_memory(
    model: Architecture, precision: Precision, workload: Workload, card: Card | None = None
) -> MemoryPlan:
    """What a workload takes; ``card`` decides the size of cuBLAS' workspaces alone."""
    held = _held(model, precision, workload, card)
    stages = _generation(model, precision, workload)
    if workload.trains:
        kept = {"kv_cache": stages["generation"]["kv_cache"]} if workload.cached else {}
        stages |= {name: kept | each for name, each in _training(model, precision, workload).items()}
        trained = {"gradients": _adapters(model, workload)[1]}
        stages = {name: each if name in _PASSIVE else trained | each for name, each in stages.items()}
    totals = {name: sum(held.values()) + sum(each.values()) for name, each in stages.items()}
    stage = max(totals, key=lambda name: totals[name])
    parts = {part: (held | stages[stage]).get(part, 0) for part in PARTS}
    return MemoryPlan(model, precision, workload, parts, stage, totals)


def _held(model: Architecture, precision: Precision, workload: Workload, card: Card | None) -> dict[str, int]:
    """What lives all the time."""
    threads = 2 if workload.trains else 1  # autograd multiplies in a thread of its own
    held = {
        "weights": precision.weights(model).total,
        "workspace": threads * (card or Card("", 0)).workspace + precision.unpacked(model),
    }
    if workload.trains:
        held["weights"] += workload.dense * model.block_weights
        held["adapters"], _, held["optimizer"] = _adapters(model, workload)
    return held


def _adapters(model: Architecture, workload: Workload) -> tuple[int, int, int]:
    """Bytes of the adapters, of their gradients and of their optimizer state."""
    size = ADAPTER_BYTES[workload.adapters]
    matrices = [workload.rank * side for each in model.linears for side in (each.inputs, each.outputs)]
    count = model.layers * sum(matrices)
    copies, trained = (3, 2) if workload.task == "ppo" else (1, 1)
    head = model.hidden if workload.task in ("reward", "ppo") else 0
    if workload.optimizer == "adamw8bit":
        state = model.layers * sum(_adam8(elements) for elements in matrices) + 8 * head
    else:
        state = 2 * size * (count + head)
    return size * copies * (count + head), size * trained * (count + head), trained * state


def _adam8(elements: int) -> int:
    if elements < _ADAM8_SMALLEST:
        return 8 * elements
    return 2 * elements + 8 * -(-elements // _ADAM8_BLOCK)


def _activations(model: Architecture, precision: Precision, workload: Workload) -> Activations:
    stream = precision.float_bytes
    rank = workload.rank if workload.trains else 0
    return Activations(model, precision.compute_bytes, stream, rank, workload.padded)


def _generation(model: Architecture, precision: Precision, workload: Workload) -> dict[str, dict[str, int]]:
    """Stages of reading a prompt and of generating after it."""
    if workload.trains and workload.task not in ROLLED_OUT:
        return {}
    act = _activations(model, precision, workload)
    rows, prompt = workload.rollout or workload.rows, max(workload.seq - workload.generated, 1)
    bits = _kv_bits(precision, workload.kv)
    head = precision.unpacked_head(model)
    if workload.full_logits and not workload.trains:
        tokens = rows * workload.seq
        cache = act.kv_cache(rows, workload.seq, bits)
        return {
            "prompt": {"kv_cache": cache, "activations": tokens * act.forward},
            "logits": {
                "kv_cache": cache,
                "activations": tokens * act.final,
                "logits": act.all_logits(tokens) + head,
            },
        }
    # A new token's keys and values are concatenated to the old ones, layer by layer.
    grown = act.kv_cache(rows, workload.seq, bits) // model.layers
    return {
        "prompt": {
            "kv_cache": act.kv_cache(rows, prompt, bits),
            "activations": rows * prompt * act.forward,
        },
        "generation": {
            "kv_cache": act.kv_cache(rows, workload.seq, bits),
            "activations": grown + rows * act.forward,
            "logits": act.next_tokens(rows) + head,
        },
    }


def _training(model: Architecture, precision: Precision, workload: Workload) -> dict[str, dict[str, int]]:
    """Stages of a training step."""
    act = _activations(model, precision, workload)
    tokens = workload.rows * workload.seq
    scored = workload.rows * workload.scored
    block = tokens * act.saved(workload.seq)
    checkpointed = workload.checkpointing
    kept = model.layers * (tokens * act.checkpoint if checkpointed else block)
    # Adapters in float32 are cast once a step, and the casts live until the backward pass is done.
    mixed = workload.adapters == "fp32" and act.compute == 2
    kept += _adapters(model, replace(workload, adapters="bf16"))[1] if mixed else 0
    if workload.task == "reward":
        head = 0
    elif workload.full_logits:
        head = act.logits_and_gradients(scored) + precision.unpacked_head(model)
    else:
        cast = act.stream != act.compute
        head = act.log_probabilities(scored, cast=cast, unpacked=precision.unpacked_head(model))
    stages = {
        "log-probabilities": {"activations": kept + tokens * act.final, "logits": head},
        "backward": {"activations": kept + tokens * act.gradients + (block if checkpointed else 0)},
        "last norm": {"activations": kept + tokens * (act.final + act.norm_gradients)},
    }
    if workload.task == "dpo":
        stages["reference"] = {"activations": kept + tokens * (act.final + act.forward)}
    return stages


def _kv_bits(precision: Precision, kv: str) -> float:
    if kv in ("bf16", "fp16"):
        return 8.0 * precision.compute_bytes
    from rlquant.llm.kv_cache import stored_bits

    return stored_bits(kv)
