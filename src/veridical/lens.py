"""TransformerLens models: their own hook points are the sites, by the names that they have there.

Two things are kept to Veridical's meaning where TransformerLens's hook point holds something else:
`ln_final` is the output of the final norm (their `hook_normalized` is before its weight is applied), and an
edit at `resid_mid` of a `TransformerBridge` reaches the residual stream itself (through their hook it
changes the MLP's input only).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veridical import architectures
from veridical.architectures import Architecture
from veridical.errors import ModelError
from veridical.hooked import HookedModel
from veridical.hooks import Place, View, Whole, attached
from veridical.sites import KINDS, Site


def is_lens(model: nn.Module) -> bool:
    """Whether `model` is a TransformerLens model, told without importing it."""
    return type(model).__module__.split(".")[0] == "transformer_lens"


def wrap(model: Any, tokenizer: Any = None) -> HookedModel:
    """A handle on a `HookedTransformer` or `TransformerBridge`, with its own tokenizer unless one is given.

    Raises:
        ModelError: Another class of TransformerLens.
    """
    name = type(model).__name__
    if name not in ("HookedTransformer", "TransformerBridge"):
        raise ModelError(
            f"TransformerLens's {name} is not supported; load the transformers model, "
            "a HookedTransformer or a TransformerBridge"
        )
    bridge = name == "TransformerBridge"
    config = model.cfg
    original = model.original_model if bridge else None
    inside = architectures.describe(original) if original is not None else None
    kv_heads = getattr(config, "n_key_value_heads", None) or config.n_heads
    architecture = Architecture(
        kind=inside.kind if inside is not None else "causal",
        model_type=name,
        body=model,
        config=getattr(original, "config", None),
        vocabulary=int(config.d_vocab),
        n_layers=int(config.n_layers),
        d_model=int(config.d_model),
        n_heads=int(config.n_heads),
        n_kv_heads=int(kv_heads),
        d_head=int(config.d_head),
        context_length=int(config.n_ctx),
        adds_up=not bridge,
        blocks=tuple(model.blocks),
        places=_places(model, bridge),
    )
    forward = original.forward if original is not None else model.forward
    handle = HookedModel(
        model,
        architecture,
        tokenizer=tokenizer if tokenizer is not None else model.tokenizer,
        path=str(getattr(config, "model_name", "") or name),
        call=_call_bridge if bridge else _call_hooked,
        forward_parameters=frozenset(inspect.signature(forward).parameters),
    )
    _keep_reached(handle)
    return handle


@dataclass(frozen=True)
class _SplitHeads:
    """Heads of width `d_head`, of a tensor that has them side by side or already apart."""

    d_head: int

    def read(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.dim() == 4 else tensor.unflatten(-1, (-1, self.d_head))

    def write(self, tensor: Tensor, value: Tensor) -> Tensor:
        return value if tensor.dim() == 4 else value.flatten(-2)


def _places(model: Any, bridge: bool) -> dict[Site, Place]:
    points, config = dict(model.hook_dict), model.cfg
    kv_heads = getattr(config, "n_key_value_heads", None) or config.n_heads
    kv_heads = config.n_heads if getattr(config, "ungroup_grouped_query_attention", False) else kv_heads
    widths = {"q": config.n_heads, "z": config.n_heads, "k": kv_heads, "v": kv_heads}
    places = {}
    for kind in KINDS:
        for layer in [None] if kind in ("embed", "ln_final") else range(config.n_layers):
            site = Site(kind, layer)
            module = (
                model.ln_final if kind == "ln_final" and hasattr(model, "ln_final") else points.get(site.name)
            )
            if module is None:
                continue
            width: tuple[int, ...] | None = (config.d_model,)
            view: View = Whole()
            if kind in widths:
                width, view = (widths[kind], config.d_head), _SplitHeads(config.d_head)
            elif kind in ("pattern", "mlp_post"):
                width = None if kind == "pattern" or not config.d_mlp else (config.d_mlp,)
            block = model.blocks[layer] if bridge and layer is not None else None
            places[site] = Place(
                module, "out", width, view, carried=bridge and kind == "resid_mid", block=block
            )
    return places


def _keep_reached(handle: HookedModel) -> None:
    """Drops hook points that are not passed on the way, and neurons that are none (a bridge's experts)."""
    places = handle.architecture.places
    devices = [handle.device] if handle.device.type == "cuda" else []
    reads = {site: (place, lambda value: tuple(value.shape[2:])) for site, place in places.items()}
    with torch.no_grad(), torch.random.fork_rng(devices), attached(reads, {}) as run:
        handle.call(handle.dummy_inputs())
    for site, place in list(places.items()):
        other = site.kind == "mlp_post" and place.width not in (None, run.values.get(site.name))
        if site.name not in run.values or other:
            del places[site]


def _call_hooked(model: nn.Module, inputs: dict[str, Any]) -> Any:
    ids = inputs.pop("input_ids")
    return model(ids, return_type="logits", **inputs)


def _call_bridge(model: nn.Module, inputs: dict[str, Any]) -> Any:
    main = "pixel_values" if "pixel_values" in inputs else "input_ids"
    return model(inputs.pop(main), return_type="logits", **inputs)
