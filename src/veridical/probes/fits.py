"""Whether a probe fits the model, site and store on which it is about to be used; one rule for every use.

A direction belongs to one place in one model. Elsewhere it still gives numbers, and they look plausible; so
every use of a probe goes through here, and what does not fit is refused with both sides named. `force=True`
lets it pass, for a fine-tuned descendant of the model, say, where the question is just how far the direction
holds. A wrong width cannot be forced.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from veridical.errors import InputError

if TYPE_CHECKING:
    from veridical.activations import Activations
    from veridical.hooked import HookedModel
    from veridical.probes.base import LinearProbe

FORCE = "pass force=True to use it all the same, as for a fine-tuned descendant"


class MismatchError(InputError):
    """A probe that belongs to another model, site or width; the message names both."""


def place_for(model: HookedModel, probe: LinearProbe, site: str | None = None, *, force: bool = False) -> str:
    """The canonical site of `model` at which `probe` is to be used, after every check.

    Args:
        model: Where it is to be used.
        probe: A fitted probe.
        site: Where to use it; the probe's own site when not given.
        force: Accept another model or another site than the probe's own.

    Raises:
        MismatchError: The probe was fitted on another model or site, or has another width.
        InputError: Neither the probe nor the caller names a site.
        UnknownNameError: A site that this model does not have.
    """
    own, wanted = probe.site, site or probe.site
    if wanted is None:
        raise InputError("this probe does not say which site it reads; give site=...")
    origin = probe.origin_
    if not force and origin.model_fingerprint is not None:
        same_model(origin.model, origin.model_fingerprint, model.path, model.fingerprint())
    places = model.resolve(wanted)
    if len(places) != 1:
        raise InputError(f"a probe reads one site; {wanted!r} names {len(places)} of {model.path}")
    name = places[0].name
    if own is not None and site is not None and not force and model.resolve(own)[0].name != name:
        raise MismatchError(f"the probe was fitted at {own}, not at {name}; {FORCE}")
    same_width(probe, math.prod(model.width(name)), f"{model.path} has", name)
    return name


def vectors_for(probe: LinearProbe, acts: Activations, *, force: bool = False) -> np.ndarray:
    """The activations of a store that `probe` reads, `[vectors, d]` float64, after every check.

    Raises:
        MismatchError: The store holds another model's activations, or vectors of another width.
        InputError: The probe does not name its site.
        UnknownNameError: The store does not hold that site.
    """
    if probe.site is None:
        raise InputError("this probe does not say which site it reads; give the vectors to decision_function")
    origin, model = probe.origin_, acts.request.model
    if not force:
        same_model(origin.model, origin.model_fingerprint, model.get("path"), model["fingerprint"])
    vectors = acts[probe.site]
    vectors = vectors.reshape(len(vectors), -1)
    same_width(probe, vectors.shape[1], "the store has", probe.site)
    return vectors.double().numpy()


def same_model(
    own: str | None, own_print: str | None, other: Any, other_print: str | None, what: str = "probe"
) -> None:
    """Refuses two fingerprints that differ; where one side has none there is nothing to compare."""
    if own_print is None or other_print is None or own_print == other_print:
        return
    raise MismatchError(
        f"the {what} was fitted on another model: {own or 'unnamed'} (fingerprint {own_print[:12]}), not "
        f"{other or 'unnamed'} (fingerprint {other_print[:12]}); {FORCE}"
    )


def same_width(probe: LinearProbe, width: int, who: str, site: str) -> None:
    """Refuses a probe of another width than the vectors have."""
    if width != probe.n_features_in_:
        raise MismatchError(f"the probe reads {probe.n_features_in_} features; {who} {width} at {site}")
