"""The load-time check: do a model's sites hold what their names say?

On two rows of six tokens (or one image) it checks that every site is reached and has its shape, that
attention rows sum to one, that the residual stream is the sum of its parts, and that an edit at each kind
of site changes what follows, in the first and last block that have it. The model, its mode, its gradients,
its hooks and the random state are afterwards as they were before.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from veridical.errors import ModelError
from veridical.hooked import HookedModel
from veridical.hooks import Run
from veridical.sites import Site

log = logging.getLogger("veridical")

LARGE = 2_000_000_000
"""Parameters from which on only the first block is checked, and only as deep as it."""


def check(model: HookedModel) -> None:
    """Checks the sites of `model` on a tiny input.

    A model of more than two billion parameters, or one that is partly offloaded, is checked in its first
    block only, and the log says so. One on the meta device has no numbers and is not checked.

    Raises:
        ModelError: A site that is not what its name says; the message names it.
    """
    sites = list(model.architecture.places)
    devices = {parameter.device.type for parameter in model.model.parameters()}
    if not sites:
        return
    if devices == {"meta"}:
        log.info("%s: sites not checked, its weights are on the meta device", model.path)
        return
    size = sum(parameter.numel() for parameter in model.model.parameters())
    short = size > LARGE or "meta" in devices
    if short:
        log.info("%s: sites checked in the first block only, as the model is large or offloaded", model.path)
        sites = [site for site in sites if site.layer == 0 or site.kind == "embed"]
    with undisturbed(model.model), torch.no_grad():
        read = _check_reads(model, sites, stop=short)
        _check_sums(model, read)
        _check_edits(model, sites, read, short)


@contextlib.contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every submodule's own mode and the random state are as before afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        try:
            for part, _ in modes:
                part.training = False
            yield
        finally:
            for part, mode in modes:
                part.training = mode


def _check_reads(model: HookedModel, sites: list[Site], stop: bool) -> Run:
    run = model.run(model.dummy_inputs(), read=sites, stop=stop)
    stream = next(value for site, value in ((site, run[site]) for site in sites) if site.kind == "resid_pre")
    rows, positions = stream.shape[:2]
    for site in sites:
        value, width = run[site], model.architecture.places[site].width
        shape = (rows, model.n_heads, positions, positions) if site.kind == "pattern" else (rows, positions)
        expected = shape if site.kind == "pattern" else (*shape, *(width or value.shape[2:]))
        if tuple(value.shape) != expected:
            _fail(model, site, f"has shape {tuple(value.shape)}; expected {expected}")
        if site.kind == "pattern" and (value.float().sum(-1) - 1).abs().max() > 2e-2:
            _fail(model, site, "holds rows that do not sum to one")
    return run


def _check_sums(model: HookedModel, run: Run) -> None:
    if not model.architecture.adds_up:
        return
    for layer in range(model.n_layers):
        part = {kind: run.values.get(Site(kind, layer).name) for kind in _PARTS}
        if any(part[kind] is None for kind in ("resid_pre", "resid_post", "attn_out", "mlp_out")):
            continue
        middle = part["resid_pre"] + part["attn_out"]  # type: ignore[operator]
        if part["resid_mid"] is not None and _differs(part["resid_mid"], middle):
            _fail(model, Site("resid_mid", layer), "is not resid_pre + attn_out")
        if _differs(part["resid_post"], middle + part["mlp_out"]):  # type: ignore[operator, arg-type]
            _fail(model, Site("resid_post", layer), "is not resid_pre + attn_out + mlp_out")


_PARTS = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")


def _differs(found: Tensor, expected: Tensor) -> bool:
    scale = expected.float().abs().max().item() + 1e-6
    tolerance = 1e-4 if found.dtype == torch.float32 else 5e-2
    return (found.float() - expected.float().to(found.device)).abs().max().item() > tolerance * scale


def _check_edits(model: HookedModel, sites: list[Site], clean: Run, short: bool) -> None:
    ends = _first_and_last(sites)
    last = max((site.layer for site in sites if site.layer is not None), default=0)
    for site in ends:
        # What follows in the same block, or the model's output where nothing does.
        after = Site("resid_post", site.layer if site.layer is not None else 0)
        watch = None if site.kind in ("ln_final", "resid_post") and not short else after
        if site.kind == "resid_post" and site.layer != last and not short:
            watch = Site("resid_post", last)
        known = site in model.architecture.places
        if not known or watch == site or (watch is not None and watch not in sites):
            continue
        if model.architecture.model_type == "TransformerBridge" and not _has_effect(
            model, site, watch, clean
        ):
            _leave_out(model, site.kind)
            continue
        if not _has_effect(model, site, watch, clean):
            _fail(model, site, f"can be edited without effect on {watch or 'the output'}")
    for site in ends:
        if site not in model.architecture.places:
            continue
        stays = model.architecture.adds_up or model.architecture.places[site].carried
        if site.kind == "resid_mid" and stays and Site("mlp_out", site.layer) in model.architecture.places:
            _check_carried(model, site)


def _leave_out(model: HookedModel, kind: str) -> None:
    # Some hook points of a bridge show a value that nothing follows from (opt's pattern): an edit is lost.
    log.warning(
        "%s: edits at its hook point for %s have no effect, so these sites are left out", model.path, kind
    )
    for site in [site for site in model.architecture.places if site.kind == kind]:
        del model.architecture.places[site]


def _has_effect(model: HookedModel, site: Site, watch: Site | None, clean: Run) -> bool:
    inputs = model.dummy_inputs()
    write = {site: _reversed_rows if site.kind == "pattern" else _doubled}
    if watch is None:
        before, after = _output(clean), _output(model.run(inputs, write=write))
    else:
        before, after = clean[watch], model.run(inputs, read=[watch], write=write, stop=True)[watch]
    return before is None or after is None or not torch.equal(before, after)


def _check_carried(model: HookedModel, site: Site) -> None:
    """With the MLP silenced, an edit of the stream in mid-block must come out of the block as it is."""
    seen = {}

    def edit(value: Tensor) -> Tensor:
        seen["edited"] = value * 2 + 1
        return seen["edited"]

    after = Site("resid_post", site.layer)
    write = {site: edit, Site("mlp_out", site.layer): torch.zeros_like}
    run = model.run(model.dummy_inputs(), read=[after], write=write, stop=True)
    if _differs(run[after], seen["edited"]):
        _fail(model, site, "reaches the MLP when edited, but not the residual stream")


def _first_and_last(sites: list[Site]) -> list[Site]:
    by_kind: dict[str, list[Site]] = {}
    for site in sites:
        by_kind.setdefault(site.kind, []).append(site)
    return [site for found in by_kind.values() for site in dict.fromkeys((found[0], found[-1]))]


def _doubled(value: Tensor) -> Tensor:
    # Not a mere factor, which a norm would take out again.
    ramp = torch.linspace(-1, 1, value.shape[-1], device=value.device, dtype=value.dtype)
    return value * 2 + ramp


def _reversed_rows(pattern: Tensor) -> Tensor:
    return pattern.flip(-1)


def _output(run: Run) -> Tensor | None:
    for found in (run.output, *(getattr(run.output, name, None) for name in ("logits", "last_hidden_state"))):
        if isinstance(found, Tensor):
            return found
    return None


def _fail(model: HookedModel, site: Site, what: str) -> None:
    raise ModelError(
        f"{model.path}: the site {site.short} {what}; this {model.architecture.model_type} is laid out "
        "otherwise than expected (load with check=False to use raw module paths)"
    )
