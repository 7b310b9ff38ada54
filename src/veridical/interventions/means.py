"""Means of activations over a data set, for ablation: over every real token, or at each position.

Sums are kept in float64 and taken in one pass, however large the data. A mean over all tokens is one vector
of the site's own shape (heads and neurons keep theirs); a mean by position is one such vector for each
position, over the texts that are long enough to have it. Padding enters neither.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from veridical.errors import DataError, InputError, NonFiniteError, unknown
from veridical.sites import Site

if TYPE_CHECKING:
    from veridical.activations import Activations
    from veridical.hooked import HookedModel

IMAGES = 32
"""Images that are run at a time."""
Transform = Callable[[Tensor], Tensor]
"""From values `[n, ...]` of a site to what is averaged, `[n, ...]`."""


@dataclass(frozen=True, eq=False, repr=False)
class Means:
    """Mean activations by site.

    Attributes:
        values: By canonical site name: float64, the site's shape (`[d]`, `[heads, d_head]`), with a leading
            axis of positions where means were taken by position.
        counts: Tokens behind each mean: `[1]`, or `[positions]`.
        by_position: Whether there is one mean for each position.
    """

    values: Mapping[str, Tensor]
    counts: Tensor
    by_position: bool = False

    def __getitem__(self, site: str | Site) -> Tensor:
        name = Site.parse(site).name
        if name not in self.values:
            raise unknown("site", str(site), self.values, "Means were taken at these sites only.")
        return self.values[name]

    def __repr__(self) -> str:
        how = f" at each of {len(self.counts)} positions" if self.by_position else ""
        return f"Means({len(self.values)} sites, over {int(self.counts.sum()):,} tokens{how})"


def mean_activations(
    model: HookedModel,
    data: Any,
    sites: Any,
    *,
    by_position: bool = False,
    batch_tokens: int = 4096,
    progress: bool | None = None,
) -> Means:
    """Means over a data set by one streaming pass; nothing but sums is kept.

    Args:
        model: The model, which runs in its present mode.
        data: What `collect` reads (texts, chats, `Pairs`, a `datasets.Dataset`, token ids), or images
            `[n, channels, height, width]` for a vision transformer.
        sites: Sites in any spelling.
        by_position: One mean for each position, over the texts that have it.
        batch_tokens: Most tokens in one batch, padding included.
        progress: Show a bar; on a terminal or in a notebook when not given.

    Raises:
        InputError: Attention patterns without `by_position`, or of texts of different lengths. Their means
            are `[query, head, key]`.
        NonFiniteError: The model gives NaN or infinity.
    """
    return streamed(model, data, sites, by_position=by_position, budget=batch_tokens, progress=progress)


def streamed(
    model: HookedModel,
    data: Any,
    sites: Any,
    *,
    by_position: bool,
    transform: Transform | None = None,
    budget: int = 4096,
    progress: bool | None = None,
) -> Means:
    """`mean_activations`, of what `transform` makes of the values."""
    from veridical.progress import bar

    resolved = model.resolve(sites)
    for site in resolved:
        if site.kind == "pattern" and not by_position:
            raise InputError(f"{site.short} goes by query and key position; give by_position=True")
    names = [site.name for site in resolved]
    patterns = {site.name for site in resolved if site.kind == "pattern"}
    sums = {name: _Sums(by_position) for name in names}
    inputs, total = (_images if model.kind == "vision" else _texts)(model, data, budget)
    with torch.no_grad(), bar(total, "means", "rows", progress) as shown:
        for batch in inputs:
            mask = batch.get("attention_mask")

            def add(value: Tensor, name: str, mask: Tensor | None = mask) -> None:
                if name in patterns:
                    _check_whole(name, value, mask, sums[name].total)
                    value = value.transpose(1, 2)
                vectors, index = _real(value, mask)
                sums[name].add(vectors if transform is None else transform(vectors), index)

            reads: Any = {name: lambda value, name=name, add=add: add(value, name) for name in names}
            model.run(batch, read=reads, stop=True)
            shown.update(len(next(iter(batch.values()))))
    return _means(sums, by_position)


def over_store(
    acts: Activations, sites: Sequence[str], *, by_position: bool, transform: Transform | None = None
) -> Means:
    """Means over the vectors of a store: its own moments where these serve, else one pass over its chunks.

    Raises:
        InputError: By position, from a store that averaged tokens or left some of the first positions out.
    """
    if not by_position and transform is None:
        moments = {name: acts.moments[name] for name in sites}
        counts = torch.tensor([len(acts)])
        return Means({name: found.mean.double() for name, found in moments.items()}, counts)
    places = torch.from_numpy(np.ascontiguousarray(acts.index["position"].to_numpy(), dtype=np.int64))
    if by_position and len(places) and int(places.min()) < 0:
        raise InputError("this store averaged the tokens of each row (tokens='mean'), so it has no positions")
    sums = {name: _Sums(by_position) for name in sites}
    for name in sites:
        first = 0
        for chunk in acts.chunks(name):
            vectors = chunk if transform is None else transform(chunk)
            sums[name].add(vectors, places[first : first + len(chunk)])
            first += len(chunk)
    return _means(sums, by_position)


def warn_of_selection(over: Any) -> None:
    """Warns when `over` is a store of other tokens than all: a mean over these is not the texts' mean."""
    from veridical.activations import Activations

    if isinstance(over, Activations) and (chosen := over.request.tokens["selection"]) != "all":
        warnings.warn(
            f"the store holds the tokens chosen by {chosen!r}, so its mean is over those only; collect with "
            "tokens='all' for the mean over all tokens",
            stacklevel=4,
        )


