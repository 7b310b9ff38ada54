"""Which position of one text belongs to which of the other, when their token counts differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from veridical.errors import InputError
from veridical.tokens import Encoded

Span = str | tuple[int, int]
"""A piece of a text: its own words, which must occur once, or its first character and the one behind it."""


def by_token(clean: Sequence[int], corrupt: Sequence[int]) -> list[tuple[int, int]]:
    """Positions that hold the same token: the longest common start and end, and what lies between by
    difflib's matching blocks, which stay in order. `(clean position, corrupt position)` each."""
    clean, corrupt = list(clean), list(corrupt)
    shortest = min(len(clean), len(corrupt))
    start = next((i for i in range(shortest) if clean[i] != corrupt[i]), shortest)
    left = shortest - start
    end = next((i for i in range(left) if clean[-1 - i] != corrupt[-1 - i]), left)
    pairs = [(i, i) for i in range(start)]
    middle = SequenceMatcher(
        None, clean[start : len(clean) - end], corrupt[start : len(corrupt) - end], autojunk=False
    )
    for block in middle.get_matching_blocks():
        pairs += [(start + block.a + i, start + block.b + i) for i in range(block.size)]
    return pairs + [(len(clean) - i, len(corrupt) - i) for i in range(end, 0, -1)]


def by_span(
    clean: Encoded, corrupt: Encoded, spans: Sequence[tuple[Span, Span]], row: int
) -> list[tuple[int, int]]:
    """Positions of the tokens of each clean span and its corrupt span, matched from their last tokens.

    Of the longer of two spans the first tokens stay unmatched.

    Raises:
        InputError: A span that is not in its text, holds no token, or a tokenizer that gives no offsets.
    """
    pairs: dict[int, int] = {}
    for ours, theirs in spans:
        a = tokens_of(clean, ours, "clean", row)
        b = tokens_of(corrupt, theirs, "corrupt", row)
        for i, j in zip(reversed(a), reversed(b)):
            if pairs.get(i, j) != j or (i not in pairs and j in pairs.values()):
                raise InputError(
                    f"row {row}: the spans of align overlap at clean token {i}, corrupt token {j}"
                )
            pairs[i] = j
    return sorted(pairs.items())


def as_spans(align: Any, rows: int) -> list[list[tuple[Span, Span]]]:
    """The spans of each row from what the user gave: one mapping or list of pairs for all rows, or one
    for each row.

    Raises:
        InputError: None of these.
    """
    if align == "span":
        raise InputError(
            'align="span" needs the spans: give align={"words in clean": "words in corrupt"}, or a list of '
            "((first, behind), (first, behind)) in characters; one for all rows or a list with one for each"
        )
    per_row = isinstance(align, Sequence) and bool(align) and all(_is_spans(item) for item in align)
    given = list(align) if per_row else [align] * rows
    if len(given) != rows:
        raise InputError(f"align has spans for {len(given)} rows; there are {rows}")
    if not all(_is_spans(item) for item in given):
        raise InputError(
            f"align is {align!r}; expected 'token', or spans such as {{'words in clean': 'words in corrupt'}}"
        )
    return [list(item.items()) if isinstance(item, Mapping) else [tuple(p) for p in item] for item in given]


def _is_spans(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and all(_is_span(a) and _is_span(b) for a, b in value.items())
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and bool(value)
        and all(
            isinstance(p, Sequence) and not isinstance(p, str) and len(p) == 2 and all(map(_is_span, p))
            for p in value
        )
    )


def _is_span(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value)
    return isinstance(value, Sequence) and len(value) == 2 and all(type(number) is int for number in value)


def tokens_of(encoded: Encoded, span: Span, side: str, row: int) -> list[int]:
    """Positions of the tokens that a span of a text touches.

    Raises:
        InputError: A span that is not in the text or holds no token, or a tokenizer that gives no offsets.
    """
    if encoded.offsets is None:
        raise InputError(f"row {row}: this tokenizer does not tell where tokens begin; align by token")
    if isinstance(span, str):
        count = encoded.text.count(span)
        if count != 1:
            raise InputError(
                f"row {row}: {span!r} occurs {count} times in the {side} text; give its characters instead"
            )
        first = encoded.text.index(span)
        span = first, first + len(span)
    start, end = span
    if not 0 <= start < end <= len(encoded.text):
        raise InputError(
            f"row {row}: span {(start, end)} lies outside the {side} text, of {len(encoded.text)} characters"
        )
    found = [i for i, (a, b) in enumerate(encoded.offsets) if a < end and b > start]
    if not found:
        raise InputError(f"row {row}: span {(start, end)} of the {side} text holds no token")
    return found
