"""The one pass: both models read a batch of the same rows, and every measure takes what it needs of it.

Nothing is stored. A batch's logits and residual streams are handed to the meters and let go, so memory
depends on `batch_tokens`, the widths and the vocabulary, and not on the number of texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from veridical.progress import bar
from veridical.tokens import by_length

if TYPE_CHECKING:
    from veridical.comparison.duo import Duo
    from veridical.comparison.resampling import Resampling
    from veridical.comparison.rows import Rows
    from veridical.hooked import HookedModel

BATCH_TOKENS = 1024
"""Tokens of one batch: logits of both models are held at once, 400 MB at 50,000 tokens in float32."""


@dataclass
class Step:
    """What both models gave for one batch, at the tokens that are compared, one row after another.

    Attributes:
        numbers: `[rows]`, which rows of the data these are.
        row: `[tokens]`, row of each token within the batch.
        position: `[tokens]`, its position in the policy's tokens.
        offset: `[tokens]`, its position less that of the completion's first token.
        answer: `[tokens]` bool, whether it predicts a token of the completion.
        last: `[rows]`, index of each row's last compared token; -1 where none is compared.
        ids: `[tokens]`, the policy's token read there.
        following: `[tokens]`, the token after it; -1 at the end of a row.
        groups, labels: `[rows]`.
        weights: `[resamples + 1, rows]`, ones first.
        flips: `[signs + 1, rows]`, ones first.
        logits: Of policy and reference, `[rows, pos, vocabulary]`; None where they are not compared.
        flat: Of policy and reference, place of each compared token in `[rows * pos]`; None for every place in
            order.
        streams: By name of a compared pair of sites, the values of policy and of reference there,
            `[tokens, ...]`.
    """

    numbers: np.ndarray
    row: Tensor
    position: Tensor
    offset: Tensor
    answer: Tensor
    last: Tensor
    ids: Tensor
    following: Tensor
    groups: np.ndarray
    labels: np.ndarray
    weights: Tensor
    flips: Tensor
    logits: tuple[Tensor, Tensor] | None
    flat: tuple[Tensor | None, Tensor | None]
    streams: dict[str, tuple[Tensor, Tensor]]

    def __len__(self) -> int:
        return len(self.numbers)

    @cached_property
    def counts(self) -> Tensor:
        """`[rows]` float64, compared tokens of each."""
        return torch.bincount(self.row, minlength=len(self)).to(torch.float64)

    def pieces(self, size: int) -> list[tuple[slice, Tensor, Tensor]]:
        """Logits of policy and reference `[n, vocabulary]`, at most `size` tokens at a time."""
        if self.logits is None:
            return []
        whole = [value.flatten(0, 1) for value in self.logits]

        def piece(side: int, at: slice) -> Tensor:
            index = self.flat[side]
            return whole[side][at] if index is None else whole[side].index_select(0, index[at])

        count = len(self.row)
        parts = [slice(first, min(first + size, count)) for first in range(0, count, size)]
        return [(at, piece(0, at), piece(1, at)) for at in parts]


class Meter(Protocol):
    """A measure that is taken on the way."""

    def add(self, step: Step) -> None:
        """Takes what it needs of a batch."""
        ...


def stream(
    duo: Duo,
    rows: Rows,
    meters: Sequence[Meter],
    resampling: Resampling,
    *,
    sites: Mapping[str, tuple[str, str]] | None = None,
    logits: bool = True,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool | None = None,
) -> None:
    """Runs both models over all rows once and hands every batch to the meters.

    Args:
        duo: The models; they run in their present mode, without gradients.
        rows: What they read.
        meters: Measures.
        resampling: Where the weights of rows come from.
        sites: By name, pairs of sites whose values to hand on, (policy, reference).
        logits: Whether logits are compared; they are computed either way unless nothing asks for them.
        batch_tokens: Most tokens in one batch, padding included.
        progress: Show a bar; on a terminal or in a notebook when not given.
    """
    lengths = [max(len(row.policy), len(row.reference)) for row in rows.rows]
    batches = by_length(lengths, batch_tokens)
    with torch.no_grad(), bar(rows.tokens, f"comparing on {rows.source}", "tokens", progress) as shown:
        for batch in batches:
            step = _step(duo, rows, batch, resampling, sites or {}, logits)
            for meter in meters:
                meter.add(step)
            shown.update(len(step.row))


def _step(
    duo: Duo,
    rows: Rows,
    batch: Sequence[int],
    resampling: Resampling,
    sites: Mapping[str, tuple[str, str]],
    logits: bool,
) -> Step:
    picked = [rows.rows[number] for number in batch]
    places = np.concatenate([row.places for row in picked])
    others = np.concatenate([row.others for row in picked])
    line = np.repeat(np.arange(len(picked)), [len(row.places) for row in picked])
    first = np.array([row.first for row in picked])[line]
    lengths = np.array([len(row.policy) for row in picked])
    device = duo.policy.device
    own, other = [a for a, _ in sites.values()], [b for _, b in sites.values()]
    ours = _run(duo.policy, [row.policy for row in picked], line, places, own, logits, device)
    theirs = _run(duo.reference, [row.reference for row in picked], line, others, other, logits, device)
    ids = [row.policy for row in picked]
    after = [ids[r][p + 1] if p + 1 < lengths[r] else -1 for r, p in zip(line.tolist(), places.tolist())]
    read = [ids[r][p] for r, p in zip(line.tolist(), places.tolist())]
    ends = np.cumsum(np.bincount(line, minlength=len(picked))) - 1
    empty = np.bincount(line, minlength=len(picked)) == 0
    groups = rows.groups[list(batch)]

    def on(values: np.ndarray | list[int]) -> Tensor:
        return torch.as_tensor(np.asarray(values), device=device)

    return Step(
        numbers=np.asarray(batch),
        row=on(line),
        position=on(places),
        offset=on(places - first),
        answer=on((places >= first - 1) & (places + 1 < lengths[line])),
        last=on(np.where(empty, -1, ends)),
        ids=on(read),
        following=on(after),
        groups=groups,
        labels=rows.labels[list(batch)],
        weights=resampling.weights(groups.tolist()),
        flips=resampling.flips(groups.tolist()),
        logits=(ours[0], theirs[0]) if ours[0] is not None and theirs[0] is not None else None,
        flat=(ours[1], theirs[1]),
        streams=dict(zip(sites, zip(ours[2], theirs[2]))),
    )


def _run(
    model: HookedModel,
    ids: list[tuple[int, ...]],
    line: np.ndarray,
    places: np.ndarray,
    sites: list[str],
    logits: bool,
    device: torch.device,
) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    """Logits, where the compared tokens stand in them, and the streams at those tokens."""
    inputs = model.batch(ids)
    wide = inputs["input_ids"].shape[1]
    index = line * wide + places
    whole = len(index) == inputs["input_ids"].numel() and bool((index == np.arange(len(index))).all())
    run = model.run(inputs, read=sites, stop=bool(sites) and not logits)
    flat = None if whole else torch.as_tensor(index, device=model.device)
    streams = [_at(run[site].flatten(0, 1), flat).to(device) for site in sites]
    flat = None if flat is None else flat.to(device)
    return (run.logits.to(device) if logits else None), flat, streams


def _at(values: Tensor, flat: Tensor | None) -> Tensor:
    return values if flat is None else values.index_select(0, flat)
