"""`fit_probes`: a probe for every site, chosen on folds by pair, reported on pairs that took no part.

Strength and site are chosen by the mean AUROC over folds of the fitted pairs. The figure of each site is
that of one fit on all those pairs, at the chosen strength, scored on the held-out pairs. The shuffled
control goes through the same choice with labels permuted over pairs. Standardisation uses the fitted pairs'
mean and variance in every
fold: the labels of a fold's held-out pairs are never seen, their spread is; the test pairs enter nothing.
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
from veridical.probes.solver import Design

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


@dataclass(frozen=True)
class _SiteFit:
    """One site, solved: everything that is scored later, on the vectors of the task.

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
        fits: dict[str, _SiteFit] = {}
        with bar(len(self.source.sites), "probes", "sites", self.config.progress) as progress:
            for site in self.source.sites:
                fits[site] = self._fit_site(site)
                progress.update(1)
        best = max(fits, key=lambda site: round(fits[site].fold_auroc[0], 9))
        results = tuple(self._result(site, fit, text) for site, fit in fits.items())
        notes = self.probe.notes(self.source, self.task)
        return ProbeSweep.assemble(
            config=self.config,
            source=replace(self.source, notes=(*self.source.notes, *notes)),
            task=self.task,
            results=results,
            best_site=best,
            selected_control=self._selected_control(fits),
            text=None if text is None else evaluate.measure(text[0], self._test_truth, self.weights),
            text_fold_auroc=None if text is None else text[1],
            firing=self._firing(best, fits[best]),
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
        x = self.source.vectors(site, self.task.fit)
        design = self.probe.space(x)
        strengths = sorted(self.config.strengths) if self.probe.tuned else [1.0]
        by_fold, out_of_fold = self._validate(design, strengths)
        found = np.nanmean(by_fold, axis=1)  # [1 + shuffles, strengths]
        # The strongest penalty wins ties.
        chosen = np.argmax(np.round(found, 9), axis=1)
        labels = torch.from_numpy(self.fit_labels.astype(np.float64)).to(design.rows.device)
        each = torch.tensor(strengths, dtype=torch.float64)[torch.from_numpy(chosen)].to(labels.device)
        final = self.probe.solve(design, self._problems(labels, torch.ones_like(labels), each))
        held = self.source.vectors(site, self.task.test)
        scores = self.probe.held_out(design, final.weights, held)
        probe = self.probe.at(strengths[chosen[0]])
        return _SiteFit(
            fold_auroc=found[np.arange(len(chosen)), chosen],
            probe=probe.settle(self.task.classes, design, final),
            converged=bool(final.converged[0]),
            out_of_fold=out_of_fold[:, chosen[0]],
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
        n, sets, count = len(self.fit_labels), self.fit_labels.shape[1], len(self.folds)
        device = design.rows.device
        train = np.ones((n, count))
        for fold, (_, validation) in enumerate(self.folds):
            train[validation, fold] = 0
        labels = torch.from_numpy(np.repeat(self.fit_labels, count, axis=1).astype(np.float64)).to(device)
        masks = torch.from_numpy(np.tile(train, (1, sets))).to(device)
        found = np.full((sets, count, len(strengths)), np.nan)
        out_of_fold = np.zeros((n, len(strengths)))
        weights = None
        for at, strength in enumerate(strengths):
            each = torch.full((sets * count,), strength, dtype=torch.float64, device=device)
            problems = self._problems(labels, masks, each, start=weights, tol=SELECTION_TOL)
            weights = self.probe.solve(design, problems).weights
            scores = evaluate.settled(self.probe.scores(design, weights).cpu().numpy()).reshape(
                n, sets, count
            )
            for fold, (_, validation) in enumerate(self.folds):
                part = scores[validation, :, fold]
                found[:, fold, at] = evaluate.auroc(part, self.fit_labels[validation])
                out_of_fold[validation, at] = part[:, 0]
        # A fold without both classes says nothing of ranks; where no fold has both, nothing can be chosen.
        none = np.isnan(found).all(axis=1, keepdims=True)
        found[np.broadcast_to(none, found.shape)] = 0.5
        return found, out_of_fold

    def _result(self, site: str, fit: _SiteFit, text: tuple[np.ndarray, float] | None) -> SiteResult:
        scores, truth = fit.test_scores[:, 0], self._test_truth
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

    def _selected_control(self, fits: Mapping[str, _SiteFit]) -> np.ndarray:
        """Test AUROC of each shuffle at the site that its own folds choose: what choosing alone can reach."""
        folds = np.stack([fit.fold_auroc for fit in fits.values()])  # [sites, 1 + shuffles]
        tests = [fit.test_scores for fit in fits.values()]
        return np.array(
            [
                evaluate.auroc(tests[int(np.argmax(folds[:, s]))][:, s : s + 1], self.test_labels[:, s])[0]
                for s in range(1, folds.shape[1])
            ]
        )

    def _text_baseline(self) -> tuple[np.ndarray, float] | None:
        if not self.config.text_baseline or self.source.texts is None:
            return None
        task = self.task
        return text_scores(
            self.source.texts, task.positive, self.source.units, self.folds, task.fit, task.test
        )

    def _firing(self, site: str, fit: _SiteFit) -> Any:
        truth = self.task.positive[self.task.fit]

        def scores(rows: np.ndarray) -> np.ndarray:
            return fit.probe.decision_function(self.source.vectors(site, rows))

        return firing_rates(self.source, self.task, self.config, fit.out_of_fold, truth, scores)
