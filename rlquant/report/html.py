"""The HTML report: one file that needs no network, drawn from the results document alone."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files
from typing import Any

from rlquant.measure import validate_results
from rlquant.report.language import generation_entries, language_rows
from rlquant.report.realtime import (
    factor_text,
    realtime_entries,
    realtime_figures,
    realtime_sentences,
    time_text,
)
from rlquant.report.wording import (
    UNDEFINED,
    bytes_text,
    findings,
    gain_sentence,
    interval_text,
    number_text,
    percent_text,
    row_labels,
    row_verdict,
    words,
)

__all__ = ["render_report"]

_PACKAGE = "rlquant.report"


def render_report(document: dict[str, Any]) -> str:
    """``document`` as a self-contained HTML page.

    Nothing in the document can run: all text is escaped, and the page's content security policy admits only
    the two scripts that the report itself carries (by their hash) and no network.

    Args:
        document: a results document, as read from results.json.

    Raises:
        InputError: it does not fit the schema.
    """
    from jinja2 import Environment, StrictUndefined
    from plotly.offline import get_plotlyjs

    from rlquant.report.figures import MAX_LAYERS, figures

    document = _complete(validate_results(document))
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        number=number_text,
        percent=percent_text,
        size=bytes_text,
        interval=interval_text,
        time=time_text,
        factor=factor_text,
    )
    rows = document["rows"]
    scripts = {"plotly_js": get_plotlyjs(), "plots_js": _asset("plots.js")}
    drawn = figures(document) | realtime_figures(document)
    return environment.from_string(_asset("template.html.jinja")).render(
        document=document,
        words=words(document),
        gain=gain_sentence(document),
        findings=findings(document),
        rows=list(zip(rows, row_labels(rows), [row_verdict(document, row) for row in rows], strict=True)),
        drawn=drawn,
        realtime=realtime_entries(document),
        language=language_rows(document),
        generation=generation_entries(document),
        realtime_sentences=realtime_sentences(document),
        layers_left_out=any(len(row.get("weights", ())) > MAX_LAYERS for row in rows),
        max_layers=MAX_LAYERS,
        figures_json=_script_json(drawn),
        facts={name: _flat(document[name]) for name in ("settings", "machine", "versions")},
        style=_asset("style.css"),
        hashes=[_hash(script) for script in scripts.values()],
        **scripts,
    )


def _complete(document: dict[str, Any]) -> dict[str, Any]:
    """A copy in which every optional key that the template reads is there, as None where it was missing."""
    subject = dict.fromkeys(("algorithm", "env", "parameters", "sha256")) | document["subject"]
    rows = [
        row
        | {"score": {"worst_decile": None} | row["score"]}
        | {"agreement": row["agreement"] and {"q_gap": None} | row["agreement"]}
        for row in document["rows"]
    ]
    return document | {"subject": subject, "rows": rows}


def _asset(name: str) -> str:
    return files(_PACKAGE).joinpath(name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _script_json(value: Any) -> str:
    """JSON that can stand inside a script element: no character of it can end the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as (dotted name, text) pairs."""
    if isinstance(value, dict):
        pairs = []
        for key, item in value.items():
            pairs += _flat(item, f"{prefix}.{key}" if prefix else key)
        return pairs
    if isinstance(value, list):
        return [(prefix, ", ".join(str(item) for item in value))]
    return [(prefix, UNDEFINED if value is None else str(value))]
