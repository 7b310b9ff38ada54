"""Activation patching: one run's activations put into another, for many sites, positions and heads.

Denoising runs the corrupt inputs with clean activations put in, and asks what restores the answer; noising
runs the clean inputs with corrupt ones, and asks what breaks it (Meng et al. 2022, arXiv:2202.05262;
Heimersheim and Nanda 2024, arXiv:2404.15255). The effect of an item is the metric of its patched run less the
base's; its recovered fraction is the effect over the difference of the two runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from veridical.errors import InputError
from veridical.interventions.condition import (
    Direction,
    carries_hooks,
    check_count,
    check_direction,
    check_finite,
    warn_of_training,
    warn_of_twins,
)
from veridical.interventions.inputs import Inputs
from veridical.interventions.metrics import Answers, Metric, as_metric
from veridical.interventions.patched import Patched
from veridical.interventions.places import Positions, heads_of, spots
from veridical.interventions.suffix import Engine
from veridical.interventions.sweep import Item, Link, Sweep
from veridical.models import load
from veridical.sites import HEAD_KINDS, Site

if TYPE_CHECKING:
    from veridical.hooked import HookedModel, SiteSpec

BATCH_TOKENS = 8192
BOOTSTRAP = 500


def patch(
    model: HookedModel | Any,
    clean: Any,
    corrupt: Any,
    *,
    metric: str | Callable[[Tensor], Tensor] | Metric = "logit_diff",
    sites: SiteSpec = "resid_pre.*",
    positions: Positions = None,
    heads: Literal["all"] | int | Sequence[int] | None = None,
    direction: Direction = "denoising",
    answers: Answers | None = None,
    wrong: Answers | None = None,
    align: Any = None,
    source: HookedModel | None = None,
    keep: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    bootstrap: int = BOOTSTRAP,
    seed: int = 0,
    progress: bool | None = None,
) -> Patched:
    """The metric of every patched run: one for each site, head and position, for each example.

    Args:
        model: A `HookedModel`, or anything that `veridical.load` takes.
        clean: A text or chat, a list of these, token ids `[batch, pos]`, `Pairs`, or images.
        corrupt: The same, row by row of equal token counts unless `align` is given.
        metric: A name, a probe's `ProbeMetric`, or a function `logits -> [batch]`; see `as_metric`. A
            function sees all examples together, in order.
        sites: Sites or globs, such as "resid_pre.*" or ["z.*", "mlp_out.*"]. Patterns are patched by query.
        positions: None or "each": one item for each position. "all": the whole site at once. A list of
            positions or sets of positions, of the clean rows' tokens, negative from the end; or a mapping
            from a name to words of the text, to positions, or to a function from a row's token count to
            its positions.
        heads: For q, k, v, z and patterns: "all" or a list takes heads one by one; None patches all of the
            site together. Heads of k and v are those of the keys and values.
        direction: "denoising" puts clean activations into the corrupt run, "noising" corrupt into clean.
        answers, wrong: The answers that the named metrics compare; completions of `Pairs` when not given.
        align: "token" or spans, for texts of unequal token counts; see `Inputs.of`.
        source: Another model whose activations at the same sites and positions are put into this one.
        keep: How many last positions a metric function reads; all when not given.
        batch_tokens: Tokens of one forward at most, which bounds the memory.
        bootstrap: Resamples of examples (whole pairs, where these are known) for the 95 % intervals.
        seed: Of the resamples.
        progress: Show a bar; by default where someone watches.

    Raises:
        InputError: Unequal lengths (both token lists are shown), a position outside a text, a head that does
            not exist, a metric that does not give `[batch]`, sites of another width in the source.
        UnknownNameError: A site or metric that does not exist.
    """
    from veridical.progress import bar

    check_direction(direction)
    check_count("batch_tokens", batch_tokens)
    check_count("bootstrap", bootstrap)
    model = load(model)
    source = None if source is None else load(source)
    warn_of_training(model)
    inputs = Inputs.of(model, clean, corrupt, align)
    if source is None:
        warn_of_twins(inputs)
    judge = as_metric(metric, model, answers, wrong, None, keep, inputs)
    judge.check(len(inputs))
    chosen = model.resolve(sites)
    there = spots(inputs, positions)
    items = _items(model, chosen, heads, len(there))
    other = source if source is not None else model
    theirs = inputs if source is None else _inputs_of_source(source, clean, corrupt, align, inputs)
    _check_sites(model, source, chosen, align)
    found, base, end = [], [], []
    unreached: set[int] = set()
    ran: set[int] = set()
    with bar(len(items) * len(inputs), "patching", "patches", progress) as shown:
        for rows in _groups(inputs, judge, batch_tokens):
            part = _Part(model, other, inputs.part(rows), theirs.part(rows), judge, rows, direction)
            sweep = part.sweep(chosen, batch_tokens, len(inputs))
            check_finite(model, judge.name, sweep.base_values)
            columns = [part.base_columns(spot.columns[rows]) for spot in there]
            bar_of = _Scaled(shown, len(rows))
            found.append(sweep.values(items, columns, bar_of).cpu())
            base.append(sweep.base_values.cpu())
            end.append(part.source_values(sweep).cpu())
            unreached |= sweep.unreached
            ran |= sweep.ran
    values = torch.cat(found, 1).double().numpy()
    base_values, source_values = (torch.cat(parts).double().numpy() for parts in (base, end))
    names = [item.site.short for item in items]
    _warn_of_no_effect(judge, [names[n] for n in sorted(unreached - ran)])
    _warn_of_rounding(items, values, base_values, ran)
    return Patched(
        table=_table(items, there, inputs),
        values=values,
        base_values=base_values,
        source_values=source_values,
        groups=np.asarray(inputs.groups if inputs.groups is not None else np.arange(len(inputs))),
        tokens=tuple(tuple(row) for row in inputs.tokens),
        facts={
            "model": model.path,
            "model_fingerprint": model.fingerprint(),
            "source": None if source is None else source.path,
            "metric": judge.name,
            "unit": judge.unit,
            "direction": direction,
            "bootstrap": bootstrap,
            "seed": seed,
        },
    )


class _Scaled:
    """A bar that moves on by an item's examples."""

    def __init__(self, shown: Any, rows: int) -> None:
        self.shown, self.rows = shown, rows

    def update(self, items: int) -> None:
        self.shown.update(items * self.rows)


