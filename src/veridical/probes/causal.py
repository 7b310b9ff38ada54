"""Does the model use a direction, or can it only be read there? Edits at its site, and what they do.

A probe shows that a label can be read from activations. Whether the model acts on the direction is another
question (Elazar et al. 2021, arXiv:2006.00995; Marks and Tegmark 2024, arXiv:2310.06824, who add and remove
truth directions). Two edits answer it:

- add: `x + strength * unit * u`, with `u` the unit direction and `unit` the standard deviation of the
  activations along it, over the edited tokens of the unedited model. Strength 1 is thus a step as long as
  those that the data take along `u`.
- ablate: `x - ((x - mean) . u) u`: activations are projected to the mean along `u`, not to zero. The mean is
  what all rows share and what later layers were trained on; taking it away too would move every row off the
  data, and its effect would not be that of the label.

The effect is the change in the log-odds of one set of answers against another (by default the wrong options
against the right one), per row. It stands beside the same edits along random directions: added with the
same length, and ablated to their own mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from veridical import scoring
from veridical.errors import DataError, InputError, unknown
from veridical.probes import evaluate
from veridical.probes.base import LinearProbe, as_array
from veridical.probes.causal_result import CausalCheck, Edited
from veridical.probes.causal_runs import At, Runs
from veridical.probes.data import missing
from veridical.probes.fits import place_for

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.pairs import Pairs

STRENGTHS = (-4.0, -2.0, -1.0, 1.0, 2.0, 4.0)


def causal_check(
    model: HookedModel,
    probe: LinearProbe | Any,
    pairs: Pairs,
    *,
    site: str | None = None,
    at: At = "prompt_last",
    strengths: Sequence[float] = STRENGTHS,
    random: int = 20,
    contrast: tuple[str, str] | None = None,
    by: str | None = None,
    bootstrap: int = 500,
    seed: int = 0,
    batch_tokens: int = 4096,
    force: bool = False,
    progress: bool | None = None,
) -> CausalCheck:
    """Adds and ablates a direction at its site and measures what it does to the answers.

    Args:
        model: The model that the direction belongs to.
        probe: A fitted probe, or a direction `[d]` towards the behaviour (any length).
        pairs: Prompts; rows with `options` and `correct` are judged by wrong against right options.
        site: Where to edit; the probe's own site when not given.
        at: Tokens to edit: the last of the prompt, all of the prompt, those of the answer as far as it is
            given (an answer of one token is only predicted, so it has none), or all.
        strengths: What to add, in standard deviations along the direction.
        random: Number of random directions to compare with.
        contrast: Two columns of completions, (A, B); the effect is then on log p(A) - log p(B).
        by: Column whose values also get lines of their own; the probe's target when the pairs have it.
        bootstrap: Resamples of whole pairs for the 95 % intervals.
        seed: Seed of the random directions and resamples.
        batch_tokens: Tokens in one batch, padding included.
        force: Accept a probe of another model or site.
        progress: Progress bar; by default only on a terminal or in a notebook.

    Raises:
        MismatchError: The probe belongs to another model or site, or has another width.
        InputError: No site, a direction of length zero, no strengths, or no token to edit.
        DataError: Fewer than two rows, or rows without answers to compare.
        ModelError: An edit changed nothing, to the last bit.
        NonFiniteError: The model gives NaN.
    """
    _check(at, strengths, random)
    name, direction = _direction(model, probe, site, force)
    if len(pairs) < 2:
        raise DataError(f"a causal check needs at least 2 rows; {pairs.name} has {len(pairs)}")
    prompts, options, first = answers_of(pairs, contrast)
    drawn = np.random.default_rng([seed, 4]).normal(size=(random, len(direction)))
    directions = np.concatenate([direction[None], drawn / np.linalg.norm(drawn, axis=1, keepdims=True)])
    runs = Runs(model, name, scoring.plan(model, prompts, options, batch_tokens), at, directions)
    each = [(float(strength), which) for strength in (*strengths, np.nan) for which in range(random + 1)]
    edits = [(0.0, -1), *each]
    found = tuple(
        Edited(*edit, *_log_odds(logprobs, first)) for edit, logprobs in zip(edits, runs.run(edits, progress))
    )
    origin = probe.origin_ if isinstance(probe, LinearProbe) else None
    groups = np.asarray(pairs.groups)
    return CausalCheck(
        edited=found,
        kinds=_kinds(pairs, by or (origin.target if origin is not None else None), by is not None),
        groups=groups,
        weights=evaluate.resample_weights(groups, bootstrap, seed),
        facts={
            "model": model.path,
            "model_fingerprint": model.fingerprint(),
            "data": pairs.name,
            "data_fingerprint": pairs.fingerprint,
            "direction": (origin.target if origin is not None else None) or "the direction",
            "site": name,
            "at": at,
            "effect_on": "wrong against right"
            if contrast is None
            else f"{contrast[0]} against {contrast[1]}",
            "unit": runs.unit,
            "mean_norm": runs.mean_norm,
            "random": random,
            "seed": seed,
        },
    )


def _log_odds(logprobs: list[np.ndarray], first: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds of the answers in `first` against the others, and the probability of all; `[rows]` each."""
    odds = [
        np.logaddexp.reduce(row[mask]) - np.logaddexp.reduce(row[~mask]) for row, mask in zip(logprobs, first)
    ]
    return np.array(odds), np.array([min(1.0, float(np.exp(row).sum())) for row in logprobs])


