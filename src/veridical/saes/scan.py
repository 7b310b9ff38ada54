"""Pre-activations, the one dense product of a sparse training step: made part by part and used in cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from veridical.saes.kernels import Block
from veridical.saes.workers import Result, each

CPU_BYTES = 16 << 20  # of pre-activations at a time, over all cores: stays in their shared cache
CORE_BYTES = 2 << 20  # at least, for a core
GPU_BYTES = 1 << 30


class Scan:
    """Pre-activations `x W^T + b` part by part, each part used while it is in cache.

    What blocks need is copied in passing.

    Args:
        x: Inputs `[N, B, d]`.
        W: Encoder `[N, F, d]`.
        b: Its bias `[N, F]`.
        blocks: Latents whose pre-activations are wanted in full.
        dtype: Number format of the product.
        scratch: Memory that scans use again, since fresh memory has to be cleared by the system; is filled.
    """

    def __init__(
        self,
        x: Tensor,
        W: Tensor,
        b: Tensor,
        blocks: Sequence[Block],
        dtype: torch.dtype,
        scratch: list[Tensor],
    ):
        self.x, self.W, self.b = (each.detach().to(dtype) for each in (x, W, b))
        self.members, self.size, self.width = len(x), x.shape[1], W.shape[1]
        self._linear = _linear() if x.device.type == "cpu" and dtype == torch.float32 else None
        self._blocks, self._filled, self._scratch = blocks, not blocks, scratch
        threads = torch.get_num_threads()
        room = GPU_BYTES if x.is_cuda else max(CPU_BYTES // threads, CORE_BYTES)
        room //= self.width * dtype.itemsize
        self._together = max(min(room // self.size, self.members), 1) if x.is_cuda else 1
        # A core each, where there are fewer parts than cores.
        share = self.size if x.is_cuda else -(-self.members * self.size // threads)
        self._rows = max(min(room // self._together, share, self.size), min(64, self.size))

    def each(self, use: Callable[[slice, slice, Tensor], Result]) -> list[Result]:
        """What `use` makes of every part, in order.

        Args:
            use: Gets members, rows, and their pre-activations `[members, rows, F]`, which are overwritten
                once it is done. On a CPU parts are used by several threads at once.
        """
        parts = [
            (slice(first, min(first + self._together, self.members)),
             slice(start, min(start + self._rows, self.size)))
            for first in range(0, self.members, self._together)
            for start in range(0, self.size, self._rows)
        ]  # fmt: skip

        def run(part: tuple[slice, slice]) -> Result:
            members, rows = part
            if self._linear is not None:
                member = members.start
                return finished(
                    part, self._linear(self.x[member, rows], self.W[member], self.b[member])[None]
                )
            memory = self._memory()
            out = memory[: members.stop - members.start, : rows.stop - rows.start]
            torch.baddbmm(self.b[members, None], self.x[members, rows], self.W[members].mT, out=out)
            result = finished(part, out)
            self._scratch.append(memory)
            return result

        def finished(part: tuple[slice, slice], pre: Tensor) -> Result:
            if not self._filled:
                self._fill(*part, pre)
            return use(*part, pre)

        results = [run(part) for part in parts] if self.x.is_cuda else each(run, parts)
        self._filled = True
        return results

    def _memory(self) -> Tensor:
        """Memory for a part, which nobody else has."""
        shape = (self._together, self._rows, self.width)
        with contextlib.suppress(IndexError):  # several threads ask
            memory = self._scratch.pop()
            if (memory.shape, memory.dtype, memory.device) == (shape, self.x.dtype, self.x.device):
                return memory
        return self.x.new_empty(shape)

    def _fill(self, some: slice, rows: slice, pre: Tensor) -> None:
        for block in self._blocks:
            if some.start <= block.member < some.stop:
                block.pre[rows] = pre[block.member - some.start].index_select(-1, block.ids)


@cache
def _linear() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """`x W^T + b` in float32 by oneDNN, which takes a fifth less than the library torch uses by itself (MKL)
    where the processor is AMD's. Torch has it for its compiler, not for the public: None where it is not as
    known here."""
    x, W, b = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3), torch.arange(4.0)
    try:
        operation = torch.ops.mkldnn._linear_pointwise
        found = operation(x, W, b, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return None
    if not torch.equal(found, x @ W.T + b):
        return None
    return lambda x, W, b: operation(x, W, b, "none", [], "")
