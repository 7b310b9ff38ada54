"""The direction of a label (honesty, refusal) in both models: does it point the same way, is it as long?

At each site the direction is the difference of the two classes' means at the last token of a row, in each
model by itself. A direction from few rows is noisy, so its cosine between the models is read beside that of
two halves of the pairs within one model, which is the most that two equal models could be expected to show,
and beside that of directions from labels permuted over rows. For models without a shared basis (other
training runs) the cosine is meaningless; it is for a policy and the model that it started from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from veridical.comparison.resampling import bounds

if TYPE_CHECKING:
    from veridical.comparison.resampling import Resampling
    from veridical.comparison.streaming import Step

HALVES, CLASSES = 2, 2
RESAMPLES = 50
"""Resamples of pairs in which the directions are taken anew, at most; a direction is kept for each."""


class Directions:
    """Takes the residual streams at the last token of every labelled row.

    Args:
        sites: Short names of the compared sites, in order of depth.
        labels: `[rows]`, 0, 1 or -1 for none.
        groups: `[rows]`, code of each row's pair.
        resampling: Where halves and permutations come from.
    """

    def __init__(
        self, sites: Sequence[str], labels: np.ndarray, groups: np.ndarray, resampling: Resampling
    ) -> None:
        self.sites = list(sites)
        random = np.random.default_rng([resampling.seed, 3])
        count = int(groups.max(initial=-1)) + 1
        self.half = random.permutation(np.arange(count) % HALVES)
        known = np.flatnonzero(labels >= 0)
        self.shuffled = labels.copy()
        self.shuffled[known] = labels[random.permutation(known)]
        self.sums = torch.empty(0)  # the width is known with the first batch
        self.resamples = min(resampling.count, RESAMPLES)
        self.drawn = torch.empty(0)
        self.drawn_counts = torch.zeros(CLASSES, self.resamples, dtype=torch.float64)
        self.counts = torch.zeros(2, HALVES, CLASSES, dtype=torch.float64)

    def add(self, step: Step) -> None:
        keep = (step.labels >= 0) & (step.last.cpu().numpy() >= 0)
        if not keep.any():
            return
        ends = step.last[torch.from_numpy(keep).to(step.last.device)]
        half = self.half[step.groups[keep]]
        kinds = np.stack([step.labels[keep], self.shuffled[step.numbers[keep]]])
        code = torch.from_numpy(half * CLASSES + kinds)
        onto = torch.nn.functional.one_hot(code, HALVES * CLASSES).double().transpose(1, 2)
        self.counts += onto.sum(2).reshape(2, HALVES, CLASSES)
        onto = onto.to(ends.device)
        labels = torch.nn.functional.one_hot(torch.from_numpy(step.labels[keep]), CLASSES).double().T
        drawn = labels[:, None] * step.weights[1 : self.resamples + 1, torch.from_numpy(keep)]
        self.drawn_counts += drawn.sum(2)
        drawn = drawn.to(ends.device)
        for at, site in enumerate(self.sites):
            for side, stream in enumerate(step.streams[site]):
                if not self.sums.numel():
                    shape = (2, len(self.sites), 2, HALVES, CLASSES, stream.shape[1])
                    self.sums = torch.zeros(shape, dtype=torch.float64, device=ends.device)
                    shape = (2, len(self.sites), CLASSES, self.resamples, stream.shape[1])
                    self.drawn = torch.zeros(shape, dtype=torch.float64, device=ends.device)
                read = stream[ends].double()
                self.sums[side, at] += (onto @ read).reshape(self.sums.shape[2:])
                self.drawn[side, at] += drawn @ read

    def vectors(self) -> Tensor:
        """`[model, sites, d]` float64: direction of class 1 less class 0 in policy and reference.

        Zeros where a class has no rows.
        """
        return self._whole(0)

    def _whole(self, kind: int) -> Tensor:
        counts = self.counts[kind].sum(0).to(self.sums.device)
        means = self.sums[:, :, kind].sum(2) / counts.clamp_min(1)[:, None]
        return means[:, :, 1] - means[:, :, 0]

    def frame(self) -> pd.DataFrame:
        """One line per site.

        Columns: `cosine` of the two models' directions with `low` and `high` (95 %, over resamples of pairs),
        `halves_policy` and `halves_reference` (cosine of the
        directions of two halves of the pairs), `shuffled` (cosine of the models' directions for permuted
        labels), `norm_ratio` (policy over reference), `rows`. Empty without labels of two classes.
        """
        columns = [
            "site", "cosine", "low", "high", "halves_policy", "halves_reference", "shuffled", "norm_ratio",
            "rows",
        ]  # fmt: skip
        if not bool((self.counts[0] > 0).all()):
            return pd.DataFrame(columns=columns)
        counts = self.counts[0].to(self.sums.device).clamp_min(1)
        means = self.sums[:, :, 0] / counts[..., None]
        halves = means[:, :, :, 1] - means[:, :, :, 0]
        own, shuffled = self._whole(0), self._whole(1)
        each = self.drawn / self.drawn_counts.to(self.drawn.device).clamp_min(1)[..., None]
        each = each[:, :, 1] - each[:, :, 0]
        low, high = bounds(_cosine(each[0], each[1]).T)
        found = {
            "site": self.sites,
            "cosine": _cosine(own[0], own[1]),
            "low": low,
            "high": high,
            "halves_policy": _cosine(halves[0, :, 0], halves[0, :, 1]),
            "halves_reference": _cosine(halves[1, :, 0], halves[1, :, 1]),
            "shuffled": _cosine(shuffled[0], shuffled[1]),
            "norm_ratio": (own[0].norm(dim=-1) / own[1].norm(dim=-1)).cpu().numpy(),
            "rows": int(self.counts[0].sum()),
        }
        return pd.DataFrame(found, columns=columns)


def _cosine(a: Tensor, b: Tensor) -> np.ndarray:
    return ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).cpu().numpy()
