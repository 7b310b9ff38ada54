"""What estimators that only find a direction share: class means, and the log-odds along a direction.

A direction alone has no threshold and no unit. Along it the two classes are taken as normal distributions
with one variance; the log-odds of the positive class are then a line (Fisher 1936; Hastie, Tibshirani and
Friedman, The Elements of Statistical Learning, 2nd ed., section 4.3), whose slope also carries the sign.
Means and variance are those of the fitted rows, so that a direction that was fitted closely to few rows has
odds that are too sure; calibrate on held-out rows where the probabilities themselves matter.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from veridical.errors import DataError
from veridical.probes.base import Problems
from veridical.probes.solver import Design, Solution

LEAST = 1e-4
"""Least variance within the classes, as a share of the squared distance of their means: separable classes
keep finite log-odds (5,000 at the class means)."""


def alike(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The different columns `[n, u]` of `weights` `[n, k]`, and which of them each column is, `[k]`.

    Folds recur for every shuffle, and what depends on the rows alone is solved once for all of them.
    """
    different, which = torch.unique(weights, dim=1, return_inverse=True)
    return different, which.reshape(-1)


def shares(problems: Problems) -> tuple[Tensor, Tensor]:
    """What turns weights of the rows of each class into averages: one over their sums, `[k]` each.

    Where a problem lacks one class both are zero: there is no difference of means to speak of.
    """
    positive, negative = problems.totals()
    both = (positive > 0) & (negative > 0)
    high, low = (both / total.clamp_min(1e-300) for total in (positive, negative))
    return high, low


def mean_difference(design: Design, problems: Problems) -> Tensor:
    """Mean of the positive class minus mean of the negative one, `[r, k]` in the basis of `design`."""
    high, low = shares(problems)

    def averaged(at: slice) -> Tensor:
        targets, weights = problems.part(at)
        return weights * (targets * high - (1 - targets) * low)

    return design.sums(averaged)[:-1]


def prior_log_odds(problems: Problems) -> Tensor:
    """Log-odds of the classes' weights, `[k]`; finite with one class only."""
    positive, negative = problems.totals()
    share = (positive / (positive + negative).clamp_min(1e-300)).clamp(1e-6, 1 - 1e-6)
    return torch.log(share) - torch.log1p(-share)


def along(design: Design, directions: Tensor, problems: Problems) -> Solution:
    """Directions `[r, k]`, of any length and sign, as solutions in log-odds of the positive class."""
    scores = design.readings(torch.cat([directions, torch.zeros_like(directions[:1])]))
    high, low = directions.new_zeros(2, len(problems))
    squares = torch.zeros_like(high)
    for at, part in scores:
        targets, weights = problems.part(at)
        high += (weights * targets * part).sum(0)
        low += (weights * (1 - targets) * part).sum(0)
    high_share, low_share = shares(problems)
    high, low = high * high_share, low * low_share
    for at, part in scores:
        targets, weights = problems.part(at)
        squares += (weights * (part - torch.where(targets > 0.5, high, low)).square()).sum(0)
    gap, (positive, negative) = high - low, problems.totals()
    total = (positive + negative).clamp_min(1e-300)
    variance = torch.maximum(squares / total, LEAST * gap.square())
    slope = torch.where(variance > 0, gap / variance.clamp_min(1e-300), 0.0)
    intercept = prior_log_odds(problems) - slope * (high + low) / 2
    return closed(torch.cat([directions * slope, intercept[None]]))


def closed(weights: Tensor) -> Solution:
    """Solutions `[r + 1, k]` that took one step."""
    k = weights.shape[1]
    return Solution(
        weights,
        torch.ones(k, dtype=torch.int64, device=weights.device),
        torch.ones(k, dtype=torch.bool, device=weights.device),
    )


def check_contrast(problems: Problems, groups: Tensor, said: str) -> None:
    """Refuses pairs of which none has both classes: their differences say nothing of the label."""
    positive = problems.targets[:, 0].to(torch.float64)
    count = torch.bincount(groups)
    hits = torch.bincount(groups, weights=positive)
    if bool(((hits == 0) | (hits == count)).all()):
        raise DataError(
            f"the label is constant within every pair; {said} compares the rows of a pair: give pairs with a "
            "row of each class, or take another estimator"
        )


def signs_of(values: np.ndarray, name: str, rows: int) -> np.ndarray:
    """A label column of two values as -1 and 1 (in sorted order), `[rows]`; anything else is refused."""
    if values.shape != (rows,):
        raise DataError(f"{name} has shape {values.shape}; expected one value for each of {rows} rows")
    levels, codes = np.unique(values.astype(str), return_inverse=True)
    if len(levels) != 2:
        seen = ", ".join(levels[:6]) + (", ..." if len(levels) > 6 else "")
        raise DataError(f"{name} has {len(levels)} values ({seen}); expected two")
    return codes.reshape(-1) * 2.0 - 1.0
