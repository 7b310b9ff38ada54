"""The features of an SAE over a data set: how often they fire, how strongly, and on which tokens.

One pass in constant memory. For each latent the strongest text (one example a text, so that one repetitive
text cannot fill the list) and a random draw among all tokens on which it fires: the strongest examples alone
make almost any latent look cleaner than it is (Bolukbasi et al. 2021, arXiv:2104.07143).
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from veridical.errors import InputError
from veridical.probes.card import number
from veridical.saes.base import FIRED
from veridical.saes.held_out import HeldOut, held_out
from veridical.saes.splice import check_feature
from veridical.saes.units import unscaled

if TYPE_CHECKING:
    from veridical.activations import Activations
    from veridical.hooked import HookedModel
    from veridical.reporting.section import Section
    from veridical.saes.base import SAE


@dataclass(frozen=True)
class Example:
    """A place where a feature fires.

    Attributes:
        row: Line of the data.
        position: Of the token, among the row's real tokens.
        value: The feature's activation there.
        tokens: The tokens around it, in order.
        values: The feature's activation at each of them.
        at: Which of them it is.
    """

    row: int
    position: int
    value: float
    tokens: tuple[str, ...]
    values: tuple[float, ...]
    at: int

    @property
    def text(self) -> str:
        """The tokens, joined."""
        return "".join(self.tokens)


@dataclass(frozen=True, repr=False)
class FeatureTable:
    """Every feature of an SAE over one data set.

    Attributes:
        sae: The SAE, in raw units.
        acts: The activations that it was run on, all tokens of each text.
        frequency: `[F]`, share of the tokens on which each feature exceeds 1e-3.
        texts: `[F]`, share of the texts in which it does.
        mean: `[F]`, its mean activation where it does; 0 where it never does.
        largest: `[F]`, its largest activation.
        strongest: `[n, F]`, vector with the largest activation in each of its strongest texts; -1 for none.
        drawn: `[m, F]`, vectors drawn at random among those on which it fires; -1 for none.
        context: Tokens shown on either side of an example.
    """

    sae: SAE
    acts: Activations
    frequency: np.ndarray
    texts: np.ndarray
    mean: np.ndarray
    largest: np.ndarray
    strongest: np.ndarray
    drawn: np.ndarray
    context: int

    @property
    def site(self) -> str:
        """Where the SAE reads, as the store names it."""
        return _site(self.sae, self.acts)

    def to_frame(self) -> pd.DataFrame:
        """One line per feature."""
        return pd.DataFrame(
            {
                "feature": np.arange(len(self.frequency)),
                "frequency": self.frequency,
                "texts": self.texts,
                "mean": self.mean,
                "largest": self.largest,
            }
        )

    def examples(self, feature: int) -> list[Example]:
        """The strongest example of each of the feature's strongest texts, strongest first."""
        return self._examples(feature, self.strongest)

    def random_examples(self, feature: int) -> list[Example]:
        """Examples drawn among all tokens on which the feature fires, strongest first."""
        return sorted(self._examples(feature, self.drawn), key=lambda one: -one.value)

    def values(self, features: Sequence[int]) -> np.ndarray:
        """Activations of some features at every token, `[tokens, features]`."""
        numbers = [check_feature(self.sae, feature) for feature in features]
        rows = held_out(self.sae, self.acts)
        with torch.no_grad():
            parts = [self.sae.encode(x)[:, numbers].float().cpu() for _, x, _ in rows.blocks(self.sae)]
        return torch.cat(parts).numpy()

    def page(self, feature: int, model: HookedModel | None = None) -> Section:
        """What is known of one feature, as a section of a report; `model` for its effect on logits."""
        return self.pages([feature], model)[0]

    def pages(self, features: Sequence[int], model: HookedModel | None = None) -> list[Section]:
        """Sections for several features, over one pass of the data."""
        from veridical.saes.feature_pages import pages

        return pages(self, features, model)

    def report_section(self) -> Section:
        """The index: every feature in a line, most active first, and how often features fire."""
        from veridical.saes.feature_pages import index

        return index(self)

    def __repr__(self) -> str:
        dead = float((self.frequency == 0).mean())
        return (
            f"FeatureTable({len(self.frequency):,} features at {self.site}, {number(dead)} silent, over "
            f"{len(self.acts):,} tokens of {len(self.acts.rows):,} texts)"
        )

    def _repr_html_(self) -> str:
        top = self.to_frame().nlargest(20, "frequency").round(4)
        return f"<p><b>{html.escape(repr(self))}</b></p>{top.to_html(index=False, escape=True, border=0)}"

    def _examples(self, feature: int, places: np.ndarray) -> list[Example]:
        feature = check_feature(self.sae, feature)
        return [self._example(feature, int(at)) for at in places[:, feature] if at >= 0]

    def _example(self, feature: int, vector: int) -> Example:
        index = self.acts.index
        rows, positions = index["row"].to_numpy(), index["position"].to_numpy()
        near = np.arange(max(0, vector - self.context), min(len(rows), vector + self.context + 1))
        near = near[rows[near] == rows[vector]]
        x = self.acts.take(self.site, near).flatten(1).to(self.sae.W_dec.device)
        with torch.no_grad():
            values = self.sae.encode(x)[:, feature].double().tolist()
        at = int(np.flatnonzero(near == vector)[0])
        return Example(
            row=int(rows[vector]),
            position=int(positions[vector]),
            value=values[at],
            tokens=tuple(str(token) for token in index["token"].to_numpy()[near]),
            values=tuple(values),
            at=at,
        )


