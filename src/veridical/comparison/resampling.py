"""Intervals in one pass, in memory that does not grow with the texts: the Poisson bootstrap.

A bootstrap of pairs gives each pair a multinomial weight in each resample. For many pairs these are nearly
independent Poisson(1) counts (Chamandy et al. 2012, "Estimating Uncertainty for Massive Data Streams"), which
can be drawn pair by pair. So sums are kept for every resample at once: a pair's weights depend on the seed
and its code alone, and all its rows get the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from veridical.probes.evaluate import Estimate, estimate


class Resampling:
    """Weights of pairs in `count` resamples, and random signs for a null.

    Attributes:
        count: Resamples.
        signs: Sign flips.
        seed: Of both.
    """

    def __init__(self, count: int, signs: int = 20, seed: int = 0) -> None:
        self.count, self.signs, self.seed = count, signs, seed

    def weights(self, groups: Sequence[int]) -> Tensor:
        """`[count + 1, rows]` float64 on the CPU: ones first, then how often each row counts."""
        drawn = [self._random(group, 0).poisson(1.0, self.count) for group in groups]
        whole = np.ones((1, len(groups)))
        return torch.from_numpy(np.concatenate([whole, np.array(drawn, dtype=np.float64).T]))

    def flips(self, groups: Sequence[int]) -> Tensor:
        """`[signs + 1, rows]` float64: ones first, then 1 or -1 for all rows of a pair."""
        drawn = [self._random(group, 1).integers(0, 2, self.signs) * 2.0 - 1.0 for group in groups]
        whole = np.ones((1, len(groups)))
        return torch.from_numpy(np.concatenate([whole, np.array(drawn, dtype=np.float64).T]))

    def _random(self, group: int, what: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, what, int(group)])


class Ratios:
    """Weighted sums over weighted counts, for many figures at once."""

    def __init__(self, resamples: int, figures: int) -> None:
        self.sums = torch.zeros(resamples + 1, figures, dtype=torch.float64)
        self.counts = torch.zeros_like(self.sums)

    def add(self, weights: Tensor, sums: Tensor, counts: Tensor) -> None:
        """Adds rows.

        Args:
            weights: `[resamples + 1, rows]`.
            sums: `[rows, figures]`, what each row adds.
            counts: `[rows, figures]`, tokens that it comes from.
        """
        self.sums += weights @ sums.to("cpu", torch.float64)
        self.counts += weights @ counts.to("cpu", torch.float64)

    @property
    def values(self) -> np.ndarray:
        """`[resamples + 1, figures]`: the figures, then those of each resample; NaN without tokens."""
        counts = self.counts.numpy()
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(counts > 0, self.sums.numpy() / counts, np.nan)

    def estimates(self) -> list[Estimate]:
        """Each figure with its 95 % interval."""
        values = self.values
        return [estimate(column[0], column[1:]) for column in values.T]

    def frame_columns(self) -> dict[str, np.ndarray]:
        """`value`, `low`, `high` and `tokens`, `[figures]` each."""
        values = self.values
        low, high = bounds(values[1:])
        return {"value": values[0], "low": low, "high": high, "tokens": self.counts[0].numpy().astype(int)}


def bounds(resampled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the middle 95 % of each column of `[resamples, figures]`; NaN where nothing is finite."""
    low = np.full(resampled.shape[1], np.nan)
    high = low.copy()
    some = np.isfinite(resampled).any(0) if len(resampled) else np.zeros(resampled.shape[1], dtype=bool)
    if some.any():
        low[some], high[some] = np.nanpercentile(resampled[:, some], [2.5, 97.5], axis=0)
    return low, high


EXCHANGES = 400
"""Random exchanges of the two models."""


def exchanged(
    value: float,
    change: Callable[[np.ndarray, np.ndarray], float],
    ours: np.ndarray,
    theirs: np.ndarray,
    groups: np.ndarray,
    seed: int,
    count: int = EXCHANGES,
) -> float:
    """How often a change is as large as `value` when the two models change places in random pairs.

    Where both models do the same, what each said of a pair could have come from the other, so this is an
    exact two-sided test by permutation (up to its own draws): its p is at least 1 / (count + 1).

    Args:
        value: The change that was found.
        change: From values of both models `[rows]` to the change.
        ours, theirs: Values of the two models, `[rows]`.
        groups: `[rows]`, pair of each row; a pair's rows change places together.
        seed: Of the exchanges.
        count: How many.
    """
    if np.array_equal(ours, theirs):
        return 1.0
    _, codes = np.unique(groups, return_inverse=True)
    random = np.random.default_rng([seed, 8])
    beyond = 0
    for _ in range(count):
        swap = (random.random(int(codes.max()) + 1) < 0.5)[codes.reshape(-1)]
        found = change(np.where(swap, theirs, ours), np.where(swap, ours, theirs))
        beyond += abs(found) >= abs(value) - 1e-12
    return (1 + beyond) / (1 + count)


def by_row(rows: Tensor, count: int, values: Tensor) -> Tensor:
    """Sums of `values` `[tokens, figures]` within each of `count` rows, float64 `[count, figures]`."""
    kind = torch.float64 if values.device.type != "mps" else torch.float32
    out = torch.zeros(count, *values.shape[1:], dtype=kind, device=values.device)
    return out.index_add_(0, rows, values.to(kind))
