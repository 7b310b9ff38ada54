"""A row's score so far, as its tokens come in: what a monitor shows while a model still writes."""

from __future__ import annotations

from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

Aggregate = Literal["max", "last"]


class Running(Protocol):
    """The scores of some rows as running aggregates, on the device of the model."""

    def update(self, readings: Tensor, real: Tensor) -> Tensor:
        """Takes in further tokens.

        Args:
            readings: `[rows, tokens, k]` float32, k linear readings of each token (1 for a plain probe).
            real: `[rows, tokens]` bool; tokens that are not real change nothing.

        Returns:
            `[rows, tokens]`: the row's score after each of these tokens; -inf before the first real one.
        """
        ...

    def alone(self, readings: Tensor) -> Tensor:
        """The score `[n]` of each token by itself, from readings `[n, k]`."""
        ...


class State(Protocol):
    """How a probe over sequences takes in sequences of equal length, one token after the other."""

    def update(self, readings: Tensor) -> Tensor:
        """The scores `[rows]` after one more token of each, from its readings `[rows, k]`."""
        ...


@runtime_checkable
class Aggregating(Protocol):
    """A probe over whole sequences: k linear readings per token, and how they join."""

    def readers(self) -> tuple[Any, Any]:
        """Coefficients `[k, d]` and intercepts `[k]` of what is read from each token."""
        ...

    def running(self) -> State:
        """A fresh state, before the first token."""
        ...


class Highest:
    """The highest token so far."""

    def __init__(self) -> None:
        self.so_far: Tensor | None = None

    def update(self, readings: Tensor, real: Tensor) -> Tensor:
        found = readings[..., 0].masked_fill(~real, -torch.inf).cummax(1).values
        if self.so_far is not None:
            found = torch.maximum(found, self.so_far)
        self.so_far = found[:, -1:]
        return found

    def alone(self, readings: Tensor) -> Tensor:
        return readings[:, 0]


class Latest:
    """The last token so far."""

    def __init__(self) -> None:
        self.so_far: Tensor | None = None

    def update(self, readings: Tensor, real: Tensor) -> Tensor:
        empty = readings.new_full((len(readings), 1), -torch.inf)
        before = empty if self.so_far is None else self.so_far
        tokens = torch.arange(1, readings.shape[1] + 1, device=readings.device)
        last = torch.where(real, tokens, 0).cummax(1).values
        found = torch.cat([before, readings[..., 0]], 1).gather(1, last)
        self.so_far = found[:, -1:]
        return found

    def alone(self, readings: Tensor) -> Tensor:
        return readings[:, 0]


class RowByRow:
    """The state of a probe over sequences, one for each row, since rows differ in their padding and end."""

    def __init__(self, probe: Aggregating) -> None:
        self.probe = probe
        self.states: list[State] = []
        self.so_far: list[Tensor] = []

    def update(self, readings: Tensor, real: Tensor) -> Tensor:
        device, (readings, real) = readings.device, (readings.cpu(), real.cpu())
        if not self.states:
            self.states = [self.probe.running() for _ in range(len(readings))]
            self.so_far = [torch.tensor(-torch.inf)] * len(readings)
        found = torch.empty(real.shape)
        for row, state in enumerate(self.states):
            for token in range(real.shape[1]):
                if real[row, token]:
                    self.so_far[row] = state.update(readings[row, token][None])[0]
                found[row, token] = self.so_far[row]
        return found.to(device)

    def alone(self, readings: Tensor) -> Tensor:
        return self.probe.running().update(readings)


RUNNING: dict[str, type[Highest] | type[Latest]] = {"max": Highest, "last": Latest}
"""How plain probes, which score single tokens, give a score for the row."""
