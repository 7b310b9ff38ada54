"""A probe that is fitted already, judged on other data: its figures beside those of the text alone.

Nothing of the probe is fitted again: its thresholds are those it was saved with. The text baseline is fitted
on these data by cross-fitting over pairs, so it has seen the topic, which the probe may not have seen.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from veridical import config as configs
from veridical.config import ProbeConfig
from veridical.errors import DataError
from veridical.probes import evaluate
from veridical.probes.baseline import cross_fit_texts
from veridical.probes.card import interval
from veridical.probes.data import Source, Where, as_conditions, meets, missing, two_classes
from veridical.probes.evaluate import Estimate
from veridical.probes.firing import SIGNS, kinds_of_rows, shares_above
from veridical.probes.fits import same_model, same_width
from veridical.saved_result import Saved

if TYPE_CHECKING:
    from veridical.activations import Activations
    from veridical.probes.base import LinearProbe
    from veridical.reporting.section import Section


@dataclass(frozen=True, repr=False)
class Judged(Saved):
    """How a fitted probe does on given rows.

    Attributes:
        name: Label, site, and the rows that count.
        metrics: AUROC, accuracy and recall at 1 % false positives, with 95 % intervals by pair.
        text: The same of the text alone, cross-fitted on these rows; None without texts.
        lead: AUROC less that of the text.
        firing: Share of each kind of row above each of the probe's own thresholds; None without either.
        counts: Rows, pairs and positives.
        facts: Tokens, model and fingerprints.
        notes: What a reader should know.
    """

    name: str
    metrics: Mapping[str, Estimate]
    text: Mapping[str, Estimate] | None
    lead: Estimate | None
    firing: pd.DataFrame | None
    counts: Mapping[str, int]
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """One line for the probe and one for the text alone, with the ends of every interval."""
        lines = [_line("probe", self.metrics)]
        if self.text is not None:
            lines.append(_line("text alone", self.text))
        return pd.DataFrame(lines)

    def findings(self) -> list[str]:
        """What the figures say, in sentences."""
        auroc = self.metrics["auroc"]
        said = [f"AUROC {_said(auroc)} on {self.counts['rows']} rows of {self.counts['pairs']} pairs."]
        if auroc.low <= 0.5 <= auroc.high:
            said.append("The interval holds 0.5: on these rows the probe is not surely better than chance.")
        if self.text is not None and self.lead is not None:
            words = f"the text alone, fitted on these very rows, reaches {_said(self.text['auroc'])}"
            ahead = "leads" if self.lead.low > 0 else "does not surely lead"
            said.append(f"The probe {ahead} over its text: {words}; difference {_said(self.lead)}.")
        return [*said, *self.notes]

    def report_section(self) -> Section:
        """The figures as a section of a report."""
        from veridical.reporting.section import Section

        tables = [("Figures with 95 % intervals over whole pairs", self.to_frame().round(3))]
        if self.firing is not None:
            tables.append(("Share of rows above the probe's own thresholds", self.firing.round(3)))
        return Section(
            title=f"A saved probe on other data: {self.name}",
            text="\n\n".join(self.findings()),
            tables=tuple(tables),
            headline=((f"AUROC of {self.name}", _said(self.metrics["auroc"])),),
        )

    def __repr__(self) -> str:
        text = "" if self.text is None else f", text alone {_said(self.text['auroc'])}"
        return (
            f"Judged({self.name}: AUROC {_said(self.metrics['auroc'])}{text}; {self.counts['pairs']} pairs)"
        )

    def _repr_html_(self) -> str:
        table = self.to_frame().round(3).to_html(index=False, escape=True, border=0)
        return f"<p><b>{html.escape(repr(self))}</b></p>{table}"


def judge_probe(
    probe: LinearProbe,
    acts: Activations,
    *,
    target: str | None = None,
    where: Where | None = None,
    force: bool = False,
    **options: Any,
) -> Judged:
    """Scores a fitted probe on the activations of other data, or of another checkpoint.

    Args:
        probe: A fitted probe with its site.
        acts: What `collect` returned, with the probe's site and token selection.
        target: Label column; the probe's own when not given.
        where: Conditions on the rows; the probe's own when not given, `()` for all rows.
        force: Accept activations of another model than the probe's.
        **options: Fields of `ProbeConfig` that apply: `bootstrap`, `text_baseline`, `folds`, `seed`.

    Raises:
        MismatchError: The activations are of another model or width.
        DataError: No site, no rows, one class, or labels other than the probe's.
    """
    if probe.site is None:
        raise DataError("this probe does not say which site it reads; judge it by its decision_function")
    origin, model = probe.origin_, acts.request.model
    config = configs.build(ProbeConfig, None, **options)
    if not force:
        same_model(origin.model, origin.model_fingerprint, model.get("path"), model["fingerprint"])
    source = probe.source(acts, None, None, None, None)
    column = target or origin.target or config.target
    conditions = origin.where if where is None else as_conditions(where)
    used = meets(source, conditions) if conditions else np.ones(len(source), dtype=bool)
    labels = source.column(column)
    used &= np.array([not missing(value) for value in labels])
    if not used.any():
        raise DataError(f"no row has a value of {column}: there is nothing to judge")
    classes, codes = two_classes(labels[used], column, conditions)
    if [str(c) for c in classes] != [str(c) for c in probe.classes_]:
        raise DataError(
            f"{column} is {classes.tolist()} here; the probe tells {probe.classes_.tolist()} apart"
        )
    same_width(probe, int(np.prod(acts[probe.site].shape[1:])), "the store has", probe.site)
    rows, positive = np.flatnonzero(used), codes == 1
    own = origin.thresholds if any(name in source.columns for name in SIGNS) else {}

    def score(those: np.ndarray) -> np.ndarray:
        return probe.decision_function(source.vectors(str(probe.site), those))

    scores = score(rows)
    weights = evaluate.resample_weights(source.groups[rows], config.bootstrap, config.seed)
    text = _text(source, rows, positive, config)
    within = f" where {' and '.join(conditions)}" if conditions else ""
    notes = list(source.notes)
    if origin.tokens and origin.tokens != source.facts.get("tokens"):
        notes.append(
            f"The probe was fitted on tokens {origin.tokens}; these are {source.facts.get('tokens')}."
        )
    return Judged(
        name=f"{column} = {classes[1]} at {probe.site}{within}",
        metrics=evaluate.measure(scores, positive, weights),
        text=None if text is None else evaluate.measure(text, positive, weights),
        lead=None if text is None else evaluate.difference(scores, text, positive, weights),
        firing=shares_above(source, kinds_of_rows(source), own, score, config) if own else None,
        counts={
            "rows": len(rows),
            "pairs": len(np.unique(source.groups[rows])),
            "positive": int(positive.sum()),
        },
        facts={**source.facts, "seed": config.seed},
        notes=tuple(notes),
    )


def _text(source: Source, rows: np.ndarray, positive: np.ndarray, config: ProbeConfig) -> np.ndarray | None:
    """Out-of-fold decision values of the text baseline on the rows; None where there is no text."""
    from veridical.probes.crossfit import fold_numbers

    if source.texts is None or not config.text_baseline:
        return None
    fold_of = fold_numbers(source.groups[rows], config.folds, config.seed, positive)
    texts, every = source.texts[rows], np.ones(len(rows), dtype=bool)
    return cross_fit_texts(texts, positive, source.units[rows], every, fold_of).on(texts, fold_of)


def _line(who: str, metrics: Mapping[str, Estimate]) -> dict[str, Any]:
    line: dict[str, Any] = {"who": who}
    for name, value in metrics.items():
        line |= value.columns(name)
    return line


def _said(value: Estimate) -> str:
    return interval(value.value, value.low, value.high)
