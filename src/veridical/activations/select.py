"""Which tokens of a prompt are read.

A selection is decided from the encodings alone, before any forward pass: the size of a store is then known
up front, padding cannot enter, and the index can say which tokens were read. Positions count the real
tokens of a row, from 0, without padding; special tokens (a beginning-of-sequence token, the tokens of a
chat template) are real tokens, so `all` and `mean` include them and `last` may be one: `Activations.index`
shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from veridical.errors import DataError, InputError, unknown

if TYPE_CHECKING:
    from veridical.tokens import Encoded

Tokens = str | int | Callable[["Encoded"], int | Sequence[int]]
MEANING = {
    "last": "the last real token",
    "prompt_last": "the last token before the completion",
    "answer": "all tokens of the completion",
    "all": "all real tokens",
    "mean": "one vector a row: the mean over all real tokens",
    "span": "the tokens that overlap the characters span_start to span_end",
}


@dataclass(frozen=True)
class Row:
    """What a selection may look at besides the encoding: the row's number, prompt, and its columns."""

    number: int
    prompt: Any
    has_completion: bool
    span: tuple[Any, Any] | None


@dataclass(frozen=True)
class Selection:
    """A named choice of tokens; `pooled` means that the tokens of a row are averaged into one vector."""

    name: str
    pick: Callable[[Encoded, Row], Sequence[int]]
    pooled: bool = False

    def positions(self, encoded: Encoded, row: Row) -> np.ndarray:
        """Positions in `encoded.ids` to read, int32, in the order in which they are stored.

        Raises:
            DataError: Nothing is selected, or a position outside the row; names the row.
        """
        picked = np.atleast_1d(np.asarray(self.pick(encoded, row)))
        if picked.size == 0:
            raise DataError(
                f"row {row.number}: tokens={self.name!r} selects none of its {len(encoded.ids)} tokens"
            )
        if picked.ndim != 1 or picked.dtype.kind not in "iu":
            raise DataError(
                f"row {row.number}: tokens={self.name!r} gave {picked.dtype} values; expected positions"
            )
        length = len(encoded.ids)
        wrong = picked[(picked < -length) | (picked >= length)]
        if wrong.size:
            raise DataError(
                f"row {row.number}: tokens={self.name!r} asks for position {wrong[0]}, but it has {length} "
                "tokens"
            )
        return np.where(picked < 0, picked + length, picked).astype(np.int32)


def selection(tokens: Tokens) -> Selection:
    """The selection for a name, an index (negative from the end), or a function from `Encoded` to positions.

    Raises:
        UnknownNameError: A name that does not exist; gives the nearest.
    """
    if callable(tokens):
        return _from_function(tokens)
    if isinstance(tokens, str) and tokens in _BY_NAME:
        return _BY_NAME[tokens]
    if isinstance(tokens, bool) or not isinstance(tokens, str | int):
        raise InputError(f"tokens={tokens!r}: expected a name, an index, or a function of an Encoded")
    try:
        index = int(tokens)
    except ValueError:
        raise unknown(
            "token selection", tokens, MEANING, "An index such as -1, or a function, is taken too"
        ) from None
    return Selection(str(index), lambda encoded, row: (index,))


def _from_function(function: Callable[[Encoded], int | Sequence[int]]) -> Selection:
    name = getattr(function, "__qualname__", type(function).__name__)

    def pick(encoded: Encoded, row: Row) -> Sequence[int]:
        picked = function(encoded)
        return np.atleast_1d(np.asarray(picked)) if np.size(picked) else ()  # type: ignore[return-value]

    return Selection(f"function {name}", pick)


def _last(encoded: Encoded, row: Row) -> Sequence[int]:
    return (len(encoded.ids) - 1,) if encoded.ids else ()


def _prompt_last(encoded: Encoded, row: Row) -> Sequence[int]:
    if encoded.prompt_tokens == 0:
        raise DataError(f"row {row.number}: tokens='prompt_last' needs a prompt, and it has none")
    return (encoded.prompt_tokens - 1,)


def _answer(encoded: Encoded, row: Row) -> Sequence[int]:
    if not row.has_completion:
        raise DataError(f"row {row.number}: tokens='answer' needs a completion, and it has none")
    return range(encoded.prompt_tokens, len(encoded.ids))


def _all(encoded: Encoded, row: Row) -> Sequence[int]:
    return range(len(encoded.ids))


def _span(encoded: Encoded, row: Row) -> Sequence[int]:
    start, end = row.span or (None, None)
    if start is None or end is None or start != start or end != end:
        raise DataError(f"row {row.number}: tokens='span' needs the columns span_start and span_end")
    if encoded.offsets is None:
        raise DataError("tokens='span' needs a fast tokenizer, which knows the characters of each token")
    base = _span_base(encoded, row)
    start, end = base + int(start), base + int(end)
    return [
        position
        for position, (first, last) in enumerate(encoded.offsets)
        if first < end and last > start and last > first
    ]


def _span_base(encoded: Encoded, row: Row) -> int:
    """Where the characters that a span counts begin: the completion, else the text, else the last message."""
    if row.has_completion:
        return encoded.prompt_chars
    if isinstance(row.prompt, str) or row.prompt is None or not len(row.prompt):
        return max(encoded.text.find(row.prompt), 0) if row.prompt else 0
    content = row.prompt[-1]["content"]
    found = encoded.text.rfind(content)
    if found < 0:
        raise DataError(
            f"row {row.number}: its last message is not in the text that the chat template made of it"
        )
    return found


_BY_NAME = {
    "last": Selection("last", _last),
    "prompt_last": Selection("prompt_last", _prompt_last),
    "answer": Selection("answer", _answer),
    "all": Selection("all", _all),
    "mean": Selection("mean", _all, pooled=True),
    "span": Selection("span", _span),
}
