"""Intervals of CKA and of the Procrustes distance: how much each pair moves them, to first order.

Both are smooth functions of means over rows (products and squared norms), so their variance over pairs is, to
first order, that of the sum of each pair's influence (the infinitesimal jackknife: Efron and Hastie 2016,
"Computer Age Statistical Inference", section 10.1). A row's influence needs the sums over all rows, which
are known only at the end of the pass, so the rows of some whole pairs, drawn at random, are kept until then,
within a memory that does not grow with the texts. With few pairs kept (long texts, wide models) the interval
is itself uncertain; Student's t is used with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import stats
from torch import Tensor

if TYPE_CHECKING:
    from veridical.comparison.cka import Products
    from veridical.comparison.resampling import Resampling
    from veridical.comparison.streaming import Step

MEMORY = 128 << 20
"""Bytes that may always be kept; a quarter of what CKA's products take where that is more."""
LEAST = 3
"""Pairs without which there is no interval."""


class Kept:
    """Takes the residual streams of whole pairs, those with the smallest random keys, while there is room.

    Args:
        sites: Names of the compared sites.
        resampling: Where the keys come from.
        memory: Bytes; chosen by the streams' width when not given.
    """

    def __init__(self, sites: Sequence[str], resampling: Resampling, memory: int | None = None) -> None:
        self.sites, self.seed, self.memory = list(sites), resampling.seed, memory
        self.below = 1.0
        self.seen: set[int] = set()
        self.rows: dict[int, list[tuple[Tensor, ...]]] = {}
        self.keys: dict[int, float] = {}
        self.bytes: dict[int, int] = {}

    def add(self, step: Step) -> None:
        self.seen.update(step.groups.tolist())
        for group in np.unique(step.groups).tolist():
            key = float(np.random.default_rng([self.seed, 7, group]).random())
            mine = torch.from_numpy(np.flatnonzero(step.groups == group)).to(step.row.device)
            at = torch.isin(step.row, mine).nonzero()[:, 0]
            if key >= self.below or not len(at):
                continue
            parts = tuple(side[at] for site in self.sites for side in step.streams[site])
            self.keys[group] = key
            self.rows.setdefault(group, []).append(parts)
            self.bytes[group] = self.bytes.get(group, 0) + sum(part.nbytes for part in parts)
        self._within(self.memory or self._room(step))

    def _room(self, step: Step) -> int:
        widths = [(x.shape[1], y.shape[1]) for x, y in (step.streams[site] for site in self.sites)]
        products = sum(8 * (a * a + b * b + a * b) for a, b in widths)
        return max(MEMORY, products // 4)

    def _within(self, memory: int) -> None:
        while sum(self.bytes.values()) > memory:
            last = max(self.keys, key=lambda group: self.keys[group])
            self.below = self.keys.pop(last)
            del self.rows[last], self.bytes[last]

    def vectors(self, site: str) -> tuple[Tensor, Tensor, np.ndarray]:
        """What was kept at a site: of policy and reference, `[n, d]`, and the pair of each, `[n]`."""
        at = 2 * self.sites.index(site)
        parts = [(part, group) for group, batches in self.rows.items() for part in batches]
        groups = np.repeat([group for _, group in parts], [len(part[at]) for part, _ in parts])
        return (
            torch.cat([part[at] for part, _ in parts]),
            torch.cat([part[at + 1] for part, _ in parts]),
            groups,
        )


Influence = Callable[["Products", Tensor, Tensor], Tensor]


def interval(
    value: float, influence: Influence, products: Products, kept: Kept | None, site: str,
    lowest: float = -float("inf"), highest: float = float("inf"),
) -> tuple[float, float]:  # fmt: skip
    """The 95 % interval of a figure from the influences of kept pairs; NaN where there are too few."""
    if kept is None or len(kept.rows) < LEAST or not np.isfinite(value):
        return float("nan"), float("nan")
    x, y, groups = kept.vectors(site)
    each = influence(products, x, y).double().cpu().numpy()
    codes = np.unique(groups, return_inverse=True)[1]
    sums = np.bincount(codes.reshape(-1), each)
    # The sum of squares over all pairs, from those that were kept.
    variance = len(kept.seen) * float(np.mean(np.square(sums))) / products.count**2
    reach = float(stats.t.ppf(0.975, len(sums) - 1)) * variance**0.5
    return max(lowest, value - reach), min(highest, value + reach)


def of_cka(products: Products, x: Tensor, y: Tensor) -> Tensor:
    """How much each row moves CKA, times the number of all rows; `[n]` for rows `[n, a]` and `[n, b]`."""
    both = _centred(products, x, y)
    count, norms = products.count, [v.square().sum(1) for v in both]
    terms = []
    for first, second in ((0, 1), (0, 0), (1, 1)):
        mean = products.covariance(first, second).to(both[0].dtype)
        # Without the row's own part in the mean, as the estimator without bias leaves it out.
        own = norms[first] * norms[second] / count
        along = ((both[first] @ mean) * both[second]).sum(1) - own
        terms.append(along / (products.hsic(first, second) / count**2) - 1)
    return products.cka() * (2 * terms[0] - terms[1] - terms[2])


def of_procrustes(products: Products, x: Tensor, y: Tensor) -> Tensor:
    """The same of the Procrustes distance."""
    both = _centred(products, x, y)
    cross, *norms = products.centred()
    # The rotation of the polar decomposition; directions without weight take no part.
    values, vectors = torch.linalg.eigh(cross.T @ cross)
    sure = values > 1e-12 * values[-1]
    roots = values[sure].sqrt()
    turn = (cross @ (vectors[:, sure] / roots) @ vectors[:, sure].T).to(both[0].dtype)
    nuclear, scale = float(roots.sum()), (norms[0] * norms[1]) ** 0.5
    along = products.count * ((both[0] @ turn) * both[1]).sum(1) / nuclear - 1
    sizes = [products.count * v.square().sum(1) / norm - 1 for v, norm in zip(both, norms)]
    return -2 * nuclear / scale * (along - (sizes[0] + sizes[1]) / 2)


def _centred(products: Products, x: Tensor, y: Tensor) -> list[Tensor]:
    """Rows less their means over all rows, in float32 or better."""
    kind = torch.promote_types(torch.float32, torch.promote_types(x.dtype, y.dtype))
    means = [shift + total / products.count for shift, total in zip(products.shifts, products.totals)]
    return [v.to(kind) - mean.to(kind) for v, mean in zip((x, y), means)]
