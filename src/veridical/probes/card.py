"""The README of a saved probe: what it reads, how well, and what it cannot show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from veridical.probes.base import LinearProbe
    from veridical.probes.origin import Origin

USE = """```python
import veridical as vd

probe = vd.load_probe("this folder")
probe.predict_proba(x)   # x: {reads}{read}
```"""
LIMITS = (
    "A probe shows that a label can be read from the activations, not that the model uses it: ablate or "
    "steer along the direction before saying so.",
    "The figures hold for data like the held-out pairs; on other prompts, scenarios or tokens measure again.",
    "It belongs to the model whose fingerprint is given; another checkpoint has other directions.",
)

THRESHOLDS = {
    "balanced": "threshold, recall plus specificity largest",
    "fpr1": "threshold, 1 % false positives on the fitted pairs (out of fold)",
}


def card(probe: LinearProbe) -> str:
    """The card of a fitted probe as Markdown."""
    origin = probe.origin_
    positive, negative = probe.classes_[1], probe.classes_[0]
    title = f"Probe for `{origin.target}`" if origin.target else f"A {probe.name} probe"
    read = f" at {origin.site}, tokens: {origin.tokens or 'as given'}" if origin.site else ""
    facts = [
        ("estimator", probe.said()),
        ("positive class", f"`{positive}` (against `{negative}`)"),
        ("site", f"`{origin.site}`" if origin.site else "not recorded"),
        ("tokens read", origin.tokens or "not recorded"),
        ("width", str(probe.n_features_in_)),
        ("model", origin.model or "not recorded"),
        ("model fingerprint", origin.model_fingerprint or "not recorded"),
        ("data fingerprint", origin.data_fingerprint or "not recorded"),
        ("rows", ", ".join(origin.where) if origin.where else "all"),
    ]
    facts += [(name.replace("_", " "), str(value)) for name, value in origin.rows.items()]
    facts += [(THRESHOLDS.get(name, name), f"{value:.4g}") for name, value in origin.thresholds.items()]
    if origin.calibration:
        slope, shift = origin.calibration["slope"], origin.calibration["intercept"]
        facts.append(
            ("calibrated probability (Platt)", f"sigmoid({slope:.4g} * decision value + {shift:.4g})")
        )
    use = USE.format(reads=probe.reads.format(width=probe.n_features_in_), read=read)
    parts = [f"# {title}", _table(("", ""), facts), use]
    if origin.metrics:
        parts += ["## Figures on held-out pairs", _table(("figure", "value"), _figures(origin))]
    parts += ["## Limits", "\n".join(f"- {line}" for line in (*origin.notes, *LIMITS))]
    return "\n\n".join(parts) + "\n"


def _figures(origin: Origin) -> list[tuple[str, str]]:
    metrics = origin.metrics
    lines = []
    for name in (key for key in metrics if f"{key}_low" in metrics):
        low, high = metrics[f"{name}_low"], metrics[f"{name}_high"]
        lines.append(
            (f"{name.replace('_', ' ')} (95 % interval by pair)", f"{interval(metrics[name], low, high)}")
        )
    shown = {key for key in metrics for name in metrics if key in (name, f"{name}_low", f"{name}_high")}
    shown = {key for key in shown if f"{key}_low" in metrics or key.endswith(("_low", "_high"))}
    lines += [(key.replace("_", " "), number(value)) for key, value in metrics.items() if key not in shown]
    return lines


def interval(value: float | None, low: float | None, high: float | None) -> str:
    """`0.93 [0.90, 0.96]`, or what there is of it."""
    if value is None or low is None or high is None:
        return number(value)
    return f"{number(value)} [{number(low)}, {number(high)}]"


def number(value: object) -> str:
    """A figure to three decimals; "not measured" where there is none."""
    if value is None or value != value:
        return "not measured"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _table(head: tuple[str, str], lines: list[tuple[str, str]] | Mapping[str, str]) -> str:
    pairs = list(lines.items()) if isinstance(lines, Mapping) else lines
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in pairs]
    return "\n".join([f"| {head[0]} | {head[1]} |", "| --- | --- |", *rows])


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
