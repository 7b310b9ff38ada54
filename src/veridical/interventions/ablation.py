"""Ablation: a site, head, neuron, SAE feature or direction taken out while the model runs.

    with vd.ablate(m, "attn_out.3", mode="mean", over=acts):
        m.logits("...")            # and m.run, m.generate, or a plain call of the model itself

What is put in its place:

- `zero`: nothing.
- `mean`: the mean over a data set, over all its tokens or at each position. The mean of what? `over` says: a
  store of activations (its own running moments), texts (averaged on the spot), `Means` or a mapping from
  sites to tensors, or "batch", the real tokens of the present batch.
- `resample`: values of other tokens, drawn with a seed, from a store, from texts, or from other rows of the
  batch (as in causal scrubbing, Chan et al. 2022).
- `project`: directions projected out (as in Arditi et al. 2024, arXiv:2406.11717), to zero along them or, with
  `over`, to their mean.

A head is taken out at `z`, before the output projection mixes heads. An edit that leaves every number as it
was is warned about when the context ends, with the reason.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from veridical.errors import InputError, unknown
from veridical.interventions import means as averaging
from veridical.interventions.drawing import FromBatch, FromStore
from veridical.interventions.means import Means, Transform
from veridical.interventions.replacing import (
    BatchMean,
    ByPosition,
    Constant,
    Drawn,
    Projected,
    Replace,
    as_map,
)
from veridical.interventions.spots import Spots, as_positions, as_tokens
from veridical.interventions.units import Units, per_site, units_of
from veridical.probes.passes import following

if TYPE_CHECKING:
    from veridical.hooked import HookedModel, SiteSpec
    from veridical.saes.base import SAE

Mode = Literal["zero", "mean", "resample", "project"]
BATCH = "batch"


@dataclass(eq=False, repr=False)
class Ablation:
    """What an ablation does and did.

    Attributes:
        mode: As given.
        changed: For each site whether any number there was changed so far.
        reached: For each site whether a pass came by.
    """

    mode: str
    changed: dict[str, bool] = field(default_factory=dict)
    reached: dict[str, bool] = field(default_factory=dict)

    def __repr__(self) -> str:
        done = sum(self.changed.values())
        return f"Ablation({self.mode} at {len(self.changed)} sites, {done} of them changed so far)"


@contextlib.contextmanager
def ablate(
    model: HookedModel | Any,
    sites: SiteSpec | None = None,
    *,
    mode: Mode = "zero",
    over: Any = None,
    heads: Any = None,
    neurons: Any = None,
    features: Any = None,
    sae: SAE | None = None,
    positions: Any = None,
    tokens: Any = None,
    directions: Any = None,
    by_position: bool = False,
    seed: int = 0,
) -> Iterator[Ablation]:
    """Ablates for every forward pass in the context: `run`, `logits`, `generate`, or the model called as is.

    Contexts may be nested: the outer one acts first. They are undone at the end, also by an exception, and
    hooks of yours stay.

    Args:
        model: A `HookedModel`, or anything that `veridical.load` takes.
        sites: Sites in any spelling. Not needed with `sae`, or with a probe that knows its site.
        mode: "zero", "mean", "resample" or "project"; see the module.
        over: For "mean": a store of activations, texts or `Pairs`, `Means`, a mapping from site to a tensor
            of the site's shape, or "batch". For "resample": a store, texts, or "batch" (also when not given).
            For "project": none, or as for "mean", to keep the mean along the directions.
        heads: Heads at q, k, v, z or pattern: an integer, several, or a mapping from site to these. At k and
            v they are key/value heads.
        neurons: Neurons (entries of the last axis), likewise.
        features: Features of `sae`, at the place in the model that it was made for; what it does not explain
            stays.
        sae: An SAE or transcoder.
        positions: Integers or slices; all tokens when not given. They count each text's real tokens from 0,
            with the prefix that a cache holds; negative ones from the end of the text that the call was given
            (of the prompt, in a generation). At a pattern they are queries.
        tokens: Token ids, or texts of one token each: only these tokens. With `positions`, both must hold.
        directions: For "project": `[d]` or `[k, d]`, a fitted probe, or an `Eraser`; of the site's width, or
            of one head's.
        by_position: For "mean" and "resample": the mean at the token's own position, or a token from the same
            position.
        seed: Decides what "resample" draws. A batch gets the same draws each time that it is run.

    Yields:
        `Ablation`: which sites were reached and changed.

    Raises:
        UnknownNameError: A site or mode that does not exist.
        InputError: A head, neuron, feature or position that is not there, a mean of another shape, or options
            that do not go together; positions and draws are checked as passes come.
    """
    model = _loaded(model)
    _check(mode, over, features, sae, heads, neurons, directions, by_position)
    found = Ablation(mode)
    if mode == "mean" and positions is None and tokens is None:
        averaging.warn_of_selection(over)
    with following(model) as passes:
        spots = Spots(passes, as_positions(positions), as_tokens(model, tokens))
        reads, writes = _Making(model, mode, over, by_position, seed, directions, spots, found).hooks(
            sites, heads, neurons, features, sae
        )
        with model.hooks(read=reads, write=writes):
            yield found
    if late := spots.unreached():
        raise InputError(
            f"position {late[0]} is outside every text: the longest had {spots.longest} tokens, generated ones "
            "included"
        )
    _warn(found, spots, mode)


class _Edit:
    """The hook at one site: part of the value is replaced at the chosen tokens."""

    def __init__(
        self, name: str, pattern: bool, units: Units, replace: Replace, spots: Spots, found: Ablation
    ) -> None:
        self.name, self.pattern, self.units, self.replace = name, pattern, units, replace
        self.spots, self.found = spots, found
        self.needs_spot = spots.told or replace.needs_spot
        found.changed[name] = found.reached[name] = False

    def __call__(self, value: Tensor) -> Tensor:
        """The edited value; `value` is this hook's own copy."""
        found, name = self.found, self.name
        # Compared until a first change is seen, so that a long generation does not pay for it.
        before = None if found.changed[name] else value.detach().clone()
        found.reached[name] = True
        part = self.units.read(value)
        tokens = value.shape[2] if self.pattern else value.shape[1]
        spot = self.spots.look(value.shape[0], tokens) if self.needs_spot else None
        new = self.replace(part, spot)
        if spot is not None and spot.chosen is not None:
            where = spot.chosen.to(value.device)
            where = where[:, None, :, None] if self.pattern else where[..., *[None] * (part.dim() - 2)]
            new = torch.where(where, new, part)
        edited = self.units.write(value, new)
        if before is not None and not torch.equal(before, edited):
            found.changed[name] = True
        return edited


