"""An SAE inside the model: its reconstruction spliced in, a feature steered, clamped or ablated.

All of it goes through the one hook engine and is undone when its context ends. Steering, clamping and
ablating leave what the SAE does not explain as it is: only the direction of the feature moves, by
`(wanted - found) * W_dec[feature]`, so where an ablated feature is silent the model is left bit for bit as it
was. A transcoder reads at one site and writes at another; a plain SAE does both at the same.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veridical.errors import InputError
from veridical.saes.row_norm import RowNormalised
from veridical.saes.units import unscaled

if TYPE_CHECKING:
    from veridical.hooked import HookedModel, Read, Write
    from veridical.hooks import Run
    from veridical.saes.base import SAE

Edit = Callable[[Tensor, Tensor], Tensor]
"""Takes the SAE's input `[n, d_in]` and the value at its output site `[n, d_out]`; gives the new value."""


def spliced(
    model: HookedModel, sae: SAE, *, site: str | None = None
) -> contextlib.AbstractContextManager[Run]:
    """A context in which the model runs on the SAE's reconstruction instead of its own activations.

    Args:
        model: The model that the SAE belongs to.
        sae: An SAE or transcoder; a transcoder's output takes the place of the value at its output site.
        site: Where to read (and, for a plain SAE, write); the SAE's own site when not given.

    Raises:
        InputError: No site, another width than the SAE's, or a crosscoder.
        UnknownNameError: A site that the model does not have.
    """
    return _edited(model, sae, reconstruct(sae), site)


def steer(
    model: HookedModel, sae: SAE, features: Mapping[int, float], *, site: str | None = None
) -> contextlib.AbstractContextManager[Run]:
    """A context in which `strength * W_dec[feature]` is added at every token.

    Args:
        model: The model that the SAE belongs to.
        sae: An SAE or transcoder.
        features: Strength of each feature, in the units of its activation: the largest activation seen on
            data (`FeatureTable`) is a natural scale.
        site: As for `spliced`.

    Raises:
        InputError: As for `spliced`, or a feature that the SAE does not have.
    """
    sae = unscaled(sae)
    numbers, strengths = _features(sae, features)
    added = strengths @ sae.W_dec.detach()[numbers].to(strengths)
    return _edited(model, sae, lambda x, y: y + (added * _units(sae, x)).to(y), site)


def clamp(
    model: HookedModel, sae: SAE, features: Mapping[int, float], *, site: str | None = None
) -> contextlib.AbstractContextManager[Run]:
    """A context in which each of `features` is held at a value, at every token.

    Args:
        model: The model that the SAE belongs to.
        sae: An SAE or transcoder.
        features: Activation to hold each feature at; 0 ablates it.
        site: As for `spliced`.

    Raises:
        InputError: As for `spliced`, or a feature that the SAE does not have.
    """
    numbers, wanted = _features(sae, features)
    edit = on_latents(sae, numbers, lambda found: wanted.to(found).expand_as(found))
    return _edited(model, sae, edit, site)


def ablate(
    model: HookedModel, sae: SAE, features: int | Sequence[int], *, site: str | None = None
) -> contextlib.AbstractContextManager[Run]:
    """A context in which `features` contribute nothing; see `clamp`."""
    listed = [features] if isinstance(features, int) else list(features)
    return clamp(model, sae, dict.fromkeys(listed, 0.0), site=site)


def on_latents(sae: SAE, numbers: Sequence[int], act: Callable[[Tensor], Tensor]) -> Edit:
    """The edit that puts `act(latents)` in place of the latents of some features.

    Args:
        sae: An SAE or transcoder.
        numbers: The features.
        act: From their activations in raw units `[..., features]` to new ones of the same shape; where both
            are equal the value keeps its bits.
    """
    raw, picked = unscaled(sae), list(numbers)

    def edit(x: Tensor, y: Tensor) -> Tensor:
        found = raw.encode(cast(raw, x))[..., picked]
        change = (act(found) - found) @ raw.W_dec[picked].to(found) * _units(raw, x)
        return y + change.to(y)

    return edit


