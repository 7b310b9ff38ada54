"""Learning curves: how good a probe is by the number of pairs that it was fitted on.

Every size is drawn several times from the fitted pairs, and judged on the same held-out pairs. The draws of
one size are nested in those of the next, so that a curve is not moved by luck between its points. Each draw
chooses its own strength on folds of its own pairs, since a strength that suits all pairs does not suit ten.
All draws, folds and strengths are columns of one design; mean and variance for standardising, and nothing of
a label, are those of all fitted rows.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from veridical import config as configs
from veridical.config import ProbeConfig
from veridical.errors import DataError
from veridical.probes import evaluate, kinds
from veridical.probes.base import LinearProbe, Problems, group_codes
from veridical.probes.baseline import text_scores
from veridical.probes.card import interval, number
from veridical.probes.crossfit import fold_numbers
from veridical.probes.data import TARGET, Source, Task, Where, as_conditions, choose_rows, site_name
from veridical.probes.duplicates import without_copies
from veridical.probes.evaluate import Estimate
from veridical.probes.room import Room
from veridical.probes.sweep import SELECTION_TOL, as_estimator, check_config, run_sweep
from veridical.saved_result import Saved

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.activations import Activations
    from veridical.reporting.section import Section

SIZES = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
"""Numbers of pairs that are tried, as far as there are so many; all of them come last."""


@dataclass(frozen=True, repr=False)
class LearningCurve(Saved):
    """AUROC on the same held-out pairs by the number of fitted pairs.

    Attributes:
        config: How the probes were fitted.
        estimator: Name of the estimator.
        site: The site that was read.
        draws: One line per size and draw: `pairs`, `rows`, `draw`, `C`, `auroc`.
        whole: AUROC of the probe of all fitted pairs, with its interval over held-out pairs.
        text: AUROC of the text alone, fitted on all those pairs; None without texts.
        counts: Fitted and held-out pairs, and held-out rows.
        facts: Tokens, model and fingerprints.
        notes: What should be known about rows and texts.
    """

    config: ProbeConfig
    estimator: str
    site: str
    draws: pd.DataFrame
    whole: Estimate
    text: Estimate | None
    counts: Mapping[str, int] = field(default_factory=dict)
    facts: Mapping[str, str | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """One line per size: `pairs`, `rows` (mean), `draws`, `auroc` (mean over draws), `auroc_sd` (NaN for
        one draw), `auroc_low` and `auroc_high` (least and greatest of the draws)."""
        lines = []
        for pairs, part in self.draws.groupby("pairs"):
            found = part["auroc"].to_numpy(dtype=np.float64)
            lines.append(
                {
                    "pairs": pairs,
                    "rows": float(np.mean(part["rows"].tolist())),
                    "draws": len(part),
                    "auroc": float(found.mean()),
                    "auroc_sd": float(found.std(ddof=1)) if len(found) > 1 else float("nan"),
                    "auroc_low": float(found.min()),
                    "auroc_high": float(found.max()),
                }
            )
        return pd.DataFrame(lines)

    def findings(self) -> list[str]:
        """What the curve says, in sentences."""
        lines = self.to_frame().to_dict("records")
        first, last = lines[0], lines[-1]
        said = [
            f"With {first['pairs']} pairs the AUROC is {number(first['auroc'])} on average (draws from "
            f"{number(first['auroc_low'])} to {number(first['auroc_high'])}), with all {last['pairs']} it is "
            f"{interval(self.whole.value, self.whole.low, self.whole.high)}."
        ]
        enough = next(line for line in lines if line["auroc"] >= last["auroc"] - 0.01)
        if enough["pairs"] < last["pairs"]:
            said.append(f"{enough['pairs']} pairs come within 0.01 of that.")
        elif len(lines) > 1:
            rise = last["auroc"] - lines[-2]["auroc"]
            said.append(f"The curve still rises (by {rise:.3f} in its last step): more pairs would help.")
        if self.text is not None:
            shown = interval(self.text.value, self.text.low, self.text.high)
            said.append(f"The text alone, fitted on all these pairs, reaches {shown}.")
        return [*said, *self.notes]

    def figure(self) -> go.Figure:
        """AUROC by number of pairs on a logarithmic axis, with the range of the draws."""
        from veridical.probes.figure import by_pairs

        return by_pairs(self)

    def report_section(self) -> Section:
        """The curve as a section of a report."""
        from veridical.reporting.section import Section

        counts, labelled = self.counts, kinds.kind(self.estimator).labelled
        text = (
            f"{self.estimator.capitalize()} probes for {self.config.target} at {self.site}, judged on "
            f"{counts['test_rows']} {labelled} of {counts['test_pairs']} held-out pairs. Each draw chose its "
            "own strength on folds of its own pairs. The band is the range of the draws."
        )
        return Section(
            title=f"Learning curve of the probe for {self.config.target}",
            text="\n\n".join([text, *self.findings()]),
            figures=(self.figure(),),
            tables=(("AUROC by number of pairs", self.to_frame().round(3)),),
            headline=(
                (
                    f"AUROC with {counts['fit_pairs']} pairs",
                    interval(self.whole.value, self.whole.low, self.whole.high),
                ),
            ),
        )

    def __repr__(self) -> str:
        lines = self.to_frame().to_dict("records")
        shown = ", ".join(f"{line['pairs']}: {number(line['auroc'])}" for line in lines)
        return f"LearningCurve({self.config.target} at {self.site}, AUROC by pairs {shown})"

    def _repr_html_(self) -> str:
        said = "".join(f"<p>{html.escape(line)}</p>" for line in self.findings())
        table = self.to_frame().round(3).to_html(index=False, escape=True, border=0)
        return f"<p><b>{html.escape(repr(self))}</b></p>{said}{table}"


def learning_curve(
    acts: Activations | Mapping[str, Any],
    config: ProbeConfig | None = None,
    *,
    sizes: Sequence[int] = SIZES,
    repeats: int = 10,
    site: str | None = None,
    probe: LinearProbe | str | None = None,
    target: Any = None,
    groups: Any = None,
    texts: Sequence[str] | None = None,
    rows: Any = None,
    where: Where | None = None,
    holdout: Where | None = None,
    **options: Any,
) -> LearningCurve:
    """Fits on 10, 20, 50, ... pairs, several draws each, and judges all on the same held-out pairs.

    Args:
        acts: As for `fit_probes`, and so are the arguments that are not named here.
        config: Options; keyword `options` of `ProbeConfig` win over it.
        sizes: Numbers of pairs, 4 at least; those above what there is are left out, and all pairs come last.
        repeats: Draws of each size.
        site: Site to read; when not given, the one that the folds of all fitted pairs choose.
        probe: Estimator or its name; logistic when not given.
        target: Label column, or labels `[n]`.
        groups: `[n]`, pair of each vector.
        texts: `[n]`, for the text baseline.
        rows: Table of label columns for a dict of activations.
        where: Conditions on the rows.
        holdout: Conditions that mark rows which are never fitted on.
        **options: Fields of `ProbeConfig`.

    Raises:
        UnknownNameError: A site, column or option that does not exist.
        DataError: As `fit_probes`; no size that can be drawn.
    """
    if "shuffles" in options:
        raise DataError("shuffles means nothing to a learning curve; fit_probes has the shuffled control")
    given = {"where": where, "holdout": holdout}
    options |= {name: as_conditions(value) for name, value in given.items() if value is not None}
    if target is not None:
        options["target"] = target if isinstance(target, str) else TARGET
    config = configs.build(ProbeConfig, config, **options)
    check_config(config)
    estimator = as_estimator(probe)
    source = without_copies(estimator.source(acts, target, groups, texts, rows), config.allow_duplicates)
    task = choose_rows(source, config, config.where)
    read = site_name(site, source.sites) if site else _choose_site(source, task, config, estimator)
    return _Curve(source, task, config, estimator, read).run(_checked(sizes, repeats, source, task), repeats)


class _Curve:
    """The steps of one curve over data that were already checked."""

    def __init__(
        self, source: Source, task: Task, config: ProbeConfig, probe: LinearProbe, site: str
    ) -> None:
        self.source, self.task, self.config, self.probe, self.site = source, task, config, probe, site
        self.pairs = group_codes(source.groups[task.fit], len(task.fit)).numpy()
        self.truth, self.held_truth = task.positive[task.fit], task.positive[task.test]
        read = Room.of(config).reader(source, site, task, "a learning curve", streams=False)
        self.design = probe.space(read(task.fit))
        self.held = read(task.test)
        self.strengths = sorted(config.strengths) if probe.tuned else [1.0]
        self.columns = probe.beside(source, task.fit)

    def run(self, sizes: list[int], repeats: int) -> LearningCurve:
        every = int(self.pairs.max()) + 1
        orders = [self._order(draw) for draw in range(repeats)]
        members, lines = [], []
        for size in sizes:
            for draw, order in enumerate(orders[: 1 if size == every else repeats]):
                chosen = np.isin(self.pairs, order[:size])
                members.append(chosen)
                lines.append({"pairs": size, "rows": int(chosen.sum()), "draw": draw})
        used = np.stack(members, 1)  # [fit, draws]
        chosen = self._choose(used, [line["draw"] for line in lines])
        scores = self._fit(used.astype(np.float64), np.array(self.strengths)[chosen])
        aurocs = evaluate.auroc(scores, self.held_truth)
        for line, at, auroc in zip(lines, chosen, aurocs):
            line |= {"C": self.strengths[at] if self.probe.tuned else np.nan, "auroc": float(auroc)}
        weights = evaluate.resample_weights(
            self.source.groups[self.task.test], self.config.bootstrap, self.config.seed
        )
        measured = evaluate.measure(scores[:, -1], self.held_truth, weights)
        return LearningCurve(
            config=self.config,
            estimator=self.probe.name,
            site=self.site,
            draws=pd.DataFrame(lines),
            whole=measured["auroc"],
            text=self._text(weights),
            counts={
                "fit_pairs": every,
                "test_pairs": len(np.unique(self.source.groups[self.task.test])),
                "test_rows": len(self.task.test),
            },
            facts=dict(self.source.facts),
            notes=tuple(self.source.notes),
        )

    def _order(self, draw: int) -> np.ndarray:
        """Pairs in a random order in which every beginning holds both classes about as the whole does."""
        random = np.random.default_rng([self.config.seed, 5, draw])
        count = int(self.pairs.max()) + 1
        hits = np.bincount(self.pairs, weights=self.truth, minlength=count)
        kinds = np.stack([hits, np.bincount(self.pairs, minlength=count)])
        _, kind_of = np.unique(kinds, axis=1, return_inverse=True)
        place = np.empty(count)
        for kind in np.unique(kind_of):
            alike = random.permutation(np.flatnonzero(kind_of.reshape(-1) == kind))
            place[alike] = (np.arange(len(alike)) + random.random()) / len(alike)
        return np.argsort(place, kind="stable")

    def _choose(self, used: np.ndarray, order: list[int]) -> np.ndarray:
        """Strength of each draw, by the mean AUROC over folds of its own pairs, `[draws]` as numbers.

        The folds of a draw are dealt by its number within its size: all pairs, number 0, get a sweep's folds.
        """
        draws, found = used.shape[1], np.full((len(self.strengths), used.shape[1]), 0.5)
        if len(self.strengths) == 1:
            return np.zeros(draws, dtype=int)
        folds = [self._folds(used[:, draw], order[draw]) for draw in range(draws)]
        owner = np.concatenate([np.full(fold.max() + 1, draw) for draw, fold in enumerate(folds)])
        number = np.concatenate([np.arange(fold.max() + 1) for fold in folds])
        masks = np.stack([used[:, d] & (folds[d] != k) for d, k in zip(owner, number)], 1)
        held = np.stack([used[:, d] & (folds[d] == k) for d, k in zip(owner, number)], 1)
        start = None
        for at, strength in enumerate(self.strengths):
            problems = self._problems(masks.astype(np.float64), np.full(masks.shape[1], strength))
            solution = self.probe.solve(self.design, replace(problems, start=start, tol=SELECTION_TOL))
            start = solution.weights
            scores = evaluate.settled(self.probe.scores(self.design, solution.weights).cpu().numpy())
            each = [
                evaluate.auroc(scores[rows, k : k + 1], self.truth[rows])[0] if rows.any() else np.nan
                for k, rows in enumerate(held.T)
            ]
            for draw in range(draws):
                part = np.array(each)[owner == draw]
                found[at, draw] = np.nanmean(part) if np.isfinite(part).any() else 0.5
        return np.argmax(np.round(found, 9), axis=0)

    def _folds(self, used: np.ndarray, draw: int) -> np.ndarray:
        """Fold of each fitted row within one draw, `[fit]`; -1 outside it."""
        rows, number = np.flatnonzero(used), np.full(len(used), -1)
        count = min(self.config.folds, len(np.unique(self.pairs[rows])))
        # By name, not by number: names are what a sweep deals out, so that all pairs get its folds.
        names = self.source.groups[self.task.fit][rows]
        number[rows] = fold_numbers(names, count, self.config.seed + draw, self.truth[rows])
        return number

    def _fit(self, weights: np.ndarray, strengths: np.ndarray) -> np.ndarray:
        """Scores of every draw on the held-out rows, `[test, draws]`."""
        solution = self.probe.solve(self.design, self._problems(weights, strengths))
        return evaluate.settled(self.probe.held_out(self.design, solution.weights, self.held).cpu().numpy())

    def _problems(self, weights: np.ndarray, strengths: np.ndarray) -> Problems:
        device = self.design.rows.device
        labels = np.repeat(self.truth[:, None].astype(np.float64), weights.shape[1], axis=1)
        labels, weights_, strengths_ = (torch.from_numpy(a).to(device) for a in (labels, weights, strengths))
        return Problems(labels, weights_, strengths_, torch.from_numpy(self.pairs).to(device), self.columns)

    def _text(self, weights: np.ndarray) -> Estimate | None:
        if not self.config.text_baseline or self.source.texts is None:
            return None
        from veridical.pairs.splits import folds

        task, config = self.task, self.config
        parts = folds(self.source.groups[task.fit], config.folds, config.seed, self.truth)
        texts, units = self.source.texts, self.source.units
        scores, _ = text_scores(texts, task.positive, units, parts, task.fit, task.test)
        return evaluate.measure(scores, self.held_truth, weights)["auroc"]


def _choose_site(source: Source, task: Task, config: ProbeConfig, probe: LinearProbe) -> str:
    if len(source.sites) == 1:
        return source.sites[0]
    alone = replace(config, shuffles=0, text_baseline=False, bootstrap=1)
    return run_sweep(source, task, alone, probe).best_site


def _checked(sizes: Sequence[int], repeats: int, source: Source, task: Task) -> list[int]:
    """Sizes in order, as far as there are pairs, and all pairs."""
    if repeats < 1:
        raise DataError(f"repeats is {repeats}; expected at least 1")
    count = len(np.unique(source.groups[task.fit]))
    wrong = [size for size in sizes if isinstance(size, bool) or int(size) != size or size < 4]
    if wrong or not len(sizes):
        raise DataError(f"sizes are {tuple(sizes)}; expected whole numbers of pairs, 4 at least")
    return [*sorted({int(size) for size in sizes if size < count}), count]
