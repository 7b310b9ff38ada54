"""What the layers say differently: logit-lens divergence by layer, and what the mean difference decodes to.

The logit lens (nostalgebraist 2020) sends each layer's stream through the model's own final norm and
unembedding; the divergence is KL(policy's lens || reference's lens) at the same site, in nats, each with its
own readout. Unembedding every layer at every token would cost several forward passes, so some tokens of each
text are drawn at random (seeded by the text's number), and the intervals hold what that adds.

The difference lens decodes the mean of (policy - reference) through the policy's readout (Minder et al. 2025,
arXiv:2510.13900, who read what a narrow fine-tuning was about from it). A mean over few texts is long by
chance alone; beside its norm stands that of means whose pairs got random signs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from veridical.comparison.logits import kl
from veridical.comparison.resampling import Ratios, by_row
from veridical.interventions.readout import Readout

if TYPE_CHECKING:
    from veridical.comparison.duo import Duo
    from veridical.comparison.resampling import Resampling
    from veridical.comparison.streaming import Step

DRAWN = 2
"""Tokens of each text that the logit lens reads."""
RESAMPLES = 50
"""Resamples of pairs in which the mean difference is taken anew, at most; a vector is kept for each."""
WHERE = ("all tokens", "last token")
TOP = 8


class LensDivergence:
    """Takes the residual streams of every batch at some tokens of each text.

    Args:
        duo: The models, of one vocabulary.
        sites: Short names of the compared sites, in order of depth.
        resampling: Where intervals and the draw of tokens come from.
        drawn: Tokens of each text; all of a text that has no more.
    """

    def __init__(self, duo: Duo, sites: Sequence[str], resampling: Resampling, drawn: int = DRAWN) -> None:
        self.sites, self.vocabulary, self.drawn = list(sites), duo.vocabulary, drawn
        self.readouts = Readout(duo.policy), Readout(duo.reference)
        self.devices = duo.policy.device, duo.reference.device
        self.seed = resampling.seed
        self.divergence = Ratios(resampling.count, len(self.sites))

    def add(self, step: Step) -> None:
        places = self._draw(step)
        if not len(places):
            return
        # All sites in one call: the unembedding is read once.
        ours, theirs = (
            self.readouts[side](
                torch.cat([step.streams[site][side][places] for site in self.sites]).to(self.devices[side])
            ).to(places.device)
            for side in range(2)
        )
        values = kl(ours, theirs, self.vocabulary).reshape(len(self.sites), len(places)).T
        rows = step.row[places]
        counts = torch.bincount(rows, minlength=len(step)).double()[:, None].expand(-1, len(self.sites))
        self.divergence.add(step.weights, by_row(rows, len(step), values), counts)

    def _draw(self, step: Step) -> Tensor:
        counts = step.counts.long().tolist()
        starts = np.cumsum([0, *counts])
        picked = []
        for number, count, start in zip(step.numbers.tolist(), counts, starts):
            random = np.random.default_rng([self.seed, 2, number])
            some = random.choice(count, size=min(self.drawn, count), replace=False) if count else []
            picked += [int(start + at) for at in some]
        return torch.tensor(picked, dtype=torch.long, device=step.row.device)

    def frame(self) -> pd.DataFrame:
        """One line per site: `kl` in nats with `low` and `high`, and `tokens`."""
        columns = self.divergence.frame_columns()
        return pd.DataFrame({"site": self.sites, "kl": columns.pop("value"), **columns})


class MeanDifference:
    """Takes the mean of (policy - reference) at every site, over all tokens and over last tokens.

    Args:
        sites: Short names of the compared sites, in order of depth.
        resampling: Where the random signs come from.
    """

    def __init__(self, sites: Sequence[str], resampling: Resampling) -> None:
        self.sites, self.signs = list(sites), resampling.signs
        self.resamples = min(resampling.count, RESAMPLES)
        self.sums = torch.empty(0)  # the width is known with the first batch
        self.counts = torch.zeros(len(WHERE), 1 + self.signs + self.resamples, dtype=torch.float64)

    def add(self, step: Step) -> None:
        present = (step.last >= 0).cpu()
        ends = step.last[step.last >= 0]
        drawn = step.weights[1 : self.resamples + 1]
        # Resamples change how often a row counts, signs do not.
        often = torch.cat([torch.ones_like(step.flips), drawn])
        self.counts += torch.stack([often @ step.counts.cpu(), often[:, present].sum(1)])
        onto = torch.cat([step.flips, drawn]).to(step.row.device)
        for at, site in enumerate(self.sites):
            policy, reference = step.streams[site]
            kind = torch.promote_types(torch.float32, policy.dtype)
            change = policy.to(kind) - reference.to(kind)
            if not self.sums.numel():
                shape = (len(WHERE), len(self.sites), len(onto), change.shape[1])
                self.sums = torch.zeros(shape, dtype=torch.float64, device=change.device)
            self.sums[0, at] += onto @ by_row(step.row, len(step), change)
            self.sums[1, at] += onto[:, present.to(onto.device)] @ change[ends].double()

    @property
    def means(self) -> Tensor:
        """`[2, sites, d]` float64: over all tokens, and over the last token of each text."""
        return self.sums[:, :, 0] / self.counts[:, :1, None].to(self.sums.device).clamp_min(1)

    def frame(self, duo: Duo, names: Callable[[int], str], top: int = TOP) -> pd.DataFrame:
        """One line per site and place.

        Columns: `site`, `where`, `norm` of the mean difference with `low` and `high` (95 %, normal, from 50
        resamples of pairs), `by_chance` (the 95th percentile of the norm
        under random signs of pairs), `promotes` and `suppresses` (the tokens that the policy's readout of
        it, and of its opposite, finds likeliest), `weight` (probability that the readout gives the first).
        """
        readout, means = Readout(duo.policy), self.means
        each = self.sums / self.counts[:, None, :, None].to(self.sums.device).clamp_min(1)
        norms = torch.linalg.vector_norm(each, dim=-1).cpu().numpy()
        spread = norms[..., 1 + self.signs :].std(-1)
        lines = []
        for place, where in enumerate(WHERE):
            vectors = means[place].to(duo.policy.device, duo.policy.dtype)
            with torch.no_grad():
                both = [readout(sign * vectors).float().softmax(-1).topk(top) for sign in (1, -1)]
            for at, site in enumerate(self.sites):
                norm, chance = norms[place, at, 0], norms[place, at, 1 : 1 + self.signs]
                said = [", ".join(repr(names(int(i))) for i in found.indices[at]) for found in both]
                lines.append(
                    {
                        "site": site,
                        "where": where,
                        "norm": norm,
                        "low": max(0.0, norm - 1.96 * spread[place, at]),
                        "high": norm + 1.96 * spread[place, at],
                        "by_chance": float(np.percentile(chance, 95)) if len(chance) else float("nan"),
                        "promotes": said[0] if norm > 0 else "",
                        "suppresses": said[1] if norm > 0 else "",
                        "weight": float(both[0].values[at, 0]) if norm > 0 else 0.0,
                    }
                )
        return pd.DataFrame(lines)
