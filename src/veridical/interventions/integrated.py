"""Integrated gradients at one site at a time, with a Gauss-Legendre rule and the gap that it leaves.

The value at the site goes straight from one end to the other, and the gradient along the way is averaged
(Sundararajan et al. 2017, arXiv:1703.01365). All scores together are the metric at the far end less that at
the near one; what is missing of that is the rule's error, the completeness gap. A Gauss-Legendre rule of n
nodes is exact where the gradient along the path is a polynomial of degree up to 2n - 1, and on smooth paths
its error falls far faster with n than that of equal steps. Kinks (ReLU, the choice of experts) slow it down.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from veridical.errors import InputError
from veridical.interventions.found import Found
from veridical.interventions.gradients import (
    differentiable,
    forward,
    measure,
    measured,
    pulled,
    reduced,
    warn_unreachable,
)
from veridical.interventions.runs import Batch, Runs, rows_of
from veridical.progress import bar
from veridical.sites import Site

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.interventions.metrics import Metric


def score_paths(
    model: HookedModel,
    runs: Runs,
    sites: list[Site],
    steps: int,
    baseline: float | Tensor,
    neurons: bool,
    progress: bool | None,
) -> Found:
    """Integrated gradients of every example at each site, with totals and gaps."""
    if not runs.alone and not (isinstance(baseline, float | int) and baseline == 0):
        raise InputError("baseline stands in for a corrupt run; give one of the two")
    if any(site.kind == "pattern" for site in sites):
        raise InputError("integrated gradients at attention patterns are not offered; take z or v")
    found, batches = Found(), list(runs.batches())
    with bar(len(batches) * len(sites), "integrated gradients", "sites", progress) as shown:
        for number, batch in enumerate(batches):
            metric = runs.metric_for(model, batch)
            own, run = measure(model, batch.base, metric, sites)
            source = None
            if not runs.alone:
                theirs, other = measure(model, batch.source, metric, sites)
                source = other.values
                found.add(":source", theirs)  # type: ignore[arg-type]
            found.add(":base", own)  # type: ignore[arg-type]
            for site in sites:
                ends = _ends(batch, site, run.values[site.name], source, baseline)
                _score(model, runs, metric, batch, site, ends, steps, neurons, found, first=number == 0)
                shown.update(1)
    return found


Ends = tuple[Tensor, Tensor]
"""Value at the start of the path, and the change to its end; both `[batch, pos, ...]`."""


def _ends(
    batch: Batch, site: Site, own: Tensor, source: dict[str, Tensor] | None, baseline: float | Tensor
) -> Ends:
    if own.dim() < 3 or own.shape[:2] != batch.valid.shape:
        raise InputError(f"{site} holds {tuple(own.shape)}; expected [batch, pos, ...]")
    if source is not None:
        return own, batch.change(own, source[site.name])
    try:
        start = torch.as_tensor(baseline).to(own).expand_as(own)
    except RuntimeError:
        raise InputError(
            f"baseline has shape {tuple(torch.as_tensor(baseline).shape)}; expected one that broadcasts to "
            f"{tuple(own.shape)}, the value at {site.short}"
        ) from None
    start = torch.where(batch.where(own), start, own)
    exact = torch.promote_types(own.dtype, torch.float32)
    return start, own.to(exact) - start.to(exact)


def _score(
    model: HookedModel,
    runs: Runs,
    metric: Metric,
    batch: Batch,
    site: Site,
    ends: Ends,
    steps: int,
    neurons: bool,
    found: Found,
    *,
    first: bool,
) -> None:
    start, change = ends
    places, weights = legendre(steps)
    together = max(1, runs.batch_tokens // max(1, batch.valid.numel()))
    average = torch.zeros_like(change)
    for begin in range(0, steps, together):
        part = slice(begin, begin + together)
        slope = _slopes(model, metric, batch, site, ends, places[part], first=first and begin == 0)
        if slope is not None:
            scaled = torch.as_tensor(weights[part], dtype=change.dtype, device=change.device)
            average += torch.einsum("n,n...->...", scaled, slope.to(change))
    scores = change * average
    found.add(site.name, reduced(site, scores, neurons))
    near, far = (
        _metric_at(model, batch, site, value, metric) for value in (start, (start + change).to(start.dtype))
    )
    total = scores.flatten(1).sum(1)
    found.add(f":total {site.name}", total)
    found.add(f":gap {site.name}", total - (far - near).to(total))


def _slopes(
    model: HookedModel,
    metric: Metric,
    batch: Batch,
    site: Site,
    ends: Ends,
    places: np.ndarray,
    *,
    first: bool,
) -> Tensor | None:
    """The metric's gradient at several places of the path, `[places, batch, pos, ...]`; None without one."""
    start, change = ends
    at = torch.as_tensor(places, dtype=change.dtype, device=change.device)
    at = at.view(-1, *[1] * change.dim())
    points = (start.to(change) + at * change).to(start.dtype).flatten(0, 1)
    rows = len(batch.rows)
    metric = metric.take(torch.arange(rows).repeat(len(places)), rows)
    with differentiable(model.model):
        points.requires_grad_()
        inputs = rows_of(batch.base, len(places))
        run = forward(model, inputs, metric, [], {site: lambda value: points.view_as(value)})
        (slope,) = pulled(model, run, metric, measured(run, metric), [points])
    if first:
        warn_unreachable(site, metric, slope)
    return None if slope is None else slope.unflatten(0, (len(places), -1))


def _metric_at(model: HookedModel, batch: Batch, site: Site, value: Tensor, metric: Metric) -> Tensor:
    found, _ = measure(model, batch.base, metric, [], {site: lambda _: value})
    return found


def legendre(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Places and weights of the Gauss-Legendre rule on 0 to 1; the weights sum to one."""
    places, weights = np.polynomial.legendre.leggauss(steps)
    return (places + 1) / 2, weights / 2
