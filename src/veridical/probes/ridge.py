"""The ridge probe: least squares with an L2 penalty (Hoerl and Kennard 1970), solved in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from veridical.errors import DataError
from veridical.probes.base import LinearProbe, Problems
from veridical.probes.directions import alike, along
from veridical.probes.solver import Design, Solution


class RidgeProbe(LinearProbe):
    """Least squares on targets of -1 and 1 with an L2 penalty and a free intercept.

    Minimises `C * sum_i m_i (y_i - w . (x_i - mean) / scale - b)^2 + |w|^2`, which is scikit-learn's
    `Ridge` and `RidgeClassifier` with `alpha = 1 / C` and sample weights `m`. Its direction is that of a
    linear discriminant with a ridge on the covariance, so it is as fast as a class-mean difference and
    takes correlated features into account. Least squares also pays for rows that are far on the right side,
    so an outlier turns it further than it turns logistic regression.

    The fitted values are no log-odds; the direction is given the log-odds of two normal distributions along
    it (see `directions`). The threshold is theirs, which differs from 0 on the least-squares scale where
    the classes differ in size.

    Args:
        C: Inverse strength of the penalty: it multiplies the sum of the squares.
        standardise: Scale every feature to variance 1 before the penalty applies.
    """

    name = "ridge"
    tuned = True
    streams = True

    def __init__(self, C: float = 1.0, *, standardise: bool = True) -> None:
        self.C = C
        self.standardise = standardise

    def solve(self, design: Design, problems: Problems) -> Solution:
        return along(design, least_squares(design, problems)[:-1], problems)

    def said(self) -> str:
        return f"ridge regression, C = {self.C:g}, standardise = {self.standardise}"


def least_squares(design: Design, problems: Problems) -> Tensor:
    """Ridge solutions `[r + 1, k]` for targets of -1 and 1, in the basis of `design`.

    The columns of a design are orthogonal, so the Gram matrix of all rows is a diagonal; a fold changes it by
    the rows it leaves out. One factorisation serves all labels with the same rows and strength.
    """

    def signed(at: slice) -> Tensor:
        targets, weights = problems.part(at)
        return weights * (2 * targets - 1)

    strengths = problems.strengths
    right = design.sums(signed)
    whole = len(design) * design.second_moment
    different, which = alike(problems.weights)
    solved = torch.empty_like(right)
    for number, weight in enumerate(different.T):
        gram = design.gram(weight.to(torch.float64) - 1)
        for strength in strengths[which == number].unique():
            columns = torch.nonzero((which == number) & (strengths == strength))[:, 0]
            penalty = whole + 1 / strength
            penalty[-1] = whole[-1]
            factor, failed = torch.linalg.cholesky_ex(gram + torch.diag(penalty))
            if int(failed):
                raise DataError(
                    f"C = {float(strength):g} leaves least squares on {len(design)} rows without a unique "
                    "solution in float64; use a smaller C (a stronger penalty)"
                )
            solved[:, columns] = torch.cholesky_solve(right[:, columns], factor)
    return solved
