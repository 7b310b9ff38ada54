"""Which tokens of a pass an intervention acts on.

Positions count the real tokens of each text from 0, the prefix that a key/value cache holds included and
padding left out, on either side of it. Negative positions count from the last real token of the text that a
call was given: in a generation, of the prompt, so that position -1 stays where it was while text is added
behind it. Without a cache every pass reads the whole text anew and is a call of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veridical.errors import InputError, ModelError

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.probes.passes import Pass, Passes

Position = int | slice


@dataclass(frozen=True, eq=False)
class Spot:
    """The tokens of one pass.

    Attributes:
        of: The pass.
        index: `[rows, tokens]`, position of each token in its text; -1 where it is padding.
        chosen: `[rows, tokens]` bool, what to act on; None for every token.
        furthest: A position that no token of the pass lies beyond; an upper bound where there is padding.
    """

    of: Pass
    index: Tensor
    chosen: Tensor | None
    furthest: int

    @property
    def real(self) -> Tensor:
        """`[rows, tokens]` bool: which tokens are no padding."""
        return self.index >= 0


class Spots:
    """Finds the chosen tokens of each pass, once for all sites.

    Attributes:
        told: Whether anything but every token was asked for.
        longest: Tokens of the longest text so far (an upper bound where there is padding).
    """

    def __init__(
        self, passes: Passes, positions: tuple[Position, ...] | None, tokens: tuple[int, ...] | None
    ) -> None:
        self.passes, self.positions, self.tokens = passes, positions, tokens
        self.told = positions is not None or tokens is not None
        self._spot: Spot | None = None
        self._lengths: Tensor | None = None  # of each text as its call was given it
        self.longest = 0
        self._pending: set[int] = set()
        self._some: Tensor | None = None

    def look(self, rows: int, tokens: int) -> Spot:
        """The tokens of the running pass, whose values have these many rows and tokens."""
        now = self.passes.require()
        if self._spot is None or self._spot.of is not now:
            self._spot = self._found(now, rows, tokens)
        return self._spot

    @property
    def some(self) -> bool:
        """Whether any pass so far held a chosen token."""
        return self._some is not None and bool(self._some)

    def unreached(self) -> list[int]:
        """Positions that were asked for and that no text was long enough for."""
        return sorted(position for position in self._pending if position >= self.longest)

    def _found(self, now: Pass, rows: int, tokens: int) -> Spot:
        index, furthest = _index(now, rows, tokens)
        if now.first or self._lengths is None:
            self._lengths = index.max(1).values + 1
            if self.positions is not None:
                self._check(self._lengths.tolist(), now.cached)
                furthest = int(self._lengths.max()) - 1
        self.longest = max(self.longest, furthest + 1)
        chosen = self._chosen(now, index) if self.told else None
        if chosen is not None:
            self._some = chosen.any() if self._some is None else self._some | chosen.any()
        return Spot(now, index, chosen, furthest)

    def _chosen(self, now: Pass, index: Tensor) -> Tensor:
        chosen = index >= 0
        if self.positions is not None and self._lengths is not None:
            lengths = self._lengths.to(index.device)[:, None]
            hits = [_hit(position, index, lengths) for position in self.positions]
            chosen = chosen & torch.stack(hits).any(0)
        if self.tokens is not None:
            if now.ids is None or now.ids.shape != index.shape:
                raise ModelError("tokens= needs a pass that is given token ids; this one was given none")
            wanted = torch.tensor(self.tokens, device=index.device)
            chosen = chosen & torch.isin(now.ids.to(index.device), wanted)
        return chosen

    def _check(self, lengths: Sequence[int], cached: bool) -> None:
        """Refuses a position outside a text; one past its end may still come where a cache is filled."""
        for position in self.positions or ():
            if isinstance(position, slice):
                continue
            for row, length in enumerate(lengths):
                if -length <= position < length:
                    continue
                if position >= 0 and cached:
                    self._pending.add(position)
                    continue
                raise InputError(
                    f"position {position} is outside the text of row {row}, which has {length} tokens "
                    f"(0 to {length - 1}, or -1 to -{length} from its end)"
                )


def as_positions(given: Any) -> tuple[Position, ...] | None:
    """Positions as they may be given: an integer, a slice, or several of these; None for all.

    Raises:
        InputError: Anything else.
    """
    if given is None:
        return None
    listed = [given] if isinstance(given, slice | int) or not isinstance(given, Iterable) else list(given)
    found: list[Position] = []
    for one in listed:
        if isinstance(one, slice):
            ends = (one.start, one.stop, one.step)
            if not all(end is None or isinstance(end, int) for end in ends) or (one.step or 1) < 1:
                raise InputError(f"positions holds {one}; expected a slice of integers with a positive step")
            found.append(one)
        elif isinstance(one, bool) or not hasattr(one, "__index__"):
            raise InputError(
                f"positions holds {one!r}; expected integers or slices, such as 3, [0, -1] or slice(2, None)"
            )
        else:
            found.append(int(one))
    if not found:
        raise InputError("positions is empty; leave it out for every position")
    return tuple(found)


def as_tokens(model: HookedModel, given: Any) -> tuple[int, ...] | None:
    """Token ids as they may be given: ids, texts of one token each, or several of these; None for all.

    Raises:
        InputError: A text that is several tokens, an id outside the vocabulary, or no tokenizer for a text.
    """
    if given is None:
        return None
    listed = [given] if isinstance(given, str | int) else list(given)
    if not listed:
        raise InputError("tokens is empty; leave it out for every token")
    return tuple(_token(model, one) for one in listed)


def _token(model: HookedModel, given: Any) -> int:
    if isinstance(given, str):
        if model.tokenizer is None:
            raise InputError(f"tokens holds {given!r}, and {model.path} has no tokenizer; give token ids")
        ids = model.tokenizer(given, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            parts = [model.tokenizer.decode([number]) for number in ids]
            raise InputError(
                f"tokens holds {given!r}, which is {len(ids)} tokens ({parts}); give texts of one token each "
                "(a word within a text often begins with its space), or ids"
            )
        return int(ids[0])
    vocabulary = model.architecture.vocabulary
    if isinstance(given, bool) or not hasattr(given, "__index__") or int(given) < 0:
        raise InputError(f"tokens holds {given!r}; expected token ids or texts")
    if vocabulary and int(given) >= vocabulary:
        raise InputError(f"tokens holds {int(given)}; {model.path} has token ids 0 to {vocabulary - 1}")
    return int(given)


def _index(now: Pass, rows: int, tokens: int) -> tuple[Tensor, int]:
    """Position of each token of a pass in its text, -1 for padding, and an upper bound of them."""
    real = now.real
    device = real.device if real is not None else (now.ids.device if now.ids is not None else "cpu")
    if real is None or real.shape[1] != now.past + tokens:  # an image: its patches are no tokens of the input
        index = torch.arange(now.past, now.past + tokens, device=device).expand(rows, tokens)
        return index, now.past + tokens - 1
    counted = real.cumsum(1) - 1
    return counted.masked_fill(~real, -1)[:, now.past :], now.past + tokens - 1


def _hit(position: Position, index: Tensor, lengths: Tensor) -> Tensor:
    if not isinstance(position, slice):
        return index == (position if position >= 0 else lengths + position)
    start = _end(position.start, lengths) if position.start is not None else torch.zeros_like(lengths)
    hit = index >= start
    if position.stop is not None:
        hit = hit & (index < _end(position.stop, lengths))
    step = position.step or 1
    return hit if step == 1 else hit & ((index - start) % step == 0)


def _end(end: int, lengths: Tensor) -> Tensor:
    return torch.full_like(lengths, end) if end >= 0 else (lengths + end).clamp(min=0)
