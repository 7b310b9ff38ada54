"""Which sites, heads and positions a sweep patches, checked against the model and the texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veridical.errors import InputError
from veridical.interventions.align import tokens_of
from veridical.interventions.inputs import Inputs
from veridical.sites import HEAD_KINDS, Site

if TYPE_CHECKING:
    from veridical.hooked import HookedModel

WHOLE = "all"
Positions = str | int | Sequence[Any] | Mapping[str, Any] | None


@dataclass(frozen=True)
class Spot:
    """Positions that are patched together.

    Attributes:
        label: The position (negative from the end), or the name of a span or set.
        columns: `[batch, pos]` bool, of the clean rows.
    """

    label: int | str
    columns: Tensor


def spots(inputs: Inputs, positions: Positions) -> list[Spot]:
    """The positions of a sweep, in order.

    Args:
        inputs: Clean and corrupt rows.
        positions: None or "each": every position, from the start where all rows are equally long, else from
            the end. "all": the whole of a site at once. A position, or a list of positions and of sets
            (lists of positions that are patched together): positions of the clean row's own tokens, negative
            from its end. A mapping from a name to words of the clean (or else the corrupt) text, to
            positions, or to a function from a row's token count to its positions.

    Raises:
        InputError: A position outside a text, or words that are not in it.
    """
    mask = inputs.mask
    if positions is None or (isinstance(positions, str) and positions == "each"):
        return _each(mask)
    if isinstance(positions, str) and positions == WHOLE:
        return [Spot(WHOLE, mask)]
    if isinstance(positions, str):
        raise InputError(
            f"positions is {positions!r}; expected 'each', 'all', a list of positions, or a mapping from a "
            "name to words of the text"
        )
    if isinstance(positions, Mapping):
        named = [(str(name), value) for name, value in positions.items()]
    else:
        listed = [positions] if isinstance(positions, int) else list(positions)
        named = [(value if isinstance(value, int) else _said(value), value) for value in listed]
    if not named:
        raise InputError("positions is empty; give 'each', 'all' or at least one position")
    return [Spot(label, _columns(inputs, value)) for label, value in named]


def _each(mask: Tensor) -> list[Spot]:
    lengths, width = mask.sum(1), mask.shape[1]
    longest = int(lengths.max())
    same = bool((lengths == longest).all())
    found = []
    for column in range(width - longest, width):
        only = torch.zeros_like(mask)
        only[:, column] = mask[:, column]
        found.append(Spot(column - width + (longest if same else 0), only))
    return found


def _said(value: Any) -> str:
    return str(value if isinstance(value, str) else list(value))


def _columns(inputs: Inputs, value: Any) -> Tensor:
    chosen = torch.zeros_like(inputs.mask)
    for row, real in enumerate(inputs.mask.sum(1).tolist()):
        start = inputs.width - real
        if isinstance(value, str):
            places = _words(inputs, value, row)
        else:
            value_of = value(real) if callable(value) else value
            listed = list(value_of) if isinstance(value_of, Sequence | range) else [value_of]
            places = [_position(place, real, row, inputs) for place in listed]
        for place in places:
            chosen[row, start + place] = True
    return chosen


def _position(value: Any, length: int, row: int, inputs: Inputs) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InputError(f"position {value!r}: expected a whole number, such as 3, or -1 for the last token")
    number = int(value)
    if not -length <= number < length:
        text = "".join(inputs.tokens[row]).strip()
        shown = text if len(text) <= 60 else text[:59] + "…"
        raise InputError(
            f"position {number} lies outside the text of row {row}, which has {length} tokens, 0 to "
            f"{length - 1} (or -{length} to -1): {shown!r}"
        )
    return number % length


def _words(inputs: Inputs, words: str, row: int) -> list[int]:
    if inputs.encoded is None or inputs.corrupt_encoded is None:
        raise InputError(f"positions names the words {words!r}, and tokens or images arrived; give numbers")
    clean, corrupt = inputs.encoded[row], inputs.corrupt_encoded[row]
    if words in clean.text or words not in corrupt.text:
        return tokens_of(clean, words, "clean", row)
    start = inputs.width - len(corrupt.ids)
    theirs = {start + place for place in tokens_of(corrupt, words, "corrupt", row)}
    first = inputs.width - len(clean.ids)
    found = [at - first for at, there in enumerate(inputs.matched[row].tolist()) if there in theirs]
    if not found:
        raise InputError(f"row {row}: {words!r} of the corrupt text is matched with no clean token")
    return found


def heads_of(model: HookedModel, site: Site, heads: Any) -> list[int | None]:
    """The heads of a site that are patched one by one; [None] for the whole site.

    Raises:
        InputError: A head that the site does not have.
    """
    if heads is None or site.kind not in (*HEAD_KINDS, "pattern"):
        return [None]
    count = model.n_heads if site.kind == "pattern" else model.width(site)[0]
    if isinstance(heads, str):
        if heads != "all":
            raise InputError(f"heads is {heads!r}; expected 'all' or a list of heads")
        return list(range(count))
    listed = [heads] if isinstance(heads, int) else list(heads)
    if not listed:
        raise InputError("heads is empty; give 'all', or at least one head")
    return [_head(model, site, head, count) for head in listed]


def _head(model: HookedModel, site: Site, head: Any, count: int) -> int:
    if isinstance(head, bool) or not hasattr(head, "__index__"):
        raise InputError(f"head {head!r}: expected a whole number")
    number = int(head)
    if -count <= number < count:
        return number % count
    if site.kind in ("k", "v") and count < model.n_heads:
        share = model.n_heads // count
        groups = ", ".join(
            f"{g} for heads {g * share} to {(g + 1) * share - 1}" for g in range(min(count, 4))
        )
        more = ", ..." if count > 4 else ""
        raise InputError(
            f"head {number} does not exist at {site.short}: keys and values are shared by groups of {share} "
            f"query heads, and it has {count} (group {groups}{more})"
        )
    raise InputError(f"head {number} does not exist at {site.short}; it has heads 0 to {count - 1}")
