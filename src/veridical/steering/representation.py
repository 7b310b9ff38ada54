"""Representation target: states under the source prompt become those under the target prompt.

    loss = mean over sites of  sum |h - t|^2 / sum |s - t|^2

over the tokens that both prompts end with (the end of the question and the wanted answer), where h are the
states of the trained model under the source prompt, and s and t the plain model's under the source and the
target prompt. It is the share of the gap that is left: 1 before training, 0 at the target.

As LoRRA (Zou et al. 2023, "Representation Engineering: A Top-Down Approach to AI Transparency", algorithm 1),
whose target is s + alpha (t+ - t-) with a pair of templates around the same text; here t+ is the target
prompt, t- the source prompt and alpha 1, so that the target is a state that the model itself takes. It needs
pairs that differ in their prompts and end alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from veridical.errors import DataError

if TYPE_CHECKING:
    from veridical.steering.runner import Runner
    from veridical.steering.twins import Twin


def loss(runner: Runner, items: Sequence[Twin], strength: float, beta: float) -> Tensor:
    """The loss of one batch at a strength."""
    gap = runner.gap(items, strength)
    return gap_left(gap.states, gap.source, gap.target, gap.mask)


def gap_left(states: Tensor, source: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Share of the squared gap between source and target that is left, mean over sites.

    Args:
        states, source, target: `[sites, rows, tokens, width]`.
        mask: `[rows, tokens]`, which tokens count.
    """
    left = ((states - target.detach()) ** 2).sum(-1) * mask
    whole = ((source - target).detach() ** 2).sum(-1) * mask
    return (left.sum((1, 2)) / whole.sum((1, 2)).clamp_min(1e-12)).mean()


def check(items: Sequence[Twin]) -> None:
    """Refuses pairs that have one prompt.

    Raises:
        DataError: Both sides of a pair have the same prompt, so their states are the same.
    """
    same = sum(not item.moves_prompt for item in items)
    if same:
        raise DataError(
            f"{same} of {len(items)} pairs have the same prompt on both sides, so there is no state to move "
            "to; use hidden_preference, rerouting, dpo, ipo or distil_vector"
        )
