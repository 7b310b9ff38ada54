"""The KL budget as a constraint: a Lagrangian whose multiplier follows the KL.

    loss = objective + multiplier * KL / budget

with KL the exact KL(adapted || plain) of a batch of neutral text, in nats a token. The multiplier is updated
by exponentiated ascent on the dual (Kivinen and Warmuth 1997, "Exponentiated Gradient versus Gradient
Descent"; as a constraint on a policy's KL it is used by Stooke et al. 2020, "Responsive Safety"):

    multiplier <- multiplier * exp(rate * (smoothed KL / (margin * budget) - 1))

so it grows while the KL is over the budget less a margin and shrinks while it is under. It stays within
bounds, and the margin is there because the budget is judged on other text than is trained on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MARGIN = 0.5
RATE = 0.2
SMOOTHING = 0.7
LOWEST, HIGHEST = 0.05, 1e3


@dataclass
class Budget:
    """A budget and the multiplier that keeps to it.

    Attributes:
        budget: Nats a token.
        multiplier: Weight of KL / budget in the loss.
        smoothed: Running mean of the KL; None before the first step.
    """

    budget: float
    multiplier: float = 0.5
    smoothed: float | None = None

    def update(self, kl: float) -> None:
        """Takes the KL of a step into account."""
        before = kl if self.smoothed is None else self.smoothed
        self.smoothed = SMOOTHING * before + (1 - SMOOTHING) * kl
        over = min(self.smoothed / (MARGIN * self.budget) - 1, 2.0)
        self.multiplier = min(max(self.multiplier * math.exp(RATE * over), LOWEST), HIGHEST)
