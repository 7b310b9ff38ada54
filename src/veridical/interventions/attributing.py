"""Which parts of a model a metric depends on, by gradients: one backward instead of a run for each part.

- "grad_x_input": the value at a site times the metric's gradient there, summed over its dimensions
  (Simonyan et al. 2014, arXiv:1312.6034; Shrikumar et al. 2017, arXiv:1704.02685). One run.
- "atp", attribution patching (Nanda 2023, neelnanda.io/mechanistic-interpretability/attribution-patching):
  source less base, times the gradient at the base: the first order of what patching that part would do.
  Two forwards, one backward. Where a part's effect is far from linear (a saturated softmax, a norm on a
  small stream) it misleads: check what stands out with `patch`.
- "ig": integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365), see `integrated`.
- "edges": edge attribution patching (Syed et al. 2023, arXiv:2310.10348), see `edges`.
- "edges_ig": the same with gradients averaged along the way from base to source (Hanna et al. 2024,
  arXiv:2403.17806): as many forwards and backwards as `steps`, and right where one gradient is saturated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from veridical.errors import InputError, unknown
from veridical.interventions.attribution import Attribution
from veridical.interventions.found import Found
from veridical.interventions.gradients import linearise, measure, reduced, warn_unreachable
from veridical.interventions.runs import Batch, Direction, Runs
from veridical.models import load
from veridical.progress import bar
from veridical.sites import Site

if TYPE_CHECKING:
    from veridical.hooked import HookedModel, SiteSpec
    from veridical.interventions.graph import Edge

Method = Literal["grad_x_input", "atp", "ig", "edges", "edges_ig"]
METHODS = ("grad_x_input", "atp", "ig", "edges", "edges_ig")
EDGES = ("edges", "edges_ig")
STEPS = {"ig": 32, "edges_ig": 8}
"""Nodes of the Gauss-Legendre rule. For edges fewer do: what counts is their order."""
DEFAULT_SITES = {"grad_x_input": "embed", "atp": "resid_pre.*, z.*, mlp_out.*", "ig": "embed"}


def attribute(
    model: HookedModel | Any,
    clean: Any,
    corrupt: Any = None,
    *,
    metric: Any = "logit_diff",
    method: Method = "grad_x_input",
    sites: SiteSpec | None = None,
    answers: Any = None,
    wrong: Any = None,
    direction: Direction = "denoising",
    steps: int | None = None,
    baseline: float | Tensor = 0.0,
    neurons: bool = False,
    edges: str | Edge | Sequence[str | Edge] | None = None,
    by_position: bool = False,
    keep: int | None = None,
    align: Any = None,
    progress: bool | None = None,
    batch_tokens: int = 4096,
) -> Attribution:
    """Scores of the parts of a model for a metric, by gradients.

    Args:
        model: A `HookedModel`, or anything that `veridical.load` takes; its parameters, their `.grad` and
            `requires_grad` stay as they are.
        clean: Texts, chats, token ids `[batch, pos]`, `Pairs`, or images.
        corrupt: The run to compare with, row by row; needed by "atp", "edges" and "edges_ig".
        metric: A name (`logit_diff`, `prob`, `logprob`, `cross_entropy`, `kl`), a fitted probe, or any smooth
            function of the logits to `[batch]`; of a classifier, of `[batch, label]`, such as
            `lambda x: x[:, yes] - x[:, no]`.
        method: "grad_x_input", "atp", "ig", "edges" or "edges_ig"; see the module.
        sites: Where to score nodes; `embed` when not given, for "atp" streams, heads and MLPs.
        answers: The right answer of each row, for named metrics.
        wrong: The wrong answer of each row, for `logit_diff`.
        direction: "denoising" takes the gradient at corrupt, and a score says what putting clean in would add
            to the metric; "noising" the reverse.
        steps: Nodes of the Gauss-Legendre rule; 32 for "ig", 8 for "edges_ig" when not given.
        baseline: For "ig" without corrupt: where the path begins, a number or a tensor that broadcasts to the
            value at the site.
        neurons: Score each neuron of `mlp_post` apart. Heads always are.
        edges: For "edges": names or globs, such as "head.*->logits"; all when not given.
        by_position: For "edges": keep the positions apart (of every example, one number for each position
            and pair of sender and receiver).
        keep: Of a function: how many last positions' logits it reads; all when not given.
        align: For texts of unequal length, "token" or spans; see `Inputs.of`. What has no partner is absent.
        progress: Show a bar; None for a terminal or notebook only.
        batch_tokens: Positions of one batch, padding included. A function of your own sees all examples at
            once, in one batch.

    Returns:
        Scores of each example; `.to_frame()`, `.top(n)`, `.figure()`.

    Raises:
        InputError: A metric without gradient, runs that do not fit, an unknown method or site.
        ModelError: A model without a backward; for "edges" one whose parts do not add up.
        NonFiniteError: NaN in the model's values or gradients.
    """
    model = load(model)
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    _check_options(method, corrupt, sites, edges, by_position, neurons, steps)
    # What is made in inference mode could not be part of a graph.
    with torch.inference_mode(False), torch.no_grad():
        runs = Runs.of(
            model,
            clean,
            corrupt,
            metric,
            answers=answers,
            wrong=wrong,
            keep=keep,
            align=align,
            direction=direction,
            batch_tokens=batch_tokens,
        )
        _check_kl(runs, method)
        steps = steps if steps is not None else STEPS.get(method)
        if method in EDGES:
            from veridical.interventions.edges import score_edges

            return score_edges(model, runs, edges, by_position=by_position, progress=progress, steps=steps)
        resolved = model.resolve(sites if sites is not None else DEFAULT_SITES[method])
        _check_sites(runs, resolved)
        if method == "ig":
            from veridical.interventions.integrated import score_paths

            found = score_paths(model, runs, resolved, steps or STEPS[method], baseline, neurons, progress)
        else:
            found = _score_nodes(model, runs, resolved, neurons, progress)
        return found.result(model, runs, method, resolved)


def _score_nodes(
    model: HookedModel, runs: Runs, sites: list[Site], neurons: bool, progress: bool | None
) -> Found:
    """Gradient times value, or times the change to the source run, at every site in one backward."""
    found, first = Found(), True
    batches = list(runs.batches())
    with bar(len(batches), "attribution", "batches", progress) as shown:
        for batch in batches:
            metric = runs.metric_for(model, batch)
            here = linearise(model, batch.base, sites, metric)
            found.add(":base", here.metric)
            source = None
            if not runs.alone:
                theirs, run = measure(model, batch.source, metric, sites)
                source = run.values
                found.add(":source", theirs)
            for site in sites:
                gradient, own = here.gradients[site.name], here.values[site.name]
                if first:
                    warn_unreachable(site, metric, gradient)
                change = _own(batch, site, own) if source is None else _change(batch, site, own, source)
                slope = torch.zeros_like(change) if gradient is None else gradient.to(change)
                found.add(site.name, reduced(site, change * slope, neurons))
            first = False
            shown.update(1)
    return found


def _own(batch: Batch, site: Site, value: Tensor) -> Tensor:
    _check_shape(batch, site, value)
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _change(batch: Batch, site: Site, base: Tensor, source: dict[str, Tensor]) -> Tensor:
    _check_shape(batch, site, base)
    if site.kind != "pattern":
        return batch.change(base, source[site.name])
    exact = torch.promote_types(base.dtype, torch.float32)
    return source[site.name].to(exact) - base.to(exact)


def _check_shape(batch: Batch, site: Site, value: Tensor) -> None:
    positions = 2 if site.kind == "pattern" else 1
    if value.dim() < 3 or value.shape[0] != len(batch.rows) or value.shape[positions] != batch.valid.shape[1]:
        raise InputError(
            f"{site} holds {tuple(value.shape)}; expected [batch, pos, ...] = [{len(batch.rows)}, "
            f"{batch.valid.shape[1]}, ...]"
        )


def _check_sites(runs: Runs, sites: Sequence[Site]) -> None:
    if any(site.kind == "pattern" for site in sites) and any(batch.aligned for batch in runs.batches()):
        raise InputError("attention patterns of texts of unequal length have no common keys; leave them out")


def _check_kl(runs: Runs, method: str) -> None:
    at_clean = runs.alone or runs.direction == "noising"
    if runs.metric.name == "kl" and at_clean and method != "ig":
        raise InputError(
            "the KL from the clean run is at its least in the clean run, where its gradient is zero; take "
            "the gradient at corrupt (direction='denoising'), or method='ig'"
        )


def _check_options(
    method: str, corrupt: Any, sites: Any, edges: Any, by_position: bool, neurons: bool, steps: Any
) -> None:
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise InputError(f"steps is {steps!r}; expected a number of nodes, at least 1")
    if steps is not None and method not in STEPS:
        raise InputError(f"steps is for methods {' and '.join(STEPS)}; method is {method!r}")
    if method in ("atp", *EDGES) and corrupt is None:
        raise InputError(f"method {method!r} compares two runs; give corrupt= too")
    if method == "grad_x_input" and corrupt is not None:
        raise InputError(
            "method 'grad_x_input' reads the clean run only; leave corrupt out, or use 'atp', 'ig' or 'edges'"
        )
    if method in EDGES and (sites is not None or neurons):
        raise InputError(
            f"method {method!r} scores edges between nodes; choose with edges=, not sites or neurons"
        )
    if method not in EDGES and (edges is not None or by_position):
        raise InputError(
            f"edges and by_position are for methods 'edges' and 'edges_ig'; method is {method!r}"
        )
