"""How far the residual stream moved, by layer and position: relative norm and cosine of the change.

With `x` the reference's and `y` the policy's stream at one token, the relative norm is |y - x| / |x|, and the
turn is 1 - cos(x, y) = (|y - x|^2 - (|y| - |x|)^2) / (2 |x| |y|), which is exactly 0 for equal vectors and
keeps its digits for near ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from veridical.comparison.resampling import Ratios, by_row

if TYPE_CHECKING:
    from veridical.comparison.resampling import Resampling
    from veridical.comparison.streaming import Step

POSITIONS = 128
"""Positions that are told apart; what is behind them is counted together."""
MEASURES = ("relative norm", "turn")


class Drift:
    """Takes the residual streams of every batch.

    Args:
        sites: Short names of the compared sites, in order of depth.
        resampling: Where intervals come from.
    """

    def __init__(self, sites: Sequence[str], resampling: Resampling) -> None:
        self.sites = list(sites)
        figures = len(self.sites) * len(MEASURES)
        self.overall = Ratios(resampling.count, figures)
        self.positions = Ratios(0, figures * POSITIONS)

    def add(self, step: Step) -> None:
        if not len(step.row):
            return
        values = torch.stack([value for site in self.sites for value in moved(*step.streams[site])], 1)
        ones = step.counts[:, None].expand(-1, values.shape[1])
        self.overall.add(step.weights, by_row(step.row, len(step), values), ones)
        place = step.position.clamp(max=POSITIONS - 1)
        sums = by_row(place, POSITIONS, values).T.reshape(1, -1)
        counts = torch.bincount(place, minlength=POSITIONS).double().repeat(values.shape[1])[None]
        self.positions.add(torch.ones(1, 1, dtype=torch.float64), sums, counts)

    def frame(self) -> pd.DataFrame:
        """One line per site and measure, means over tokens: `value`, `low`, `high`, `tokens`."""
        return pd.DataFrame(
            {
                "site": np.repeat(self.sites, len(MEASURES)),
                "measure": np.tile(MEASURES, len(self.sites)),
                **self.overall.frame_columns(),
            }
        )

    def position_frame(self) -> pd.DataFrame:
        """One line per site, measure and position: `value`, `tokens`."""
        figures = len(self.sites) * len(MEASURES)
        columns = self.positions.frame_columns()
        frame = pd.DataFrame(
            {
                "site": np.repeat(self.sites, len(MEASURES) * POSITIONS),
                "measure": np.tile(np.repeat(MEASURES, POSITIONS), len(self.sites)),
                "position": np.tile(np.arange(POSITIONS), figures),
                "value": columns["value"],
                "tokens": columns["tokens"],
            }
        )
        return frame.loc[frame["tokens"] > 0].reset_index(drop=True)


def moved(policy: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Relative norm of the change and turn, `[tokens]` each, of streams `[tokens, d]`; 0 where both are 0."""
    kind = torch.promote_types(torch.float32, policy.dtype)
    y, x = policy.to(kind), reference.to(kind)
    change, ours, theirs = (torch.linalg.vector_norm(v, dim=-1).double() for v in (y - x, y, x))
    least = torch.finfo(kind).tiny
    turn = (change.square() - (ours - theirs).square()) / (2 * ours * theirs).clamp_min(least)
    return change / theirs.clamp_min(least), turn.clamp(0, 2)
