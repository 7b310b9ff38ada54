"""A linear path beside the latents of a transcoder (Paulo, Shabalin and Belrose 2025, arXiv:2501.18823)."""

from __future__ import annotations

import torch
from torch import Tensor

from veridical.saes.base import SAE
from veridical.saes.config import SAEConfig


class Skip(SAE):
    """`W_skip x` beside what the latents predict, where `skip` is set; mixed into the transcoders.

    `W_skip [d_out, d_in]` (`[N, d_out, d_in]`) starts at zero.
    """

    W_skip: Tensor

    @classmethod
    def initial(cls, config: SAEConfig, d_in: int, d_out: int) -> dict[str, Tensor]:
        """As without the path, and a path of zeros."""
        made = super().initial(config, d_in, d_out)
        return {**made, "W_skip": torch.zeros(d_out, d_in)} if config.skip else made

    def skipped(self, x: Tensor) -> Tensor:
        """What the path predicts from `x [..., d_in]`: `[..., d_out]`, both in raw units."""
        return self.inputs(x) @ self.W_skip.mT / self.scale_out

    def rebuild(self, x: Tensor, latents: Tensor) -> Tensor:
        """Prediction from `x [..., d_in]` and its latents: `[..., d_out]`, in raw units."""
        predicted = super().rebuild(x, latents)
        return predicted + self.skipped(x) if self.config.skip else predicted

    def _fold(self, state: dict[str, Tensor]) -> None:
        super()._fold(state)
        if self.config.skip:
            state["W_skip"] *= self.scale / self.scale_out
