"""Crosscoder: one set of latents for several layers, or for one site in several models.

Lindsey et al. 2024 (transformer-circuits.pub/2024/crosscoders); with BatchTopK instead of L1, Minder et al.
2025 (arXiv:2504.02922), because an L1 crosscoder calls latents exclusive to one model that are in both:

    f = BatchTopK(ReLU(Σ_m W_enc^m x^m + b_enc)), ranked by f_i Σ_m |W_dec,i^m|
    loss = Σ_m |x^m - (W_dec^m f + b_dec^m)|² / Var(x) + 1/32 · AuxK

Vectors of the M sites stand side by side, `[..., M·d]`; so do encoder and decoder rows, and `encoders` and
`decoders` show them site by site. Each site has a scale of its own, so that none outweighs another by its
norm. Decoder rows keep their norms: where a latent's row is near zero at a site, the latent is absent there.
`latent_scaling` tells a true absence from one that the loss made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from veridical.errors import DataError
from veridical.saes.base import unit_factor
from veridical.saes.batch_topk import BatchTopK
from veridical.saes.config import SAEConfig


class Crosscoder(BatchTopK):
    """BatchTopK over the vectors of several sites of equal width, `[..., M·d]` or `[..., M, d]`.

    Attributes:
        site_scale: What decoder norms are multiplied by at each site, `[M]`, so that they compare across
            sites of unlike norm; ones until `folded`.
    """

    architecture = "crosscoder"
    centred = False
    unit_norm = False
    homogeneous: ClassVar[tuple[str, ...]] = ()

    site_scale: Tensor

    def __init__(self, configs: SAEConfig | Sequence[SAEConfig], d_in: int, d_out: int | None = None) -> None:
        super().__init__(configs, d_in, d_out)
        if d_in % self.parts or self.d_out != d_in:
            raise DataError(
                f"{self.config.label}: vectors are {d_in} to {self.d_out} wide; expected {self.parts} sites "
                "of one width side by side, in and out"
            )
        self.register_buffer("scale", torch.ones(d_in))
        self.register_buffer("scale_out", torch.ones(d_in))
        self.register_buffer("site_scale", torch.ones(self.parts))

    @property
    def parts(self) -> int:
        """Number of sites M."""
        return len(self.config.sites)

    @property
    def decoders(self) -> Tensor:
        """Decoder rows by site, `[M, F, d]` (`[N, M, F, d]`)."""
        return self.W_dec.unflatten(-1, (self.parts, -1)).movedim(-2, -3)

    @property
    def encoders(self) -> Tensor:
        """Encoder rows by site, `[M, F, d]` (`[N, M, F, d]`)."""
        return self.W_enc.unflatten(-1, (self.parts, -1)).movedim(-2, -3)

    def norms(self) -> Tensor:
        """Decoder norms by site, `[M, F]` (`[N, M, F]`), comparable across sites."""
        return self.decoders.norm(dim=-1) * self.site_scale[:, None]

    def weights(self) -> Tensor:
        """Sums of a latent's decoder norms over sites, `[F]` (`[N, F]`), without gradient."""
        return self.norms().detach().sum(-2)

    def inputs(self, x: Tensor) -> Tensor:
        """`x` side by side, in units of the weights."""
        return super().inputs(self._side_by_side(x))

    def targets(self, x: Tensor, y: Tensor | None) -> Tensor:
        """What is to be reconstructed, side by side, in units of the weights."""
        return super().targets(self._side_by_side(x), None if y is None else self._side_by_side(y))

    def set_scales(self, x: Tensor, y: Tensor) -> None:
        """Factors that bring each site's vectors to a mean norm of sqrt(d)."""
        parts = self._side_by_side(x).unflatten(-1, (self.parts, -1))
        factors = torch.tensor([unit_factor(parts[:, part]) for part in range(self.parts)])
        self.scale.copy_(factors.repeat_interleave(parts.shape[-1]))
        self.scale_out.copy_(self.scale)

    def _side_by_side(self, x: Tensor) -> Tensor:
        return x.flatten(-2) if x.shape[-1] != self.d_in and x.ndim > 1 else x

    def _fold(self, state: dict[str, Tensor]) -> None:
        # Sites have unlike scales, so latents keep their units and the decoder takes the scales up.
        state["W_enc"] *= self.scale
        for name in ("W_dec", "b_dec"):
            state[name] /= self.scale_out
        state["site_scale"] *= self.scale_out.unflatten(-1, (self.parts, -1))[:, 0]
        state["scale"], state["scale_out"] = torch.ones_like(self.scale), torch.ones_like(self.scale_out)
