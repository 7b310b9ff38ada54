"""What each part of a model adds to the residual stream, read with hooks.

A head's contribution is its values `z` through its own slice of the output projection; the projection's bias
belongs to no head. The stream is the sum of what enters the first block, of all heads and biases, and of all
MLPs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from veridical.errors import ModelError
from veridical.interventions.graph import Node
from veridical.selftest import undisturbed
from veridical.sites import Site

if TYPE_CHECKING:
    from veridical.hooked import HookedModel


@dataclass(frozen=True)
class Facts:
    """How the blocks of a model are put together.

    Attributes:
        kv_heads: Heads of keys and values.
        parallel: For each block, whether its MLP reads what its attention reads.
        has_mlp: For each block, whether there is an MLP.
        whole_attention: The attention output is not the sum of its heads' contributions and a bias.
    """

    kv_heads: int
    parallel: tuple[bool, ...]
    has_mlp: tuple[bool, ...]
    whole_attention: bool


def examine(model: HookedModel) -> Facts:
    """How the blocks of `model` are put together, told by its sites and by a pass over two short rows.

    A handle is examined once, as its sites are checked once at load.

    Raises:
        ModelError: The stream is not the sum of its parts, or the sites are not known.
    """
    if model not in _EXAMINED:
        _EXAMINED[model] = _examined(model)
    return _EXAMINED[model]


_EXAMINED: WeakKeyDictionary[HookedModel, Facts] = WeakKeyDictionary()


def _examined(model: HookedModel) -> Facts:
    places, layers = model.architecture.places, range(model.n_layers)
    for kind in ("resid_pre", "z", "q", "k", "v", "attn_out", "resid_post"):
        absent = [layer for layer in layers if Site(kind, layer) not in places]
        if absent or not model.n_layers:
            raise ModelError(
                f"{model.path}: heads and MLPs of a {model.architecture.model_type} cannot be told apart, as "
                f"its site {kind}.{absent[0] if absent else 0} is not known"
            )
    kinds = ("resid_pre", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")
    sites = [site for site in places if site.kind in kinds]
    with undisturbed(model.model), torch.no_grad():
        values = model.run(model.dummy_inputs(positions=3), read=sites, stop=True).values
        whole = False
        for layer in layers:
            found = {kind: values.get(Site(kind, layer).name) for kind in kinds}
            _check_sum(model, layer, found)
            whole = whole or not _sums_to(found["attn_out"], _attention_sum(model, layer, found["z"]))
    return Facts(
        kv_heads=model.width(Site("k", 0))[0],
        parallel=tuple(Site("resid_mid", layer) not in places for layer in layers),
        has_mlp=tuple(Site("mlp_out", layer) in places for layer in layers),
        whole_attention=whole,
    )


def output_projection(model: HookedModel, layer: int) -> tuple[Tensor, Tensor | None]:
    """The output projection of a layer by heads: `[heads, d_head, d_model]`, and its bias `[d_model]`.

    A view of the weight where there is one that can be used as it is (a plain linear map, GPT-2's `Conv1D`,
    a `HookedTransformer`); otherwise (LoRA, quantised) the map as it acts.
    """
    heads, width = model.width(Site("z", layer))
    place = model.place(Site("z", layer))
    if place.side == "in":
        weight, bias = linear_map(place.module, heads * width, model.dtype, model.device)
    else:
        attention = model.architecture.blocks[layer].get_submodule("attn")
        if model.architecture.model_type == "HookedTransformer":
            return attention.W_O.detach(), attention.b_O.detach()  # type: ignore[union-attr]
        projection = attention.get_submodule("o").original_component  # type: ignore[union-attr]
        weight, bias = linear_map(projection, heads * width, model.dtype, model.device)  # type: ignore[arg-type]
    return weight.unflatten(0, (heads, width)), bias


def linear_map(
    module: nn.Module, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """The matrix `[in, out]` and bias of a linear module, such that `module(x) = x @ matrix + bias`."""
    if type(module) is nn.Linear:
        return module.weight.detach().T, None if module.bias is None else module.bias.detach()
    if type(module).__name__ == "Conv1D" and module.weight.shape[0] == width:  # type: ignore[index]
        return module.weight.detach(), module.bias.detach()  # type: ignore[union-attr,return-value]
    with torch.no_grad():
        bias = module(torch.zeros(1, 1, width, dtype=dtype, device=device))[0, 0]
        return module(torch.eye(width, dtype=dtype, device=device)[None])[0] - bias, bias


def head_contributions(model: HookedModel, layer: int, z: Tensor) -> Tensor:
    """What each head of a layer adds to the stream.

    Args:
        model: The model.
        layer: The layer.
        z: `[batch, pos, heads, d_head]`, the value at `z.layer`.

    Returns:
        `[batch, pos, heads, d_model]`; with the projection's bias, their sum is the attention output.
    """
    weight, _ = output_projection(model, layer)
    return torch.einsum("bphe,hed->bphd", z, weight.to(z))


def sender_site(sender: Node) -> Site:
    """The site from whose value a sender's contribution is had (see `contribution`)."""
    kinds = {"embed": ("resid_pre", 0), "head": ("z", sender.layer), "attn": ("attn_out", sender.layer)}
    return Site(*kinds.get(sender.kind, ("mlp_out", sender.layer)))


def sender_sites(senders: Iterable[Node]) -> list[Site]:
    """The sites of several senders, each once."""
    return list(dict.fromkeys(sender_site(sender) for sender in senders))


def contribution(model: HookedModel, sender: Node, values: Mapping[str, Tensor]) -> Tensor:
    """What a sender adds to the stream, `[batch, pos, d_model]`.

    Args:
        model: The model.
        sender: A sender of its graph.
        values: By canonical name, the value at `sender_site(sender)` (such as `Run.values`).
    """
    value = values[sender_site(sender).name]
    if sender.kind != "head":
        return value
    weight, _ = output_projection(model, sender.layer or 0)
    return value[..., sender.head, :] @ weight[sender.head].to(value)  # type: ignore[index]


def _attention_sum(model: HookedModel, layer: int, z: Tensor | None) -> Tensor:
    assert z is not None
    total = head_contributions(model, layer, z).sum(2)
    bias = output_projection(model, layer)[1]
    return total if bias is None else total + bias


def _check_sum(model: HookedModel, layer: int, found: Mapping[str, Tensor | None]) -> None:
    parts = [found[kind] for kind in ("resid_pre", "attn_out", "mlp_out")]
    total = sum(part for part in parts if part is not None)
    if not isinstance(total, Tensor) or not _sums_to(found["resid_post"], total):
        raise ModelError(
            f"{model.path}: the residual stream after block {layer} is not the sum of its parts (this "
            f"{model.architecture.model_type} normalises after adding, or scales what it adds), so no part's "
            "contribution can be told apart; edges and paths need a model whose parts add up"
        )


def _sums_to(found: Tensor | None, expected: Tensor) -> bool:
    if found is None:
        return False
    scale = expected.float().abs().max().item() + 1e-6
    tolerance = 1e-4 if found.dtype in (torch.float32, torch.float64) else 5e-2
    return (found.float() - expected.float()).abs().max().item() <= tolerance * scale
