"""Linear artificial tomography (Zou et al. 2023, arXiv:2310.01405): the main axis of differences in pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from veridical.errors import DataError
from veridical.probes.base import LinearProbe, Problems
from veridical.probes.directions import alike, along, check_contrast
from veridical.probes.solver import Design, Solution


class LATProbe(LinearProbe):
    """First principal component of the differences between the rows of a pair, each taken in both orders.

    The direction is found without labels; they give only its sign, and slope and intercept of the log-odds
    along it (see `directions`). Over a pair of `n` rows, `sum_{i<j} (x_i - x_j)(x_i - x_j)'` equals
    `n sum_i (x_i - m)(x_i - m)'` with `m` the pair's mean, so the differences are never formed. Rows without
    pairs are taken as one group: differences between any two rows, the method's form for unpaired stimuli.

    It finds whatever varies most within pairs. Where that is not the label (the name that differs, the length
    of the answer), it reads that, and its AUROC falls to chance; see its figure beside a probe with labels.

    Args:
        standardise: Scale every feature to variance 1 first; the paper does not.
    """

    name = "lat"

    def __init__(self, *, standardise: bool = False) -> None:
        self.standardise = standardise

    def solve(self, design: Design, problems: Problems) -> Solution:
        rows, groups = design.rows[:, :-1], problems.groups
        if groups is None:
            groups = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        else:
            check_contrast(problems, groups, "LAT")
        different, which = alike(problems.weights)
        axes = torch.stack([_main_axis(rows, weight, groups) for weight in different.T], 1)
        return along(design, axes[:, which], problems)

    def said(self) -> str:
        return f"first principal component of differences within pairs, standardise = {self.standardise}"


def _main_axis(rows: Tensor, weight: Tensor, groups: Tensor) -> Tensor:
    """Unit axis `[r]` of the largest spread of differences within groups."""
    count = int(groups.max()) + 1
    total = weight.new_zeros(count).index_add_(0, groups, weight)
    sums = rows.new_zeros(count, rows.shape[1]).index_add_(0, groups, weight[:, None] * rows)
    inner = rows - (sums / total.clamp_min(1e-300)[:, None])[groups]
    # Rows that count at all, not their weight: a pair that is drawn twice counts twice, not four times.
    sizes = torch.bincount(groups[weight > 0], minlength=count)
    scatter = inner.T @ ((weight * sizes[groups])[:, None] * inner)
    values, vectors = torch.linalg.eigh(scatter)
    if not float(values[-1]) > 1e-20 * float(rows.square().sum()):
        raise DataError(
            "no pair has two rows that differ; LAT compares the rows of a pair: check the groups, or fit "
            "without them"
        )
    return vectors[:, -1]
