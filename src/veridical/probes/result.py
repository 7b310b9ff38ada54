"""What a sweep found: every site's figures beside their controls, and the probe that the folds chose."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from veridical.config import ProbeConfig
from veridical.errors import unknown
from veridical.probes.calibration import Calibration, calibrate, fit_platt
from veridical.probes.card import interval, number
from veridical.probes.evaluate import METRICS, Estimate
from veridical.probes.firing import balanced_threshold, false_positive_threshold
from veridical.probes.origin import Origin
from veridical.probes.verdict import verdict

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.probes.base import LinearProbe
    from veridical.probes.data import Source, Task
    from veridical.reporting.section import Section


@dataclass(frozen=True)
class Labels:
    """What was true of the rows of a sweep: fitted `[fit]` and held out `[test]` bool, pairs `[test]`."""

    fit: np.ndarray
    test: np.ndarray
    test_pairs: np.ndarray


@dataclass(frozen=True)
class SiteResult:
    """One site.

    Attributes:
        site: Its name.
        probe: Fitted on all fitted pairs at the strength that the folds chose.
        fold_auroc: Mean AUROC over the folds, by which strength and site were chosen.
        metrics: Figures on the held-out pairs.
        control: `[shuffles]`, AUROC there of probes for labels permuted over pairs.
        lead_over_text: AUROC less that of the text baseline, with an interval over the same resamples.
        random: `[draws]`, AUROC there of random directions whose sign was chosen on the fitted pairs.
        selectivity: AUROC less the mean of `control`, over the same resamples; None without shuffles.
        out_of_fold: `[fit]`, decision value of each fitted row by the probe of the fold that held it out.
        test_scores: `[test]`, decision values of `probe` on the held-out rows.
        converged: Whether the solver reached its tolerance.
    """

    site: str
    probe: LinearProbe
    fold_auroc: float
    metrics: Mapping[str, Estimate]
    control: np.ndarray
    lead_over_text: Estimate | None
    random: np.ndarray = field(default_factory=lambda: np.empty(0))
    selectivity: Estimate | None = None
    out_of_fold: np.ndarray = field(default_factory=lambda: np.empty(0))
    test_scores: np.ndarray = field(default_factory=lambda: np.empty(0))
    converged: bool = True


@dataclass(frozen=True, repr=False)
class ProbeSweep:
    """Probes at every site for one label.

    Attributes:
        config: The options of the sweep.
        classes: Negative and positive label.
        results: One per site, in order of depth.
        best_site: The site that the folds chose; the test figures had no part in it.
        selected_control: `[shuffles]`, test AUROC of each shuffle at the site that its own folds chose.
        text: Figures of the text-only baseline on the held-out pairs; None when there is no text.
        firing: How often the best probe fires on confusion, refusals and honest answers; None without those
            columns.
        counts: Rows and pairs fitted and held out, and what was left out.
        facts: Tokens, model and fingerprints.
        notes: What should be known about rows, texts and splits.
        labels: What was true of the fitted and the held-out rows, in the order of the scores.
    """

    config: ProbeConfig
    classes: tuple[Any, Any]
    results: tuple[SiteResult, ...]
    best_site: str
    selected_control: np.ndarray
    text: Mapping[str, Estimate] | None
    firing: pd.DataFrame | None
    counts: Mapping[str, Any]
    facts: Mapping[str, str | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    labels: Labels | None = None

    @classmethod
    def assemble(
        cls,
        *,
        config: ProbeConfig,
        source: Source,
        task: Task,
        results: tuple[SiteResult, ...],
        best_site: str,
        selected_control: np.ndarray,
        text: Mapping[str, Estimate] | None,
        text_fold_auroc: float | None,
        firing: pd.DataFrame | None,
    ) -> ProbeSweep:
        """Puts a sweep together; writes into every probe where it came from and how it scored."""
        counts = _counts(source, task)
        if text_fold_auroc is not None:
            counts["text_fold_auroc"] = text_fold_auroc
        negative, positive = task.classes.tolist()
        draft = cls(
            config,
            (negative, positive),
            results,
            best_site,
            selected_control,
            text,
            firing,
            counts,
            source.facts,
            source.notes,
            Labels(
                task.positive[task.fit],
                task.positive[task.test],
                np.unique(source.groups[task.test], return_inverse=True)[1].reshape(-1),
            ),
        )
        for result in results:
            result.probe.origin_ = draft._origin(result)
        return draft

    def __len__(self) -> int:
        return len(self.results)

    def __getitem__(self, site: str) -> SiteResult:
        """The result of one site; an unknown site is an error that names the nearest."""
        for result in self.results:
            if result.site == site:
                return result
        raise unknown("site", site, [result.site for result in self.results])

    def best(self) -> LinearProbe:
        """The fitted probe of the site that the folds chose; its `site` and `origin_` say what it reads."""
        return self[self.best_site].probe

    def to_frame(self) -> pd.DataFrame:
        """One line per site: test figures with 95 % intervals, shuffled control, text baseline."""
        return pd.DataFrame([self._line(result) for result in self.results])

    def firing_frame(self) -> pd.DataFrame:
        """How often the best probe fires, by kind of row; empty without such columns (see `firing`)."""
        return pd.DataFrame() if self.firing is None else self.firing.copy()

    @property
    def metrics(self) -> dict[str, float | None]:
        """The figures of the best site as plain JSON values."""
        return dict(self.best().origin_.metrics)

    def calibration(self, site: str | None = None, bins: int = 10) -> Calibration:
        """Platt and isotonic calibration at `site` (the chosen one), judged on held-out pairs."""
        return calibrate(self, site, bins)

    def findings(self) -> list[str]:
        """What the figures say, in sentences."""
        return verdict(self)

    def figure(self) -> go.Figure:
        """AUROC by site with its interval, the shuffled control and the text baseline."""
        from veridical.probes.figure import auroc_by_site

        return auroc_by_site(self)

    def save(self, folder: str | Path) -> Path:
        """Saves the sweep with every probe into `folder`; the best one also as `best/`, for `load_probe`."""
        from veridical.probes.saved_sweep import save_sweep

        return save_sweep(self, folder)

    @classmethod
    def load(cls, folder: str | Path) -> ProbeSweep:
        """Loads a saved sweep; a damaged file is named and refused."""
        from veridical.probes.saved_sweep import load_sweep

        return load_sweep(folder)

    def report_section(self) -> Section:
        """The sweep as a section of a report."""
        from veridical.reporting.section import Section

        tables = [("Probes by site (test pairs; chosen = by the folds)", _rounded(self.to_frame()))]
        if self.firing is not None:
            caption = (
                f"How often the probe at {self.best_site} fires on rows of pairs that it was not fitted on; "
                "thresholds from the fitted pairs' folds: balanced (recall plus specificity largest) and 1 % "
                "false positives"
            )
            tables.append((caption, _rounded(self.firing)))
        return Section(
            title=f"Probes for {self._name}",
            text="\n\n".join([self._description(), *self.findings()]),
            figures=(self.figure(),),
            tables=tuple(tables),
            headline=self._headline(),
        )

    def __repr__(self) -> str:
        best = self[self.best_site].metrics["auroc"]
        text = "" if self.text is None else f", text alone {number(self.text['auroc'].value)}"
        return (
            f"ProbeSweep({self._name}: {len(self)} sites, best {self.best_site} AUROC "
            f"{interval(best.value, best.low, best.high)}, shuffled "
            f"{number(_mean(self.selected_control))}{text}; {self.counts['test_pairs']} test pairs)"
        )

    def _repr_html_(self) -> str:
        said = "".join(f"<p>{html.escape(line)}</p>" for line in self.findings())
        table = _rounded(self.to_frame()).to_html(index=False, escape=True, border=0)
        return f"<p><b>{html.escape(repr(self))}</b></p>{said}{table}"

    @property
    def _name(self) -> str:
        within = f" where {' and '.join(self.config.where)}" if self.config.where else ""
        return f"{self.config.target} = {self.classes[1]}{within}"

    def _headline(self) -> tuple[tuple[str, str], ...]:
        best = self[self.best_site].metrics["auroc"]
        shown = [(f"{self._name}: AUROC at {self.best_site}", interval(best.value, best.low, best.high))]
        if self.text is not None:
            text = self.text["auroc"]
            shown.append(("text alone", interval(text.value, text.low, text.high)))
        if len(self.selected_control):
            shown.append(("shuffled labels", number(_mean(self.selected_control))))
        return tuple(shown)

    def _description(self) -> str:
        counts = self.counts
        left_out = "; ".join(f"{n} {reason}" for reason, n in counts["excluded"].items())
        tokens, labelled = self.facts.get("tokens"), self.results[0].probe.labelled
        return (
            f"{self.results[0].probe.name.capitalize()} probes at {len(self)} sites"
            + (f" (tokens read: {tokens})" if tokens else "")
            + f", fitted on {counts['fit_vectors']} {labelled} of {counts['fit_pairs']} pairs and judged on "
            f"{counts['test_vectors']} {labelled} of {counts['test_pairs']} other pairs, of which "
            f"{counts['test_positive']} are positive. Held out: {counts['split']}. Site and strength were "
            f"chosen on {self.config.folds} folds of the fitted pairs. Intervals are 95 %, over "
            f"{self.config.bootstrap} resamples of whole pairs. Selectivity is the AUROC less that of the "
            "same probe on control labels, which are the labels permuted over pairs; an AUROC is at most 1 "
            "and that of control labels about 0.5, so selectivity is at most about 0.5."
            + (f" Left out: {left_out}." if left_out else "")
        )

    def _line(self, result: SiteResult) -> dict[str, Any]:
        line: dict[str, Any] = {
            "site": result.site,
            "chosen": result.site == self.best_site,
            "C": getattr(result.probe, "C", np.nan),
            "fold_auroc": result.fold_auroc,
        }
        return {**line, **self._figures(result)}

    def _figures(self, result: SiteResult) -> dict[str, float]:
        line: dict[str, float] = {}
        for name in METRICS:
            line |= result.metrics[name].columns(name)
        line["shuffled_auroc"] = _mean(result.control)
        line["shuffled_auroc_p95"] = (
            float(np.quantile(result.control, 0.95)) if len(result.control) else np.nan
        )
        if result.selectivity is not None:
            line |= result.selectivity.columns("selectivity")
        if len(result.random):
            line["random_direction_auroc"] = _mean(result.random)
            line["random_direction_auroc_p95"] = float(np.quantile(result.random, 0.95))
        if self.text is not None and result.lead_over_text is not None:
            line |= self.text["auroc"].columns("text_auroc")
            line |= result.lead_over_text.columns("lead_over_text")
        return line

    def _origin(self, result: SiteResult) -> Origin:
        figures = {"fold_auroc": result.fold_auroc, **self._figures(result)}
        for name, alone in (self.text or {}).items():
            figures |= alone.columns(f"text_{name}")
        if self.firing is not None and result.site == self.best_site:
            for line in self.firing.to_dict("records"):
                for end in ("", "_low", "_high"):
                    figures[f"fires_fpr1 ({line['rows_of']}){end}"] = line[f"fires_fpr1{end}"]
        clean = {k: (float(v) if np.isfinite(v) else None) for k, v in figures.items()}
        counts = {k: v for k, v in self.counts.items() if k not in ("excluded", "text_fold_auroc")}
        counts["excluded"] = "; ".join(f"{n} {why}" for why, n in self.counts["excluded"].items()) or "none"
        chosen = result.site == self.best_site
        return Origin(
            site=result.site,
            tokens=self.facts.get("tokens"),
            target=self.config.target,
            where=tuple(self.config.where),
            model=self.facts.get("model"),
            model_fingerprint=self.facts.get("model_fingerprint"),
            data_fingerprint=self.facts.get("data_fingerprint"),
            metrics=clean,
            rows=counts,
            notes=tuple(self.findings()) if chosen else self.notes,
            seed=self.config.seed,
            **self._calls(result),
        )

    def _calls(self, result: SiteResult) -> dict[str, dict[str, float]]:
        """Thresholds and Platt's curve of one site, from its out-of-fold scores."""
        if self.labels is None or not len(result.out_of_fold):
            return {}
        scores, positive = result.out_of_fold, self.labels.fit
        thresholds = {
            "balanced": balanced_threshold(scores, positive),
            "fpr1": false_positive_threshold(scores[~positive]),
        }
        return {"thresholds": thresholds, "calibration": fit_platt(scores, positive)}


def _counts(source: Source, task: Task) -> dict[str, Any]:
    def part(name: str, rows: np.ndarray) -> dict[str, int]:
        return {
            f"{name}_vectors": len(rows),
            f"{name}_rows": len(np.unique(source.units[rows])),
            f"{name}_pairs": len(np.unique(source.groups[rows])),
            f"{name}_positive": int(task.positive[rows].sum()),
        }

    return {
        **part("fit", task.fit),
        **part("test", task.test),
        "split": task.split,
        "excluded": dict(task.excluded),
    }


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _rounded(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.round({name: 3 for name in frame.select_dtypes("float").columns if name != "C"})
