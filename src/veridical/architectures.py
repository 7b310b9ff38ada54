"""Where each model family of transformers keeps its sites: one short record for each.

A new family is one entry in `FAMILIES`, with the paths as they stand in its modelling file. A model of
another family still works by raw module paths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from veridical.hooks import Heads, Interleaved, Place, View
from veridical.sites import Site

Kind = Literal["causal", "encoder", "vision"]


@dataclass(frozen=True)
class Family:
    """Paths of a family, the first four within the model's body, the others within a block.

    Attributes:
        kind: What the family is made for.
        embed: Module whose output is `embed`.
        blocks: List of blocks.
        ln_final: The final norm; None if there is none.
        attention: Module that calls the attention function and holds `config`.
        attn_out: Module whose output is added to the stream.
        o_proj: Output projection; its input is `z`.
        mid: Module and side of `resid_mid`; None where attention and MLP run in parallel.
        mlp_out: Module whose output is added to the stream.
        down: Down projection; its input is `mlp_post`.
        qkv: Three projections, or one that holds all three.
        interleaved: The one projection holds query, key and value of each head side by side.
        flat: Norm and MLP see rows and positions as one dimension.
    """

    kind: Kind = "causal"
    embed: str = "embed_tokens"
    blocks: str = "layers"
    ln_final: str | None = "norm"
    attention: str = "self_attn"
    attn_out: str = "self_attn"
    o_proj: str = "self_attn.o_proj"
    mid: str | None = "post_attention_layernorm:in"
    mlp_out: str = "mlp"
    down: str = "mlp.down_proj"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    interleaved: bool = False
    flat: bool = False


_LLAMA = Family()
_GEMMA = replace(
    _LLAMA,
    attn_out="post_attention_layernorm",
    mid="pre_feedforward_layernorm:in",
    mlp_out="post_feedforward_layernorm",
)
_OPT = Family(
    embed="decoder.embed_tokens",
    blocks="decoder.layers",
    ln_final="decoder.final_layer_norm",
    o_proj="self_attn.out_proj",
    mid="final_layer_norm:in",
    mlp_out="fc2",
    down="fc2",
    flat=True,
)

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        embed="wte",
        blocks="h",
        ln_final="ln_f",
        attention="attn",
        attn_out="attn",
        o_proj="attn.c_proj",
        mid="ln_2:in",
        down="mlp.c_proj",
        qkv=("attn.c_attn",),
    ),
    "gpt_neox": Family(
        embed="embed_in",
        ln_final="final_layer_norm",
        attention="attention",
        attn_out="post_attention_dropout",
        o_proj="attention.dense",
        mlp_out="post_mlp_dropout",
        down="mlp.dense_4h_to_h",
        qkv=("attention.query_key_value",),
        interleaved=True,
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _LLAMA,
    "phi3": replace(
        _LLAMA, attn_out="resid_attn_dropout", mlp_out="resid_mlp_dropout", qkv=("self_attn.qkv_proj",)
    ),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "olmo2": replace(
        _LLAMA, attn_out="post_attention_layernorm", mid="mlp:in", mlp_out="post_feedforward_layernorm"
    ),
    "opt": _OPT,
    "bert": Family(
        kind="encoder",
        embed="embeddings.word_embeddings",
        blocks="encoder.layer",
        ln_final=None,
        attention="attention.self",
        attn_out="attention.output.dropout",
        o_proj="attention.output.dense",
        mid="attention.output.LayerNorm:out",
        mlp_out="output.dropout",
        down="output.dense",
        qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    ),
    "vit": Family(
        kind="vision",
        embed="embeddings",
        ln_final="layernorm",
        attention="attention",
        attn_out="attention",
        o_proj="attention.o_proj",
        mid="layernorm_after:in",
        down="mlp.fc2",
        qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    ),
}

# What depends on a model's config and not on its family alone.
_VARIANTS: dict[str, Callable[[Family, Any], Family]] = {
    "gpt_neox": lambda family, config: replace(family, mid=None) if config.use_parallel_residual else family,
    "opt": lambda family, config: (
        family
        if config.do_layer_norm_before
        else replace(family, mid="self_attn_layer_norm:out", ln_final=None)
    ),
}


@dataclass(frozen=True)
class Architecture:
    """A model's dimensions and places, and the (text) config that they come from.

    Dimensions that the config does not tell are 0. In a model that `adds_up`, no norm stands in the
    residual stream, so it is the sum of its parts (not so in bert, which normalises after adding).
    """

    kind: Kind
    model_type: str
    body: nn.Module
    config: Any = None
    vocabulary: int = 0
    n_layers: int = 0
    d_model: int = 0
    n_heads: int = 0
    n_kv_heads: int = 0
    d_head: int = 0
    context_length: int = 0
    adds_up: bool = False
    blocks: tuple[nn.Module, ...] = ()
    places: dict[Site, Place] = field(default_factory=dict)


def describe(model: nn.Module) -> Architecture:
    """Dimensions and places of a transformers model; no places if its family is not in the table."""
    config = _text_config(model)
    body = _body(model)
    model_type = str(getattr(config, "model_type", "") or type(model).__name__)
    family = FAMILIES.get(model_type)
    plain = Architecture(
        kind=family.kind if family is not None else _guess_kind(model),
        model_type=model_type,
        body=body,
        config=config,
        vocabulary=int(getattr(config, "vocab_size", 0) or 0),
        **_dimensions(config),
    )
    if family is None:
        return plain
    if family.kind == "encoder" and getattr(config, "is_decoder", False):
        plain = replace(plain, kind="causal")
    if model_type in _VARIANTS:
        family = _VARIANTS[model_type](family, config)
    blocks = find(body, family.blocks)
    if not isinstance(blocks, nn.ModuleList):  # another version of transformers may lay the family out anew
        return plain
    plain = replace(plain, n_layers=len(blocks), blocks=tuple(blocks))
    adds_up = family.mid is None or family.mid.endswith(":in")
    return replace(plain, adds_up=adds_up, places=_places(family, plain))


def find(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule at `path`, or None."""
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
        if not isinstance(found, nn.Module):
            return None
    return found


