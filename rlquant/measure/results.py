"""The results document (results.json, schema "rlquant.results/1"): building it and checking one that was
read.

``None`` stands for what is undefined (the interval of one episode) or was not measured, wherever the check
allows it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rlquant.errors import InputError

__all__ = ["SCHEMA", "plain", "results_document", "validate_results"]

SCHEMA = "rlquant.results/1"

Check = Callable[[Any, str], None]


def plain(value: Any) -> Any:
    """``value`` in plain JSON types: dataclasses, mappings, sequences and NumPy values; NaN and infinity
    become None.

    Raises:
        InputError: a type that JSON has no place for.
    """
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (np.generic, np.ndarray)):
        return plain(value.tolist())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    raise InputError(f"results hold {value!r} of type {type(value).__name__}, which JSON cannot carry")


def results_document(
    subject: Mapping[str, Any],
    settings: Mapping[str, Any],
    machine: Mapping[str, Any],
    versions: Mapping[str, Any],
    reference: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The document of one evaluation; ``rows`` come from :meth:`rlquant.measure.Measurement.to_row`.

    Raises:
        InputError: a part does not fit the schema (see :func:`validate_results`).
    """
    document = {
        "schema": SCHEMA,
        "subject": subject,
        "settings": settings,
        "machine": machine,
        "versions": versions,
        "reference": reference,
        "rows": list(rows),
    }
    return validate_results(plain(document))


def validate_results(document: Any) -> dict[str, Any]:
    """Check a results document and return it; keys beyond the schema are allowed.

    Raises:
        InputError: it does not fit; the message names the path, for example ``rows[2].score.ci[0]``.
    """
    if not isinstance(document, dict) or "schema" not in document:
        raise InputError(f'not a results document: it has no "schema": "{SCHEMA}"')
    if document["schema"] != SCHEMA:
        raise InputError(
            f"results schema {document['schema']!r} is not {SCHEMA!r}; "
            "read it with the rlquant version that wrote it"
        )
    _DOCUMENT(document, "")
    return document


def _fail(path: str, expected: str, value: Any) -> InputError:
    return InputError(f"results: {path or 'document'} must be {expected}, not {_shorten(repr(value))}")


def _shorten(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _number(value: Any, path: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _fail(path, "a finite number", value)


def _count(value: Any, path: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _fail(path, "a whole number, 0 or more", value)


def _text(value: Any, path: str) -> None:
    if not isinstance(value, str):
        raise _fail(path, "text", value)


def _flag(value: Any, path: str) -> None:
    if not isinstance(value, bool):
        raise _fail(path, "true or false", value)


def _one_of(*choices: str) -> Check:
    def check(value: Any, path: str) -> None:
        if value not in choices:
            raise _fail(path, f"one of {', '.join(choices)}", value)

    return check


def _nullable(inner: Check) -> Check:
    def check(value: Any, path: str) -> None:
        if value is not None:
            inner(value, path)

    return check


def _list(inner: Check, *, least: int = 0, length: int | None = None) -> Check:
    def check(value: Any, path: str) -> None:
        if not isinstance(value, list):
            raise _fail(path, "a list", value)
        if len(value) < least or (length is not None and len(value) != length):
            wanted = f"at least {least}" if length is None else f"exactly {length}"
            raise InputError(f"results: {path} must have {wanted} entries, not {len(value)}")
        for i, item in enumerate(value):
            inner(item, f"{path}[{i}]")

    return check


def _object(
    required: Mapping[str, Check] | None = None, optional: Mapping[str, Check] | None = None
) -> Check:
    required, optional = required or {}, optional or {}

    def check(value: Any, path: str) -> None:
        if not isinstance(value, dict):
            raise _fail(path, "an object", value)
        prefix = f"{path}." if path else ""
        for key, inner in required.items():
            if key not in value:
                raise InputError(f"results: {prefix}{key} is missing")
            inner(value[key], prefix + key)
        for key, inner in optional.items():
            if key in value:
                inner(value[key], prefix + key)

    return check


def _mapping(inner: Check) -> Check:
    def check(value: Any, path: str) -> None:
        if not isinstance(value, dict):
            raise _fail(path, "an object", value)
        for key, item in value.items():
            inner(item, f"{path}.{key}")

    return check


_INTERVAL = _list(_nullable(_number), length=2)
_SCORE = _object(
    {
        "mean": _number,
        "std": _nullable(_number),
        "iqm": _number,
        "ci": _INTERVAL,
        "episodes": _list(_number, least=1),
    },
    {"worst_decile": _number},
)
_RETENTION = _object(
    {
        "value": _nullable(_number),
        "ci": _INTERVAL,
        "verdict": _one_of("retained", "lost", "undecided"),
    },
    {"more_episodes": _nullable(_count), "reason": _text},
)
_Q_GAP = _object({"p1": _number, "p10": _number, "p50": _number, "may_flip": _nullable(_number)})
_AGREEMENT = _object(
    {"action": _nullable(_number), "max_abs": _nullable(_number)}, {"q_gap": _nullable(_Q_GAP)}
)
_LATENCY = _object(
    dict.fromkeys(("p50", "p90", "p99", "p999", "max"), _number) | {"calls": _count, "simulated": _flag}
)
_WEIGHTS = _object(
    {
        "layer": _text,
        "edges": _list(_number, least=2),
        "before": _list(_count, least=1),
        "after": _list(_count, least=1),
        "sqnr_db": _nullable(_number),
    }
)
_FEATURES = _mapping(_list(_number))
_SHIFT = _object({"mean": _FEATURES, "wasserstein": _FEATURES, "outside": _FEATURES})
_REALTIME = _object(
    {
        **dict.fromkeys(
            ("slowdown", "control_rate_hz", "actions_hz", "missed", "late", "delay_periods"), _number
        ),
        "latency_us": _LATENCY,
        "score": _SCORE,
        "retention": _RETENTION,
    }
)
_LANGUAGE = _object(
    {
        "perplexity": _number,
        "agreement": _nullable(_object({"kl": _number, "top1": _number})),
        "generation": _list(
            _object(
                {"batch": _count, "first_token_ms": _number, "tokens_per_second": _number, "step": _LATENCY}
            )
        ),
        "preferences": _nullable(
            _object({"summed": _number, "per_token": _number, "pairs": _count, "cut": _count})
        ),
    }
)
_ROW = _object(
    {
        "precision": _text,
        "method": _text,
        "runtime": _text,
        "score": _SCORE,
        "retention": _RETENTION,
        "agreement": _nullable(_AGREEMENT),
        "bytes": _object({"weights": _count, "artifact": _nullable(_count)}),
        "compression": _nullable(_number),
        "latency_us": _nullable(_LATENCY),
    },
    {
        "weights": _list(_WEIGHTS),
        "shifts": _list(_SHIFT),
        "realtime": _list(_REALTIME),
        "language": _nullable(_LANGUAGE),
    },
)
_DOCUMENT = _object(
    {
        "subject": _object(
            {"source": _text, "kind": _one_of("control", "language")},
            {
                "algorithm": _nullable(_text),
                "env": _nullable(_text),
                "parameters": _nullable(_count),
                "sha256": _nullable(_text),
            },
        ),
        "settings": _object({"margin": _number, "confidence": _number}),
        "machine": _object(),
        "versions": _object(),
        "reference": _object({"precision": _text, "random_score": _nullable(_number)}),
        "rows": _list(_ROW),
    }
)
