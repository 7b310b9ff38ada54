"""Latents of whole texts: one vector for each row of the data, from the tokens that were read of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch

from veridical.errors import unknown
from veridical.saes.held_out import held_out
from veridical.saes.units import unscaled

if TYPE_CHECKING:
    from veridical.activations import Activations
    from veridical.saes.base import SAE

Pool = Literal["max", "mean"]


def pooled_latents(sae: SAE, acts: Activations, pool: Pool = "max") -> np.ndarray:
    """Latents of each row of the data, `[rows, F]` float32, in raw units.

    Args:
        sae: One SAE.
        acts: Activations with its site.
        pool: The largest activation among the row's tokens that were read, or their mean; the same for one
            token a row.
    """
    if pool not in get_args(Pool):
        raise unknown("pool", pool, get_args(Pool))
    sae = unscaled(sae)
    owner = acts.index["row"].to_numpy()
    rows = held_out(sae, acts, groups=owner)
    made = torch.zeros(len(acts.rows), sae.width)
    with torch.no_grad():
        for where, x, _ in rows.blocks(sae):
            latents = sae.encode(x).float().cpu()
            at = torch.from_numpy(owner[where].astype(np.int64))
            if pool == "mean":
                made.index_add_(0, at, latents)
            else:
                made.scatter_reduce_(0, at[:, None].expand_as(latents), latents, "amax")
    if pool == "mean":
        counts = np.bincount(owner, minlength=len(made)).clip(1)
        made /= torch.from_numpy(counts)[:, None]
    return made.numpy()


def row_groups(acts: Activations) -> np.ndarray:
    """The pair of each row of the data; the row itself where there are no pairs."""
    rows = acts.rows
    return rows["pair"].to_numpy() if "pair" in rows.columns else np.arange(len(rows))
