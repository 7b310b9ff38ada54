"""The mean over tokens: logistic regression on the mean vector of a sequence.

    f(x_1 ... x_T) = w . mean_t(x_t) + b = mean_t (w . x_t + b)

The plain way to give a sequence one vector, and exact: it is the logistic probe on mean vectors, convex and
solved as that is. It dilutes what only few tokens show. It does not grow with length by itself, but where
first tokens differ from the rest (an attention sink at the start of every text), the mean tells how many
tokens there are; the sweep's note on length says whether that could help it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from veridical.probes.base import LinearProbe, Problems
from veridical.probes.sequence import Running, SequenceProbe, Sequences
from veridical.probes.solver import Design, Solution, solve


class MeanTokenProbe(SequenceProbe):
    """Logistic regression on mean vectors; equal to `LogisticProbe` on `Sequences.means()`.

    Args:
        C: Inverse strength of the penalty; it multiplies the sum of the losses over sequences.
        standardise: Scale every feature of the means to variance 1 before the penalty applies.
        tol: Relative error of the coefficients at which the solver stops.
        max_iter: Newton steps at most.
    """

    name = "mean_tokens"

    def __init__(
        self, C: float = 1.0, *, standardise: bool = True, tol: float = 1e-8, max_iter: int = 100
    ) -> None:
        super().__init__(C, standardise=standardise)
        self.tol = tol
        self.max_iter = max_iter

    def space(self, x: Sequences) -> Design:
        return Design.of(x.means(), self.standardise)

    def solve(self, design: Design, problems: Problems) -> Solution:
        return solve(
            design,
            problems.targets,
            problems.weights,
            problems.strengths,
            start=problems.start,
            tol=problems.tol or self.tol,
            max_steps=self.max_iter,
        )

    def held_out(self, design: Design, weights: Tensor, x: Sequences) -> Tensor:
        return LinearProbe.held_out(self, design, weights, x.means())

    def decide(self, x: Sequences) -> np.ndarray:
        means = x.means().cpu().numpy()
        return means @ self.coef_[0] + self.intercept_[0]

    def running(self) -> Running:
        return _Running()

    def said(self) -> str:
        return f"mean over tokens, C = {self.C:g}, standardise = {self.standardise}"


class _Running(Running):
    def add(self, readings: Tensor) -> Tensor:
        value = readings[:, 0]
        self._sum = value if self.count == 1 else self._sum + value
        return torch.as_tensor(self._sum / self.count)
