"""A probe that runs while a model generates: a score for every token that the model reads.

One hook at the probe's site multiplies the activations with the probe's weights where they are, and keeps
one number per token; nothing else is copied, nothing waits for the device until the scores are looked at,
and the model's own numbers stay what they were. With a key/value cache, each pass brings only its new
tokens; which tokens are padding is read from the attention mask, and what a batch feeds to rows that have
ended is left out.

The last token of a generation is chosen but never read by the model, so it has no score. Beam search moves
rows about between passes, which can't be seen from here: monitor greedy search or sampling. Without a cache
every pass reads the whole text anew, and each is a call of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, get_args

import numpy as np
import torch
from torch import Tensor

from veridical.errors import DataError, InputError, ModelError, unknown
from veridical.probes.fits import place_for
from veridical.probes.monitored import Call, Reading, Scores
from veridical.probes.passes import Passes, following
from veridical.probes.running import RUNNING, Aggregate, Aggregating, RowByRow, Running

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.probes.base import LinearProbe


@dataclass(frozen=True)
class Fire:
    """A row whose score went over the threshold.

    Attributes:
        call: Number of the generation or forward call within the context.
        row: Row of its batch.
        position: Token of the row, counted from 0 without padding.
        token_id: The token that was read.
        score: The row's score after it, in log-odds.
    """

    call: int
    row: int
    position: int
    token_id: int
    score: float


@contextmanager
def monitor(
    probe: LinearProbe,
    model: HookedModel,
    *,
    site: str | None = None,
    threshold: float | str | None = None,
    aggregate: Aggregate = "max",
    over: str = "all",
    on_fire: Callable[[Fire], object] | None = None,
    ends: Sequence[int] | None = None,
    force: bool = False,
) -> Iterator[Scores]:
    """Scores every token that the model reads in the context.

    Edits that were put in place before (steering, ablation) come before this reading; those put in place
    inside the context come after it.

    Args:
        probe: A fitted probe.
        model: The model that it was fitted on.
        site: Where to read; the probe's own site when not given.
        threshold: Score above which a token or row fires: a number in log-odds, or the name of a threshold
            that the probe carries ("fpr1", "balanced"). When not given, "fpr1" where the probe has it, else
            0, where the probe finds both classes equally likely; `Scores.notes` says which.
        aggregate: A row's score from those of its tokens: "max" or "last". Probes over whole sequences have
            their own way and ignore it.
        over: Tokens that count for the row's score: "all", or "generated" ones only.
        on_fire: Called once per row and call, at the first token after which the row's score is above the
            threshold. It runs at the end of that pass, and makes each pass wait for its scores. To stop rows
            that fired, give `stopping_criteria=[scores.stop]` to `generate`.
        ends: Token ids after which a row has ended; those of the model and tokenizer when not given.
        force: Accept another model or site than the probe was fitted on.

    Yields:
        `Scores`, which grow as the model runs.

    Raises:
        MismatchError: The probe was fitted on another model or site, or has another width.
        UnknownNameError: A threshold that the probe does not carry.
    """
    if aggregate not in get_args(Aggregate):
        raise unknown("aggregate", aggregate, get_args(Aggregate))
    if over not in ("all", "generated"):
        raise unknown("choice of tokens", over, ("all", "generated"))
    if not hasattr(model, "hooks"):
        raise InputError(f"a {type(model).__name__} can't be monitored as it is; give veridical.load(model)")
    name = place_for(model, probe, site, force=force)
    limit, said = _threshold(probe, threshold)
    weights, biases = _readings(probe)
    scores = Scores(
        model=model,
        label=f"{probe.origin_.target or 'the positive class'} = {probe.classes_[1]}",
        site=name,
        threshold=limit,
        notes=said,
        over=over,
        make_running=_running(probe, aggregate),
        ends=_ends(model) if ends is None else tuple(ends),
        padding=getattr(model.tokenizer, "pad_token_id", None),
    )
    with following(model) as passes:
        read = _Reader(scores, passes, weights, biases)
        handle = None
        if on_fire is not None:
            told = _Teller(scores, on_fire)
            handle = model.model.register_forward_hook(lambda *_: told.tell())
        try:
            with model.hooks(read={name: read}):
                yield scores
        finally:
            if handle is not None:
                handle.remove()


class _Reader:
    """The hook at the site."""

    def __init__(self, scores: Scores, passes: Passes, weights: np.ndarray, biases: np.ndarray) -> None:
        self.scores, self.passes = scores, passes
        self.weights = torch.as_tensor(weights.T.copy(), dtype=torch.float32)
        self.biases = torch.as_tensor(biases, dtype=torch.float32)

    def __call__(self, value: Tensor) -> None:
        now = self.passes.require()
        if value.device != self.weights.device:
            self.weights, self.biases = self.weights.to(value.device), self.biases.to(value.device)
        hidden = value.detach().reshape(*value.shape[:2], -1)
        if tuple(hidden.shape[:2]) != now.shape:
            raise ModelError(
                f"{self.scores.site} gave {tuple(hidden.shape[:2])} rows and tokens in a pass of {now.shape}"
            )
        calls = self.scores.calls
        if now.first or not calls:
            calls.append(Call([]))
        elif calls[-1].readings[-1].of is now:
            raise ModelError(f"{self.scores.site} was reached more than once in one forward pass")
        with torch.no_grad():
            made = torch.addmm(self.biases, hidden.flatten(0, 1).float(), self.weights)
        calls[-1].readings.append(Reading(now, made.unflatten(0, now.shape)))


class _Teller:
    """Calls back at the end of each pass for rows that fired in it."""

    def __init__(self, scores: Scores, act: Callable[[Fire], object]) -> None:
        self.scores, self.act = scores, act
        self.told: set[tuple[int, int]] = set()

    def tell(self) -> None:
        call = len(self.scores.calls) - 1
        if call < 0:
            return
        over = self.scores.latest()
        for row in torch.nonzero(over.any(1)).flatten().tolist():
            if (call, row) in self.told:
                continue
            self.told.add((call, row))
            line = self.scores.first_over(call, row)
            self.act(Fire(call, row, *line))


def _threshold(probe: LinearProbe, given: float | str | None) -> tuple[float, tuple[str, ...]]:
    """The threshold, and what a reader should know of it."""
    carried = getattr(probe.origin_, "thresholds", None) or {}
    if isinstance(given, str):
        if given not in carried:
            raise unknown("threshold", given, carried, "Give a number in log-odds.")
        return float(carried[given]), ()
    if given is not None:
        if not np.isfinite(given):
            raise InputError(f"threshold is {given}; expected a finite number in log-odds")
        return float(given), ()
    if "fpr1" in carried:
        return float(carried["fpr1"]), ()
    return 0.0, (
        "The probe carries no threshold, so it fires above log-odds 0, where it finds both classes equally "
        "likely; how often that is wrong on honest text was not measured.",
    )


def _readings(probe: LinearProbe) -> tuple[np.ndarray, np.ndarray]:
    """Weights `[k, d]` and biases `[k]` of what is read from each token."""
    if isinstance(probe, Aggregating):
        weights, biases = (np.asarray(part, dtype=np.float64) for part in probe.readers())
    else:
        weights, biases = probe.coef_, probe.intercept_
    if weights.ndim != 2 or biases.shape != (len(weights),) or not np.isfinite(weights).all():
        raise DataError(f"the probe reads weights {weights.shape} and biases {biases.shape}; [k, d] and [k]")
    return weights, biases


def _running(probe: LinearProbe, aggregate: Aggregate) -> Callable[[], Running]:
    return partial(RowByRow, probe) if isinstance(probe, Aggregating) else RUNNING[aggregate]


def _ends(model: HookedModel) -> tuple[int, ...]:
    """Ids of the ends of sequence that the tokenizer and the model know."""
    holders = (model.tokenizer, getattr(model.model, "generation_config", None))
    values = [getattr(holder, "eos_token_id", None) for holder in holders]
    found = {v for value in values for v in (value if isinstance(value, list) else [value])}
    return tuple(sorted(v for v in found if isinstance(v, int)))
