"""Memory that is used again once nobody holds it.

A large tensor in fresh memory costs several times the copying that fills it, since the system clears every
page first.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Recycler:
    """Hands out CPU tensors of a few shapes; at most `keep` blocks of memory wait to be used again."""

    def __init__(self, keep: int = 2):
        self._keep = keep
        self._blocks: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor with any content, whose memory no other living tensor shares."""
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        memory = self._unused(size)
        # Every tensor and view of this memory keeps `lent` alive, and nothing else does.
        lent = memory[:]
        self._blocks = [*self._blocks, (memory, weakref.ref(lent))][-self._keep :]
        return torch.from_numpy(lent).view(dtype).view(tuple(shape))

    def _unused(self, size: int) -> np.ndarray:
        for number, (memory, holder) in enumerate(self._blocks):
            if memory.nbytes == size and holder() is None:
                del self._blocks[number]
                return memory
        return np.empty(size, dtype=np.uint8)
