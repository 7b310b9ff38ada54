"""Preference in representation space: states prefer the chosen ones to the rejected ones, up to a bound.

With c the plain model's states under the target prompt (chosen) and r those under the source prompt
(rejected), on the tokens that both prompts end with, and h the trained model's under the source prompt,

    m    = <h - (c + r) / 2, c - r> / |c - r|^2 + 1/2      (0 at the rejected states, 1 at the chosen)
    loss = mean softplus((1 - m) / beta) * beta,  m held at most 1,
           + mean |h - r - m (c - r)|^2 / |c - r|^2         (what leaves the line between the two)

m is the gain in squared distance, |h - r|^2 - |h - c|^2, in units of |c - r|^2, so the loss is a
Bradley-Terry preference on distances, as DPO's is on log-probabilities (Rafailov et al. 2023, equation 7).
It is bounded: once a state is at the chosen one it gains nothing by going further, where an unbounded
preference runs off along c - r. Where a pair differs in its answers only, c and r are the mean states of
the plain model over the chosen and the rejected answer, and h those of the trained one over the rejected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from veridical.steering.runner import Runner
    from veridical.steering.twins import Twin


def loss(runner: Runner, items: Sequence[Twin], strength: float, beta: float) -> Tensor:
    """The loss of one batch at a strength."""
    prompted = [item for item in items if item.moves_prompt]
    answered = [item for item in items if not item.moves_prompt]
    parts = []
    if prompted:
        gap = runner.gap(prompted, strength)
        found = preferred(gap.states, gap.target, gap.source, gap.mask, beta)
        parts.append(found * len(prompted))
    if answered:
        chosen, rejected = (
            runner.tokens([item.source for item in answered], said)
            for said in ([item.wanted for item in answered], [item.unwanted for item in answered])
        )
        tail = max(row.answer for row in (*chosen, *rejected))
        moved, better, worse = (
            _mean(states, [row.answer for row in rows])
            for states, rows in (
                (runner.states(rejected, tail, strength), rejected),
                (runner.plain(chosen, tail), chosen),
                (runner.plain(rejected, tail), rejected),
            )
        )
        mask = torch.ones(len(answered), 1, dtype=torch.bool, device=moved.device)
        parts.append(preferred(moved, better, worse, mask, beta) * len(answered))
    return torch.stack(parts).sum() / len(items)


def preferred(states: Tensor, chosen: Tensor, rejected: Tensor, mask: Tensor, beta: float) -> Tensor:
    """The loss.

    Args:
        states, chosen, rejected: `[sites, rows, tokens, width]`; no gradient goes into the last two.
        mask: `[rows, tokens]`, which tokens count.
        beta: Width of the bend at the chosen states.
    """
    chosen, rejected = chosen.detach(), rejected.detach()
    line = chosen - rejected
    length = (line**2).sum(-1).clamp_min(1e-8)
    along = ((states - rejected) * line).sum(-1) / length
    bent = torch.nn.functional.softplus((1 - along.clamp(max=1.0)) / beta) * beta
    off = ((states - rejected - along[..., None] * line) ** 2).sum(-1) / length
    weight = mask * (length > 1e-6)
    return ((bent + off) * weight).sum() / weight.sum().clamp_min(1)


def _mean(states: Tensor, lengths: Sequence[int]) -> Tensor:
    """Mean over the last `lengths` tokens of each row, `[sites, rows, 1, width]`."""
    tail = states.shape[2]
    counts = torch.tensor(lengths, device=states.device)
    mask = torch.arange(tail, device=states.device) >= (tail - counts)[:, None]
    return ((states * mask[..., None]).sum(2) / counts[:, None])[:, :, None]


def check(items: Sequence[Twin]) -> None:
    """Takes any pairs."""
