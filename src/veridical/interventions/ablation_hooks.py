"""Hooks of an ablation: what each site's hook does, and what is put in place of its values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

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
    OfPatterns,
    Projected,
    Replace,
    as_map,
)
from veridical.interventions.spots import Spots
from veridical.interventions.units import Units, per_site, units_of
from veridical.sites import Site

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
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


class Edit:
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


class Making:
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
    ) -> tuple[Any, Mapping[Any, Any]]:
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
        for site in resolved:
            if site.kind == "pattern":
                self._check_pattern(site)
        shapes: dict[str, tuple[int, ...] | None] = {
            site.name: None if site.kind == "pattern" else tuple(self.model.width(site)) for site in resolved
        }
        replace = self._replacements(shapes, None)
        return (), {
            site: Edit(
                site.name,
                site.kind == "pattern",
                units[site],
                self._for_pattern(site, replace(site.name, units[site])),
                self.spots,
                self.found,
            )
            for site in resolved
        }

    def _check_pattern(self, site: Site) -> None:
        """Refuses what means nothing for probabilities over keys."""
        if self.mode == "project":
            raise InputError(f"{site.short} holds probabilities over keys, not vectors to project within")
        if self.mode != "zero" and not self.by_position:
            raise InputError(f"{site.short} goes by query and key position; give by_position=True")
        if self.mode == "resample" and self.over is not None and not is_batch(self.over):
            raise InputError(f"{site.short} is resampled from other rows of the batch only: over='batch'")

    def _for_pattern(self, site: Site, replace: Replace) -> Replace:
        return OfPatterns(replace, site.short) if site.kind == "pattern" and self.mode != "zero" else replace

    def _on_features(self, sites: Any, features: Any, sae: SAE) -> tuple[Any, Mapping[Any, Any]]:
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
        edit = Edit(source, False, Units(), replace(source, Units()), self.spots, self.found)
        # The SAE's latents come as they are and go back as a difference, so the hook gets a copy of them.
        on_latents = splice.on_latents(sae, numbers, lambda found: edit(found.clone()))
        return splice.hooks_for(self.model, sae, on_latents, sites)

    def _replacements(
        self, shapes: Mapping[str, tuple[int, ...] | None], transform: Transform | None
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
        self, name: str, shape: tuple[int, ...] | None, units: Units, means: Mapping[str, Tensor] | None
    ) -> Replace:
        shape = shape or ()
        width = shape[-1] if shape else 0
        left, right, centre, flat = as_map(self.directions, math.prod(shape), width)
        if flat and units.axis is not None:
            raise InputError(
                f"the directions lie over all heads of {name} together; give heads= none, or directions of "
                f"width {width}"
            )
        kept = torch.as_tensor(np.asarray(centre))
        if means is not None:
            kept = means[name].flatten() if flat else _part(means[name], units, 2)
        return Projected(left, right, kept, flat)

    def _resampling(
        self, shapes: Mapping[str, tuple[int, ...] | None], transform: Transform | None
    ) -> Callable[[str, Units], Replace]:
        if self.over is None or is_batch(self.over):
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
        self, shapes: Mapping[str, tuple[int, ...] | None], transform: Transform | None
    ) -> Mapping[str, Tensor] | None:
        """The means at each site; None where each batch has its own, or where a projection keeps none."""
        from veridical.activations import Activations

        over, names = self.over, list(shapes)
        if over is None or is_batch(over):
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
            if shape is None:  # of a pattern, [query, head, key]
                has, shape = has[:1] + has[2:], (self.model.n_heads,)
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
    axis = 1 if units.axis == 1 else units.axis - without  # of a pattern, [query, head, key]
    return mean.index_select(axis, torch.tensor(units.numbers, device=mean.device))


def is_batch(over: Any) -> bool:
    """Whether `over` means the present batch."""
    return isinstance(over, str) and over == BATCH