def reconstruct(sae: SAE) -> Edit:
    """The edit that puts the SAE's output in place of the value."""
    return lambda x, y: sae(cast(sae, x)).to(y)


def cast(sae: SAE, x: Tensor) -> Tensor:
    """`x` on the SAE's device, in its number format."""
    return x.to(device=sae.W_dec.device, dtype=sae.W_dec.dtype)


def places(model: HookedModel, sae: SAE, site: str | None = None) -> tuple[str, str]:
    """The canonical sites at which the SAE reads and writes in `model`, after every check.

    Raises:
        InputError: No site, several, another width than the SAE's, or a crosscoder.
        UnknownNameError: A site that the model does not have.
    """
    config = sae.config
    if config.architecture == "crosscoder":
        raise InputError(
            "a crosscoder reads several sites or models at once and has no one place in a model; evaluate it "
            "on its activations"
        )
    source = site or config.site
    if source is None:
        raise InputError("this SAE does not say which site it reads; give site=...")
    read = _one(model, source, sae.d_in, "reads")
    return read, _one(model, config.target_site or source, sae.d_out, "writes")


def hooks_for(
    model: HookedModel, sae: SAE, edit: Edit, site: str | None = None, where: Tensor | None = None
) -> tuple[Read, Write]:
    """Reads and writes that apply `edit` at the SAE's place, for `HookedModel.run` or `.hooks`.

    Args:
        model: The model.
        sae: The SAE.
        edit: What to put in place of the value.
        site: As for `spliced`.
        where: `[rows, pos]` bool, the tokens to edit; all when not given.
    """
    source, target = places(model, sae, site)
    kept: dict[str, Tensor] = {}

    def write(value: Tensor) -> Tensor:
        y = value.flatten(2)
        x = y if source == target else kept.pop("x").flatten(2)
        if where is None:
            return edit(x, y).reshape(value.shape)
        chosen = where.to(value.device)
        y = y.clone()
        y[chosen] = edit(x[chosen], y[chosen])
        return y.reshape(value.shape)

    def keep(value: Tensor) -> None:
        kept["x"] = value

    reads: Read = {} if source == target else {source: keep}
    return reads, {target: write}


def _edited(
    model: HookedModel, sae: SAE, edit: Edit, site: str | None
) -> contextlib.AbstractContextManager[Run]:
    read, write = hooks_for(model, sae, edit, site)

    @contextlib.contextmanager
    def running() -> Iterator[Run]:
        with model.hooks(read=read, write=write) as run:
            yield run

    return running()


def _units(sae: SAE, x: Tensor) -> Tensor | float:
    """What a step of 1 in latents is worth in raw units, for rows `x`: 1, but where rows are normalised."""
    return sae.row_units(cast(sae, x)) if isinstance(sae, RowNormalised) else 1.0


def _one(model: HookedModel, site: Any, width: int, verb: str) -> str:
    found = model.resolve(site)
    if len(found) != 1:
        raise InputError(f"an SAE {verb} one site; {site!r} names {len(found)} of {model.path}")
    name = found[0].name
    has = math.prod(model.width(name))
    if has != width:
        raise InputError(f"the SAE {verb} {width} dimensions; {model.path} has {has} at {name}")
    return name


def _features(sae: SAE, features: Mapping[int, float]) -> tuple[list[int], Tensor]:
    if not isinstance(features, Mapping) or not features:
        raise InputError(
            f"features is {features!r}; expected a mapping from feature to value, such as {{12: 4.0}}"
        )
    numbers = [check_feature(sae, number) for number in features]
    values = torch.tensor([float(value) for value in features.values()], device=sae.W_dec.device)
    if not bool(torch.isfinite(values).all()):
        raise InputError(f"features is {dict(features)}; expected finite values")
    return numbers, values


def check_feature(sae: SAE, number: Any) -> int:
    """The number of a feature that the SAE has; anything else is refused."""
    if isinstance(number, bool) or int(number) != number or not 0 <= int(number) < sae.width:
        raise InputError(f"feature {number!r}: this SAE has features 0 to {sae.width - 1}")
    return int(number)
