"""The rows that both models read, in tokens, and which of their tokens go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from veridical.errors import DataError, InputError

if TYPE_CHECKING:
    from veridical.comparison.duo import Duo
    from veridical.tokens import Encoded

FIXED, SAMPLED = "fixed text", "policy samples"
"""What the rows are. The two are never mixed: a KL on the one says nothing about the other."""


@dataclass(frozen=True)
class Row:
    """One text.

    Attributes:
        policy: Token ids as the policy reads them.
        reference: As the reference reads them; the same tuple where tokens are shared.
        first: Index of the completion's first token among the policy's; `len(policy)` without one.
        places: Positions that are compared, in the policy's tokens.
        others: The positions in the reference's tokens that go with them.
    """

    policy: tuple[int, ...]
    reference: tuple[int, ...]
    first: int
    places: np.ndarray
    others: np.ndarray


@dataclass(frozen=True)
class Rows:
    """Texts in order.

    Attributes:
        source: `FIXED` or `SAMPLED`.
        rows: One for each text.
        groups: `[rows]` int64, code of the pair that each text belongs to.
        labels: `[rows]` int64, 0 or 1, or -1 where there is none.
        name: Name of the data.
        fingerprint: Digest of the data; "" where it has none.
        encoded: Each text as the policy's tokenizer read it; empty for rows that came as token ids.
    """

    source: str
    rows: list[Row]
    groups: np.ndarray
    labels: np.ndarray
    name: str
    fingerprint: str = ""
    encoded: Sequence[Encoded] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def completed(self) -> bool:
        """Whether any row has a completion."""
        return any(row.first < len(row.policy) for row in self.rows)

    @property
    def tokens(self) -> int:
        """Tokens that are compared, over all rows."""
        return sum(len(row.places) for row in self.rows)


def rows_of(duo: Duo, data: Any, label: str = "label", **options: Any) -> Rows:
    """Rows of fixed text.

    Args:
        duo: Who reads them.
        data: `Pairs` (prompt and completion, pair, label), a list of texts or chats, or token ids
            `[rows, pos]`.
        label: Column of `Pairs` with two classes, for the directions.
        **options: `max_length` and `on_long` of `HookedModel.encode`.

    Raises:
        DataError: Rows that cannot be tokenised, or no rows.
        InputError: Token ids for models that do not share their tokens.
    """
    if isinstance(data, torch.Tensor | np.ndarray) or are_ids(data):
        ids = [tuple(int(number) for number in row) for row in data]
        if not duo.same_tokens:
            raise InputError("token ids arrived, and the two models do not share their tokens; give texts")
        highest = max((max(row) for row in ids if row), default=-1)
        if not ids or not all(ids) or highest >= duo.vocabulary or min(map(min, ids)) < 0:
            raise InputError(f"token ids go from 0 to {duo.vocabulary - 1}, in rows of one or more")
        made = [_shared(row, len(row)) for row in ids]
        nothing = np.full(len(made), -1, dtype=np.int64)
        return Rows(FIXED, made, np.arange(len(made)), nothing, "tokens")
    pairs = hasattr(data, "prompts") and hasattr(data, "groups")
    prompts = list(data.prompts) if pairs else _listed(data)
    completions = data.completions if pairs else None
    ours, theirs = duo.encode(prompts, completions, **options)
    made = [_matched(duo, a, b, at) for at, (a, b) in enumerate(zip(ours, theirs))]
    groups = np.unique(data.groups, return_inverse=True)[1] if pairs else np.arange(len(made))
    labels = _labels(data, label) if pairs and label in data else np.full(len(made), -1, dtype=np.int64)
    name, digest = (data.name, data.fingerprint) if pairs else ("texts", "")
    return Rows(FIXED, made, groups.reshape(-1).astype(np.int64), labels, name, digest, ours)


def sampled_rows(prompts: Sequence[Sequence[int]], new: Sequence[Sequence[int]], groups: np.ndarray) -> Rows:
    """Rows of prompts and what a model went on with, in tokens that both models share."""
    made = [_shared((*before, *after), len(before)) for before, after in zip(prompts, new)]
    return Rows(SAMPLED, made, groups, np.full(len(made), -1, dtype=np.int64), "policy samples")


def _shared(ids: tuple[int, ...], first: int) -> Row:
    places = np.arange(len(ids))
    return Row(ids, ids, first, places, places)


def _matched(duo: Duo, ours: Encoded, theirs: Encoded, number: int) -> Row:
    if duo.same_tokens:
        return _shared(ours.ids, ours.prompt_tokens)
    if ours.offsets is None or theirs.offsets is None:
        raise DataError("models of different tokens are aligned by characters, which needs fast tokenizers")
    if ours.text != theirs.text:
        raise DataError(
            f"row {number}: the two chat templates give different texts, and the models do not share their "
            "tokens, so nothing can be aligned; give prompts as text"
        )
    ends = {end: at for at, (start, end) in enumerate(theirs.offsets) if end > start}
    both = [(at, ends[end]) for at, (start, end) in enumerate(ours.offsets) if end > start and end in ends]
    places, others = np.array(both, dtype=np.int64).reshape(-1, 2).T
    return Row(ours.ids, theirs.ids, ours.prompt_tokens, places, others)


def are_ids(data: Any) -> bool:
    """Whether these are rows of token ids."""
    return (
        isinstance(data, list | tuple)
        and bool(data)
        and isinstance(data[0], list | tuple)
        and all(isinstance(number, int) for number in data[0])
    )


def _listed(data: Any) -> list[Any]:
    from veridical.scoring import as_list

    if not isinstance(data, str | list | tuple):
        raise InputError(
            f"cannot compare on a {type(data).__name__}; expected Pairs, texts, chats or token ids"
        )
    listed = as_list(data)
    if not listed:
        raise DataError("there are no texts to compare on")
    return listed


def _labels(pairs: Any, label: str) -> np.ndarray:
    """A label of two classes as 0 and 1; -1 in rows without it."""
    values = pairs[label].tolist()
    found = sorted({int(value) for value in values if value is not None and value == value})
    if len(found) != 2:
        return np.full(len(values), -1, dtype=np.int64)
    codes = {found[0]: 0, found[1]: 1}
    return np.array([-1 if v is None or v != v else codes[int(v)] for v in values], dtype=np.int64)
