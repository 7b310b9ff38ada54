"""Contrast-consistent search: a direction on which a pair contradicts itself.

Burns, Ye, Klein and Steinhardt 2022, arXiv:2212.03827. Found without labels: the probabilities of the two
sides of a pair should add up to one (consistency) and should not both be a half (confidence).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from veridical.errors import DataError
from veridical.probes.base import LinearProbe, Problems
from veridical.probes.directions import alike, along, check_contrast, signs_of
from veridical.probes.lbfgs import minimise
from veridical.probes.solver import Design, Solution

SAME = 1e-7
"""Losses this close are one minimum, found from several starts; the first start wins."""


class CCSProbe(LinearProbe):
    """The direction on which the two sides of each pair disagree most surely.

    Minimises over `theta = (w, b)` the mean over pairs of `(p1 + p2 - 1)^2 + min(p1, p2)^2` plus
    `decay * |w|^2 / 2`, with `p = sigmoid(w . x + b)` and the mean of each side subtracted from it first,
    so that what only tells the sides apart ("yes" from "no") cannot serve. The loss has several minima: the
    search starts from `restarts` seeded points and keeps the one of least loss, which it reaches by L-BFGS.
    The authors run Adam with a weight decay of 0.01; here the decay is part of the loss, so that a minimum
    is defined also with fewer pairs than features.

    A pair is the two sides' mean rows: with `side`, a label column of two values, those of its rows that have
    each value, however many; without it a pair has two rows, whose order is drawn from `seed` and not from
    the label. Rows fitted by hand without groups are pairs in order: 0 and 1, 2 and 3, and so on. Rows
    without a partner do not enter the search. Labels give only the sign, and slope and intercept of the
    log-odds of a single row along `w` (see `directions`).

    Nothing in the loss speaks of truth: it finds the most consistent feature of the pairs, and where another
    feature also flips within pairs and is stronger (whose opinion it is, a word at the end), it finds that
    one (Farquhar et al. 2023, arXiv:2312.10029).

    Args:
        side: Label column whose two values tell the sides of a pair apart; None for pairs of two rows.
        restarts: Starting points of the search.
        decay: Weight of `|w|^2 / 2` in the loss, on activations as they are searched.
        seed: Of starting points and sides.
        max_iter: Steps of the search at most.
        standardise: Scale every feature to variance 1 first.
    """

    name = "ccs"
    columns = ("side",)

    def __init__(
        self,
        side: str | None = None,
        *,
        restarts: int = 10,
        decay: float = 0.01,
        seed: int = 0,
        max_iter: int = 500,
        standardise: bool = True,
    ) -> None:
        self.side = side
        self.restarts = restarts
        self.decay = decay
        self.seed = seed
        self.max_iter = max_iter
        self.standardise = standardise

    def solve(self, design: Design, problems: Problems) -> Solution:
        if self.restarts < 1:
            raise DataError(f"restarts is {self.restarts!r}; expected at least 1")
        if not self.decay > 0:
            raise DataError(f"decay is {self.decay!r}; expected a number above 0")
        groups, signs = self._sides(len(design.rows), problems)
        different, which = alike(problems.weights)
        rows, sides = design.rows[:, :-1], (signs > 0, signs < 0)
        whole = torch.stack([torch.bincount(groups[side], minlength=int(groups.max()) + 1) for side in sides])
        paired = (whole > 0).all(0)
        if int(paired.sum()) < 2:
            raise DataError(f"{int(paired.sum())} pairs have both sides; CCS needs at least 2")
        one, other = (_means(rows, groups, side)[paired] for side in sides)
        # A pair counts with its rows: folds, bootstraps and learning curves give all of them the same weight.
        counts = torch.minimum(*(_least(different, groups, side)[paired] for side in sides))
        found, steps, converged = self._search(one, other, counts, design)
        solution = along(design, found[:, which], problems)
        return Solution(solution.weights, steps[which], converged[which])

    def said(self) -> str:
        sides = f"sides by {self.side}, " if self.side else ""
        return f"contrast-consistent search, {sides}{self.restarts} starts, decay = {self.decay:g}"

    def _sides(self, rows: int, problems: Problems) -> tuple[Tensor, Tensor]:
        """Pair of each row, and its side as -1 or 1, `[rows]` each."""
        device = problems.targets.device
        groups = problems.groups
        if groups is None:
            groups = torch.arange(rows, device=device) // 2
        check_contrast(problems, groups, "CCS")
        largest = int(torch.bincount(groups).max())
        if "side" in problems.columns:
            signs = torch.from_numpy(signs_of(problems.columns["side"], "side", rows)).to(device)
            agree = (signs > 0) == (problems.targets[:, 0] > 0.5)
            if bool(agree.all()) or not bool(agree.any()):
                raise DataError(
                    "side tells the label of every row, and CCS takes out what tells the sides apart; name a "
                    "column whose sides hold both classes, such as the answer that a statement ends in"
                )
        elif self.side is not None:
            raise DataError(f"CCSProbe(side={self.side!r}) needs that column: fit(X, y, groups, side=values)")
        elif largest > 2:
            raise DataError(
                f"a pair has {largest} rows; CCS needs two sides: name the label column that tells them "
                "apart with CCSProbe(side=...)"
            )
        else:
            signs = _drawn(groups, self.seed)
        return groups, signs

    def _search(self, one: Tensor, other: Tensor, counts: Tensor, design: Design) -> tuple[Tensor, ...]:
        """Directions `[r, u]` of least loss for the columns of `counts` `[pairs, u]`, steps, convergence."""
        sets, width = counts.shape[1], one.shape[1]
        random = torch.Generator().manual_seed(self.seed)
        start = torch.randn(width + 1, self.restarts, generator=random, dtype=torch.float64).to(one)
        # Unit spread of the scores, as the authors' start has on normalised activations.
        spread = design.second_moment[:-1]
        start[:-1] /= spread.sum().sqrt().clamp_min(1e-300)
        # Only the penalty acts where no row has anything; the answer there is 0, not the rest of a start.
        start[:-1] *= (spread > 1e-12 * spread.amax())[:, None]
        start[-1] = 0
        share = counts / counts.sum(0).clamp_min(1e-300)
        share = share.repeat_interleave(self.restarts, dim=1)
        # Subtracting a side's mean from its rows is adding a constant to the scores, in each fold its own.
        means = torch.stack([one.T @ share, other.T @ share])

        begin = start.repeat(1, sets)
        contrast = Contrast(one, other, means, share, self.decay, torch.ones_like(share[:1]))
        _, kept = contrast.value(contrast.readings(begin), begin)
        # The first step is no longer than 1; later ones have a curvature to go by.
        length = contrast.gradient(kept, begin).norm(dim=0, keepdim=True)
        contrast = replace(contrast, inverse=1 / length.clamp_min(1))
        reached = minimise(contrast, begin, self.max_iter, norm=1e-7)
        losses = reached.values.reshape(sets, self.restarts)
        best = torch.argmax((losses <= losses.amin(1, keepdim=True) + SAME).to(torch.int8), dim=1)
        best += self.restarts * torch.arange(sets, device=best.device)
        return reached.points[:-1, best], reached.steps[best], reached.converged[best]


@dataclass(frozen=True)
class Contrast:
    """The loss of normals and intercepts `theta` `[r + 1, k]` by column, as `lbfgs.minimise` asks for it.

    Attributes:
        one: `[pairs, r]`, first sides.
        other: `[pairs, r]`, second sides.
        means: `[2, r, k]`, mean of each side in each problem.
        share: `[pairs, k]`, weight of each pair; columns add up to 1.
        decay: Weight of `|w|^2 / 2`.
        inverse: `[1, k]`, lengths of the first steps relative to the gradient.
    """

    one: Tensor
    other: Tensor
    means: Tensor
    share: Tensor
    decay: float
    inverse: Tensor

    def readings(self, theta: Tensor) -> Tensor:
        """Scores of both sides, `[2, pairs, k]`."""
        w, b = theta[:-1], theta[-1]
        less = b - (self.means * w).sum(1)
        return torch.stack([self.one @ w + less[0], self.other @ w + less[1]])

    def value(self, readings: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Losses `[k]`, and the probabilities of both sides."""
        sides = torch.sigmoid(readings)
        p, q = sides
        losses = (self.share * ((p + q - 1).square() + torch.minimum(p, q).square())).sum(0)
        return losses + self.decay / 2 * theta[:-1].square().sum(0), sides

    def gradient(self, sides: Tensor, theta: Tensor) -> Tensor:
        """Gradients `[r + 1, k]`."""
        p, q = sides
        apart = p + q - 1
        first = self.share * 2 * (apart + torch.where(p <= q, p, 0.0)) * p * (1 - p)
        second = self.share * 2 * (apart + torch.where(p <= q, 0.0, q)) * q * (1 - q)
        ends = first.sum(0), second.sum(0)
        slope = self.one.T @ first - self.means[0] * ends[0] + self.other.T @ second - self.means[1] * ends[1]
        return torch.cat([slope + self.decay * theta[:-1], (ends[0] + ends[1])[None]])

    def pick(self, columns: Tensor) -> Contrast:
        """Some of the columns."""
        parts = {name: getattr(self, name)[..., columns] for name in ("means", "share", "inverse")}
        return replace(self, **parts)


