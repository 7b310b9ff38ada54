"""A row's score so far, as its tokens come in: what a monitor shows while a model still writes."""

from __future__ import annotations

from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

Aggregate = Literal["max", "last"]


class Running(Protocol):
    """The scores of some rows as running aggregates, on the device of the model."""

    def update(self, scores: Tensor, real: Tensor) -> Tensor:
        """Takes in further tokens.

        Args:
            scores: `[rows, tokens, k]` float32, k linear readings of each token (1 for a plain probe).
            real: `[rows, tokens]` bool; tokens that are not real must change nothing.

        Returns:
            `[rows, tokens]`: the row's score after each of these tokens; -inf before the first real one.
        """
        ...


@runtime_checkable
class Aggregating(Protocol):
    """A probe over whole sequences that a monitor can run: k linear readings per token, and how they join.

    Attributes:
        readings_: Weights `[k, d]` and biases `[k]`, float64 arrays.
    """

    readings_: tuple[Any, Any]

    def running(self) -> Running:
        """A fresh state, before the first token."""
        ...


class Highest:
    """The highest token so far."""

    def __init__(self) -> None:
        self.so_far: Tensor | None = None

    def update(self, scores: Tensor, real: Tensor) -> Tensor:
        found = scores[..., 0].masked_fill(~real, -torch.inf).cummax(1).values
        if self.so_far is not None:
            found = torch.maximum(found, self.so_far)
        self.so_far = found[:, -1:]
        return found


class Latest:
    """The last token so far."""

    def __init__(self) -> None:
        self.so_far: Tensor | None = None

    def update(self, scores: Tensor, real: Tensor) -> Tensor:
        before = scores.new_full((len(scores), 1), -torch.inf) if self.so_far is None else self.so_far
        tokens = torch.arange(1, scores.shape[1] + 1, device=scores.device)
        last = torch.where(real, tokens, 0).cummax(1).values
        found = torch.cat([before, scores[..., 0]], 1).gather(1, last)
        self.so_far = found[:, -1:]
        return found


RUNNING: dict[str, type[Highest] | type[Latest]] = {"max": Highest, "last": Latest}
"""How plain probes, which score single tokens, give a score for the row."""