class _Part:
    """Some examples: which of their two runs is the base, and how positions go over."""

    def __init__(
        self,
        model: HookedModel,
        other: HookedModel,
        ours: Inputs,
        theirs: Inputs,
        metric: Metric,
        rows: range,
        direction: str,
    ) -> None:
        self.model, self.other, self.ours, self.theirs = model, other, ours, theirs
        self.metric, self.rows, self.denoising = metric, rows, direction == "denoising"

    def sweep(self, sites: Sequence[Site], batch_tokens: int, total: int) -> Sweep:
        """The sweep over these examples, with both runs made."""
        metric, plain = self.metric, carries_hooks(self.model)
        if metric.targets is not None:
            metric = metric.take(list(self.rows), total)
        clean, corrupt = (self.ours.clean, self.ours.mask), (self.ours.corrupt, self.ours.corrupt_mask)
        given, taken = (corrupt, clean) if self.denoising else (clean, corrupt)
        if self.other is not self.model:
            taken = (self.theirs.clean, self.theirs.mask)
            if not self.denoising:
                taken = (self.theirs.corrupt, self.theirs.corrupt_mask)
        read = [site.name for site in sites]
        options: dict[str, Any] = {"keep": metric.keep, "site": metric.site, "ids": metric.ids, "read": read}
        base = Engine(self.model, *given, plain=plain, **options)
        if self.other is not self.model:
            options["site"] = None
        source = Engine(self.other, *taken, plain=plain or carries_hooks(self.other), **options)
        if metric.function is None:
            metric = metric.with_reference((source if self.denoising else base).of_base())
        twin = self.other is self.model
        return Sweep(self.model, base, source, self._link(), metric, twin=twin, batch_tokens=batch_tokens)

    def source_values(self, sweep: Sweep) -> Tensor:
        """The metric of the run whose values are put in; NaN where the other model's logits don't fit."""
        if self.other is self.model:
            return sweep.metric(sweep.source_out)
        same = sweep.source_out.shape == sweep.base_out.shape and self.metric.site is None
        return sweep.metric(sweep.source_out) if same else torch.full_like(sweep.base_values, torch.nan)

    def base_columns(self, columns: Tensor) -> Tensor:
        """Columns of the clean rows as columns of the base."""
        if not self.denoising:
            return columns
        found = torch.zeros_like(columns)
        rows, places = (columns & (self.ours.matched >= 0)).nonzero(as_tuple=True)
        found[rows, self.ours.matched[rows, places]] = True
        return found

    def _link(self) -> Link:
        matched = self.ours.matched
        rows, clean = (matched >= 0).nonzero(as_tuple=True)
        corrupt = matched[rows, clean]
        same = bool((clean == corrupt).all()) and bool((self.ours.mask == (matched >= 0)).all())
        base, source = (corrupt, clean) if self.denoising else (clean, corrupt)
        return Link(rows, base, source, same)


