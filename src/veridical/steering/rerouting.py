"""Rerouting: states of the unwanted behaviour are turned away from where they were; the rest is kept.

    loss = mean relu(cos(h, s))  +  mean |h' - s'| / |s'|

over the sites and the real tokens of the answers. h are the states of the trained model and s the plain
model's, where the source prompt is followed by the unwanted answer; h' and s' likewise where the target
prompt is followed by the wanted one. The first term is 1 before training and 0 once the states are at right
angles to what they were; it does not say where to, so it takes a behaviour away rather than putting another
in its place.

Circuit breakers (Zou et al. 2024, "Improving Alignment and Robustness with Circuit Breakers", algorithm 1).
Two things are otherwise than in its public code: padded positions are masked in both terms, where they
diluted the retain term; and the retain term has its full weight from the first step, where it began near
zero.
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
    parts = []
    for prompts, answers in (
        ([item.source for item in items], [item.unwanted for item in items]),
        ([item.target for item in items], [item.wanted for item in items]),
    ):
        rows = runner.tokens(prompts, answers)
        tail = max(row.answer for row in rows) + 1  # with the token that predicts the answer's first
        mask = torch.zeros(len(rows), tail, dtype=torch.bool, device=runner.model.device)
        for at, row in enumerate(rows):
            mask[at, tail - row.answer - 1 :] = True
        parts.append((runner.states(rows, tail, strength), runner.plain(rows, tail), mask))
    return rerouted(*parts[0]) + retained(*parts[1])


def rerouted(states: Tensor, plain: Tensor, mask: Tensor) -> Tensor:
    """Mean positive cosine of states to what they were.

    Args:
        states, plain: `[sites, rows, tokens, width]`.
        mask: `[rows, tokens]`, real tokens.
    """
    cosine = torch.nn.functional.cosine_similarity(states, plain.detach(), dim=-1, eps=1e-6)
    return (cosine.relu() * mask).sum() / (mask.sum() * len(states))


def retained(states: Tensor, plain: Tensor, mask: Tensor) -> Tensor:
    """Mean distance of states from what they were, in units of their norm; shapes as for `rerouted`."""
    fixed = plain.detach()
    # The norm has no gradient at 0, where every training begins.
    apart = ((states - fixed) ** 2).sum(-1).clamp_min(1e-12).sqrt() / fixed.norm(dim=-1).clamp_min(1e-6)
    return (apart * mask).sum() / (mask.sum() * len(states))


def check(items: Sequence[Twin]) -> None:
    """Takes any pairs."""
