"""Several processes writing one store, as `torchrun` starts them.

Shards are dealt out in turn. Processes talk over gloo, also where the model runs on GPUs, since only a few
words are exchanged: when to start, who failed, when all is written. They share the folder, not memory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from veridical.errors import StoreError


@dataclass(frozen=True)
class World:
    """This process among those that write the store; alone, rank 0 of 1."""

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def mine(self, numbers: list[int]) -> list[int]:
        """The shards of this process, dealt out in turn by their own number."""
        return [number for number in numbers if number % self.size == self.rank]

    def agree(self, error: BaseException | None) -> None:
        """Waits for all; raises this process's error, or says that another failed.

        Without this a failed process would leave the others waiting for it.
        """
        if self.size > 1:
            import torch.distributed as dist

            said: list[Any] = [None] * self.size
            dist.all_gather_object(
                said, None if error is None else f"{type(error).__name__}: {error}", self.group
            )
            failed = [(rank, words) for rank, words in enumerate(said) if words is not None]
            if error is None and failed:
                raise StoreError(f"process {failed[0][0]} of {self.size} failed: {failed[0][1]}")
        if error is not None:
            raise error


def world() -> World:
    """The processes that torchrun started (or that `torch.distributed` already knows)."""
    import torch.distributed as dist

    if not dist.is_available():
        return World()
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
            return World()
        dist.init_process_group("gloo")
    if dist.get_world_size() < 2:
        return World()
    return World(dist.get_rank(), dist.get_world_size(), _gloo())


_group: Any = None


def _gloo() -> Any:
    import torch.distributed as dist

    global _group
    if dist.get_backend() == "gloo":
        return None  # the default group
    if _group is None:
        _group = dist.new_group(backend="gloo")
    return _group
