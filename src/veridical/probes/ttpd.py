"""TTPD: training of truth and polarity direction (Bürger, Hamprecht and Nadler 2024, arXiv:2407.12831)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from veridical.errors import DataError, unknown
from veridical.probes.base import LinearProbe, Problems
from veridical.probes.directions import alike, closed, signs_of
from veridical.probes.solver import Design, Solution, solve

if TYPE_CHECKING:
    from veridical.probes.data import Source

WEAK = 1e4
"""C of the last regression, on projections of variance 1: felt only where they separate."""


class TTPDProbe(LinearProbe):
    """A general truth direction, apart from the one that turns over in negated statements.

    With truth `t = +-1` and polarity `p = +-1` (affirmative or negated), three steps:

    1. least squares of the centred activations on truth and truth times polarity,
       `x_i - mean = t_i t_G + t_i p_i t_P`, gives the general direction `t_G` and the polarity-sensitive
       `t_P`;
    2. a logistic regression of the polarity on the activations gives the polarity direction;
    3. a logistic regression of the truth on the two projections `x . t_G` and `x . polarity direction` gives
       the decision value, which is linear in `x`.

    A probe that is fitted on affirmative statements alone mixes `t_G` with `t_P` and inverts on negated ones;
    this one needs both kinds to tell them apart, and the more balanced, the better. The paper centres the
    activations of each topic by itself and regresses without a penalty. Here they are centred over all fitted
    rows; the polarity's regression has the L2 penalty `C` on activations of mean variance 1, since with fewer
    rows than features the polarity is separable and its direction would not be defined; and the last one has
    a penalty that is felt only where the projections separate.

    Args:
        polarity: Label column of two values (which value is which does not matter); None where all statements
            are affirmative: `t_G` is then the mean of `t_i (x_i - mean)` and stands alone, as in the
            authors' code.
        C: Inverse strength of the penalty of the polarity's regression.
        standardise: Scale every feature to variance 1 first; the paper does not.
    """

    name = "ttpd"
    columns = ("polarity",)

    def __init__(
        self, polarity: str | None = "polarity", *, C: float = 1.0, standardise: bool = False
    ) -> None:
        self.polarity = polarity
        self.C = C
        self.standardise = standardise

    def solve(self, design: Design, problems: Problems) -> Solution:
        polarity = self._polarities(len(design.rows), problems)
        directions = truth_directions(design, problems, polarity)[0][:, None]
        if polarity is not None:
            other = self._polarity_directions(design, problems, polarity)
            directions = torch.cat([directions, other[:, None]], 1)
        solved = [
            self._decision(design, directions[:, :, at], problems.pick(torch.tensor([at])))
            for at in range(len(problems))
        ]
        return closed(torch.cat(solved, 1))

    def said(self) -> str:
        by = f"polarity by {self.polarity}" if self.polarity else "without polarity"
        return f"truth and polarity directions (TTPD), {by}, C = {self.C:g}, standardise = {self.standardise}"

    def beside(self, source: Source, rows: np.ndarray) -> dict[str, np.ndarray]:
        if self.polarity is not None and self.polarity not in source.columns:
            raise unknown(
                "column",
                self.polarity,
                source.columns,
                "TTPD reads a column of two values beside the label, which says of each statement whether "
                f"it is affirmative or negated: give the data such a column named {self.polarity}, or name "
                'yours with TTPDProbe(polarity="column"), or take TTPDProbe(polarity=None) where all '
                "statements are affirmative (on the command line: --estimator ttpd:polarity=column, or "
                "ttpd:polarity=null)",
            )
        return super().beside(source, rows)

    def _polarities(self, rows: int, problems: Problems) -> Tensor | None:
        if "polarity" not in problems.columns:
            if self.polarity is None:
                return None
            raise DataError(
                f"TTPDProbe(polarity={self.polarity!r}) needs that column: fit(X, y, polarity=values), or "
                "polarity=None for affirmative statements alone"
            )
        values = signs_of(problems.columns["polarity"], self.polarity or "polarity", rows)
        return torch.from_numpy(values).to(problems.targets)

    def _polarity_directions(self, design: Design, problems: Problems, polarity: Tensor) -> Tensor:
        """Normals `[r, k]` of the polarity's logistic regression; one for all labels on the same rows."""
        different, which = alike(problems.weights)
        count = different.shape[1]
        targets = (polarity > 0).to(different)[:, None].expand(-1, count)
        # The penalty acts as it would on activations of mean variance 1, whatever their unit.
        variance = design.second_moment[:-1].sum() / len(design.basis)
        strength = (self.C / variance.clamp_min(1e-300)).expand(count)
        return solve(design, targets, different, strength, tol=1e-8).weights[:-1, which]

    def _decision(self, design: Design, directions: Tensor, problem: Problems) -> Tensor:
        """`[r + 1, 1]`: logistic regression on the projections along `directions` `[r, 1 or 2]`."""
        plane = Design.of(design.rows[:, :-1] @ directions)
        strength = torch.full_like(problem.strengths, WEAK, dtype=torch.float64)
        found = solve(plane, problem.targets, problem.weights, strength, tol=1e-10)
        coefficients, intercept = plane.raw(found.weights)
        return torch.cat([directions @ coefficients.T, intercept[None]])


def truth_directions(
    design: Design, problems: Problems, polarity: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Least squares of the centred rows on truth and truth times polarity.

    Args:
        design: The rows.
        problems: Targets are the truth.
        polarity: `[n]` of -1 and 1, or None.

    Returns:
        The general direction `[r, k]` in the basis of `design`, and the polarity-sensitive one (None without
        polarity).
    """
    rows = design.rows[:, :-1]
    weights = problems.weights
    total = weights.sum(0).clamp_min(1e-300)
    signed = weights * (2 * problems.targets - 1)
    mean = rows.T @ weights / total

    def against(regressor: Tensor) -> Tensor:
        """Sum of the centred rows, each times its weighted regressor, over the total weight."""
        return (rows.T @ regressor - mean * regressor.sum(0)) / total

    general = against(signed)
    if polarity is None:
        return general, None
    sensitive = against(signed * polarity[:, None])
    # The Gram matrix of the regressors is [[1, s], [s, 1]], s the mean polarity; both squares are 1.
    s = (weights * polarity[:, None]).sum(0) / total
    rest = 1 - s.square()
    # A fold with one polarity cannot tell the two apart: the truth then goes by the general one.
    alone = rest < 1e-9
    rest = torch.where(alone, 1.0, rest)
    return (
        torch.where(alone, general, (general - s * sensitive) / rest),
        torch.where(alone, 0.0, (sensitive - s * general) / rest),
    )
