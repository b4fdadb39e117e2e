"""What determines the scores of a language model's evaluation."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rlquant.errors import InputError, unknown_name
from rlquant.llm.bitsandbytes import require_bitsandbytes
from rlquant.llm.load import DTYPES
from rlquant.llm.versions import LLM_INT8, can_do, plan_of
from rlquant.quant import get_method

__all__ = ["KV", "LanguageSettings"]

KV = "+kv="
"""Between the name of a precision and the scheme of its KV cache."""


@dataclass(frozen=True)
class LanguageSettings:
    """What determines the scores of a language model's evaluation.

    Attributes:
        precisions: float dtypes, the first of which is the reference, and names of plans such as ``int4-g128`` or
            ``nf4+embedding=int8``, or ``llm-int8``: int8 weights and LLM.int8's int8 activations, by bitsandbytes.
        methods: of ``rlquant.quant.METHODS``; each precision is tried with each that can do it.
        window, stride, windows: see :class:`~rlquant.llm.text.Windows`; ``windows`` None takes the whole text.
        agreement_windows: over how many of them distributions are compared.
        calibration_windows, calibration_length: windows of calibration data, and tokens of each.
        cache: scheme of the KV cache through which all but the reference read every text and generate; their
            precisions end in ``+kv=SCHEME``. None reads without one.
        generate: batch sizes at which generation is timed.
        prompt_tokens, new_tokens: of the timed generation.
        margin: share of the lead over uniform guessing, in nats a token, that may be lost.
        confidence: of the two-sided intervals.
        seed: of the choice of calibration windows, and of resampling.
        device: where everything computes.
    """

    precisions: tuple[str, ...] = ("bf16", "int8", "nf4", "int4-g128")
    methods: tuple[str, ...] = ("rtn",)
    window: int = 1024
    stride: int | None = None
    windows: int | None = None
    agreement_windows: int = 8
    calibration_windows: int = 128
    calibration_length: int = 512
    cache: str | None = None
    generate: tuple[int, ...] = (1,)
    prompt_tokens: int = 128
    new_tokens: int = 32
    margin: float = 0.01
    confidence: float = 0.95
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("window", "calibration_windows", "calibration_length", "prompt_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("windows", "stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")
        if self.new_tokens < 4:
            raise InputError(f"new_tokens must be at least 4, not {self.new_tokens}: a median needs some")
        if any(batch < 1 for batch in self.generate):
            raise InputError(f"batch sizes of generation are at least 1, not {min(self.generate)}")
        if not 0 <= self.margin < 1:
            raise InputError(f"the margin must be at least 0 and below 1, not {self.margin}")
        if not 0.5 <= self.confidence < 1:
            raise InputError(f"the confidence must be at least 0.5 and below 1, not {self.confidence}")
        if self.cache is not None:
            from rlquant.llm.kv_cache import stored_bits

            stored_bits(self.cache)  # which refuses what is no scheme of a cache
        self.rows()
        if LLM_INT8 in self.precisions:
            require_bitsandbytes(LLM_INT8)

    @property
    def reference(self) -> str:
        """The dtype of the reference: the first one named, else bf16 on a GPU and fp32 on the CPU."""
        named = [name for name in self.precisions if name in DTYPES]
        return named[0] if named else "fp32" if self.device == "cpu" else "bf16"

    def rows(self) -> list[tuple[str, str]]:
        """(precision, method) of each row, the reference first, none twice.

        Raises:
            InputError: a precision or method is unknown, or no method can do a precision.
        """
        rows = [(self.reference, "none")]
        for method in self.methods:
            get_method(method)
        for name in self.precisions:
            if name in DTYPES:
                rows.append((name, "none"))
                continue
            plan = plan_of(name)
            if plan.scheme.is_identity:
                raise unknown_name("precision", name, DTYPES)
            able = [method for method in self.methods if can_do(name, method)]
            if not able:
                get_method(self.methods[0]).check(plan.scheme)
                raise InputError(f"{', '.join(self.methods)} cannot do {name}; rtn can")
            rows += [(name, method) for method in able]
        if self.cache is not None:
            rows[1:] = [(f"{name}{KV}{self.cache}", method) for name, method in [*rows, *rows[1:]]]
        return list(dict.fromkeys(rows))

    def to_json(self) -> dict[str, Any]:
        """The ``settings`` of a results document."""
        lists = {name: list(getattr(self, name)) for name in ("precisions", "methods", "generate")}
        return {**asdict(self), **lists}