def stored_type(model: HookedModel) -> str:
    """The number format for activations of a model that are kept for a while: its own, or float32."""
    name = str(model.dtype).removeprefix("torch.")
    return name if name in ("float16", "bfloat16") else "float32"


class _Sums:
    """Running float64 sums of vectors, at each position or over all."""

    def __init__(self, by_position: bool) -> None:
        self.by_position = by_position
        self.total: Tensor | None = None
        self.counts = torch.zeros(0, dtype=torch.int64)

    def add(self, vectors: Tensor, index: Tensor) -> None:
        part, counted = sum_at(vectors, index, self.by_position)
        most, counts = len(part), counted.cpu()
        if self.total is None:
            self.total, self.counts = part, counts
            return
        if most > len(self.total):
            self.total = torch.cat(
                [self.total, self.total.new_zeros(most - len(self.total), *part.shape[1:])]
            )
            self.counts = torch.cat([self.counts, self.counts.new_zeros(most - len(self.counts))])
        self.total[:most] += part
        self.counts[:most] += counts


def sum_at(vectors: Tensor, index: Tensor, by_position: bool) -> tuple[Tensor, Tensor]:
    """Sums `[positions, ...]` in float64 of vectors `[n, ...]` at positions `[n]`, and how many each has.

    Without `by_position` there is one sum, of all of them.
    """
    values = vectors.double() if vectors.device.type != "mps" else vectors.cpu().double()
    if not by_position:
        return values.sum(0, keepdim=True), torch.tensor([len(values)], device=values.device)
    index = index.to(values.device)
    most = int(index.max()) + 1 if len(index) else 0
    sums = values.new_zeros(most, *values.shape[1:]).index_add_(0, index, values)
    return sums, torch.bincount(index, minlength=most)


def _means(sums: Mapping[str, _Sums], by_position: bool) -> Means:
    values, counts = {}, torch.zeros(1, dtype=torch.int64)
    for name, found in sums.items():
        if found.total is None or not len(found.counts):
            raise DataError(f"there is no token to take a mean over at {name}")
        counts = found.counts
        if not bool((counts > 0).all()):
            missing = int((counts == 0).nonzero()[0])
            raise InputError(
                f"no token was read at position {missing}, so there is no mean for it; means by position "
                "need every token (tokens='all')"
            )
        mean = found.total.cpu() / counts.reshape(-1, *[1] * (found.total.dim() - 1))
        if not bool(torch.isfinite(mean).all()):
            raise NonFiniteError(f"the mean at {name} is NaN or infinity: the model gives it for these data")
        values[name] = mean if by_position else mean[0]
    return Means(values, counts, by_position)


def _real(value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Vectors `[n, ...]` of the real tokens, and the position of each in its text."""
    rows, tokens = value.shape[:2]
    if mask is None:
        index = torch.arange(tokens, device=value.device).expand(rows, tokens)
        return value.flatten(0, 1), index.flatten()
    real = mask.to(value.device).bool()
    return value[real], (real.cumsum(1) - 1)[real]


def _texts(model: HookedModel, data: Any, budget: int) -> tuple[Iterator[dict[str, Tensor]], int]:
    from veridical.activations.data import read_data
    from veridical.activations.plan import batches, tokenise
    from veridical.activations.select import selection

    table = tokenise(model, read_data(data), selection("all"), on_long="error", max_length=None)
    groups = batches(table.lengths, budget)
    return (model.batch([table.encoded(int(row)) for row in rows]) for rows in groups), table.rows


def _images(model: HookedModel, data: Any, budget: int) -> tuple[Iterator[dict[str, Tensor]], int]:
    images = data["pixel_values"] if isinstance(data, Mapping) and "pixel_values" in data else data
    if not isinstance(images, Tensor) or images.dim() != 4 or not len(images):
        raise InputError(
            f"{model.path} is a vision transformer: give images as a tensor [n, channels, height, width]"
        )
    parts = images.split(IMAGES)
    return ({"pixel_values": part.to(model.device, model.dtype)} for part in parts), len(images)


def _check_whole(name: str, value: Tensor, mask: Tensor | None, total: Tensor | None) -> None:
    """Refuses patterns of texts of different lengths, whose keys are not the same."""
    keys = value.shape[-1]
    if (mask is not None and not bool(mask.all())) or (total is not None and total.shape[-1] != keys):
        raise InputError(
            f"{name} goes by query and key, so its mean is over texts of one length; these have different "
            "ones"
        )
