"""Latent scaling: whether a crosscoder latent that looks exclusive to one site is absent from the other.

Minder et al. 2025 (arXiv:2504.02922). For latent j with its decoder row d at the site a where it is thought
to live, and any site m, the best scale of that row for explaining vectors y of site m is

    β_j^m = argmin_β Σ_x |β f_j(x) d - y^m(x)|² = Σ f_j <d, y^m> / (|d|² Σ f_j²)

with y the *error* of the reconstruction without latent j (what only j could still explain), or the sum of all
*other latents* (what these already say there). The ratio ν = β^m / β^a is near 0 where the
latent is truly absent. An error ratio near 1 means that it is there and was left out (complete shrinkage), a
reconstruction ratio near 1 that other latents stand in for it (latent decoupling).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from veridical.errors import DataError, InputError
from veridical.saes.crosscoder import Crosscoder


@dataclass(frozen=True, eq=False)
class LatentScaling:
    """Scales of each latent's decoder row at every site.

    Attributes:
        home: The site whose decoder row is scaled.
        error: β against the error without the latent, `[M, F]`; NaN where the latent never fired.
        reconstruction: β against what the other latents add up to, `[M, F]`.
    """

    home: int
    error: np.ndarray
    reconstruction: np.ndarray

    def ratios(self, site: int) -> tuple[np.ndarray, np.ndarray]:
        """ν of a site against home, `[F]` each: from errors, and from reconstructions."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.error[site] / self.error[self.home], self.reconstruction[site] / self.reconstruction[
                self.home
            ]


@torch.no_grad()
def latent_scaling(crosscoder: Crosscoder, batches: Iterable[Tensor], home: int) -> LatentScaling:
    """Measures how much of each latent's direction is in the vectors of every site.

    Args:
        crosscoder: One crosscoder, not a stack.
        batches: Vectors of all sites `[B, M, d]` or `[B, M·d]`, raw units.
        home: The site whose decoder rows are scaled.

    Raises:
        InputError: A stack, or a site that it has not.
        DataError: No vectors.
    """
    parts = crosscoder.parts
    if crosscoder.stacked or not 0 <= home < parts:
        raise InputError(
            f"expected one crosscoder and a site from 0 to {parts - 1}; got {crosscoder}, {home}"
        )
    rows = crosscoder.decoders.double()  # [M, F, d]
    direction, bias = rows[home], crosscoder.b_dec.double().unflatten(-1, (parts, -1))
    along = {
        "error": torch.zeros(parts, crosscoder.width),
        "reconstruction": torch.zeros(parts, crosscoder.width),
    }
    along = {name: value.to(rows) for name, value in along.items()}
    energy, count = torch.zeros(crosscoder.width).to(rows), 0
    for batch in batches:
        x = crosscoder.targets(batch, None).double().unflatten(-1, (parts, -1)).movedim(1, 0)  # [M, B, d]
        latents = crosscoder.encode(batch).double()
        made = latents @ rows
        along["error"] += ((latents.T @ (x - made - bias[:, None])) * direction).sum(-1)
        along["reconstruction"] += ((latents.T @ made) * direction).sum(-1)
        energy += latents.square().sum(0)
        count += len(batch)
    if not count:
        raise DataError("no vectors: latent scaling needs a batch or more")
    own = (rows * direction).sum(-1) * energy  # what latent j itself adds at each site, [M, F]
    below = direction.square().sum(-1) * energy
    below[energy == 0] = float("nan")
    return LatentScaling(
        home,
        ((along["error"] + own) / below).cpu().numpy(),
        ((along["reconstruction"] - own) / below).cpu().numpy(),
    )
