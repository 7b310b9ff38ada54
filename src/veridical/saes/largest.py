"""The k largest of each row, found among few candidates.

`torch.topk` on a CPU is as dear as the encoder's product. The k-th largest of the maxima of disjoint blocks
is a lower bound of the k-th largest of all: k blocks hold a value that large. Few values reach it, so the row
is searched once for those and only they are compared. numpy's `partition` is vectorised for such short rows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SPREAD = 4
"""Blocks that a row is cut into, in multiples of k: with more the bound is closer, but dearer."""
CROWD = 4
"""Candidates in multiples of k, on average, above which the whole rows are sorted after all."""


def largest(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices of the k largest of `rows [..., n]`, both `[..., k]`, in no order."""
    n, blocks = rows.shape[-1], 1 << (SPREAD * k - 1).bit_length()
    if n % blocks or n < 4 * blocks or not has_numpy(rows):
        return rows.topk(k, dim=-1, sorted=False)  # type: ignore[return-value]
    flat = rows.detach().reshape(-1, n)
    maxima = flat.view(len(flat), -1, blocks).amax(1)
    found = np.flatnonzero(flat.numpy() >= kth_largest(maxima, k).numpy())
    if np.isnan(maxima.numpy()).any() or len(found) > CROWD * k * len(flat):  # NaN counts as the largest
        return rows.topk(k, dim=-1, sorted=False)  # type: ignore[return-value]
    row, column = np.divmod(found, n)
    counts = np.bincount(row, minlength=len(flat))
    width = int(counts.max())
    place = np.arange(len(found)) + np.repeat(
        width * np.arange(len(flat)) - np.cumsum(counts) + counts, counts
    )
    few = np.full((len(flat), width), -np.inf, dtype=flat.numpy().dtype)
    columns = np.zeros(few.shape, dtype=np.int64)
    few.reshape(-1)[place] = flat.numpy().reshape(-1)[found]
    columns.reshape(-1)[place] = column
    values, picks = torch.from_numpy(few).topk(k, dim=-1, sorted=False)
    shape = (*rows.shape[:-1], k)
    return values.view(shape), torch.from_numpy(columns).gather(-1, picks).view(shape)


def kth_largest(rows: Tensor, k: int) -> Tensor:
    """The k-th largest of each row of `rows [..., n]`, `[..., 1]`."""
    n = rows.shape[-1]
    if has_numpy(rows):
        return torch.from_numpy(np.partition(rows.detach().numpy(), n - k, axis=-1)[..., n - k : n - k + 1])
    return rows.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)


def has_numpy(rows: Tensor) -> bool:
    """Whether numpy can read the tensor."""
    return rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.float64)
