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
- `project`: directions projected out (as in Arditi et al. 2024, arXiv:2406.11717), to zero along them or,
  with `over`, to their mean.

Attention patterns go by query and key: at `pattern`, beside zero there are `mean` and `resample` with
`by_position=True`, for texts of one length that are read whole; the mean over texts, the batch or `Means`,
and other texts' patterns from the batch. Other modes are refused.

A head is taken out at `z`, before the output projection mixes heads. An edit that leaves every number as it
was is warned about when the context ends, with the reason.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, get_args

from veridical.errors import InputError, unknown
from veridical.interventions import means as averaging
from veridical.interventions.ablation_hooks import Ablation, Making, Mode, is_batch
from veridical.interventions.means import Means
from veridical.interventions.spots import Spots, as_positions, as_tokens
from veridical.models import load
from veridical.probes.passes import following

if TYPE_CHECKING:
    from veridical.hooked import HookedModel, SiteSpec
    from veridical.saes.base import SAE

__all__ = ["Ablation", "ablate"]


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
    model = load(model)
    _check(mode, over, features, sae, heads, neurons, directions, by_position)
    found = Ablation(mode)
    if mode == "mean" and positions is None and tokens is None:
        averaging.warn_of_selection(over)
    with following(model) as passes:
        spots = Spots(passes, as_positions(positions), as_tokens(model, tokens))
        reads, writes = Making(model, mode, over, by_position, seed, directions, spots, found).hooks(
            sites, heads, neurons, features, sae
        )
        with model.hooks(read=reads, write=writes):
            yield found
    if late := spots.unreached():
        raise InputError(
            f"position {late[0]} is outside every text: the longest had {spots.longest} tokens, generated "
            "ones included"
        )
    _warn(found, spots, mode)


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
    if isinstance(over, str) and not is_batch(over):
        raise InputError(f"over is {over!r}; expected a store, texts, means, or 'batch'")
    if (features is None) != (sae is None):
        raise InputError(
            "features= and sae= go together: the features of which SAE, or which of its features?"
        )
    if sae is not None and (heads is not None or neurons is not None):
        raise InputError("heads= and neurons= do not go with an SAE's features")
    if (mode == "project") != (directions is not None):
        raise InputError("directions= goes with mode='project', and that needs them")
    if mode == "project" and (sae is not None or neurons is not None or by_position or is_batch(over)):
        raise InputError(
            "mode='project' takes directions out of whole vectors, to zero or to a mean over a data set: it "
            "does not go with features, neurons, by_position or over='batch'"
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
