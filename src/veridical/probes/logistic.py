"""The L2 logistic probe: the plain baseline of linear probing (Alain and Bengio 2016, arXiv:1610.01644)."""

from __future__ import annotations

from veridical.probes.base import LinearProbe, Problems
from veridical.probes.solver import Design, Solution, solve


class LogisticProbe(LinearProbe):
    """Logistic regression with an L2 penalty and a free intercept, on standardised activations.

    Minimises `C * sum_i log(1 + exp(-y_i f(x_i))) + |w|^2 / 2`, where `f(x) = w . (x - mean) / scale + b`
    and mean and scale are those of the training rows. The fitted coefficients are given on the activations
    as they are. It fails where classes are not parted by a plane, and its direction leans away from the
    class-mean difference where features are correlated: a good reader need not be a good steering vector.

    Args:
        C: Inverse strength of the penalty, as in scikit-learn: it multiplies the sum of the losses.
        standardise: Scale every feature to variance 1 before the penalty applies.
        tol: Relative error of the coefficients at which the solver stops.
        max_iter: Newton steps at most.
    """

    name = "logistic"
    tuned = True
    streams = True

    def __init__(
        self, C: float = 1.0, *, standardise: bool = True, tol: float = 1e-8, max_iter: int = 100
    ) -> None:
        self.C = C
        self.standardise = standardise
        self.tol = tol
        self.max_iter = max_iter

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

    def said(self) -> str:
        return f"L2 logistic regression, C = {self.C:g}, standardise = {self.standardise}"
