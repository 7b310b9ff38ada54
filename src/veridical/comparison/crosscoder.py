"""A crosscoder on both models at one site: which features are the policy's alone, and which the reference's.

Tokens drawn in the one pass train a BatchTopK crosscoder (`veridical.saes.crosscoder`) on the two models'
vectors side by side. A latent whose decoder norm lies at one model by more than nine in ten is a candidate;
latent scaling (`veridical.saes.exclusive`; Minder et al. 2025, arXiv:2504.02922) on tokens of held-out pairs
then asks whether the other model truly lacks it. A crosscoder also makes candidates of nothing: so the same
is trained on the reference against itself, with the same tokens, seeds and steps; its counts stand beside.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from veridical.errors import DataError
from veridical.saes.base import FIRED

if TYPE_CHECKING:
    from veridical.comparison.config import CompareConfig
    from veridical.comparison.resampling import Resampling
    from veridical.comparison.streaming import Step
    from veridical.saes.crosscoder import Crosscoder

SIDES = ("policy", "reference")
CANDIDATE = 0.9
"""Share of a latent's decoder norm that lies at one model, from which on it may be that model's alone."""
ERROR, RECONSTRUCTION = 0.2, 0.5
"""What latent scaling finds of a latent in the other model, below which that model lacks it (Minder et al.
2025, section 3): the ratio from errors, and what other latents say in its place there, in units of the
latent. (The ratio of that to the same at home is not taken: where no other latent says it, both are 0.)"""
HELD_OUT = 0.2
"""Share of the pairs on whose tokens figures are measured."""
LEAST = 500
"""Tokens below which no crosscoder is trained."""
TOP = 5
COLUMNS = ["trained_on", "latents", "alive", "unexplained policy", "unexplained reference",
           "policy candidates", "policy only", "reference candidates", "reference only"]  # fmt: skip


class Drawn:
    """Takes a uniform sample of tokens at one site in both models, in memory that does not grow.

    Args:
        site: Name of the site in the batches.
        resampling: Where the draw comes from.
        count: Tokens.
    """

    def __init__(self, site: str, resampling: Resampling, count: int) -> None:
        self.site, self.seed, self.count = site, resampling.seed, count
        self.keys = np.empty(0)
        self.groups = np.empty(0, dtype=np.int64)
        self.ids = np.empty(0, dtype=np.int64)
        self.vectors: list[Tensor] = []

    def add(self, step: Step) -> None:
        lines = step.row.cpu().numpy()
        drawn = [
            np.random.default_rng([self.seed, 9, number]).random(int(count))
            for number, count in zip(step.numbers.tolist(), step.counts.tolist())
        ]
        keys = np.concatenate([self.keys, *drawn])
        groups = np.concatenate([self.groups, step.groups[lines]])
        ids = np.concatenate([self.ids, step.ids.cpu().numpy()])
        fresh = [side.flatten(1).cpu() for side in step.streams[self.site]]
        vectors = [torch.cat([old, new]) for old, new in zip(self.vectors, fresh)] or fresh
        if len(keys) > self.count:
            kept = np.sort(np.argpartition(keys, self.count)[: self.count])
            keys, groups, ids = keys[kept], groups[kept], ids[kept]
            vectors = [side[torch.from_numpy(kept)] for side in vectors]
        self.keys, self.groups, self.ids, self.vectors = keys, groups, ids, vectors


def crosscoded(drawn: Drawn, config: CompareConfig, names: Any) -> dict[str, pd.DataFrame]:
    """Trains on policy and reference, and on the reference against itself.

    Tables: "crosscoder" (`COLUMNS`; the second line is the null), and "crosscoder latents": the candidates,
    with `only` (the model), `share` (of the decoder norm at the policy), `error` and `reconstruction` (of
    latent scaling, near 0 where the other model lacks it), `confirmed`, `rate` (share of held-out tokens)
    and `tokens` (those at which it is largest).

    Args:
        drawn: Tokens.
        config: Width, k, passes and seed.
        names: From a token id to its text.

    Raises:
        DataError: Too few tokens.
    """
    if len(drawn.keys) < LEAST:
        raise DataError(f"{len(drawn.keys)} tokens were read; a crosscoder needs at least {LEAST}")
    random = np.random.default_rng([config.seed, 10])
    pairs = np.unique(drawn.groups)
    held = random.choice(pairs, size=max(1, round(HELD_OUT * len(pairs))), replace=False)
    test = torch.from_numpy(np.isin(drawn.groups, held))
    policy, reference = (side.float() for side in drawn.vectors)
    lines, latents = [], pd.DataFrame()
    for trained_on, first in (("policy and reference", policy), ("reference and itself", reference)):
        sae = _trained({"policy": first[~test], "reference": reference[~test]}, config)
        found, figures = judged(
            sae, torch.stack([first[test], reference[test]], 1), drawn.ids[test.numpy()], names
        )
        lines.append({"trained_on": trained_on, "latents": sae.width, **figures, **_counts(found)})
        latents = found if first is policy else latents
    return {"crosscoder": pd.DataFrame(lines, columns=COLUMNS), "crosscoder latents": latents}


def _trained(vectors: dict[str, Tensor], config: CompareConfig) -> Crosscoder:
    from veridical.saes import SAEConfig, train_saes

    count, width = len(vectors["policy"]), vectors["policy"].shape[1]
    batch = min(512, count)
    made = SAEConfig(
        architecture="crosscoder", sites=SIDES, width=config.crosscoder_width or 4 * width,
        k=min(config.crosscoder_k, 4 * width), batch=batch, lr=1e-3,
        tokens=max(1, config.crosscoder_passes * count // batch) * batch, seed=config.seed,
    )  # fmt: skip
    sae: Any = train_saes(
        vectors, [made], holdout=0, seed=config.seed, device="cpu", progress=config.progress
    )
    return sae[0]


@torch.no_grad()
def judged(
    sae: Crosscoder, vectors: Tensor, ids: np.ndarray, names: Any
) -> tuple[pd.DataFrame, dict[str, float]]:
    """The candidates of a crosscoder of policy and reference on held-out vectors `[n, 2, d]`; and how many
    latents fire there, with the variance that is left at each model."""
    from veridical.saes import latent_scaling

    latents = sae.encode(vectors)
    rates = (latents > FIRED).double().mean(0).numpy()
    norms = sae.norms().double()
    share = (norms[0] / norms.sum(0).clamp_min(1e-30)).numpy()
    left = (vectors - sae.rebuild(vectors, latents).unflatten(-1, (2, -1))).square().sum((0, 2))
    spread = (vectors - vectors.mean(0)).square().sum((0, 2))
    lines = []
    for home, side in enumerate(SIDES):
        scaling = latent_scaling(sae, [vectors], home=home)
        error, reconstruction = scaling.ratios(1 - home)[0], scaling.reconstruction[1 - home]
        mine = (share if home == 0 else 1 - share) > CANDIDATE
        for latent in np.flatnonzero(mine & (rates > 0)):
            top = latents[:, latent].topk(min(TOP, len(latents))).indices.tolist()
            confirmed = abs(error[latent]) < ERROR and abs(reconstruction[latent]) < RECONSTRUCTION
            said = ", ".join(dict.fromkeys(repr(names(int(ids[at]))) for at in top))
            lines.append(
                (side, latent, share[latent], error[latent], reconstruction[latent], bool(confirmed),
                 rates[latent], said)
            )  # fmt: skip
    columns = ["only", "latent", "share", "error", "reconstruction", "confirmed", "rate", "tokens"]
    table = pd.DataFrame(lines, columns=columns).sort_values(
        ["confirmed", "rate"], ascending=False, ignore_index=True
    )
    unexplained = {f"unexplained {side}": float(left[at] / spread[at]) for at, side in enumerate(SIDES)}
    return table, {"alive": int((rates > 0).sum()), **unexplained}


def _counts(table: pd.DataFrame) -> dict[str, int]:
    counts = {}
    for side in SIDES:
        mine = (table["only"] == side).to_numpy(dtype=bool)
        confirmed = mine & table["confirmed"].to_numpy(dtype=bool)
        counts |= {f"{side} candidates": int(mine.sum()), f"{side} only": int(confirmed.sum())}
    return counts