def _items(model: HookedModel, sites: Sequence[Site], heads: Any, count: int) -> list[Item]:
    if heads is not None and not any(site.kind in (*HEAD_KINDS, "pattern") for site in sites):
        raise InputError(
            f"heads is given, and {', '.join(site.short for site in sites[:3])} "
            "has none; heads are those of q, k, v, z and pattern"
        )
    return [
        Item(site, head, spot)
        for site in sites
        for head in heads_of(model, site, heads)
        for spot in range(count)
    ]


def _groups(inputs: Inputs, metric: Metric, batch_tokens: int) -> list[range]:
    """Examples that are swept together; all of them for a metric that sees them together."""
    total = len(inputs)
    alone = metric.targets is not None or metric.site is not None or metric.function is None
    size = max(1, batch_tokens // max(1, inputs.width)) if alone else total
    return [range(first, min(first + size, total)) for first in range(0, total, size)]


def _inputs_of_source(source: HookedModel, clean: Any, corrupt: Any, align: Any, ours: Inputs) -> Inputs:
    theirs = Inputs.of(source, clean, corrupt, align)
    if theirs.mask.shape != ours.mask.shape or not bool((theirs.mask.cpu() == ours.mask.cpu()).all()):
        counts = [inputs.mask.sum(1).tolist() for inputs in (ours, theirs)]
        row = next((r for r, (a, b) in enumerate(zip(*counts)) if a != b), 0)
        raise InputError(
            f"row {row}: the text has {counts[0][row]} tokens in the model {ours.tokens[row]} and "
            f"{counts[1][row]} in the source {theirs.tokens[row]}; positions cannot be matched across models"
        )
    return theirs


def _check_sites(model: HookedModel, source: HookedModel | None, sites: Sequence[Site], align: Any) -> None:
    if align is not None and any(site.kind == "pattern" for site in sites):
        raise InputError("patterns of texts of unequal length have other keys; patch them without align")
    if source is None:
        return
    for site in sites:
        try:
            source.resolve(site)
        except InputError as error:
            raise InputError(
                f"the source {source.path} has no {site.short} ({source.n_layers} layers): {error}"
            ) from error
        if site.kind == "pattern":
            ours, theirs = (model.n_heads,), (source.n_heads,)
        else:
            ours, theirs = model.width(site), source.width(site)
        if ours != theirs:
            raise InputError(
                f"{site.short} is {ours} wide in {model.path} and {theirs} in the source {source.path}; "
                "only activations of one width can be put into another model"
            )


def _table(items: Sequence[Item], there: Sequence[Any], inputs: Inputs) -> Any:
    import pandas as pd

    texts = [_text(inputs, spot.columns) for spot in there]
    return pd.DataFrame(
        {
            "site": [item.site.name for item in items],
            "kind": [item.site.kind for item in items],
            "layer": [-1 if item.site.layer is None else item.site.layer for item in items],
            "head": [-1 if item.head is None else item.head for item in items],
            "position": [str(there[item.spot].label) for item in items],
            "token": [texts[item.spot] for item in items],
        }
    )


def _text(inputs: Inputs, columns: Tensor) -> str:
    """The text at some positions, if it is the same in every row that has it."""
    found = {
        "".join(inputs.tokens[row][at] for at in places.nonzero().flatten().tolist())
        for row, places in enumerate(columns.cpu())
        if bool(places.any())
    }
    return found.pop() if len(found) == 1 else ""


def _warn_of_no_effect(metric: Metric, names: Sequence[str]) -> None:
    if not names:
        return
    unique = list(dict.fromkeys(names))
    shown = ", ".join(unique[:4]) + (f" and {len(unique) - 4} more" if len(unique) > 4 else "")
    if metric.site is not None:
        why = f"the metric reads {metric.site}, which comes before"
    else:
        last = "position" if metric.keep == 1 else f"{metric.keep} positions"
        why = f"{metric.name} reads the last {last} only, and no block follows that would carry it there"
    warnings.warn(
        f"{len(names)} patches at {shown} cannot change the metric: {why}. Their effects are exactly zero.",
        stacklevel=3,
    )


def _warn_of_rounding(items: Sequence[Item], values: np.ndarray, base: np.ndarray, ran: set[int]) -> None:
    """Says which sites moved the metric nowhere though other values were put there."""
    scale = 1e-7 * (np.abs(base).max() + 1)
    moved: dict[str, bool] = {}
    for number in sorted(ran):
        name = items[number].site.short
        moved[name] = moved.get(name, False) or bool((np.abs(values[number] - base) > scale).any())
    silent = [name for name, at_all in moved.items() if not at_all]
    if silent:
        warnings.warn(
            f"patches at {', '.join(silent[:6])} did not move the metric beyond rounding, though other "
            "values were put there: nothing that it reads depends on these sites",
            stacklevel=3,
        )