def _means(rows: Tensor, groups: Tensor, side: Tensor) -> Tensor:
    """Mean of the rows of one side of each group, `[groups, r]`; 0 where there is none."""
    count = int(groups.max()) + 1
    sums = rows.new_zeros(count, rows.shape[1]).index_add_(0, groups[side], rows[side])
    return sums / torch.bincount(groups[side], minlength=count).clamp_min(1)[:, None]


def _least(weights: Tensor, groups: Tensor, side: Tensor) -> Tensor:
    """Least weight of the rows of one side of each group, `[groups, u]`; infinite where there is none."""
    least = weights.new_full((int(groups.max()) + 1, weights.shape[1]), float("inf"))
    inside = weights[side]
    return least.scatter_reduce_(0, groups[side][:, None].expand_as(inside), inside, "amin")


def _drawn(groups: Tensor, seed: int) -> Tensor:
    """Sides for pairs of at most two rows, `[rows]` of -1 and 1: the first row's is drawn."""
    drawn = np.random.default_rng([seed, 4]).integers(0, 2, int(groups.max()) + 1) * 2.0 - 1.0
    order = torch.argsort(groups, stable=True)
    ordered = groups[order]
    again = torch.zeros(len(groups), dtype=torch.bool, device=groups.device)
    again[order[1:]] = ordered[1:] == ordered[:-1]
    side = torch.from_numpy(drawn).to(groups.device)[groups]
    return torch.where(again, -side, side)
