"""Preference on outputs, DPO and IPO: the wanted answer gains on the unwanted one under the source prompt.

With d = log p(wanted) - log p(unwanted) of the trained model less the same of the plain one,

    DPO:  loss = mean -log sigmoid(beta d)                              (Rafailov et al. 2023, equation 7)
    IPO:  loss = mean (d' - 1 / (2 beta))^2,  log p per answer token    (Azar et al. 2023, equation 17)

The first loss is ln 2 and 1 / (4 beta^2), as for `veridical prefer` (`preference.config.first_loss`). The
same adapters under the same KL budget as the losses on states, so that the two can be compared at equal KL; a
preference training as such is `veridical prefer dpo`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import logsigmoid

if TYPE_CHECKING:
    from veridical.steering.runner import Runner
    from veridical.steering.twins import Twin


class OutputPreference:
    """DPO, or IPO with `squared`."""

    def __init__(self, squared: bool) -> None:
        self.squared = squared

    def loss(self, runner: Runner, items: Sequence[Twin], strength: float, beta: float) -> Tensor:
        """The loss of one batch at a strength."""
        prompts = [item.source for item in items]
        gains = []
        for answers in ([item.wanted for item in items], [item.unwanted for item in items]):
            rows = runner.tokens(prompts, answers)
            found, counts = runner.logprobs(rows, strength)
            gain = found - runner.plain_logprobs(rows).to(found)
            gains.append(gain / counts if self.squared else gain)
        margin = gains[0] - gains[1]
        return ipo(margin, beta) if self.squared else dpo(margin, beta)

    def check(self, items: Sequence[Twin]) -> None:
        """Takes any pairs."""


def dpo(margin: Tensor, beta: float) -> Tensor:
    """DPO's loss of `[rows]` margins against the reference, in nats."""
    return -logsigmoid(beta * margin).mean()


def ipo(margin: Tensor, tau: float) -> Tensor:
    """IPO's loss of `[rows]` margins per token against the reference, in nats."""
    return ((margin - 1 / (2 * tau)) ** 2).mean()
