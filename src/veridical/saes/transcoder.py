"""Transcoder: TopK latents of one site that predict another, such as an MLP's output from its input.

Dunefsky, Chlenski and Nanda 2024 (arXiv:2406.11944); with a linear skip path, Paulo, Shabalin and Belrose
2025 (arXiv:2501.18823):

    f = ReLU(TopK(W_enc x + b_enc));  ŷ = W_dec f + b_dec (+ W_skip x)
    loss = |y - ŷ|² / Var(y) + 1/32 · AuxK

Inputs are not centred: the decoder bias lives at the other site.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from veridical.saes.kernels import Block, Chosen
from veridical.saes.skip import Skip
from veridical.saes.topk import TopK


class Transcoder(Skip, TopK):
    """`W_dec ReLU(TopK(W_enc x + b_enc)) + b_dec`, with `W_skip x` beside it where `skip` is set."""

    architecture = "transcoder"
    centred = False

    def errors(
        self,
        x: Tensor,
        target: Tensor,
        values: Tensor,
        chosen: Chosen,
        blocks: Sequence[Block],
        acts: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """As without the path, of what the path leaves over of the target."""
        if self.config.skip:
            target = target - x @ self.led(self.W_skip, 3).mT
        return super().errors(x, target, values, chosen, blocks, acts)
