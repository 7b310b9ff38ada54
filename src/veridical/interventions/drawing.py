"""Which other tokens a resample ablation takes values from: seeded, never padding, never the row itself.

The draw of a pass is made once and serves every site of the ablation, so that what is put in at several
places comes from one and the same token of one other text. It is drawn anew from the seed at the start of
each call: the same batch gets the same donors however often it is run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from veridical.errors import InputError
from veridical.interventions.spots import Spot

if TYPE_CHECKING:
    from veridical.activations import Activations
    from veridical.probes.passes import Pass


class Draw:
    """Seeded picks, once for each pass."""

    def __init__(self, seed: int, by_position: bool) -> None:
        self.seed, self.by_position = seed, by_position
        self._random = np.random.default_rng(seed)
        self._of: Pass | None = None
        self._picks: np.ndarray = np.empty(0, dtype=np.int64)

    def picks(self, spot: Spot) -> np.ndarray:
        """A donor's number for each of the pass's real tokens, in row order."""
        if self._of is not spot.of:
            if spot.of.first:
                self._random = np.random.default_rng(self.seed)
            self._picks, self._of = self._drawn(spot), spot.of
        return self._picks

    def _drawn(self, spot: Spot) -> np.ndarray:
        raise NotImplementedError


class FromBatch(Draw):
    """Real tokens of other rows of the same pass; with `by_position`, those at the same position."""

    def take(self, part: Tensor, spot: Spot) -> Tensor:
        """The donors' values in the shape of `part`; padded tokens keep their own."""
        picks = torch.from_numpy(self.picks(spot)).to(part.device)
        real = spot.real.to(part.device)
        new = part.clone()
        new[real] = part[real][picks]
        return new

    def _drawn(self, spot: Spot) -> np.ndarray:
        index = spot.index.cpu().numpy()
        row, place = np.nonzero(index >= 0)[0], index[index >= 0]
        if len(np.unique(row)) < 2:
            raise InputError(
                "resample takes values from other rows of the batch, and this pass has one row; give several "
                "texts, or a store: over=acts"
            )
        if not self.by_position:
            return _another(self._random, np.zeros_like(row), np.full_like(row, len(row)), _runs(row))
        # A row has one token at each position, so that only the token itself is left out.
        order, numbers = np.argsort(place, kind="stable"), np.arange(len(place))
        picks = np.empty(len(place), dtype=np.int64)
        low, high = _runs(place[order])
        picks[order] = order[_another(self._random, low, high, np.stack([numbers, numbers + 1]))]
        lone = picks == numbers
        if spot.chosen is not None:
            lone &= spot.chosen.cpu().numpy()[index >= 0]
        if lone.any():
            raise InputError(
                f"no other row of this pass has a token at position {int(place[lone][0])}; resample with "
                "by_position=False, or from a store: over=acts"
            )
        return picks


class FromStore(Draw):
    """Vectors of a store; with `by_position`, those at the same position.

    Args:
        acts: The store.
        seed: Decides the draws.
        by_position: As above.
    """

    def __init__(self, acts: Activations, seed: int, by_position: bool) -> None:
        super().__init__(seed, by_position)
        self.acts = acts
        if by_position:
            places = acts.index["position"].to_numpy()
            if int(places.min()) < 0:
                raise InputError("this store averaged the tokens of each row, so it has no positions")
            self._order = np.argsort(places, kind="stable")
            self._sorted = places[self._order]

    def take(self, site: str, spot: Spot, like: Tensor) -> Tensor:
        """The drawn vectors of a site for each token `[rows, tokens, ...]`; zeros at padding."""
        picks = self.picks(spot)
        inverse = np.unique(picks, return_inverse=True)
        drawn = self.acts.take(site, inverse[0])[torch.from_numpy(inverse[1].reshape(-1))].to(like)
        new = drawn.new_zeros(*spot.index.shape, *drawn.shape[1:])
        new[spot.real.to(new.device)] = drawn
        return new

    def _drawn(self, spot: Spot) -> np.ndarray:
        index = spot.index.cpu().numpy()
        place = index[index >= 0]
        if not self.by_position:
            return self._random.integers(0, len(self.acts), size=len(place))
        low = np.searchsorted(self._sorted, place, side="left")
        high = np.searchsorted(self._sorted, place, side="right")
        lone = low == high
        wanted = lone if spot.chosen is None else lone & spot.chosen.cpu().numpy()[index >= 0]
        if wanted.any():
            raise InputError(f"the store has no vector at position {int(place[wanted][0])} to resample from")
        drawn = low + np.floor(self._random.random(len(place)) * (high - low)).astype(np.int64)
        return self._order[np.where(lone, 0, drawn)]


def _another(random: np.random.Generator, low: np.ndarray, high: np.ndarray, own: np.ndarray) -> np.ndarray:
    """A number from `low` to `high` (exclusive) outside `own` `[2, n]` (first, end), uniformly.

    Where there is none, the first of its own.
    """
    first, end = own
    others = (high - low) - (end - first)
    drawn = low + np.floor(random.random(len(low)) * others).astype(np.int64)
    return np.where(others > 0, np.where(drawn >= first, drawn + end - first, drawn), first)


def _runs(sorted_values: np.ndarray) -> np.ndarray:
    """First and end of the run of equal values that each item lies in, `[2, n]`."""
    first = np.searchsorted(sorted_values, sorted_values, side="left")
    return np.stack([first, np.searchsorted(sorted_values, sorted_values, side="right")])
