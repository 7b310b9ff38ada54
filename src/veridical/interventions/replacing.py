"""What an ablation puts in place of a value: nothing, a mean, another token's value, or a projection of it.

Each is made once per site and called with the chosen part of a pass's value `[rows, tokens, ...]` and the
pass's `Spot` (None where every token is meant and positions do not matter); it returns what broadcasts to
that part. Constants are moved to the value's device and number format once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from veridical.errors import InputError
from veridical.interventions.spots import Spot


class Replace(Protocol):
    """Gives what comes in place of a part of a site's value."""

    needs_spot: bool
    """Whether it must know where in the texts the tokens stand."""

    def __call__(self, part: Tensor, spot: Spot | None) -> Tensor: ...


class Held:
    """A constant, kept in every device and number format that it was asked for in."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self._made: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def like(self, other: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        key = (other.device, dtype or other.dtype)
        if key not in self._made:
            self._made[key] = self.value.to(device=key[0], dtype=key[1])
        return self._made[key]


class Constant:
    """One value for every token: zero, or a mean."""

    needs_spot = False

    def __init__(self, value: Tensor) -> None:
        self.held = Held(value)

    def __call__(self, part: Tensor, spot: Spot | None) -> Tensor:
        return self.held.like(part)


class ByPosition:
    """A value for each position, `[positions, ...]`."""

    needs_spot = True

    def __init__(self, values: Tensor, where: str) -> None:
        self.held, self.where = Held(values), where

    def __call__(self, part: Tensor, spot: Spot | None) -> Tensor:
        assert spot is not None
        table = self.held.like(part)
        index = spot.index.to(part.device)
        if spot.furthest >= len(table):
            wanted = index if spot.chosen is None else index.masked_fill(~spot.chosen.to(part.device), -1)
            if int(wanted.max()) >= len(table):
                raise InputError(
                    f"position {int(wanted.max())} at {self.where}: means were taken at positions 0 to "
                    f"{len(table) - 1} only; take them over longer texts, or use by_position=False"
                )
        return table[index.clamp(0, len(table) - 1)]


class BatchMean:
    """The mean over the real tokens of the present batch; later tokens of a generation get the prompt's."""

    needs_spot = True

    def __init__(self, by_position: bool, where: str) -> None:
        self.by_position, self.where = by_position, where
        self._mean: Tensor | ByPosition | None = None

    def __call__(self, part: Tensor, spot: Spot | None) -> Tensor:
        assert spot is not None
        if spot.of.first or self._mean is None:
            from veridical.interventions.means import sum_at

            real = spot.real.to(part.device)
            sums, counts = sum_at(part[real], spot.index.to(part.device)[real], self.by_position)
            # A text has every position up to its end, so that no count between is zero.
            mean = sums / counts.clamp(min=1).reshape(-1, *[1] * (sums.dim() - 1))
            self._mean = ByPosition(mean, self.where) if self.by_position else mean[0]
        if isinstance(self._mean, ByPosition):
            return self._mean(part, spot)
        return self._mean.to(part)


class Drawn:
    """Values of other tokens: those that a `Draw` picks, the same ones at every site of an ablation."""

    needs_spot = True

    def __init__(self, take: Callable[[Tensor, Spot], Tensor]) -> None:
        self.take = take

    def __call__(self, part: Tensor, spot: Spot | None) -> Tensor:
        assert spot is not None
        return self.take(part, spot)


class OfPatterns:
    """Another replacement by position, for attention patterns `[rows, heads, queries, keys]`.

    A pattern goes by query and key, so that one text's means something in another only where both have the
    same tokens before and behind: at one length, whole.
    """

    needs_spot = True

    def __init__(self, inner: Replace, where: str) -> None:
        self.inner, self.where = inner, where

    def __call__(self, part: Tensor, spot: Spot | None) -> Tensor:
        assert spot is not None
        queries, keys = part.shape[-2:]
        if queries != keys or not bool(spot.real.all()):
            raise InputError(
                f"{self.where}: patterns of other texts go in by query and key, so all texts must have one "
                "length and be read whole, in a pass without a cache (generate with use_cache=False)"
            )
        new = self.inner(part.transpose(1, 2), spot)
        if new.shape[-1] != keys:
            raise InputError(
                f"the mean pattern at {self.where} is of texts of {new.shape[-1]} tokens; these have {keys}"
            )
        return new.transpose(1, 2)


class Projected:
    """`x - (x @ right.T) @ left.T + offset`: directions taken out, in float32 or better.

    Args:
        left: `[d, k]`.
        right: `[k, d]`.
        centre: `[..., d]`, the point that stays where it is; zero where nothing of the directions is kept.
        flat: The value's last axes are taken as one of width d (a probe over all heads together).
    """

    needs_spot = False

    def __init__(self, left: np.ndarray, right: np.ndarray, centre: Tensor, flat: bool) -> None:
        self.flat = flat
        self.left, self.right = Held(torch.as_tensor(left)), Held(torch.as_tensor(right))
        kept = centre.double() @ self.right.value.double().T @ self.left.value.double().T
        self.offset = Held(kept) if bool(kept.any()) else None

    def __call__(self, part: Tensor, spot: Spot | None) -> Tensor:
        exact = torch.float64 if part.dtype == torch.float64 else torch.float32
        x = part.to(exact)
        x = x.flatten(2) if self.flat else x
        new = x - (x @ self.right.like(x, exact).T) @ self.left.like(x, exact).T
        if self.offset is not None:
            new = new + self.offset.like(x, exact)
        return new.reshape(part.shape).to(part.dtype)


def as_map(directions: Any, width: int, head: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """Directions, a probe or an eraser as left, right, centre, and whether they lie over all heads together.

    Args:
        directions: `[d]` or `[k, d]`, a fitted probe, or an `Eraser`.
        width: Numbers at the site.
        head: Numbers along its last axis: of one head, or `width`.

    Raises:
        InputError: Another width than the site or one of its heads has.
        DataError: Directions that are zero, not finite, or linearly dependent.
    """
    from veridical.probes.base import LinearProbe
    from veridical.probes.erasure import Eraser, ProjectionEraser

    if isinstance(directions, LinearProbe):
        directions = directions.direction_
    eraser = directions if isinstance(directions, Eraser) else ProjectionEraser(directions)
    found = len(eraser.centre_)
    if found not in (width, head):
        beside = f" (or {head}, of one head)" if head != width else ""
        raise InputError(f"the directions have width {found}; the site has {width}{beside}")
    return eraser.left_, eraser.right_, eraser.centre_, found != head
