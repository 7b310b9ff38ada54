"""One sparse autoencoder on both models: what it leaves over, and which features fire more or less.

The SAE was trained on one of the two models (the reference, as a rule) and reads the same tokens of both. A
latent fires at a token where it exceeds 1e-3. Its change is the share of tokens at which it fires in the
policy less that in the reference; intervals and standard errors are over resamples of whole pairs. Of many
latents some change by chance: p is two-sided, from the change over its standard error, and the latents with a
false discovery rate of 5 % (Benjamini and Hochberg 1995) are named. How many would pass the same bar with the
models exchanged in random pairs stands beside them. A latent in fewer than six rows that differ is never
named: of five, all in one direction, chance alone makes one in sixteen.

What changes here need not have been trained for: any further training moves some features. "Appears" and
"vanishes" ask for a factor of twenty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from veridical.comparison.resampling import bounds, by_row
from veridical.saes.base import FIRED
from veridical.sites import Site

if TYPE_CHECKING:
    from veridical.comparison.duo import Duo
    from veridical.comparison.resampling import Resampling
    from veridical.comparison.streaming import Step
    from veridical.saes.base import SAE

FALSE = 0.05
"""Share of false ones among the latents that are named."""
FACTOR = 20
"""Ratio of the two firing rates from which on a latent appears or vanishes, and does not merely change."""
LEAST_ROWS = 6
SHOWN = 200
"""Latents in the table: those that are named, then those that changed most."""
POLICY, REFERENCE = 0, 1
COLUMNS = [
    "sae", "site", "latent", "policy", "reference", "change", "low", "high", "p", "named", "kind",
]  # fmt: skip
KINDS = ("appears", "vanishes", "fires more", "fires less")


def readable(saes: Sequence[Any], duo: Duo) -> tuple[list[tuple[str, str, SAE]], dict[str, str]]:
    """The SAEs that both models can be read by, with name and site, and why the others can't."""
    found, missing = [], {}
    for number, sae in enumerate(saes):
        name = f"SAE {number} ({sae.config.label})"
        site = sae.config.reads[0] if sae.config.reads else None
        why = ""
        if not duo.applies("SAEs"):
            why = duo.not_applicable["SAEs"]
        elif sae.stacked or len(sae.config.reads) != 1:
            why = "it does not name one site that it reads"
        elif site is not None and duo.reference.width(Site.parse(site)) != (sae.d_in,):
            why = f"it reads vectors {sae.d_in} wide"
        if why or site is None:
            missing[name] = why
        else:
            found.append((name, Site.parse(site).short, sae))
    return found, missing