def feature_table(
    sae: SAE,
    data: HookedModel | Activations,
    texts: Any = None,
    *,
    examples: int = 8,
    random: int = 4,
    context: int = 12,
    seed: int = 0,
    batch_tokens: int = 2048,
    progress: bool | None = None,
) -> FeatureTable:
    """Runs an SAE over a data set and keeps, for every feature, its figures and examples.

    Args:
        sae: One SAE or transcoder (not a stack, not a crosscoder).
        data: A model that then runs over `texts`, or `Activations` with the SAE's site.
        texts: Texts, chats or `Pairs`, where `data` is a model; all their tokens are read.
        examples: Texts kept for each feature.
        random: Tokens drawn at random for each feature, among those on which it fires.
        context: Tokens shown on either side of an example.
        seed: Seed of the draw.
        batch_tokens: Tokens in one batch of the model, padding included.
        progress: Progress bar; by default only on a terminal or in a notebook.

    Raises:
        InputError: A stack or crosscoder, a model without texts, or activations averaged over tokens.
    """
    if sae.stacked or sae.config.architecture == "crosscoder":
        raise InputError(f"features are listed for one SAE at one site; this is {sae!r}")
    sae = unscaled(sae)
    acts = _activations(sae, data, texts, batch_tokens, progress)
    if (acts.index["position"].to_numpy() < 0).any():
        raise InputError("these activations are averaged over tokens; collect them with tokens='all'")
    sums = _Running(sae.width, examples, random, seed)
    rows = held_out(sae, acts, groups=acts.index["row"].to_numpy())
    with torch.no_grad():
        for where, latents in _latents(sae, rows):
            sums.add(where, latents, rows.groups[where])
    fired = sums.fired.clamp_min(1)
    return FeatureTable(
        sae=sae,
        acts=acts,
        frequency=(sums.fired / rows.count).numpy(),
        texts=(sums.texts / (int(rows.groups.max()) + 1)).numpy(),
        mean=(sums.total / fired).numpy(),
        largest=sums.largest.numpy(),
        strongest=sums.strongest(),
        drawn=sums.drawn(),
        context=context,
    )


