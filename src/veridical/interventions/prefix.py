"""Key/value caches of transformers, as patched runs use them: the base's, cut, for the rows of each layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from veridical.hooked import HookedModel


class Filled(Exception):
    """Ends a block's first pass once its keys and values are there. Always caught."""


def recording_cache(model: HookedModel) -> Any:
    """An empty cache that keeps every layer's keys and values whole; None for a model that takes none.

    Made without a config, so that a layer with a sliding window keeps all of them too; what it may see is
    then the mask's business, as in a run without a cache.
    """
    taken = {"past_key_values", "use_cache"} <= model.forward_parameters
    if model.kind != "causal" or not model.generates or not taken or not model.architecture.blocks:
        return None
    from transformers import DynamicCache

    return DynamicCache()


def prefix_cache(
    whole: Sequence[tuple[Tensor, Tensor]], examples: Tensor, counts: Sequence[int], start: int
) -> Any:
    """A cache of the first `start` positions, in layer l for the first `counts[l]` rows.

    Args:
        whole: Keys and values of the base in each layer, `[batch, groups, pos, d_head]` each.
        examples: `[rows]`, the base's row for each row.
        counts: How many rows run in each layer.
        start: Positions that are taken over.
    """
    from transformers.cache_utils import Cache

    def part(values: Tensor, count: int) -> Tensor:
        cut = values[:, :, :start]
        if len(cut) == 1:
            return cut.expand(count, -1, -1, -1)
        return cut[examples[:count].to(cut.device)]

    kind = _layer_class()
    return Cache(layers=[kind(part(k, n), part(v, n)) for (k, v), n in zip(whole, counts)])


@contextlib.contextmanager
def filling(cache: Any, layer: int) -> Iterator[Any]:
    """The layer's part of `cache`, which keeps its first keys and values and raises `Filled`.

    Once `filled` is set on it, it gives those that it has kept.
    """
    held = cache.layers[layer]
    held.filled = False
    try:
        yield held
    finally:
        held.filled, held.kept = None, None


@cache
def _layer_class() -> Any:
    from transformers.cache_utils import DynamicLayer

    class PrefixLayer(DynamicLayer):
        """Keys and values that stay as they are; what comes is joined to them for this one call.

        Attributes:
            filled: None; within `filling`, False until the first pass has brought its keys and values.
        """

        def __init__(self, keys: Tensor, values: Tensor) -> None:
            super().__init__()
            self.keys, self.values = self.before = keys, values
            self.dtype, self.device = keys.dtype, keys.device
            self.is_initialized = True
            self.filled: bool | None = None
            self.kept: tuple[Tensor, Tensor] | None = None

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            if self.filled:
                assert self.kept is not None
                return self.kept
            joined = (
                torch.cat([self.before[0], key_states], dim=-2),
                torch.cat([self.before[1], value_states], dim=-2),
            )
            if self.filled is False:
                self.kept = joined
                raise Filled
            return joined

    return PrefixLayer
