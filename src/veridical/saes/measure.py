"""Figures of SAEs in training on held-out vectors: what they leave over, how many latents they take for it.

`evaluate` judges one finished SAE, with intervals and against other dictionaries; this is for many at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from veridical.activations.moments import Moments
from veridical.errors import DataError
from veridical.saes.base import FIRED, SAE

DENSE = 0.1
"""Share of the vectors above which a latent counts as dense."""


@dataclass(frozen=True)
class Figures:
    """Figures of one SAE over held-out vectors.

    Attributes:
        fvu: Squared error over the vectors' squared distance from their own mean.
        l0: Mean number of latents above 0.
        dead: Share of the latents that were above 1e-3 for no vector.
        dense: Share of the latents that were above 1e-3 for more than a tenth of them.
    """

    fvu: float
    l0: float
    dead: float
    dense: float

    @property
    def explained_variance(self) -> float:
        """1 - FVU."""
        return 1 - self.fvu


@torch.no_grad()
def measure(sae: SAE, batches: Iterable[tuple[Tensor, Tensor]]) -> list[Figures]:
    """Figures of an SAE, or of each member of a stack.

    Args:
        sae: One SAE or a stack.
        batches: Inputs `[B, d_in]` and targets `[B, d_out]`, raw units.

    Raises:
        DataError: No vectors, or vectors that are all the same.
    """
    shape = (len(sae.configs),) if sae.stacked else (1,)
    error, l0 = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    fires = torch.zeros(*shape, sae.width, dtype=torch.float64)
    moments = Moments.empty((sae.d_out,))
    for x, y in batches:
        latents, target = sae.encode(x), y.flatten(1)
        error += (target - sae.rebuild(x, latents)).double().square().sum((-2, -1)).cpu()
        latents = latents if sae.stacked else latents[None]
        l0 += (latents > 0).sum((-2, -1)).cpu()
        fires += (latents > FIRED).sum(-2).cpu()
        moments = moments + Moments.of(target)
    if not moments.count:
        raise DataError("no vectors to measure on")
    variance, share = float(moments.m2.sum()), (fires / moments.count).cpu()
    if not variance > 0:
        raise DataError(f"{moments.count} vectors are all the same: there is no variance to explain")
    return [
        Figures(
            fvu=float(error[number]) / variance,
            l0=float(l0[number]) / moments.count,
            dead=float((share[number] == 0).double().mean()),
            dense=float((share[number] > DENSE).double().mean()),
        )
        for number in range(shape[0])
    ]
