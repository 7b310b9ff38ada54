"""How weights are written by hand into transformers models whose norms do nothing; see `micro`."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor, nn

BOS, PAD, FIRST = 0, 1, 2
"""Ids: a text begins with BOS; those from FIRST on are letters."""
LETTERS = "abcdefghijklmnopqrstuv"
VOCABULARY = FIRST + len(LETTERS)
HEADS, POSITIONS = 4, 32
EPS, WEIGHT = 2.0**100, 2.0**50
ROTARY_BASE = 1e30
"""So large that most pairs of a head's dimensions turn by less than 1e-14 a token."""


def layout(*sizes: int) -> list[list[int]]:
    """Dimensions of the stream for parts of the given sizes, one after the other."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [list(range(end - size, end)) for size, end in zip(sizes, ends)]


def matrix(rows: int, columns: int, ones: dict[int, int], value: float = 1.0) -> Tensor:
    """Zeros but for `value` at each row and column of `ones`."""
    made = torch.zeros(rows, columns)
    for row, column in ones.items():
        made[row, column] = value
    return made


def from_rows(rows: int, given: dict[int, Tensor]) -> Tensor:
    made = torch.zeros(rows, len(next(iter(given.values()))))
    for row, vector in given.items():
        made[row] = vector
    return made


def turned_by_one(d_head: int, sharpness: float) -> tuple[Tensor, Tensor]:
    """Query and key whose score under the rotary turn is largest for the token before.

    Of a pair of dimensions that turns by w a token, the score at distance d is cos(w * (d - 1)), and three
    pairs add up. Over 32 positions the next largest score (at a distance of 7) is 0.27 less than that at 1.
    """
    query, key = torch.zeros(d_head), torch.zeros(d_head)
    for pair in range(3):
        angle = torch.tensor(ROTARY_BASE, dtype=torch.float64) ** (-2 * pair / d_head)
        query[pair] = sharpness * 4
        key[pair], key[pair + d_head // 2] = torch.cos(angle), torch.sin(angle)
    return query, key


def bare(family: str, layers: int, width: int, d_head: int, positions: int, mlp: int = 4) -> nn.Module:
    """A model of zeros with norms that do nothing."""
    import transformers

    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=width,
            n_layer=layers,
            n_head=width // d_head,
            n_positions=positions,
            n_inner=mlp,
            layer_norm_epsilon=EPS,
            tie_word_embeddings=False,
            bos_token_id=BOS,
            eos_token_id=None,
            pad_token_id=PAD,
        )
        model: nn.Module = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS // 2 if family == "llama_grouped" else HEADS,
            head_dim=d_head,
            max_position_embeddings=positions,
            rms_norm_eps=EPS,
            rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE},
            tie_word_embeddings=False,
            bos_token_id=BOS,
            eos_token_id=None,
            pad_token_id=PAD,
        )
        model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = name.endswith("weight") and ("norm" in name or "ln_" in name)
            parameter.fill_(WEIGHT if norm else 0.0)
    return model.eval()


def write(parameter: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)


def set_head(model: nn.Module, layer: int, head: int, part: str, value: Tensor) -> None:
    """Puts a head's matrix: `[width, d_head]` for q, k, v, which multiplies the stream from the right, or
    `[d_head, width]` for o. Scores are divided by sqrt(d_head) in the model, so q is multiplied by it."""
    d_head = value.shape[0] if part == "o" else value.shape[1]
    value = value * d_head**0.5 if part == "q" else value
    if hasattr(model, "transformer"):
        attention = model.transformer.h[layer].attn
        if part == "o":
            write(attention.c_proj.weight[head * d_head : (head + 1) * d_head], value)
            return
        start = "qkv".index(part) * attention.embed_dim + head * d_head
        write(attention.c_attn.weight[:, start : start + d_head], value)
        return
    attention = model.model.layers[layer].self_attn
    if part in "kv":
        head = head // attention.num_key_value_groups
    span = slice(head * d_head, (head + 1) * d_head)
    weight = getattr(attention, f"{part}_proj").weight
    write(weight[:, span] if part == "o" else weight[span], value.T)


def write_ends(model: nn.Module, embedding: Tensor, unembedding: Tensor) -> None:
    write(model.get_input_embeddings().weight, embedding)
    write(model.lm_head.weight, unembedding)


def finished(
    model: nn.Module, noise: float = 0.0, seed: int = 0, busy: Set[tuple[int, int]] = frozenset()
) -> nn.Module:
    if noise:
        _add_noise(model, noise, seed, busy)
    if hasattr(model, "transformer"):
        _balance(model)
    return model


def _add_noise(model: nn.Module, noise: float, seed: int, busy: Set[tuple[int, int]]) -> None:
    """Random weights for MLPs and for the heads that are not `busy` (nor share keys with one that is)."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    gpt2 = hasattr(model, "transformer")
    width = config.n_embd if gpt2 else config.hidden_size
    d_head = width // config.n_head if gpt2 else config.head_dim
    shared = 1 if gpt2 else config.num_attention_heads // config.num_key_value_heads
    for layer in range(2):
        taken = {head // shared for busy_layer, head in busy if busy_layer == layer}
        for head in range(HEADS):
            for part in "qkvo":
                if (layer, head) in busy or (part in "kv" and head // shared in taken):
                    continue
                shape = (d_head, width) if part == "o" else (width, d_head)
                set_head(model, layer, head, part, torch.randn(shape, generator=generator) * noise)
    for name, parameter in model.named_parameters():
        if "mlp" in name and parameter.dim() > 1:
            write(parameter, torch.randn(parameter.shape, generator=generator) * noise)


def _balance(model: nn.Module) -> None:
    """Has everything that writes to GPT-2's stream put minus its sum into the last dimension."""
    body = model.transformer
    writers = [
        body.wte,
        body.wpe,
        *(part for block in body.h for part in (block.attn.c_proj, block.mlp.c_proj)),
    ]
    for module in writers:
        weight = module.weight.detach().clone()
        weight[:, -1] = -weight[:, :-1].sum(1)
        write(module.weight, weight)
