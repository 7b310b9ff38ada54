"""What comparisons are held against: direct formulas, and models with a planted change."""

import copy

import numpy as np
import torch


def direct_cka(x, y):
    """The unbiased formula with `[n, n]` kernels in float64."""

    def centred(rows):
        rows = rows.astype(np.float64)
        kernel = rows @ rows.T
        np.fill_diagonal(kernel, 0.0)
        return kernel

    def hsic(k, m):
        n = len(k)
        both = k.sum() * m.sum() / ((n - 1) * (n - 2))
        return float((k * m).sum() + both - 2 / (n - 2) * (k.sum(0) @ m.sum(0)))

    k, m = centred(x), centred(y)
    return hsic(k, m) / float(np.sqrt(hsic(k, k) * hsic(m, m)))


def changed(model, layer=None, scale=0.3, rank=2, part="mlp.down_proj", seed=0):
    """A copy of a Llama with a low-rank change in one layer; an equal copy without a layer."""
    made = copy.deepcopy(model)
    if layer is not None:
        weight = made.model.layers[layer].get_submodule(part).weight
        random = torch.Generator().manual_seed(seed)
        up = torch.randn(weight.shape[0], rank, generator=random)
        down = torch.randn(rank, weight.shape[1], generator=random)
        with torch.no_grad():
            weight += (scale / rank**0.5 / weight.shape[1] ** 0.5 * (up @ down)).to(weight.dtype)
    return made


def rotated(model, seed=0):
    """The same function with its stream in another basis: norms folded in, then everything turned."""
    made = copy.deepcopy(model).double()
    width = made.config.hidden_size
    random = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(width, width, generator=random, dtype=torch.float64))[0]
    with torch.no_grad():
        for layer in made.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, parts in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                for part in parts:
                    part.weight.copy_((part.weight * norm.weight) @ turn)
                norm.weight.fill_(1.0)
            for part in (attention.o_proj, mlp.down_proj):
                part.weight.copy_(turn.T @ part.weight)
        head = (made.lm_head.weight * made.model.norm.weight) @ turn
        made.model.norm.weight.fill_(1.0)
        made.model.embed_tokens.weight.copy_(made.model.embed_tokens.weight @ turn)
        made.lm_head.weight = torch.nn.Parameter(head)
    return made