def answers_of(
    pairs: Pairs, contrast: tuple[str, str] | None = None
) -> tuple[list[Any], list[list[str]], list[np.ndarray]]:
    """Prompts, their answers, and which of the answers count for the behaviour: the wrong ones, or the first
    of two columns of completions.
    """
    from veridical.pairs.beliefs import own_request

    if contrast is not None:
        columns = [pairs[name] for name in contrast]
        absent = [row for row in range(len(pairs)) if any(not columns[side][row] for side in (0, 1))]
        if absent:
            raise DataError(f"row {absent[0]} of {pairs.name} has no text in {contrast[0]} or {contrast[1]}")
        options = [[str(a), str(b)] for a, b in zip(*columns)]
        return pairs.prompts, options, [np.array([True, False])] * len(pairs)
    for column in ("options", "correct"):
        if column not in pairs:
            hint = "Rows need options and correct; or name two columns of completions with contrast=(A, B)."
            raise unknown("column", column, pairs.columns, hint)
    prompts, options, first = [], [], []
    for number, row in enumerate(pairs):
        correct = row["correct"]
        if not row["options"] or len(row["options"]) < 2 or correct is None:
            raise DataError(f"row {number} of {pairs.name} has no options with one that is correct")
        prompt, said = own_request(row)
        prompts.append(prompt)
        options.append(said)
        first.append(np.arange(len(said)) != int(correct))
    return prompts, options, first


def _kinds(pairs: Pairs, by: str | None, asked: bool) -> dict[str, np.ndarray]:
    """Rows that get lines of their own: all, and those of each value of a column of few values."""
    kinds = {"all": np.ones(len(pairs), dtype=bool)}
    if by is None or (by not in pairs and not asked):
        return kinds
    values = pairs[by]
    known = np.array([not missing(value) for value in values])
    for value in sorted({str(v) for v in values[known]}):
        kinds[f"{by} = {value}"] = known & np.array([str(v) == value for v in values])
    return kinds if len(kinds) <= 7 or asked else {"all": kinds["all"]}


def _direction(model: HookedModel, probe: Any, site: str | None, force: bool) -> tuple[str, np.ndarray]:
    """The canonical site and the unit direction `[d]`."""
    if isinstance(probe, LinearProbe):
        name, vector = place_for(model, probe, site, force=force), probe.direction_
    else:
        vector = np.asarray(as_array(probe), dtype=np.float64).reshape(-1)
        if site is None:
            raise InputError("a direction does not say where it belongs; give site=...")
        places = model.resolve(site)
        if len(places) != 1:
            raise InputError(f"a direction belongs to one site; {site!r} names {len(places)}")
        name = places[0].name
        width = int(np.prod(model.width(name)))
        if len(vector) != width:
            raise InputError(f"the direction has width {len(vector)}; {model.path} has {width} at {name}")
    norm = float(np.linalg.norm(vector))
    if not np.isfinite(norm) or norm == 0:
        raise InputError(f"the direction has length {norm}; it must be finite and not zero")
    return name, vector / norm


def _check(at: str, strengths: Sequence[float], random: int) -> None:
    if at not in get_args(At):
        raise unknown("choice of tokens", at, get_args(At))
    if not len(strengths) or not np.isfinite(strengths).all():
        raise InputError(f"strengths are {tuple(strengths)}; expected finite numbers, at least one")
    if random < 1:
        raise InputError(f"{random} random directions asked for; an effect needs at least 1 to compare with")
