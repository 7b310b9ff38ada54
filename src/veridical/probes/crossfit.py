"""Nested cross-fitting: every row is judged by a probe that saw nothing of its pair, and none is wasted.

Pairs are dealt into folds. For each fold one probe is fitted on the others, at the strength (and at the site)
that do best when the other folds in turn are held out as well; so choosing never sees what is reported (Varma
and Simon 2006, "Bias in error estimation when using cross-validation for model selection"). One further probe
is fitted on all pairs, for use elsewhere. With `K` folds these are `K (K - 1) / 2 + K + 1` fits per strength,
all columns of one design. As in a sweep, mean and variance for standardising are those of all fitted rows:
labels of a held-out pair are never seen, its spread is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch

from veridical.errors import DataError
from veridical.probes import evaluate
from veridical.probes.base import LinearProbe, Problems, group_codes
from veridical.probes.data import Source
from veridical.probes.solver import Solution

SELECTION_TOL = 1e-4
"""Relative error of the coefficients while choosing."""
Candidate = tuple[str, str]
"""Name of an estimator, and a site."""


@dataclass(frozen=True)
class Plan:
    """Who is fitted on what, for the `n` vectors of a source.

    Attributes:
        fit: `[n]` bool, vectors that may be fitted on.
        positive: `[n]` bool, the label; meaningful on `fit` and `judged`.
        judged: `[n]` bool, vectors on whose AUROC strength and site are chosen.
        fold_of: `[n]`, fold of each vector's pair.
        folds: How many folds there are.
        strengths: Values of C that are tried.
    """

    fit: np.ndarray
    positive: np.ndarray
    judged: np.ndarray
    fold_of: np.ndarray
    folds: int
    strengths: tuple[float, ...]


@dataclass(frozen=True)
class Crossed:
    """One estimator at one site.

    Attributes:
        scores: `[n]`, decision value of each vector by the probe of the fold that held its pair out.
        inner: `[folds, n]`, what fold `k` knew when it chose: decision values by probes that saw neither the
            vector's pair nor fold `k`; NaN on fold `k`. Thresholds for fold `k` are set on them.
        found: `[folds]`, mean AUROC over the other folds, by which fold `k` chose.
        probes: The probe of each fold, and last that of all pairs.
        whole: Mean AUROC over folds, by which its strength was chosen.
        converged: Whether the solver reached its tolerance everywhere.
    """

    scores: np.ndarray
    inner: np.ndarray
    found: np.ndarray
    probes: tuple[LinearProbe, ...]
    whole: float
    converged: bool

    @property
    def probe(self) -> LinearProbe:
        """The probe of all pairs."""
        return self.probes[-1]


@dataclass(frozen=True)
class Nested:
    """Several candidates, and the choice between them.

    Attributes:
        candidates: By (estimator, site).
        by_fold: Candidate that each fold chose without its own pairs.
        best: Candidate of the probe of all pairs.
    """

    candidates: Mapping[Candidate, Crossed]
    by_fold: tuple[Candidate, ...]
    best: Candidate

    @classmethod
    def of(cls, candidates: Mapping[Candidate, Crossed]) -> Nested:
        """Lets every fold choose; of equals the first wins."""
        keys = list(candidates)
        found = np.round(np.stack([candidates[key].found for key in keys]), 9)
        whole = np.round([candidates[key].whole for key in keys], 9)
        return cls(candidates, tuple(keys[at] for at in found.argmax(0)), keys[int(np.argmax(whole))])

    def scores(self, fold_of: np.ndarray) -> np.ndarray:
        """`[n]`, decision value of each vector by the candidate that its fold chose."""
        chosen = np.stack([self.candidates[key].scores for key in self.by_fold])
        return chosen[fold_of, np.arange(len(fold_of))]

    def inner(self) -> np.ndarray:
        """`[folds, n]`, as `Crossed.inner`, for the candidate that each fold chose."""
        return np.stack([self.candidates[key].inner[fold] for fold, key in enumerate(self.by_fold)])


def fold_numbers(groups: np.ndarray, folds: int, seed: int, strata: np.ndarray) -> np.ndarray:
    """Fold of each row, `[n]`, pairs kept together; `strata` `[n]` are spread evenly."""
    from veridical.pairs import splits

    number = np.empty(len(groups), dtype=np.int64)
    for fold, (_, held) in enumerate(splits.folds(groups, folds, seed, strata)):
        number[held] = fold
    return number


def check_plan(name: str, plan: Plan, groups: np.ndarray) -> None:
    """Refuses a plan that leaves too few pairs, or one class, where some folds are left out."""
    pairs = len(np.unique(groups[plan.fit]))
    if pairs < plan.folds:
        raise DataError(
            f"{pairs} pairs are left to fit {name} on {plan.folds} folds; give more pairs, or ask "
            "for fewer folds"
        )
    for k in range(plan.folds):
        for j in range(plan.folds):
            labels = plan.positive[plan.fit & (plan.fold_of != k) & (plan.fold_of != j)]
            if not len(labels) or labels.all() or not labels.any():
                raise DataError(
                    f"{name} has one class only without folds {k + 1} and {j + 1} of {plan.folds}; "
                    "give more pairs, or ask for fewer folds"
                )


def cross_fit(source: Source, site: str, plan: Plan, probe: LinearProbe) -> Crossed:
    """Fits `probe` at one site for every fold and pair of folds left out, and for all pairs."""
    rows = np.flatnonzero(plan.fit)
    design = probe.space(source.vectors(site, rows))
    every = source.vectors(site, np.arange(len(source)))
    left_out = [(), *((k,) for k in range(plan.folds)), *combinations(range(plan.folds), 2)]
    at = {out: number for number, out in enumerate(left_out)}
    masks = np.stack([~np.isin(plan.fold_of[rows], out) for out in left_out], 1).astype(np.float64)
    strengths = sorted(plan.strengths) if probe.tuned else [1.0]
    device = design.rows.device
    problems = Problems(
        torch.from_numpy(np.repeat(plan.positive[rows, None], len(left_out), 1).astype(np.float64)).to(
            device
        ),
        torch.from_numpy(masks).to(device),
        torch.ones(len(left_out), dtype=torch.float64, device=device),
        group_codes(source.groups[rows], len(rows)).to(device),
        probe.beside(source, rows),
    )

    def scored(solution: Solution) -> np.ndarray:
        return evaluate.settled(probe.held_out(design, solution.weights, every).cpu().numpy())

    scores, start = [], None
    for strength in strengths:
        each = torch.full_like(problems.strengths, strength)
        solution = probe.solve(design, replace(problems, strengths=each, start=start, tol=SELECTION_TOL))
        start = solution.weights
        scores.append(scored(solution))
    inner_auroc, whole_auroc = _choices(plan, at, np.stack(scores))
    chosen = np.argmax(np.round(inner_auroc, 9), axis=0)  # [folds]; the strongest penalty wins ties
    final = int(np.argmax(np.round(whole_auroc, 9)))
    kept = [strengths[s] for s in (*chosen, final)]
    which = torch.tensor([at[(k,)] for k in range(plan.folds)] + [at[()]], device=device)
    exact = replace(problems.pick(which), strengths=torch.tensor(kept, dtype=torch.float64, device=device))
    solution = probe.solve(design, exact)
    inner = np.full((plan.folds, len(source)), np.nan)
    for k in range(plan.folds):
        for j in range(plan.folds):
            if j != k:
                held = plan.fold_of == j
                inner[k, held] = scores[chosen[k]][held, at[(min(j, k), max(j, k))]]
    return Crossed(
        scores=scored(solution)[np.arange(len(source)), plan.fold_of],
        inner=inner,
        found=inner_auroc[chosen, np.arange(plan.folds)],
        probes=tuple(
            probe.at(strength).settle(np.array([False, True]), design, _one(solution, number))
            for number, strength in enumerate(kept)
        ),
        whole=float(whole_auroc[final]),
        converged=bool(solution.converged.all()),
    )


def _choices(
    plan: Plan, at: Mapping[tuple[int, ...], int], scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """AUROC by which each fold chooses `[strengths, folds]`, and by which the probe of all pairs does.

    A fold without both classes says nothing of ranks; where no fold has both, nothing can be chosen (0.5).
    """
    folds = range(plan.folds)
    held = [plan.judged & (plan.fold_of == k) for k in folds]

    def auroc(out: tuple[int, ...], fold: int) -> np.ndarray:
        rows = held[fold]
        if not rows.any():
            return np.full(len(scores), np.nan)
        return evaluate.auroc(scores[:, rows, at[out]].T, plan.positive[rows])

    inner = np.full((len(scores), plan.folds), 0.5)
    for k in folds:
        inner[:, k] = _mean([auroc((min(j, k), max(j, k)), j) for j in folds if j != k])
    return inner, _mean([auroc((k,), k) for k in folds])


def _one(solution: Solution, number: int) -> Solution:
    """One of the solved problems."""
    at = slice(number, number + 1)
    return Solution(solution.weights[:, at], solution.steps[at], solution.converged[at])


def _mean(found: list[np.ndarray]) -> np.ndarray:
    kept = [values for values in found if not np.isnan(values).any()]
    return np.mean(kept, axis=0) if kept else np.full(len(found[0]), 0.5)
