"""The geometric median: the point whose distances to all others have the least sum."""

from __future__ import annotations

from torch import Tensor

STEPS = 100
TOLERANCE = 1e-6  # of the distance that a step moved, relative to the mean distance


def geometric_median(points: Tensor) -> Tensor:
    """The geometric median of `points [n, d]`, `[d]`, by Weiszfeld's iteration (1937) from the mean.

    A point that the iteration lands on is given a small distance instead of none, so the result is within the
    tolerance of the median also where that is one of the points.
    """
    middle = points.mean(0)
    for _ in range(STEPS):
        distance = (points - middle).norm(dim=-1)
        spread = distance.mean()
        if spread == 0:
            return middle
        weight = 1 / distance.clamp_min(TOLERANCE * spread)
        moved = (weight / weight.sum()) @ points
        step, middle = (moved - middle).norm(), moved
        if step <= TOLERANCE * spread:
            break
    return middle
