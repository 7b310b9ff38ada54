"""`fit_probes`: a probe for every site, chosen on folds by pair, reported on pairs that took no part.

Strength and site are chosen by the mean AUROC over folds of the fitted pairs. The figure of each site is
that of one fit on all those pairs, at the chosen strength, scored on the held-out pairs. The shuffled
control goes through the same choice with labels permuted over pairs. Standardisation uses the fitted pairs'
mean and variance in every
fold: the labels of a fold's held-out pairs are never seen, their spread is; the test pairs enter nothing.

A site that needs more memory than `memory_gb` is read in chunks for every product (see `streamed`), with the
same steps and figures. What stays in memory for each vector then is its labels and scores, about 300 bytes
with 20 shuffles, and a byte for each resample of a held-out one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from veridical import config as configs
from veridical.config import ProbeConfig
from veridical.errors import DataError
from veridical.probes import evaluate
from veridical.probes.base import LinearProbe, Problems, group_codes
from veridical.probes.baseline import text_scores
from veridical.probes.controls import random_directions
from veridical.probes.data import TARGET, Source, Task, Where, as_conditions, choose_rows
from veridical.probes.duplicates import without_copies
from veridical.probes.firing import firing_rates
from veridical.probes.kinds import estimator
from veridical.probes.logistic import LogisticProbe
from veridical.probes.result import ProbeSweep, SiteResult
from veridical.probes.room import Room
from veridical.probes.solver import Design
from veridical.probes.streamed import StreamedRows

if TYPE_CHECKING:
    from veridical.activations import Activations

SELECTION_TOL = 1e-4
"""Relative error of the coefficients while choosing; ranks of held-out rows are settled long before."""


def fit_probes(
    acts: Activations | Mapping[str, Any],
    config: ProbeConfig | None = None,
    *,
    probe: LinearProbe | str | None = None,
    target: Any = None,
    groups: Any = None,
    texts: Sequence[str] | None = None,
    rows: Any = None,
    where: Where | None = None,
    holdout: Where | None = None,
    **options: Any,
) -> ProbeSweep:
    """Fits a probe at every site and reports it beside its controls.

    Args:
        acts: What `collect` returned, or a dict of site name to activations `[n, d]` (array or tensor of any
            float type; further axes are flattened).
        config: Options; keyword `options` of `ProbeConfig` win over it.
        probe: Estimator, or its name with default parameters (`logistic` when not given). Where it has a
            strength, C comes from `strengths`.
        target: Label column, or labels `[n]`; two classes. Rows without a value are left out and counted.
        groups: `[n]`, pair of each vector; the `pair` column when not given.
        texts: `[n]`, what the model had read at each vector, for the text baseline; from the rows when not
            given.
        rows: Table of label columns for a dict of activations (DataFrame or mapping), for `target`, `where`,
            `split`.
        where: Conditions on the rows: `"instructed_to_lie=True"`, several, or `{"instructed_to_lie": True}`.
        holdout: Conditions (in the form of `where`) that mark rows which are never fitted on, such as
            `"system_held_out=True"`; the test is then made of such rows of held-out pairs.
        **options: Fields of `ProbeConfig`.

    Raises:
        UnknownNameError: A column or option that does not exist.
        DataError: Empty data, one class, too few pairs, a pair or a repeated row on both sides of the split.
        NonFiniteError: NaN or infinity; names the site and the vector.
    """
    if where is not None:
        options["where"] = as_conditions(where)
    if holdout is not None:
        options["holdout"] = as_conditions(holdout)
    if target is not None:
        options["target"] = target if isinstance(target, str) else TARGET
    config = configs.build(ProbeConfig, config, **options)
    check_config(config)
    estimator = as_estimator(probe)
    source = estimator.source(acts, target, groups, texts, rows)
    source = without_copies(source, config.allow_duplicates)
    task = choose_rows(source, config, config.where)
    return run_sweep(source, task, config, estimator)


def run_sweep(source: Source, task: Task, config: ProbeConfig, probe: LinearProbe) -> ProbeSweep:
    """The sweep over data whose rows are already chosen."""
    return _Sweep(source, task, config, probe).run()


def as_estimator(probe: LinearProbe | str | None) -> LinearProbe:
    """The estimator, or the one of that name with the parameters said there; logistic when not given."""
    return estimator(probe) if isinstance(probe, str) else probe or LogisticProbe()


def check_config(config: ProbeConfig) -> None:
    """Refuses options that make no sense."""
    if not config.strengths or any(not 0 < c < float("inf") for c in config.strengths):
        raise DataError(f"strengths are {config.strengths}; expected one or more numbers above 0")
    for name, least in (("folds", 2), ("bootstrap", 1), ("shuffles", 0)):
        if getattr(config, name) < least:
            raise DataError(f"{name} is {getattr(config, name)}; expected at least {least}")
    Room.of(config)


@dataclass(frozen=True)
class _SiteFit:
    """One site, solved, on the vectors of the task.

    `fold_auroc` and `test_scores` hold the true labels in column 0 and the shuffles after it.
    """

    fold_auroc: np.ndarray  # [1 + shuffles]
    probe: LinearProbe
    converged: bool
    out_of_fold: np.ndarray  # [fit]
    test_scores: np.ndarray  # [test, 1 + shuffles]
    random: np.ndarray  # [draws], test AUROC of random directions


class _Sweep:
    """The steps of one sweep over data that were already checked."""

    def __init__(self, source: Source, task: Task, config: ProbeConfig, probe: LinearProbe) -> None:
        from veridical.pairs.splits import folds

        self.source, self.task, self.config, self.probe = source, task, config, probe
        self.room = Room.of(config)
        self.groups = source.groups[task.fit]
        self.pairs = group_codes(self.groups, len(self.groups))
        self.columns = probe.beside(source, task.fit)
        self.folds = folds(self.groups, config.folds, config.seed, task.positive[task.fit])
        self.fit_labels = self._with_shuffles(task.fit, 2)
        self.test_labels = self._with_shuffles(task.test, 3)
        self.weights = evaluate.resample_weights(source.groups[task.test], config.bootstrap, config.seed)

    def run(self) -> ProbeSweep:
        from veridical.progress import bar

        text = self._text_baseline()
        results: list[SiteResult] = []
        by_fold: list[np.ndarray] = []
        with bar(len(self.source.sites), "probes", "sites", self.config.progress) as progress:
            for site in self.source.sites:
                fit = self._fit_site(site)
                results.append(self._result(site, fit, text))
                by_fold.append(fit.fold_auroc)
                progress.update(1)
        found = np.stack(by_fold)  # [sites, 1 + shuffles]
        best = results[int(np.argmax(np.round(found[:, 0], 9)))]
        notes = self.probe.notes(self.source, self.task)
        return ProbeSweep.assemble(
            config=self.config,
            source=replace(self.source, notes=(*self.source.notes, *notes)),
            task=self.task,
            results=tuple(results),
            best_site=best.site,
            # Test AUROC of each shuffle at the site that its own folds choose: what choosing alone can reach.
            selected_control=np.array(
                [results[at].control[s] for s, at in enumerate(np.argmax(found[:, 1:], axis=0))]
            ),
            text=None if text is None else evaluate.measure(text[0], self._test_truth, self.weights),
            text_fold_auroc=None if text is None else text[1],
            firing=self._firing(best),
        )

    @property
    def _test_truth(self) -> np.ndarray:
        return self.task.positive[self.task.test]

    def _with_shuffles(self, rows: np.ndarray, stream: int) -> np.ndarray:
        """Labels `[rows, 1 + shuffles]`: the true ones, then permutations over pairs, for all sites."""
        random = np.random.default_rng([self.config.seed, stream])
        truth, groups, units = self.task.positive[rows], self.source.groups[rows], self.source.units[rows]
        shuffled = [
            evaluate.permute_over_pairs(truth, groups, units, random) for _ in range(self.config.shuffles)
        ]
        return np.stack([truth, *shuffled], 1)

    def _fit_site(self, site: str) -> _SiteFit:
        read = self.room.reader(self.source, site, self.task, self.probe.name, self.probe.streams)
        x = read(self.task.fit)
        design = self.probe.space(x)
        strengths = sorted(self.config.strengths) if self.probe.tuned else [1.0]
        by_fold, out_of_fold = self._validate(design, strengths)
        found = np.nanmean(by_fold, axis=1)  # [1 + shuffles, strengths]
        # The strongest penalty wins ties.
        chosen = np.argmax(np.round(found, 9), axis=1)
        labels = _flags(self.fit_labels, design)
        each = torch.tensor(strengths, dtype=torch.float64)[torch.from_numpy(chosen)].to(labels.device)
        final = self.probe.solve(design, self._problems(labels, torch.ones_like(labels), each))
        held = read(self.task.test)
        scores = self.probe.held_out(design, final.weights, held)
        probe = self.probe.at(strengths[chosen[0]])
        return _SiteFit(
            fold_auroc=found[np.arange(len(chosen)), chosen],
            probe=probe.settle(self.task.classes, design, final),
            converged=bool(final.converged[0]),
            out_of_fold=out_of_fold[:, chosen[0]].copy(),
            test_scores=evaluate.settled(scores.cpu().numpy()),
            random=random_directions(
                self.probe.one_each(x), self.fit_labels[:, 0], self.probe.one_each(held), self._test_truth,
                standardise=self.probe.standardise, seed=self.config.seed,
            ),
        )  # fmt: skip

    def _problems(self, targets: Tensor, weights: Tensor, strengths: Tensor, **options: Any) -> Problems:
        """Fits on the vectors for selection and fitting, with what they have beside the label."""
        return Problems(targets, weights, strengths, self.pairs.to(targets.device), self.columns, **options)

    def _validate(self, design: Design, strengths: list[float]) -> tuple[np.ndarray, np.ndarray]:
        """AUROC on held-out folds `[1 + shuffles, folds, strengths]`, and the true labels' scores there
        `[fit, strengths]`.

        One column per label set and fold; each strength starts from the solution of the stronger penalty
        before it.
        """
        (n, sets), count = self.fit_labels.shape, len(self.folds)
        found = np.full((sets, count, len(strengths)), np.nan)
        out_of_fold = np.zeros((n, len(strengths)))
        fold_of = np.empty(n, dtype=np.int64)
        for fold, (_, validation) in enumerate(self.folds):
            fold_of[validation] = fold
        # What is streamed may have more rows than scores and masks of all label sets leave memory for.
        step = sets if design.held else self.room.columns(n)
        for first in range(0, sets, step):
            truth, weights = self.fit_labels[:, first : first + step], None
            labels = _flags(np.repeat(truth, count, axis=1), design)
            masks = _flags(np.tile(fold_of[:, None] != np.arange(count), (1, truth.shape[1])), design)
            for at, strength in enumerate(strengths):
                each = torch.full((labels.shape[1],), strength, dtype=torch.float64, device=design.device)
                problems = self._problems(labels, masks, each, start=weights, tol=SELECTION_TOL)
                weights = self.probe.solve(design, problems).weights
                scores = self._held_out_scores(design, weights, fold_of)
                for fold, (_, validation) in enumerate(self.folds):
                    found[first : first + step, fold, at] = evaluate.auroc(
                        scores[validation], truth[validation]
                    )
                if first == 0:
                    out_of_fold[:, at] = scores[:, 0]
        # A fold without both classes says nothing of ranks; where no fold has both, nothing can be chosen.
        none = np.isnan(found).all(axis=1, keepdims=True)
        found[np.broadcast_to(none, found.shape)] = 0.5
        return found, out_of_fold

    def _held_out_scores(self, design: Design, weights: Tensor, fold_of: np.ndarray) -> np.ndarray:
        """Scores `[n, sets]` of each row by those solutions of `[r + 1, sets * folds]` that its fold had no
        part in."""
        count = len(self.folds)
        out = np.empty((len(fold_of), weights.shape[1] // count))
        for at, read in self.probe.readings(design, weights):
            which = torch.from_numpy(fold_of[at]).to(read.device)
            each = read.reshape(len(read), -1, count)
            out[at] = each[torch.arange(len(read), device=read.device), :, which].cpu().numpy()
        return evaluate.settled(out)

    def _result(self, site: str, fit: _SiteFit, text: tuple[np.ndarray, float] | None) -> SiteResult:
        # A copy, so that the shuffles' scores of all sites are not kept.
        scores, truth = fit.test_scores[:, 0].copy(), self._test_truth
        control = np.array(
            [
                evaluate.auroc(fit.test_scores[:, s : s + 1], self.test_labels[:, s])[0]
                for s in range(1, self.test_labels.shape[1])
            ]
        )
        lead = None if text is None else evaluate.difference(scores, text[0], truth, self.weights)
        return SiteResult(
            site=site,
            probe=fit.probe,
            fold_auroc=float(fit.fold_auroc[0]),
            metrics=evaluate.measure(scores, truth, self.weights),
            control=control,
            lead_over_text=lead,
            random=fit.random,
            out_of_fold=fit.out_of_fold,
            test_scores=scores,
            selectivity=evaluate.selectivity(
                scores, truth, fit.test_scores[:, 1:], self.test_labels[:, 1:], self.weights
            ),
            converged=fit.converged,
        )

    def _text_baseline(self) -> tuple[np.ndarray, float] | None:
        if not self.config.text_baseline or self.source.texts is None:
            return None
        task = self.task
        return text_scores(
            self.source.texts, task.positive, self.source.units, self.folds, task.fit, task.test
        )

    def _firing(self, best: SiteResult) -> Any:
        truth = self.task.positive[self.task.fit]
        read = self.room.reader(self.source, best.site, self.task, self.probe.name, self.probe.streams)

        def scores(rows: np.ndarray) -> np.ndarray:
            x = read(rows)
            if isinstance(x, StreamedRows):
                normal = torch.from_numpy(best.probe.coef_.T).to(x.device)
                return (x @ normal)[:, 0].cpu().numpy() + best.probe.intercept_[0]
            return best.probe.decision_function(x)

        return firing_rates(self.source, self.task, self.config, best.out_of_fold, truth, scores)


def _flags(values: np.ndarray, design: Design) -> Tensor:
    """Labels or masks `[n, k]` on the design's device; as bytes where the rows do not fit into memory."""
    return torch.from_numpy(values).to(design.device, torch.float64 if design.held else torch.bool)
