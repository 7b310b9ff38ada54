"""A forward pass and one backward to activations: values at sites, and the metric's gradient at each.

Gradients are had for activations only. Parameters are held still for the length of a pass and are afterwards
as they were; nobody's `.grad` is touched, and no graph is kept.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from veridical.errors import InputError, ModelError
from veridical.hooks import Run
from veridical.interventions.columns import only
from veridical.sites import HEAD_KINDS, Site

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.interventions.metrics import Metric

Write = Mapping[Site, Any]


@dataclass(frozen=True)
class Linear:
    """A model around one run.

    Attributes:
        metric: `[batch]`.
        values: By canonical name, the value at each site.
        gradients: Of the metric, of the same shape; None where it does not depend on the site.
    """

    metric: Tensor
    values: dict[str, Tensor]
    gradients: dict[str, Tensor | None]


def linearise(
    model: HookedModel, inputs: Mapping[str, Tensor], sites: Sequence[Site], metric: Metric
) -> Linear:
    """One forward pass and one backward.

    Args:
        model: The model.
        inputs: Keyword arguments of its forward.
        sites: Resolved sites.
        metric: Of the rows of `inputs`.

    Raises:
        ModelError: A part of the model has no backward.
        InputError: A metric without a gradient, or a site that holds integers.
    """
    with differentiable(model.model):
        run = forward(model, inputs, metric, sites, leaves(model, sites))
        values = {site.name: run.values[site.name] for site in sites}
        found = measured(run, metric)
        gradients = pulled(model, run, metric, found, list(values.values()))
    detached = {name: value.detach() for name, value in values.items()}
    return Linear(found.detach(), detached, dict(zip(values, gradients)))


def measure(
    model: HookedModel,
    inputs: Mapping[str, Tensor],
    metric: Metric,
    sites: Sequence[Site] = (),
    write: Write | None = None,
) -> tuple[Tensor, Run]:
    """The metric of each row, `[batch]`, and the values at `sites`, without gradients."""
    with torch.no_grad():
        run = forward(model, inputs, metric, sites, write or {})
        return measured(run, metric), run


def forward(
    model: HookedModel,
    inputs: Mapping[str, Tensor],
    metric: Metric,
    sites: Sequence[Site] = (),
    write: Write | None = None,
) -> Run:
    """A pass that reads `sites` and what the metric reads, with no more logits than it needs."""
    given: dict[str, Any] = dict(inputs)
    read = list(sites)
    if metric.site is not None:
        read = list(dict.fromkeys([*read, Site.parse(metric.site)]))
    elif metric.keep is not None and "logits_to_keep" in model.forward_parameters:
        given["logits_to_keep"] = metric.keep
    with only(model, metric.ids):
        return model.run(given, read=read, write=write or {}, stop=metric.site is not None)


def measured(run: Run, metric: Metric, rows: slice = slice(None)) -> Tensor:
    """The metric of each row of a run, or of some of them, `[batch]`."""
    if metric.site is not None:
        return metric(run[metric.site][rows, -1].flatten(1))
    logits = run.logits[rows]
    return metric(logits if metric.keep is None or logits.dim() < 3 else logits[:, -metric.keep :])


def pulled(
    model: HookedModel, run: Run, metric: Metric, found: Tensor, values: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients of the metric with respect to `values`; None where it does not depend on one.

    Raises:
        ModelError: A part of the model has no backward.
        InputError: A metric without a gradient.
    """
    if not found.requires_grad:
        source = run[metric.site] if metric.site is not None else run.logits
        if source.requires_grad:
            raise InputError(
                f"the metric {metric.name} has no gradient (it is detached, or counts or compares); give one "
                "that is a smooth function of the logits"
            )
        if metric.site is None:
            raise ModelError(
                f"no gradient reaches the logits of {model.path}: a part of it runs without one (under "
                "no_grad, or by kernels without a backward, as quantised ones); load it unquantised"
            )
        return [None] * len(values)
    try:
        return list(torch.autograd.grad(found.sum(), list(values), allow_unused=True))
    except (RuntimeError, NotImplementedError) as error:
        if "out of memory" in str(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{model.path} has no backward on {model.device}: {reason}") from error


@contextlib.contextmanager
def differentiable(module: nn.Module) -> Iterator[None]:
    """Gradients are kept inside, of activations only; parameters ask for none, as before afterwards."""
    asking = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with torch.inference_mode(False), torch.enable_grad():
        try:
            for parameter in asking:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in asking:
                parameter.requires_grad_(True)


def leaves(model: HookedModel, sites: Sequence[Site]) -> dict[Site, Any]:
    """Edits that start the graph where the shallowest of `sites` is, so that nothing below it is kept.

    Args:
        model: The model.
        sites: Resolved sites, in order of depth.
    """
    places = model.architecture.places
    named = [site for site in sites if not site.is_raw]
    starts = [site for site in sites if site.is_raw]
    if named:
        first = named[0] if named[0].layer is None else Site("resid_pre", named[0].layer)
        starts.append(first if first in places else Site("embed"))
    return {site: _leaf(site) for site in starts}


def _leaf(site: Site) -> Any:
    def start(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            raise InputError(f"{site} holds {value.dtype}; gradients are of floating-point values")
        return value if value.requires_grad else value.detach().requires_grad_()

    return start


def warn_unreachable(site: Site, metric: Metric, gradient: Tensor | None) -> None:
    """Says why every score at a site is zero, where it is."""
    if gradient is None:
        where = metric.site or "the logits that it reads"
        warnings.warn(
            f"the metric {metric.name} cannot depend on {site.short}, which does not come before {where}: "
            "its scores are exactly zero",
            stacklevel=4,
        )
    elif not bool(gradient.any()):
        warnings.warn(
            f"the gradient of {metric.name} is exactly zero at {site.short}: the metric is saturated or at "
            "its least there (as a KL from the same run), or reads no position that depends on it",
            stacklevel=4,
        )


def reduced(site: Site, product: Tensor, neurons: bool = False) -> Tensor:
    """Scores `[batch, pos]`, by heads `[batch, pos, heads]` or by neurons `[batch, pos, neurons]`.

    Args:
        site: Where it was taken.
        product: Change times gradient, of the shape of the site's value.
        neurons: Keep the neurons of `mlp_post` apart.
    """
    exact = product.to(torch.promote_types(product.dtype, torch.float32))
    if site.kind == "pattern":
        return exact.sum(-1).transpose(1, 2)
    if site.kind in HEAD_KINDS:
        return exact.sum(-1)
    return exact if neurons and site.kind == "mlp_post" else exact.flatten(2).sum(-1)
