"""The mass-mean probe: the difference of the class means (Marks and Tegmark 2023, arXiv:2310.06824)."""

from __future__ import annotations

from veridical.probes.base import LinearProbe, Problems
from veridical.probes.directions import along, mean_difference
from veridical.probes.solver import Design, Solution


class MassMeanProbe(LinearProbe):
    """The direction from the mean of the negative class to the mean of the positive one.

    `w = mean(x | positive) - mean(x | negative)`, on the activations as they are, with the log-odds of two
    normal distributions of one variance along `w`. It has nothing to fit beside two means, so it needs the
    fewest pairs, and its direction often steers better than that of a better reader. It ignores that features
    are correlated: where a nuisance of large variance is tilted towards the direction it reads worse than
    `LDAProbe`, which is the same difference after whitening.

    Args:
        standardise: Scale every feature to variance 1 first; the paper does not.
    """

    name = "mass_mean"
    streams = True

    def __init__(self, *, standardise: bool = False) -> None:
        self.standardise = standardise

    def solve(self, design: Design, problems: Problems) -> Solution:
        return along(design, mean_difference(design, problems), problems)

    def said(self) -> str:
        return f"difference of class means, standardise = {self.standardise}"