class Firing:
    """Runs one SAE on the site of every batch in both models.

    Args:
        name: What it is called in tables.
        site: Short name of the site.
        sae: The SAE; it is moved to the policy's device.
        resampling: Weights of pairs.
    """

    def __init__(self, name: str, site: str, sae: SAE, resampling: Resampling) -> None:
        self.name, self.site, self.sae = name, site, sae
        count, wide = resampling.count + 1, torch.float64
        self.fires = torch.zeros(2, count, sae.width, dtype=wide)
        self.flipped = torch.zeros(resampling.signs + 1, sae.width, dtype=wide)
        self.rows = torch.zeros(sae.width, dtype=torch.int64)
        self.sums = torch.zeros(2, count, sae.d_out, dtype=wide)
        # By resample: squared error, squared norm, latents above 0.
        self.totals = torch.zeros(2, count, 3, dtype=wide)
        self.tokens = torch.zeros(count, dtype=wide)
        self.pairs: set[int] = set()

    def add(self, step: Step) -> None:
        sides = [self._read(vectors, step) for vectors in step.streams[self.site]]
        for side, (fired, vectors, figures) in enumerate(sides):
            self.fires[side] += step.weights @ fired
            self.sums[side] += step.weights @ vectors
            self.totals[side] += step.weights @ figures
        change = sides[POLICY][0] - sides[REFERENCE][0]
        self.flipped += step.flips @ change
        self.rows += (change != 0).sum(0)
        self.tokens += step.weights @ step.counts.cpu()
        self.pairs.update(step.groups.tolist())

    @torch.no_grad()
    def _read(self, vectors: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """By row: tokens at which each latent fires, sum of the vectors, and `totals`."""
        sae, vectors = self.sae.to(step.row.device), vectors.flatten(1)
        latents = sae.encode(vectors)
        wide = vectors.to(torch.promote_types(torch.float32, vectors.dtype))
        error = (wide - sae.rebuild(vectors, latents)).square().sum(1)
        figures = torch.stack([error, wide.square().sum(1), (latents > 0).sum(1).to(error.dtype)], 1)
        parts = ((latents > FIRED).to(error.dtype), wide, figures)
        fired, total, figures = (by_row(step.row, len(step), part).cpu() for part in parts)
        return fired, total, figures

    def error_frame(self) -> pd.DataFrame:
        """`sae`, `site`, `measure` ("unexplained": squared error over variance; "L0"), `of` ("policy",
        "reference", "change"), `value`, `low`, `high`."""
        counts = self.tokens[None].clamp_min(1)
        spread = self.totals[..., 1] - self.sums.square().sum(-1) / counts
        values = {
            "unexplained": (self.totals[..., 0] / spread).numpy(),
            "L0": (self.totals[..., 2] / counts).numpy(),
        }
        lines = []
        for measure, each in values.items():
            sides = {
                "policy": each[POLICY],
                "reference": each[REFERENCE],
                "change": each[POLICY] - each[REFERENCE],
            }
            for of, found in sides.items():
                low, high = bounds(found[1:, None])
                lines.append((self.name, self.site, measure, of, found[0], low[0], high[0]))
        columns = ["sae", "site", "measure", "of", "value", "low", "high"]
        return pd.DataFrame(lines, columns=columns)

    def latent_frame(self) -> pd.DataFrame:
        """Up to 200 latents, in the order of the evidence: firing rates, `change` with its interval, `p`,
        whether it is `named`, and its `kind` (one of `KINDS`, "" where it is not named)."""
        rates, change, p, named, _ = self._tested()
        low, high = bounds((self._rates[POLICY] - self._rates[REFERENCE])[1:])
        order = np.lexsort((-np.abs(change), p))
        order = order[(change != 0)[order]][: max(SHOWN, int(named.sum()))]
        kinds = np.select(
            [rates[1] * FACTOR <= rates[0], rates[0] * FACTOR <= rates[1], change > 0], KINDS[:3], KINDS[3]
        )
        return pd.DataFrame(
            {
                "sae": self.name,
                "site": self.site,
                "latent": order,
                "policy": rates[POLICY][order],
                "reference": rates[REFERENCE][order],
                "change": change[order],
                "low": low[order],
                "high": high[order],
                "p": p[order],
                "named": named[order],
                "kind": np.where(named, kinds, "")[order],
            },
            columns=COLUMNS,
        )

    def summary(self) -> dict[str, Any]:
        """`sae`, `site`, `latents` that fire in either model, how many are named by kind, and `by_chance`:
        how many pass the same bar with the models exchanged in random pairs (mean)."""
        rates, *_, by_chance = self._tested()
        kinds = self.latent_frame()["kind"].tolist()
        counts = {kind: kinds.count(kind) for kind in KINDS}
        alive = int((rates.sum(0) > 0).sum())
        return {"sae": self.name, "site": self.site, "latents": alive, **counts, "by_chance": by_chance}

    @property
    def _rates(self) -> np.ndarray:
        """`[2, resamples + 1, latents]`."""
        return (self.fires / self.tokens[None, :, None].clamp_min(1)).numpy()

    def _tested(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]:
        """Rates `[2, latents]`, changes, p, whether each is named, and how many would be by chance."""
        rates = self._rates
        change = rates[POLICY, 0] - rates[REFERENCE, 0]
        # Over resamples the change varies about itself; with the models exchanged it varies about 0.
        spread = (rates[POLICY] - rates[REFERENCE])[1:].std(0)
        spread = np.sqrt(spread**2 + change**2 / max(1, len(self.pairs)))
        able = (self.rows.numpy() >= LEAST_ROWS) & (spread > 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            size = np.where(able, np.abs(change) / spread, 0.0)
            null = self.flipped[1:].numpy() / float(self.tokens[0].clamp_min(1)) / spread
        p = 2 * stats.norm.sf(size)
        named = discoveries(p)
        bar = size[named].min() if named.any() else np.inf
        passed = np.where(able, np.abs(null) >= bar, False).sum(1)
        return rates[:, 0], change, p, named, float(passed.mean())


def discoveries(p: np.ndarray, rate: float = FALSE) -> np.ndarray:
    """Which of many tests hold at a false discovery rate (Benjamini and Hochberg 1995), `[n]` bool."""
    order = np.argsort(p, kind="stable")
    good = np.flatnonzero(p[order] <= rate * np.arange(1, len(p) + 1) / max(len(p), 1))
    held = np.zeros(len(p), dtype=bool)
    if len(good):
        held[order[: good[-1] + 1]] = True
    return held


def shifted(meters: Sequence[Firing], missing: dict[str, str]) -> dict[str, pd.DataFrame]:
    """Tables "SAE error", "SAE features" (a line for each SAE), "SAE latents" and "SAEs left out"."""

    def together(parts: list[pd.DataFrame]) -> pd.DataFrame:
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()

    return {
        "SAE error": together([meter.error_frame() for meter in meters]),
        "SAE features": pd.DataFrame([meter.summary() for meter in meters]),
        "SAE latents": together([meter.latent_frame() for meter in meters]),
        "SAEs left out": pd.DataFrame(list(missing.items()), columns=["sae", "why"]),
    }