class _Running:
    """Figures and examples of every feature while the data go by, on the CPU."""

    def __init__(self, width: int, examples: int, random: int, seed: int):
        self.fired, self.texts, self.total, self.largest = (
            torch.zeros(width, dtype=torch.float64) for _ in range(4)
        )
        self.seen: Tensor | None = None  # features that fired in the text that the last block ended in
        self.last = -1
        self.kept = torch.zeros(examples, width)
        self.kept_at = torch.full((examples, width), -1)
        self.kept_of = torch.full((examples, width), -1)
        self.keys = torch.full((random, width), -1.0)
        self.keys_at = torch.full((random, width), -1)
        self.random = torch.Generator().manual_seed(seed)

    def add(self, where: slice, latents: Tensor, groups: np.ndarray) -> None:
        latents = latents.float().cpu()
        active = latents > FIRED
        self.fired += active.sum(0)
        self.total += torch.where(active, latents, 0).double().sum(0)
        self.largest = torch.maximum(self.largest, latents.amax(0).double())
        texts, codes = np.unique(groups, return_inverse=True)
        best, at = _by_text(latents, torch.from_numpy(codes.reshape(-1)), len(texts))
        self._count(best > FIRED, texts)
        self._keep(best, at + where.start, torch.from_numpy(texts))
        self._draw(active, where)

    def _count(self, fires: Tensor, texts: np.ndarray) -> None:
        """Texts in which a feature fires; one that goes on from the last block counts once."""
        counted = fires.clone()
        if self.seen is not None and texts[0] == self.last:
            counted[0] &= ~self.seen
            fires[0] |= self.seen
        self.texts += counted.sum(0)
        self.seen, self.last = fires[-1].clone(), int(texts[-1])

    def _keep(self, best: Tensor, at: Tensor, texts: Tensor) -> None:
        if not len(self.kept):
            return
        # A text that goes on from the last block gives way to itself where it is stronger now.
        again = self.kept_of == texts[0]
        self.kept = torch.where(again & (best[0] > self.kept), -1.0, self.kept)
        best = best.clone()
        best[0] = torch.where((again & (self.kept >= 0)).any(0), -1.0, best[0])
        values = torch.cat([self.kept, torch.where(best > FIRED, best, -1.0)])
        places = torch.cat([self.kept_at, at])
        owners = torch.cat([self.kept_of, texts[:, None].expand_as(at)])
        self.kept, order = values.topk(len(self.kept), dim=0)
        self.kept_at, self.kept_of = places.gather(0, order), owners.gather(0, order)

    def _draw(self, active: Tensor, where: slice) -> None:
        if not len(self.keys):
            return
        keys = torch.rand(active.shape, generator=self.random)
        keys = torch.cat([self.keys, torch.where(active, keys, -1.0)])
        numbers = torch.arange(where.start, where.start + len(active))
        places = torch.cat([self.keys_at, numbers[:, None].expand_as(active)])
        self.keys, order = keys.topk(len(self.keys), dim=0)
        self.keys_at = places.gather(0, order)

    def strongest(self) -> np.ndarray:
        """Vectors `[examples, F]`, strongest first, -1 for none."""
        return torch.where(self.kept > FIRED, self.kept_at, -1).numpy()

    def drawn(self) -> np.ndarray:
        """Vectors `[random, F]`, -1 for none."""
        return torch.where(self.keys >= 0, self.keys_at, -1).numpy()


def _by_text(latents: Tensor, codes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Largest activation of each feature in each text `[texts, F]`, and the row of the block it is at."""
    spread = codes[:, None].expand_as(latents)
    best = latents.new_full((count, latents.shape[1]), -1.0).scatter_reduce(0, spread, latents, "amax")
    rows = torch.arange(len(latents))[:, None].expand_as(latents)
    rows = torch.where(latents == best[codes], rows, len(latents))
    first = torch.full_like(best, len(latents), dtype=torch.int64).scatter_reduce(0, spread, rows, "amin")
    return best, first


def _latents(sae: SAE, rows: HeldOut) -> Iterator[tuple[slice, Tensor]]:
    for where, x, _ in rows.blocks(sae):
        yield where, sae.encode(x)


def _activations(
    sae: SAE, data: HookedModel | Activations, texts: Any, batch_tokens: int, progress: bool | None
) -> Activations:
    from veridical.activations import collect
    from veridical.hooked import HookedModel
    from veridical.saes.splice import places

    if not isinstance(data, HookedModel):
        return data
    if texts is None:
        raise InputError("a model came without texts; give texts to run the SAE on")
    site = places(data, sae)[0]
    return collect(data, texts, sites=[site], tokens="all", batch_tokens=batch_tokens, progress=progress)


def _site(sae: SAE, acts: Activations) -> str:
    from veridical.probes.data import site_name

    return acts.sites[0] if sae.config.site is None else site_name(sae.config.site, acts.sites)
