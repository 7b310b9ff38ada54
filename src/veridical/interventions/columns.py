"""Logits at the ids that a metric reads, and no others.

The unembedding of a small model is much of its arithmetic, and a logit difference reads two of its rows.
Where what follows it treats every id by itself (nothing, a scale, a softcap), the others are left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from veridical.architectures import inner
from veridical.hooks import overridden
from veridical.selftest import undisturbed

if TYPE_CHECKING:
    from veridical.hooked import HookedModel

LARGEST_SHARE = 1 / 8
"""Of the vocabulary; of more ids all logits are had."""


@contextlib.contextmanager
def only(model: HookedModel, ids: Tensor | None) -> Iterator[None]:
    """Passes inside give logits at `ids` and zeros elsewhere, if the model allows it; None is all.

    Args:
        model: Left as it is where its unembedding is no plain linear map, carries hooks, or is followed by
            anything that mixes ids.
        ids: `[n]` int64, each once.
    """
    head = None if ids is None else unembedding_of(model)
    if ids is None or head is None or len(ids) > LARGEST_SHARE * head.out_features:
        yield
        return
    if not _by_itself(model, head):
        yield
        return
    with overridden({head: _at(head, ids)}):
        yield


def unembedding_of(model: HookedModel) -> nn.Linear | None:
    """The plain linear map to the logits of a causal model, if that is what gives them."""
    getter = getattr(inner(model.model), "get_output_embeddings", None)
    head = getter() if model.kind == "causal" and callable(getter) else None
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_hf_hook")
    if type(head) is not nn.Linear or head.weight.is_meta or any(getattr(head, name, None) for name in hooks):
        return None
    return head if head.out_features == model.architecture.vocabulary else None


def _at(head: nn.Linear, ids: Tensor) -> Callable[..., Tensor]:
    def act(own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        (x,) = (*args, *kwargs.values())
        chosen = ids.to(head.weight.device)
        bias = None if head.bias is None else head.bias[chosen]
        found = nn.functional.linear(x, head.weight[chosen], bias)
        return found.new_zeros(*x.shape[:-1], head.out_features).index_copy(-1, chosen, found)

    return act


_KNOWN: WeakKeyDictionary[HookedModel, bool] = WeakKeyDictionary()


def _by_itself(model: HookedModel, head: nn.Linear) -> bool:
    """Whether logits at some ids are the same with and without the others; tried once for a handle."""
    if model not in _KNOWN:
        inputs = model.dummy_inputs(positions=3)
        ids = torch.tensor([1, head.out_features // 2, head.out_features - 1]).unique()
        with undisturbed(model.model), torch.no_grad():
            whole = model.call(inputs).logits[..., ids]
            with overridden({head: _at(head, ids)}):
                part = model.call(inputs).logits[..., ids]
        scale = whole.float().abs().max().item() + 1e-6
        close = (part.float() - whole.float()).abs().max().item() <= 1e-2 * scale
        _KNOWN[model] = close or bool(whole.isnan().any())
    return _KNOWN[model]
