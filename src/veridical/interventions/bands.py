"""Which patches share the first token that is run.

Patches that start late in the text need only its last tokens, but every band of starts is a forward of its
own. A call of a block costs, beside its arithmetic, its launch and the reading of its weights; both are
counted in tokens of arithmetic, and the bands are those of the least total.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LAUNCH = {"cpu": 3e7, "cuda": 2e10}
"""Floating-point operations in the time of calling a block on nothing: 0.5 ms at 60 GFLOP/s on two CPU cores
(`tests/benchmarks/bench_patch.py --cost` measures it), and 0.4 ms at 50 TFLOP/s on an H200."""
WEIGHTS = {"cpu": 24, "cuda": 200}
"""Tokens of arithmetic in the time of reading a block's weights once."""
FORWARD = 6
"""Blocks' launches in one forward's embedding, masks, head and hooks."""


def bands(
    firsts: Sequence[int],
    work: Sequence[float],
    width: int,
    layers: int,
    parameters: int,
    device: str = "cpu",
) -> list[int]:
    """The first column of each band, in order: the partition of the least cost.

    Args:
        firsts: First changed columns, in order, each once.
        work: For each of them its rows, each counted with the blocks that it goes through.
        width: Columns of the batch.
        layers: Blocks of the model.
        parameters: Parameters of one block.
        device: Kind of device.
    """
    launch = LAUNCH.get(device, LAUNCH["cuda"]) / (2 * max(1, parameters))
    fixed = FORWARD * launch + layers * (launch + WEIGHTS.get(device, WEIGHTS["cuda"]))
    count = len(firsts)
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(work, dtype=np.float64))])
    starts = np.asarray(firsts)
    best, cut = np.full(count + 1, np.inf), np.zeros(count + 1, dtype=int)
    best[0] = 0.0
    for end in range(1, count + 1):
        # The last band holds firsts[begin:end] and runs all of them from firsts[begin] on.
        total = best[:end] + fixed + (sums[end] - sums[:end]) * (width - starts[:end])
        cut[end] = int(total.argmin())
        best[end] = total[cut[end]]
    found, end = [], count
    while end:
        end = int(cut[end])
        found.append(int(starts[end]))
    return found[::-1]
