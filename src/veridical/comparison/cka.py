"""Linear CKA of two models' activations without bias, from sums that are kept in one pass.

CKA (Kornblith et al. 2019, arXiv:1905.00414) with the unbiased estimator of HSIC (Song et al. 2012, "Feature
Selection via Dependence Maximization", eq. 5; Nguyen et al. 2021, arXiv:2010.15327). For a linear kernel
K = X X' every sum over pairs of rows in that estimator is a product of sums over rows, such as
tr(K L) = |X'Y|_F^2, so the n x n kernels are never made and any number of rows can be added. The result is
the direct formula's for all rows together, not a mean over batches.

Products of float32 activations are taken in float32 batch by batch and summed in float64; rows are shifted by
the mean of the first batch, which changes nothing in exact arithmetic and keeps digits where the mean is
large. CKA is 1 for streams that differ by a rotation and a scale; it does not see what is the same in both.
Few directions of large variance (often the first token's) decide most of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor

from veridical.comparison import influence

if TYPE_CHECKING:
    from veridical.comparison.influence import Kept
    from veridical.comparison.streaming import Step

LEAST_HALF = 128
"""Columns from which on a matrix is halved for its product with itself."""


@dataclass
class Products:
    """Sums over rows of two sets of vectors `x` `[n, a]` and `y` `[n, b]`, all in float64.

    Attributes:
        count: Rows.
        shifts: What was taken off the rows of each.
        totals: Sums of rows.
        squares: Sums of squared norms.
        own: x'x and y'y.
        cross: x'y.
        fourth: Sums of |x|^4, |y|^4 and |x|^2 |y|^2.
        scaled: Sums of |x|^2 x, |y|^2 y, |y|^2 x and |x|^2 y.
    """

    count: int = 0
    shifts: list[Tensor] = field(default_factory=list)
    totals: list[Tensor] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)
    own: list[Tensor] = field(default_factory=list)
    cross: Tensor = field(default_factory=lambda: torch.empty(0))
    fourth: list[float] = field(default_factory=list)
    scaled: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds rows `[n, a]` and `[n, b]`."""
        if not len(x):
            return
        kind = torch.promote_types(torch.float32, x.dtype)
        both = [v.to(kind) for v in (x, y)]
        if not self.count:
            self._begin(both)
        both = [v - shift.to(kind) for v, shift in zip(both, self.shifts)]
        norms = [v.square().sum(1) for v in both]
        self.count += len(x)
        # Equal streams get one product three times, so that they come out exactly equal.
        same = torch.equal(*both)
        grams = [gram(both[0])] * 2 if same else [gram(v) for v in both]
        for side, (v, norm) in enumerate(zip(both, norms)):
            self.totals[side] += v.sum(0)
            self.squares[side] += float(norm.double().sum())
            self.own[side] += grams[side]
        self.cross += grams[0] if same else both[0].T @ both[1]
        pairs = ((0, 0), (1, 1), (1, 0), (0, 1))
        for at, (of, on) in enumerate(pairs):
            self.scaled[at] += norms[of] @ both[on]
        wide = [norm.double() for norm in norms]
        for at, (a, b) in enumerate(((0, 0), (1, 1), (0, 1))):
            self.fourth[at] += float(wide[a] @ wide[b])

    def _begin(self, both: list[Tensor]) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=both[0].device)

        (a, b), self.shifts = (v.shape[1] for v in both), [v.mean(0).double() for v in both]
        self.totals, self.own, self.cross = [zeros(a), zeros(b)], [zeros(a, a), zeros(b, b)], zeros(a, b)
        self.squares, self.fourth = [0.0, 0.0], [0.0, 0.0, 0.0]
        self.scaled = [zeros(a), zeros(b), zeros(a), zeros(b)]

    def hsic(self, first: int, second: int) -> float:
        """The unbiased HSIC of x (0) or y (1) with x or y; NaN below four rows.

        Its scale is that of `count * (count - 3)` times the estimator, which cancels in CKA.
        """
        n = self.count
        if n < 4:
            return float("nan")
        cross = self.own[first] if first == second else self.cross
        fourth = self.fourth[first] if first == second else self.fourth[2]
        sums = [self.totals[side] for side in (first, second)]
        # Row sums of the kernels without their diagonals, times each other.
        scaled = [self.scaled[first], self.scaled[second]]
        if first != second:
            scaled = [self.scaled[2], self.scaled[3]]
        trace = float(cross.square().sum()) - fourth
        rows = float(sums[0] @ cross @ sums[1]) - float(sums[0] @ scaled[0]) - float(sums[1] @ scaled[1])
        rows += fourth
        whole = [float(s.square().sum()) - self.squares[side] for s, side in zip(sums, (first, second))]
        return trace + whole[0] * whole[1] / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows

    def cka(self) -> float:
        """CKA of x and y; NaN where one of them does not vary."""
        own = self.hsic(0, 0) * self.hsic(1, 1)
        return self.hsic(0, 1) / own**0.5 if own > 0 else float("nan")

    def covariance(self, first: int, second: int) -> Tensor:
        """Mean product of centred x (0) or y (1) with x or y."""
        cross = self.own[first] if first == second else self.cross
        return (cross - torch.outer(self.totals[first], self.totals[second]) / self.count) / self.count

    def centred(self) -> tuple[Tensor, float, float]:
        """The centred cross-product x'y `[a, b]` and the centred squared norms of x and of y."""
        n = max(self.count, 1)
        # Traces of the same products as the cross one, so that equal streams come out exactly equal.
        norms = [float(own.trace() - s.square().sum() / n) for own, s in zip(self.own, self.totals)]
        return self.cross - torch.outer(self.totals[0], self.totals[1]) / n, norms[0], norms[1]


def gram(v: Tensor) -> Tensor:
    """v'v of `[n, d]`: symmetric, so that a quarter of the products need not be taken."""
    half = v.shape[1] // 2
    if half < LEAST_HALF:
        return v.T @ v
    first, second = v[:, :half], v[:, half:]
    upper, lower = first.T @ v, second.T @ second
    return torch.cat([upper, torch.cat([upper[:, half:].T, lower], 1)])


class CKA:
    """Takes the residual streams of every batch.

    Args:
        sites: Names of the compared sites, in order of depth.
    """

    def __init__(self, sites: Sequence[str]) -> None:
        self.sites = list(sites)
        self.products = [Products() for _ in self.sites]

    def add(self, step: Step) -> None:
        for site, products in zip(self.sites, self.products):
            products.add(*step.streams[site])

    def frame(self, kept: Kept | None = None) -> pd.DataFrame:
        """One line per site: `cka` with `low` and `high` (95 %, from the influence of `kept` pairs; NaN
        without), and `tokens`."""
        values = [products.cka() for products in self.products]
        spans = [
            influence.interval(value, influence.of_cka, products, kept, site, highest=1.0)
            for site, value, products in zip(self.sites, values, self.products)
        ]
        return pd.DataFrame(
            {
                "site": self.sites,
                "cka": values,
                "low": [low for low, _ in spans],
                "high": [high for _, high in spans],
                "tokens": [products.count for products in self.products],
            }
        )