def inner(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper; any other model itself."""
    if not hasattr(model, "peft_config"):
        return model
    wrapper: Any = model
    return wrapper.get_base_model()


def _places(family: Family, model: Architecture) -> dict[Site, Place]:
    places: dict[Site, Place] = {}

    def add(kind: str, layer: int | None, module: nn.Module | None, side: str, **rest: Any) -> None:
        if module is not None:
            places[Site(kind, layer)] = Place(module, side, **rest)

    stream = (model.d_model,)
    embed = find(model.body, family.embed)
    width = getattr(embed, "embedding_dim", None)
    add("embed", None, embed, "out", width=(width,) if width else stream)
    for layer, block in enumerate(model.blocks):
        flat = {"block": block} if family.flat else {}
        add("resid_pre", layer, block, "in", width=stream)
        _add_heads(add, family, layer, block, model)
        add("attn_out", layer, find(block, family.attn_out), "out", width=stream)
        if family.mid is not None:
            path, side = family.mid.split(":")
            add("resid_mid", layer, find(block, path), side, width=stream, carried=side == "in", **flat)
        down = find(block, family.down)
        add("mlp_post", layer, down, "in", width=_in_width(down), **flat)
        add("mlp_out", layer, find(block, family.mlp_out), "out", width=stream, **flat)
        add("resid_post", layer, block, "out", width=stream)
    if family.ln_final is not None:
        add("ln_final", None, find(model.body, family.ln_final), "out", width=stream)
    return places


def _add_heads(
    add: Callable[..., None], family: Family, layer: int, block: nn.Module, model: Architecture
) -> None:
    heads, kv_heads, d_head = model.n_heads, model.n_kv_heads, model.d_head
    counts = (heads, kv_heads, kv_heads)
    for index, (kind, count) in enumerate(zip("qkv", counts)):
        view: View
        if len(family.qkv) == 3:
            view = Heads(count, d_head)
        elif family.interleaved:
            view = Interleaved(count, d_head, index)
        else:
            view = Heads(count, d_head, start=sum(counts[:index]) * d_head)
        module = find(block, family.qkv[index if len(family.qkv) == 3 else 0])
        add(kind, layer, module, "out", width=(count, d_head), view=view)
    add("pattern", layer, find(block, family.attention), "pattern")
    add("z", layer, find(block, family.o_proj), "in", width=(heads, d_head), view=Heads(heads, d_head))


def _in_width(projection: nn.Module | None) -> tuple[int, ...] | None:
    for name in ("in_features", "nx"):  # nx: gpt2's Conv1D
        if isinstance(size := getattr(projection, name, None), int):
            return (size,)
    return None


def _dimensions(config: Any) -> dict[str, Any]:
    def first(*names: str) -> int:
        values = (getattr(config, name, None) for name in names)
        return next((int(value) for value in values if isinstance(value, int) and value), 0)

    d_model, heads = (
        first("hidden_size", "n_embd", "d_model"),
        first("num_attention_heads", "n_head", "num_heads"),
    )
    return {
        "n_layers": first("num_hidden_layers", "n_layer", "num_layers"),
        "d_model": d_model,
        "n_heads": heads,
        "n_kv_heads": first("num_key_value_heads") or heads,
        "d_head": first("head_dim") or (d_model // heads if heads else 0),
        "context_length": first("max_position_embeddings", "n_positions", "n_ctx")
        or _image_positions(config),
    }


def _image_positions(config: Any) -> int:
    image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if not isinstance(image, int) or not isinstance(patch, int):
        return 0
    return (image // patch) ** 2 + 1


def _text_config(model: nn.Module) -> Any:
    config = getattr(inner(model), "config", None)
    get = getattr(config, "get_text_config", None)
    return get() if callable(get) else config


def _body(model: nn.Module) -> nn.Module:
    model = inner(model)
    body = getattr(model, "base_model", model)
    body = body if isinstance(body, nn.Module) else model
    return getattr(body, "language_model", body)


def _guess_kind(model: nn.Module) -> Kind:
    model = inner(model)
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        return "vision"
    name = type(model).__name__
    makes_text = getattr(model, "can_generate", lambda: False)()
    return "causal" if makes_text or name.endswith(("CausalLM", "LMHeadModel")) else "encoder"
