"""Threads that work side by side, each on a core of its own.

What torch spreads over the cores by itself is single operations. A chain of small ones, some of them numpy's,
leaves cores idle between them; here each core runs a chain of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`work` of every item, in order, by as many threads as torch may use.

    In these threads operations run on one core; gradients are recorded where the caller records them.
    """
    items, threads = list(items), torch.get_num_threads()
    if threads == 1 or len(items) < 2:
        return [work(item) for item in items]
    recording = torch.is_grad_enabled()

    def run(item: Item) -> Result:
        with torch.set_grad_enabled(recording):
            return work(item)

    return list(_pool(threads, os.getpid()).map(run, items))


@lru_cache(maxsize=1)
def _pool(threads: int, _process: int) -> ThreadPoolExecutor:
    """Threads in which torch uses one core; a forked process makes its own."""
    ready = threading.Barrier(threads + 1)

    def begin() -> None:
        torch.get_num_threads()  # when first asked it takes up the default, which would undo the next line
        torch.set_num_threads(1)
        ready.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="veridical-saes", initializer=begin)
    for _ in range(threads):
        pool.submit(int)
    ready.wait()
    torch.set_num_threads(threads)  # what the threads set is also the default of threads made later
    return pool
