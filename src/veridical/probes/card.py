"""The README of a saved probe or eraser: what it reads or erases, how well, and what it cannot show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from veridical.probes.base import LinearProbe
    from veridical.probes.erasure import Eraser
    from veridical.probes.origin import Origin

USE = """```python
import veridical as vd

probe = vd.load_probe("this folder")
probe.predict_proba(x)  # x: {reads}{read}
```"""
LIMITS = (
    "A probe shows that a label can be read from the activations, not that the model uses it: ablate or "
    "steer along the direction before saying so.",
    "The figures hold for data like the held-out pairs; on other prompts, scenarios or tokens measure again.",
    "It belongs to the model whose fingerprint is given; another checkpoint has other directions.",
)
USE_ERASER = """```python
import veridical as vd

eraser = vd.probes.load_eraser("this folder")
with eraser.on(model, "the site"):
    model.generate("...")
```"""
ERASER_LIMITS = (
    "It takes out what is linear at one site: a probe with a hidden layer may still read the label, and so "
    "may later layers.",
    "It belongs to the model whose fingerprint is given; another checkpoint has other directions.",
)
THRESHOLDS = {
    "balanced": "threshold, recall plus specificity largest",
    "fpr1": "threshold, 1 % false positives (out of fold)",
}
CHOICE = "fold_auroc"
BESIDE = {
    "text_": "text alone",
    "shuffled_": "shuffled labels",
    "random_direction_": "random directions",
}
"""What stands beside a figure: its name with this in front, and the head of its column."""
FIRES = (
    "Shares above the threshold of 1 % false positives (`fpr1`) are of rows by kind; a probe that knows "
    "nothing is above it on 1 % of each."
)


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
        ("width", str(probe.n_features_in_)),
        *_made_from(origin),
    ]
    facts += [(name.replace("_", " "), str(value)) for name, value in origin.rows.items()]
    if origin.metrics.get(CHOICE) is not None:
        facts.append(("AUROC on folds, by which it was chosen", number(origin.metrics[CHOICE])))
    facts += [(THRESHOLDS.get(name, name), f"{value:.4g}") for name, value in origin.thresholds.items()]
    if origin.calibration:
        slope, shift = origin.calibration["slope"], origin.calibration["intercept"]
        facts.append(
            ("calibrated probability (Platt)", f"sigmoid({slope:.4g} * decision value + {shift:.4g})")
        )
    use = USE.format(reads=probe.reads.format(width=probe.n_features_in_), read=read)
    parts = [f"# {title}", _table(("", ""), facts), use, *_measured(origin)]
    parts += ["## Limits", "\n".join(f"- {line}" for line in (*origin.notes, *LIMITS))]
    return "\n\n".join(parts) + "\n"


def eraser_card(eraser: Eraser) -> str:
    """The card of a fitted eraser as Markdown."""
    origin = eraser.origin_
    what = f"Eraser of `{origin.target}`" if origin.target else f"A {eraser.name} eraser"
    facts = [
        ("method", eraser.said()),
        ("dimensions erased", f"{eraser.rank} of {len(eraser.centre_)}"),
        ("site", f"`{origin.site}`" if origin.site else "not recorded"),
        *_made_from(origin),
    ]
    facts += [(name.replace("_", " "), str(value)) for name, value in origin.rows.items()]
    parts = [f"# {what}", _table(("", ""), facts), USE_ERASER, *_measured(origin)]
    parts += ["## Limits", "\n".join(f"- {line}" for line in (*origin.notes, *ERASER_LIMITS))]
    return "\n\n".join(parts) + "\n"


def _made_from(origin: Origin) -> list[tuple[str, str]]:
    return [
        ("tokens read", origin.tokens or "not recorded"),
        ("model", origin.model or "not recorded"),
        ("model fingerprint", origin.model_fingerprint or "not recorded"),
        ("data fingerprint", origin.data_fingerprint or "not recorded"),
        ("rows", ", ".join(origin.where) if origin.where else "all"),
    ]


def _measured(origin: Origin) -> list[str]:
    """Every figure with its interval, and beside it what chance, the text and the controls reach."""
    metrics = origin.metrics
    names = [
        key
        for key in metrics
        if not key.endswith(("_low", "_high", "_p95")) and not key.startswith(tuple(BESIDE)) and key != CHOICE
    ]
    if not names:
        return []
    rows = [[_figure(name, metrics), _spread(name, metrics), _chance(name, origin)] for name in names]
    heads = ["figure", "value (95 % interval by pair)", "chance"]
    for prefix, said in BESIDE.items():
        column = [_spread(prefix + name, metrics) if prefix + name in metrics else "" for name in names]
        if any(column):
            heads.append(said)
            rows = [[*row, cell] for row, cell in zip(rows, column)]
    return ["## Figures on held-out pairs", _table(heads, rows), *([FIRES] if _fires(names) else [])]


def _figure(name: str, metrics: Mapping[str, float | None]) -> str:
    said = name.replace("_", " ")
    control = metrics.get("shuffled_auroc")
    if name == "selectivity" and control is not None:
        return f"{said} (at most {1 - control:.3f}: an AUROC of 1 less that of shuffled labels)"
    return said


def _spread(name: str, metrics: Mapping[str, float | None]) -> str:
    limit = metrics.get(f"{name}_p95")
    if limit is not None:
        return f"{number(metrics[name])}, 95 % below {number(limit)}"
    return interval(metrics[name], metrics.get(f"{name}_low"), metrics.get(f"{name}_high"))


def _chance(name: str, origin: Origin) -> str:
    """What a probe that knows nothing reaches."""
    if name.startswith("auroc"):
        return "0.500"
    if name == "recall_at_1pct_fpr" or "fpr1" in name:
        return "0.010"
    rows, positive = origin.rows.get("test_vectors"), origin.rows.get("test_positive")
    if name == "accuracy" and rows:
        return number(max(positive, rows - positive) / rows)
    return "0.000" if name.startswith(("selectivity", "lead_over_text")) else ""


def _fires(names: list[str]) -> bool:
    return any("fpr1" in name and name != "recall_at_1pct_fpr" for name in names)


def interval(value: float | None, low: float | None, high: float | None) -> str:
    """`0.93 [0.90, 0.96]`, or what there is of it."""
    if low is None or high is None or number(value) == number(None):
        return number(value)
    return f"{number(value)} [{number(low)}, {number(high)}]"


def number(value: object) -> str:
    """A figure to three decimals; "not measured" where there is none."""
    if value is None or value != value:
        return "not measured"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines]
    return "\n".join([f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *rows])


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