class _Making:
    """Makes the hooks of an ablation."""

    def __init__(
        self,
        model: HookedModel,
        mode: Mode,
        over: Any,
        by_position: bool,
        seed: int,
        directions: Any,
        spots: Spots,
        found: Ablation,
    ) -> None:
        self.model, self.mode, self.over, self.by_position = model, mode, over, by_position
        self.seed, self.directions, self.spots, self.found = seed, directions, spots, found

    def hooks(
        self, sites: Any, heads: Any, neurons: Any, features: Any, sae: SAE | None
    ) -> tuple[Any, dict[Any, Any]]:
        """Reads and writes for `HookedModel.hooks`."""
        if sae is not None:
            return self._on_features(sites, features, sae)
        sites = sites if sites is not None else getattr(self.directions, "site", None)
        if sites is None:
            raise InputError("no site was named; give one such as resid_post.0 or z.*")
        resolved = self.model.resolve(sites)
        which = per_site(self.model, resolved, heads, "heads")
        neurons_at = per_site(self.model, resolved, neurons, "neurons")
        units = {site: units_of(self.model, site, which[site], neurons_at[site]) for site in resolved}
        if self.mode != "zero":
            for site in resolved:
                if site.kind == "pattern":
                    raise InputError(
                        f"{site.short} has a size that depends on the text, so it can be ablated to zero only"
                    )
        shapes = {site.name: tuple(self.model.width(site)) for site in resolved if site.kind != "pattern"}
        replace = self._replacements(shapes, None)
        return (), {
            site: _Edit(
                site.name,
                site.kind == "pattern",
                units[site],
                replace(site.name, units[site]),
                self.spots,
                self.found,
            )
            for site in resolved
        }

    def _on_features(self, sites: Any, features: Any, sae: SAE) -> tuple[Any, dict[Any, Any]]:
        from veridical.saes import splice
        from veridical.saes.units import unscaled

        listed = [features] if not hasattr(features, "__iter__") else list(features)
        numbers = sorted({splice.check_feature(sae, number) for number in listed})
        if not numbers:
            raise InputError("features is empty; name at least one feature of the SAE")
        source, _ = splice.places(self.model, sae, sites)
        raw = unscaled(sae)

        def latents(vectors: Tensor) -> Tensor:
            return raw.encode(splice.cast(raw, vectors.flatten(1)))[..., numbers]

        replace = self._replacements({source: (len(numbers),)}, latents)
        edit = _Edit(source, False, Units(), replace(source, Units()), self.spots, self.found)
        # The SAE's latents come as they are and go back as a difference, so the hook gets a copy of them.
        on_latents = splice.on_latents(sae, numbers, lambda found: edit(found.clone()))
        return splice.hooks_for(self.model, sae, on_latents, sites)

    def _replacements(
        self, shapes: Mapping[str, tuple[int, ...]], transform: Transform | None
    ) -> Callable[[str, Units], Replace]:
        """From a site and its chosen part to what replaces that."""
        if self.mode == "zero":
            return lambda name, units: Constant(torch.zeros(()))
        if self.mode == "resample":
            return self._resampling(shapes, transform)
        means = self._means(shapes, transform)
        if self.mode == "project":
            return lambda name, units: self._projecting(name, shapes[name], units, means)
        if means is None:
            return lambda name, units: BatchMean(self.by_position, name)

        def mean(name: str, units: Units) -> Replace:
            if not self.by_position:
                return Constant(_part(means[name], units, 2))
            return ByPosition(_part(means[name], units, 1), name)

        return mean

    def _projecting(
        self, name: str, shape: tuple[int, ...], units: Units, means: Mapping[str, Tensor] | None
    ) -> Replace:
        left, right, centre, flat = as_map(self.directions, math.prod(shape), shape[-1])
        if flat and units.axis is not None:
            raise InputError(
                f"the directions lie over all heads of {name} together; give heads= none, or directions of "
                f"width {shape[-1]}"
            )
        kept = torch.as_tensor(np.asarray(centre))
        if means is not None:
            kept = means[name].flatten() if flat else _part(means[name], units, 2)
        return Projected(left, right, kept, flat)

    def _resampling(
        self, shapes: Mapping[str, tuple[int, ...]], transform: Transform | None
    ) -> Callable[[str, Units], Replace]:
        if self.over is None or _is_batch(self.over):
            drawn = FromBatch(self.seed, self.by_position)
            return lambda name, units: Drawn(drawn.take)
        acts = self._stored(list(shapes))
        store = FromStore(acts, self.seed, self.by_position)

        def donors(name: str, units: Units) -> Replace:
            def take(part: Tensor, spot: Any) -> Tensor:
                vectors = store.take(name, spot, part)
                if transform is not None:
                    vectors = transform(vectors.flatten(0, 1)).to(part).unflatten(0, vectors.shape[:2])
                return units.read(vectors)

            return Drawn(take)

        return donors

    def _stored(self, names: list[str]) -> Any:
        from veridical.activations import Activations, collect

        if isinstance(self.over, Activations):
            self._check_store(self.over, names)
            return self.over
        return collect(
            self.model, self.over, sites=names, tokens="all", dtype=averaging.stored_type(self.model)
        )

    def _check_store(self, acts: Any, names: list[str]) -> None:
        for name in names:
            if name not in acts:
                raise unknown("site", name, acts.sites, "The store holds these sites only.")
            shape, width = tuple(acts.take(name, np.arange(1)).shape[1:]), tuple(self.model.width(name))
            if shape != width:
                raise InputError(f"the store holds {shape} at {name}; {self.model.path} has {width} there")

    def _means(
        self, shapes: Mapping[str, tuple[int, ...]], transform: Transform | None
    ) -> Mapping[str, Tensor] | None:
        """The means at each site; None where each batch has its own, or where a projection keeps none."""
        from veridical.activations import Activations

        over, names = self.over, list(shapes)
        if over is None or _is_batch(over):
            return None
        if isinstance(over, Activations):
            self._check_store(over, names)
            found = averaging.over_store(
                over, names, by_position=self.by_position, transform=transform
            ).values
        elif isinstance(over, Means):
            if over.by_position != self.by_position:
                raise InputError(
                    f"by_position={self.by_position}, but the means were taken with {over.by_position}"
                )
            found = {name: over[name] for name in names}
        elif isinstance(over, Mapping) and "input_ids" not in over and "pixel_values" not in over:
            found = self._given(over, names)
        else:
            found = averaging.streamed(
                self.model, over, names, by_position=self.by_position, transform=transform
            ).values
        for name, shape in shapes.items():
            has = tuple(found[name].shape[1:] if self.by_position else found[name].shape)
            if has != shape:
                raise InputError(f"the mean at {name} has shape {has}; expected {shape}")
        return found

    def _given(self, over: Mapping[Any, Any], names: list[str]) -> dict[str, Tensor]:
        given = {site.name: value for spec, value in over.items() for site in self.model.resolve(spec)}
        for name in names:
            if name not in given:
                raise unknown("site", name, given, "over= has no mean for it.")
        made = {name: torch.as_tensor(given[name]).detach() for name in names}
        for name, value in made.items():
            if not bool(torch.isfinite(value).all()):
                raise InputError(f"the mean at {name} holds NaN or infinity")
        return made


