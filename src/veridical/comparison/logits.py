"""What two sets of logits say of each other, in few passes over the vocabulary.

Nothing is written in log-probabilities: with p the policy's probabilities, z the logits and n the logarithm
of each softmax's denominator, KL(p || q) is the sum of p (z_p - z_q) less n_p - n_q, and an entropy is n less
the sum of p z. So each side costs one softmax, and equal logits give exactly 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ELEMENTS = 1 << 20
"""Logits of one piece: what is worked on stays in the cache."""
MEASURES = (
    "kl", "reverse kl", "entropy of policy", "entropy of reference", "agreement", "log-likelihood change",
    "log-likelihood of policy", "log-likelihood of reference",
)  # fmt: skip


class Softmax(NamedTuple):
    """Logits `[n, vocabulary]` and their probabilities, the largest of each, and `log_sum`, float64 `[n]`."""

    logits: Tensor
    chances: Tensor
    top: Tensor
    likely: Tensor
    log_sum: Tensor

    @classmethod
    def of(cls, logits: Tensor, vocabulary: int) -> Softmax:
        """The first `vocabulary` logits of each row, in float32 or better."""
        logits = logits[:, :vocabulary]
        logits = logits.to(torch.promote_types(torch.float32, logits.dtype))
        chances = logits.softmax(-1)
        top, likely = logits.amax(-1), chances.amax(-1)
        return cls(logits, chances, top, likely, _double(top) - _double(likely).log())


def compare_logits(
    ours: Tensor, theirs: Tensor, following: Tensor, vocabulary: int
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Every measure of two sets of logits `[n, vocabulary]`.

    Args:
        ours: Of the policy.
        theirs: Of the reference.
        following: `[n]`, the text's next tokens; -1 for none.
        vocabulary: Tokens over which the distributions are taken.

    Returns:
        `MEASURES` `[n, measures]`; of policy and then of reference the probability of the likeliest token and
        whether it is the next one, `[n, 4]`; and the two sets of probabilities. Tokens whose logits are equal
        up to rounding count as equally likely.
    """
    p, q = Softmax.of(ours, vocabulary), Softmax.of(theirs, vocabulary)
    target = following.clamp(min=0)[:, None]
    picked = [side.logits.gather(1, target)[:, 0] for side in (p, q)]
    chosen = [_double(at) - side.log_sum for at, side in zip(picked, (p, q))]
    # A sum's maximum is found much faster than a maximum's place.
    same = (p.logits + q.logits).amax(-1) == p.top + q.top
    values = [
        *_divergences(p, q),
        *(side.log_sum - _dot(side.chances, side.logits) for side in (p, q)),
        _double(same),
        chosen[0] - chosen[1],
        *chosen,
    ]
    sure = [part for side, at in zip((p, q), picked) for part in (side.likely, at == side.top)]
    return torch.stack(values, 1), torch.stack([_double(part) for part in sure], 1), (p.chances, q.chances)


def kl(ours: Tensor, theirs: Tensor, vocabulary: int) -> Tensor:
    """KL(policy || reference) of logits `[n, vocabulary]`, float64 `[n]` in nats."""
    size = max(1, ELEMENTS // vocabulary)
    parts = []
    for first in range(0, len(ours), size):
        p, q = (Softmax.of(side[first : first + size], vocabulary) for side in (ours, theirs))
        parts.append(_dot(p.chances, p.logits - q.logits) - (p.log_sum - q.log_sum))
    return torch.cat(parts) if parts else ours.new_zeros(0)


def _divergences(p: Softmax, q: Softmax) -> tuple[Tensor, Tensor]:
    gap, shift = p.logits - q.logits, p.log_sum - q.log_sum
    return _dot(p.chances, gap) - shift, shift - _dot(q.chances, gap)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Products of rows, `[n]`."""
    return _double((a * b).sum(-1))


def _double(values: Tensor) -> Tensor:
    return values.to(torch.float64 if values.device.type != "mps" else torch.float32)
