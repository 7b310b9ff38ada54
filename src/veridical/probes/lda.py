"""Linear discriminant analysis: the mass-mean probe after whitening (Fisher 1936)."""

from __future__ import annotations

import torch
from torch import Tensor

from veridical.errors import DataError
from veridical.probes.base import LinearProbe, Problems
from veridical.probes.directions import LEAST, alike, closed, mean_difference, prior_log_odds
from veridical.probes.solver import Design, Solution


class LDAProbe(LinearProbe):
    """The class-mean difference times the inverse covariance within the classes.

    `w = S^-1 (mean(x | positive) - mean(x | negative))` with `S = (1 - a) S_w + a (trace(S_w) / d) I`; the
    whitened mass-mean probe of Marks and Tegmark (2023, arXiv:2310.06824). The decision value is that of
    scikit-learn's `LinearDiscriminantAnalysis(solver="lsqr", shrinkage=a)`.

    Without shrinkage and with fewer rows than a few times the width, `S_w` is noise and its inverse separates
    the fitted rows of pure noise. The share `a` is therefore computed from the fitted rows by the formula of
    Ledoit and Wolf (2004, J. Multivariate Analysis 88), which needs no folds and so serves ten pairs as
    well as ten thousand. A share chosen by folds would give the directions of `RidgeProbe`, which are those
    of an LDA with a ridge on the covariance; the folds choose there.

    Args:
        shrinkage: `a`, between 0 and 1; None for the formula of Ledoit and Wolf.
        standardise: Scale every feature to variance 1 first, so that a few large features do not set the
            sphere that the covariance is shrunk to.
    """

    name = "lda"
    streams = True

    def __init__(self, shrinkage: float | None = None, *, standardise: bool = True) -> None:
        self.shrinkage = shrinkage
        self.standardise = standardise

    def solve(self, design: Design, problems: Problems) -> Solution:
        if self.shrinkage is not None and not 0 <= self.shrinkage <= 1:
            raise DataError(f"shrinkage is {self.shrinkage!r}; expected a share from 0 to 1, or None")
        difference = mean_difference(design, problems)
        prior = prior_log_odds(problems)
        solved = torch.zeros_like(torch.cat([difference, prior[None]]))
        different, which = alike(problems.weights)
        for number, weight in enumerate(different.T):
            columns = torch.nonzero(which == number)[:, 0]
            weight = weight.to(torch.float64)
            total = weight.sum().clamp_min(1e-300)
            mean = design.sums(lambda at, weight=weight: weight[at, None])[:-1, 0] / total
            # The covariance of all rows; that within the classes is less by one rank, along the difference.
            covariance = design.gram(weight, torch.cat([mean, mean.new_zeros(1)]))[:-1, :-1] / total
            values, vectors = torch.linalg.eigh(covariance)
            gap = vectors.T @ difference[:, columns]
            spread = _Spread(values.clamp_min(0), gap, problems.pick(columns), total, len(design.basis))
            share = self.shrinkage
            if share is None:
                shrinkage = spread.ledoit_wolf(design, mean, difference[:, columns])
            else:
                shrinkage = gap.new_full((gap.shape[1],), share)
            whitened = vectors @ spread.whitened(shrinkage)
            halfway = mean[:, None] + (0.5 - spread.positive) * difference[:, columns]
            solved[:-1, columns] = whitened
            solved[-1, columns] = prior[columns] - (whitened * halfway).sum(0)
        return closed(solved)

    def said(self) -> str:
        share = "by Ledoit and Wolf" if self.shrinkage is None else f"{self.shrinkage:g}"
        return f"linear discriminant analysis, shrinkage {share}, standardise = {self.standardise}"


class _Spread:
    """Covariance within the classes, in the eigenbasis of the covariance of all rows: `E - p q g g'`.

    `E` `[r]` holds the eigenvalues, `g` `[r, k]` the class-mean differences, `p` and `q` the classes' shares.
    """

    def __init__(self, values: Tensor, gap: Tensor, problems: Problems, total: Tensor, width: int) -> None:
        self.values, self.gap, self.problems, self.total, self.width = values, gap, problems, total, width
        self.positive = problems.totals()[0] / total
        self.between = self.positive * (1 - self.positive)
        self.trace = (values.sum() - self.between * gap.square().sum(0)).clamp_min(0)

    def ledoit_wolf(self, design: Design, mean: Tensor, difference: Tensor) -> Tensor:
        """Shares `[k]`, as scikit-learn's `ledoit_wolf_shrinkage` gives for rows less their class's mean.

        Args:
            design: The rows.
            mean: `[r]`, of the rows.
            difference: `[r, k]`, of the class means.
        """
        length, fourth = self.gap.square().sum(0), torch.zeros_like(self.positive)
        along = torch.cat([mean[:, None], difference], 1)
        # The last line makes the readings those of the rows less their mean.
        along = torch.cat([along, -(mean @ along)[None]])
        for at, read in design.readings(along):
            targets, weights = self.problems.part(at)
            offset = targets - self.positive  # times the gap: mean of the row's class
            # |x - m|^2 = |x|^2 - 2 (x - m) . m - |m|^2
            lengths = design.squares[at, None] - 2 * read[:, :1] - mean.square().sum()
            lengths = lengths - 2 * offset * read[:, 1:] + offset.square() * length
            fourth += (weights * lengths.square()).sum(0)
        fourth = fourth / self.total
        bent = (self.values[:, None] * self.gap.square()).sum(0)
        norm = self.values.square().sum() - 2 * self.between * bent + (self.between * length).square()
        distance = (norm - self.trace.square() / self.width).clamp_min(0)
        error = torch.minimum((fourth - norm).clamp_min(0) / self.total, distance)
        return torch.where(distance > 0, error / distance.clamp_min(1e-300), 0.0)

    def whitened(self, shrinkage: Tensor) -> Tensor:
        """Inverse of the shrunk covariance times the gap, `[r, k]` (Sherman and Morrison 1950)."""
        sphere = shrinkage * self.trace / self.width
        spread = (1 - shrinkage) * self.values[:, None] + sphere
        # Directions without any spread are rounding; they hold no difference either.
        least = torch.finfo(spread.dtype).eps * len(self.problems.targets) * spread.amax(0)
        inverse = torch.where(spread > least, 1 / spread.clamp_min(1e-300), 0.0)
        first = inverse * self.gap
        rest = 1 - (1 - shrinkage) * self.between * (self.gap * first).sum(0)
        return first / rest.clamp_min(LEAST)