def _part(mean: Tensor, units: Units, without: int) -> Tensor:
    """The chosen heads or neurons of a mean, which lacks the first `without` axes of a value."""
    if units.axis is None:
        return mean
    return mean.index_select(units.axis - without, torch.tensor(units.numbers, device=mean.device))


def _check(
    mode: str,
    over: Any,
    features: Any,
    sae: Any,
    heads: Any,
    neurons: Any,
    directions: Any,
    by_position: bool,
) -> None:
    """Refuses options that do not go together."""
    if mode not in get_args(Mode):
        raise unknown("mode", mode, get_args(Mode))
    if isinstance(over, str) and not _is_batch(over):
        raise InputError(f"over is {over!r}; expected a store, texts, means, or 'batch'")
    if (features is None) != (sae is None):
        raise InputError(
            "features= and sae= go together: the features of which SAE, or which of its features?"
        )
    if sae is not None and (heads is not None or neurons is not None):
        raise InputError("heads= and neurons= do not go with an SAE's features")
    if (mode == "project") != (directions is not None):
        raise InputError("directions= goes with mode='project', and that needs them")
    if mode == "project" and (sae is not None or neurons is not None or by_position or _is_batch(over)):
        raise InputError(
            "mode='project' takes directions out of whole vectors, to zero or to a mean over a data set: it does "
            "not go with features, neurons, by_position or over='batch'"
        )
    if mode == "mean" and over is None:
        raise InputError(
            "mode='mean' needs over=: a store (acts), texts, means by site, or 'batch' for the present batch"
        )
    if mode == "zero" and (over is not None or by_position):
        raise InputError("mode='zero' takes neither over= nor by_position=; did you mean mode='mean'?")
    if mode == "resample" and isinstance(over, Mapping | Means):
        raise InputError("mode='resample' draws tokens: over= is a store, texts or 'batch', not means")


def _warn(found: Ablation, spots: Spots, mode: str) -> None:
    """Warns of sites at which nothing was changed, with the reason."""
    for name, changed in found.changed.items():
        if changed:
            continue
        if spots.passes.current is None:
            why = "the model did not run in the context"
        elif not found.reached[name]:
            why = "no pass came by it"
        elif spots.told and not spots.some:
            why = "no chosen position or token was in the texts"
        else:
            why = f"the values there were what mode={mode!r} puts in their place already"
        warnings.warn(f"the ablation at {name} changed nothing, to the last bit: {why}", stacklevel=4)


def _is_batch(over: Any) -> bool:
    return isinstance(over, str) and over == BATCH


def _loaded(model: Any) -> HookedModel:
    from veridical.models import load

    return load(model)
