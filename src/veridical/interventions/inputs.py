"""Clean and corrupt inputs, row by row, in batches of one common width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from veridical import scoring
from veridical.errors import DataError, InputError
from veridical.interventions import align as aligning
from veridical.tokens import Encoded, Prompt

if TYPE_CHECKING:
    from veridical.hooked import HookedModel


@dataclass(frozen=True)
class Inputs:
    """Rows of a clean and a corrupt run; row i of the one belongs to row i of the other.

    Attributes:
        clean: Keyword arguments of the model's forward, padded on the left to one width for both.
        corrupt: The same for the corrupt run.
        mask: `[batch, pos]` bool, real positions of the clean run.
        corrupt_mask: Of the corrupt run; the same unless the texts were aligned.
        tokens: Text of each position of each clean row, "" where it is padding.
        corrupt_tokens: Of each corrupt row.
        matched: `[batch, pos]` int64: for each position of the clean run the position in the corrupt run
            that goes with it; -1 for none.
        prompts: Texts or chats of the clean rows; None for tokens and images.
        encoded: Their tokens with text and offsets; None for tokens and images.
        answers, wrong: Completions of clean and corrupt rows, where they came with the data.
        groups: `[batch]`, pair of each row, for intervals.
    """

    clean: dict[str, Tensor]
    corrupt: dict[str, Tensor]
    mask: Tensor
    corrupt_mask: Tensor
    tokens: list[list[str]]
    corrupt_tokens: list[list[str]]
    matched: Tensor
    prompts: list[Prompt] | None = None
    encoded: list[Encoded] | None = None
    answers: list[str] | None = None
    wrong: list[str] | None = None
    groups: np.ndarray | None = None
    corrupt_encoded: list[Encoded] | None = None

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def width(self) -> int:
        """Positions of the batch, padding included."""
        return self.mask.shape[1]

    def part(self, rows: range) -> Inputs:
        """Some of the rows, of the same width."""
        at = slice(rows.start, rows.stop)
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, dict):
                changed[field.name] = {name: tensor[at] for name, tensor in value.items()}
            elif value is not None:
                changed[field.name] = value[at]
        return replace(self, **changed)

    @property
    def twins(self) -> bool:
        """Whether clean and corrupt are the same to the last token."""
        return self.clean.keys() == self.corrupt.keys() and all(
            torch.equal(value, self.corrupt[name]) for name, value in self.clean.items()
        )

    def swapped(self) -> Inputs:
        """Clean and corrupt exchanged; answers, prompts and groups stay."""
        back = torch.full_like(self.matched, -1)
        rows, places = (self.matched >= 0).nonzero(as_tuple=True)
        back[rows, self.matched[rows, places]] = places
        return replace(
            self,
            clean=self.corrupt,
            corrupt=self.clean,
            mask=self.corrupt_mask,
            corrupt_mask=self.mask,
            tokens=self.corrupt_tokens,
            corrupt_tokens=self.tokens,
            matched=back,
            encoded=self.corrupt_encoded,
            corrupt_encoded=self.encoded,
        )

    @classmethod
    def of(cls, model: HookedModel, clean: Any, corrupt: Any, align: Any = None) -> Inputs:
        """Clean and corrupt rows for `model`.

        Args:
            model: The model that will run them.
            clean: A text or chat, a list of these, token ids `[batch, pos]` (or lists of ids), a dict with
                `input_ids` and `attention_mask` (padded on either side), `Pairs` (its prompts; rows are
                matched by `pair`), or for a vision model images `[batch, channel, height, width]`.
            corrupt: The same kind of thing.
            align: For rows of unequal token counts: "token" matches equal tokens in order (common start,
                common end, and difflib's blocks between); spans, as a mapping from words of the clean text to
                words of the corrupt one or pairs of character ranges, match those from their last tokens.

        Raises:
            InputError: Row or token counts that differ (both token lists are shown), spans that do not fit.
            DataError: Rows without partners, texts that cannot be tokenised.
        """
        for side, value in (("clean", clean), ("corrupt", corrupt)):
            if value is None or (isinstance(value, list | tuple | str) and not value):
                raise InputError(f"{side} is empty; expected texts, chats, token ids, Pairs or images")
        if model.kind == "vision":
            return _of_images(model, clean, corrupt, align)
        pairs = [_is_pairs(value) for value in (clean, corrupt)]
        extra: dict[str, Any] = {}
        if any(pairs):
            clean, corrupt, extra = _partners(clean, corrupt)
        ours, theirs = _rows(model, clean, "clean"), _rows(model, corrupt, "corrupt")
        if len(ours) != len(theirs):
            raise InputError(
                f"clean has {len(ours)} rows and corrupt {len(theirs)}; expected one corrupt row for each"
            )
        links = _links(model, ours, theirs, align)
        return _padded(model, ours, theirs, links, _prompts(clean), extra)


Row = Encoded | tuple[int, ...]


def _ids(row: Row) -> tuple[int, ...]:
    return row.ids if isinstance(row, Encoded) else row


def _rows(model: HookedModel, given: Any, side: str) -> list[Row]:
    if isinstance(given, Mapping) and "input_ids" in given:
        ids = torch.as_tensor(given["input_ids"])
        mask = torch.as_tensor(given.get("attention_mask", torch.ones_like(ids)))
        rows = [tuple(row[real.bool()].tolist()) for row, real in zip(ids, mask)]
    elif isinstance(given, Tensor | np.ndarray):
        ids = torch.as_tensor(given)
        if ids.dim() not in (1, 2) or ids.is_floating_point():
            raise InputError(
                f"{side} is {ids.dtype} of shape {tuple(ids.shape)}; expected token ids [batch, pos]"
            )
        rows = [tuple(row) for row in ids.reshape(-1, ids.shape[-1]).tolist()]
    elif _is_ids(given):
        rows = [tuple(int(number) for number in given)]
    elif isinstance(given, list | tuple) and all(_is_ids(row) or row in ([], ()) for row in given):
        rows = [tuple(int(number) for number in row) for row in given]
    elif isinstance(given, Mapping):
        raise InputError(f"{side} is a dict without input_ids; give texts, chats, token ids or Pairs")
    else:
        return list(model.encode(scoring.as_list(given)))
    if not rows or not all(rows):
        raise DataError(f"{side} has a row without tokens")
    vocabulary = model.architecture.vocabulary
    for at, row in enumerate(rows):
        if vocabulary and not all(0 <= number < vocabulary for number in row):
            wrong = next(number for number in row if not 0 <= number < vocabulary)
            raise InputError(f"{side}, row {at}: token ids go from 0 to {vocabulary - 1}; {wrong} arrived")
    return list(rows)


def _is_ids(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(number, int | np.integer) and not isinstance(number, bool) for number in value)
    )


def _prompts(given: Any) -> list[Prompt] | None:
    if isinstance(given, Tensor | np.ndarray | Mapping) or _is_ids(given):
        return None
    listed = scoring.as_list(given)
    return None if listed and _is_ids(listed[0]) else listed


def _is_pairs(value: Any) -> bool:
    return hasattr(value, "prompts") and hasattr(value, "groups")


def _partners(clean: Any, corrupt: Any) -> tuple[list[Prompt], list[Prompt], dict[str, Any]]:
    """Prompts of clean and corrupt rows with one pair id, in the order of clean."""
    if not (_is_pairs(clean) and _is_pairs(corrupt)):
        raise InputError("clean and corrupt: both must be Pairs, or neither")
    places: dict[Any, int] = {}
    for side, pairs in (("clean", clean), ("corrupt", corrupt)):
        groups = pairs.groups.tolist()
        if len(set(groups)) != len(groups):
            twice = next(group for group in groups if groups.count(group) > 1)
            raise DataError(
                f"pair {twice!r} has several rows in {side}; expected one, so filter by its label"
            )
        places = {group: row for row, group in enumerate(groups)}
    ours = clean.groups.tolist()
    lone = [group for group in ours if group not in places] + [g for g in places if g not in set(ours)]
    if lone:
        raise DataError(f"pair {lone[0]!r} is on one side only ({len(lone)} such); each needs both")
    order = [places[group] for group in ours]
    answers, wrong = clean.completions, corrupt.completions
    extra = {
        "answers": answers,
        "wrong": None if wrong is None else [wrong[row] for row in order],
        "groups": clean.groups,
    }
    return list(clean.prompts), [corrupt.prompts[row] for row in order], extra


def _links(model: HookedModel, ours: list[Row], theirs: list[Row], align: Any) -> list[list[tuple[int, int]]]:
    if align is None:
        for row, (a, b) in enumerate(zip(ours, theirs)):
            if len(_ids(a)) != len(_ids(b)):
                raise InputError(
                    f"row {row}: clean has {len(_ids(a))} tokens {_shown(model, a)} and corrupt "
                    f"{len(_ids(b))} {_shown(model, b)}; make them equally long, or match them with "
                    'align="token" or by spans, align={"words in clean": "words in corrupt"} (align="span")'
                )
        return [[(at, at) for at in range(len(_ids(a)))] for a in ours]
    if align == "token":
        return [aligning.by_token(_ids(a), _ids(b)) for a, b in zip(ours, theirs)]
    if isinstance(align, str) and align != "span":
        raise InputError(f"align is {align!r}; expected 'token' or spans")
    spans = aligning.as_spans(align, len(ours))
    links = []
    for row, (a, b) in enumerate(zip(ours, theirs)):
        if not (isinstance(a, Encoded) and isinstance(b, Encoded)):
            raise InputError("spans are pieces of texts, and tokens arrived; align by token")
        links.append(aligning.by_span(a, b, spans[row], row))
    return links


def _shown(model: HookedModel, row: Row) -> str:
    return "[" + ", ".join(repr(text) for text in _texts(model, _ids(row))) + "]"


def _texts(model: HookedModel, ids: Sequence[int]) -> list[str]:
    if model.tokenizer is None:
        return [str(number) for number in ids]
    return [str(model.tokenizer.decode([number])) for number in ids]


def _padded(
    model: HookedModel,
    ours: list[Row],
    theirs: list[Row],
    links: list[list[tuple[int, int]]],
    prompts: list[Prompt] | None,
    extra: dict[str, Any],
) -> Inputs:
    both = model.batch([_ids(row) for row in (*ours, *theirs)], padding_side="left")
    count, width = len(ours), both["input_ids"].shape[1]
    mask = both["attention_mask"].bool()
    matched = torch.full((count, width), -1, dtype=torch.long)
    for row, pairs in enumerate(links):
        first, second = width - len(_ids(ours[row])), width - len(_ids(theirs[row]))
        for a, b in pairs:
            matched[row, first + a] = second + b

    def texts(rows: list[Row]) -> list[list[str]]:
        return [[""] * (width - len(_ids(row))) + _texts(model, _ids(row)) for row in rows]

    def kept(rows: list[Row]) -> list[Encoded] | None:
        found = [row for row in rows if isinstance(row, Encoded)]
        return found if len(found) == len(rows) else None

    return Inputs(
        clean={name: value[:count] for name, value in both.items()},
        corrupt={name: value[count:] for name, value in both.items()},
        mask=mask[:count],
        corrupt_mask=mask[count:],
        tokens=texts(ours),
        corrupt_tokens=texts(theirs),
        matched=matched.to(mask.device),
        prompts=prompts,
        encoded=kept(ours),
        corrupt_encoded=kept(theirs),
        **extra,
    )


def _of_images(model: HookedModel, clean: Any, corrupt: Any, align: Any) -> Inputs:
    if align is not None:
        raise InputError("align is for texts; the patches of two images go together as they are")
    given = [value["pixel_values"] if isinstance(value, Mapping) else value for value in (clean, corrupt)]
    for side, value in zip(("clean", "corrupt"), given):
        if not isinstance(value, Tensor) or value.dim() not in (3, 4) or not value.is_floating_point():
            raise InputError(f"{side}: expected images, a float tensor [batch, channel, height, width]")
    a, b = (value if value.dim() == 4 else value[None] for value in given)
    if a.shape != b.shape:
        raise InputError(f"clean has shape {tuple(a.shape)} and corrupt {tuple(b.shape)}; expected the same")
    patch = int(getattr(model.architecture.config, "patch_size", 0) or 1)
    down, across = a.shape[-2] // patch, a.shape[-1] // patch
    names = ["class", *(f"{row},{column}" for row in range(down) for column in range(across))]
    mask = torch.ones(len(a), len(names), dtype=torch.bool, device=model.device)
    matched = torch.arange(len(names), device=model.device).expand(len(a), -1).clone()
    batches = [{"pixel_values": value.to(model.device, model.dtype)} for value in (a, b)]
    texts = [list(names) for _ in range(len(a))]
    return Inputs(batches[0], batches[1], mask, mask, texts, texts, matched)
