"""Attention probabilities, read and edited in any attention implementation of transformers.

While a pattern is tapped, the attention module's `config` is replaced, for the time of each of its calls,
by a shallow copy that names the function below as its attention implementation. When the pattern is only
read, that function computes it on the side, from the same queries, keys, mask and scale, and hands the call
on to the implementation that the model was loaded with, so its output keeps its bits. When it is edited,
what the edit changed is put through the values and added to that output.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from veridical.errors import ModelError

_NAME = "veridical_pattern"


class Handle:
    """Removes a tap, with the same `remove` as torch's own handles."""

    def __init__(self, module: nn.Module, tap: Callable, handles: list[Any]) -> None:
        self._module, self._tap, self._handles = module, tap, handles

    def remove(self) -> None:
        """Takes the hooks off, and puts the module's config back if a call was interrupted."""
        for handle in self._handles:
            handle.remove()
        _release(self._module, self._tap)


def attach(module: nn.Module, tap: Callable[[Tensor], Tensor | None]) -> Handle:
    """Shows the pattern, [batch, head, query, key], of every call of `module` to `tap`."""
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(_NAME, _attend)
    before = module.register_forward_pre_hook(lambda called, args: _engage(called, tap))
    after = module.register_forward_hook(lambda called, args, output: _release(called, tap), always_call=True)
    return Handle(module, tap, [before, after])


def pattern_of(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    implementation: str,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
) -> Tensor:
    """The attention probabilities that `implementation` uses but does not return.

    Args:
        module: The attention module; its `is_causal` counts where the mask leaves that open.
        query: [batch, head, query, d_head].
        key: [batch, key/value head, key, d_head].
        mask: None, boolean (True: may be seen), additive, or flash attention's [batch, key] of real tokens.
        implementation: Name of the implementation, which decides what a missing mask means.
        scaling: Factor of the scores; one over the root of d_head when not given.
        softcap: Bound c of the scores, c tanh(score / c).
        sliding_window: How far back flash attention sees; in others the mask says so.
        is_causal: Overrides the module's.

    Returns:
        [batch, head, query, key] in the dtype of the queries. Under a boolean mask, the row of a token that
        may see nothing (padding) is zero.
    """
    scale = float(query.shape[-1]) ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query, _repeated(key, query.shape[1]).transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if "flash" in implementation:
        mask = _flash_mask(scores, mask, causal, sliding_window)
    elif mask is None and implementation != "eager" and causal and query.shape[2] > 1:
        mask = _causal(scores)
    exact = torch.promote_types(torch.float32, query.dtype)
    if mask is None:
        return torch.softmax(scores, dim=-1, dtype=exact).to(query.dtype)
    if not isinstance(mask, Tensor):
        raise ModelError(
            f"attention patterns cannot be read with {implementation}; "
            "load the model with attn_implementation='sdpa' or 'eager'"
        )
    mask = mask[..., : scores.shape[-1]]
    if mask.dtype != torch.bool:
        return torch.softmax(scores + mask, dim=-1, dtype=exact).to(query.dtype)
    weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1, dtype=exact)
    return weights.masked_fill(~mask, 0.0).to(query.dtype)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    config: Any = module.config
    original, taps = config.veridical_original, config.veridical_taps
    implementation = original._attn_implementation or "eager"
    known = {
        name: kwargs[name] for name in ("scaling", "softcap", "sliding_window", "is_causal") if name in kwargs
    }
    computed = pattern_of(module, query, key, attention_mask, implementation, **known)
    # When gradients are kept, what was read must be what the output depends on.
    kept = torch.is_grad_enabled() and computed.requires_grad
    pattern = computed.clone() if kept else computed
    edited = False
    for tap in list(taps):
        new = tap(pattern)
        if new is not None:
            pattern, edited = new, True
    if edited and dropout and module.training:
        dropped = nn.functional.dropout(pattern, p=dropout, training=True)
        return _mixed(dropped, value), pattern
    module.config = original
    try:
        function = _implementation(module, implementation)
        output, weights = function(module, query, key, value, attention_mask, dropout=dropout, **kwargs)
    finally:
        module.config = config
    if not (edited or kept):
        return output, weights
    # Only the change goes through the values, so that heads and rows that were left alone keep their bits.
    return output + _mixed(pattern - computed, value), pattern


def _mixed(pattern: Tensor, value: Tensor) -> Tensor:
    mixed = torch.matmul(pattern, _repeated(value, pattern.shape[1])[:, :, : pattern.shape[-1]])
    return mixed.transpose(1, 2).contiguous()


def _implementation(module: nn.Module, name: str) -> Callable:
    home = vars(sys.modules[type(module).__module__])
    if name == "eager" and getattr(module, "reorder_and_upcast_attn", False):  # gpt2's own variant of eager

        def upcast(
            module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
        ) -> Any:
            return module._upcast_and_reordered_attn(query, key, value, mask)

        return upcast
    return home["ALL_ATTENTION_FUNCTIONS"].get_interface(name, home.get("eager_attention_forward"))


def _engage(module: Any, tap: Callable) -> None:
    config = module.config
    if not hasattr(config, "veridical_taps"):
        tapped = copy.copy(config)
        tapped._attn_implementation_internal = _NAME
        tapped.veridical_original, tapped.veridical_taps = config, []
        module.config = config = tapped
    config.veridical_taps.append(tap)


def _release(module: Any, tap: Callable) -> None:
    config = module.config
    taps = getattr(config, "veridical_taps", None)
    if taps is None:
        return
    if tap in taps:
        taps.remove(tap)
    if not taps:
        module.config = config.veridical_original


def _repeated(heads: Tensor, n_heads: int) -> Tensor:
    groups = n_heads // heads.shape[1]
    return heads if groups == 1 else heads.repeat_interleave(groups, dim=1)


def _causal(scores: Tensor) -> Tensor:
    # Aligned at the upper left, as scaled_dot_product_attention aligns it.
    queries, keys = scores.shape[-2:]
    return torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril()[None, None]


def _flash_mask(scores: Tensor, real: Tensor | None, causal: bool, window: int | None) -> Tensor:
    queries, keys = scores.shape[-2:]
    query_at = torch.arange(keys - queries, keys, device=scores.device)[:, None]
    key_at = torch.arange(keys, device=scores.device)[None, :]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=scores.device)
    if causal:
        seen = seen & (key_at <= query_at)
    if window is not None:
        seen = seen & (query_at - key_at < window)
        seen = seen if causal else seen & (key_at - query_at < window)
    seen = seen[None, None]
    return seen if real is None else seen & real.bool()[:, None, None, -keys:]
