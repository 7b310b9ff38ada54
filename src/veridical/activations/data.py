"""What `collect` reads: the rows of a data set, as a table beside the prompts that are run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from veridical.errors import DataError, InputError, unknown
from veridical.provenance import fingerprint

if TYPE_CHECKING:
    import pyarrow as pa

    from veridical.activations.select import Row
    from veridical.models import HookedModel
    from veridical.tokens import Encoded

CHUNK = 1024  # rows that are encoded at a time, so that offsets and texts of all rows never exist together


@dataclass(frozen=True)
class Corpus:
    """Rows to run: texts or chats (`prompts`, perhaps with `completions`), or token ids as they are.

    Attributes:
        name: What to call the data in messages.
        rows: One line per row with every column.
        prompts: Texts or lists of chat messages; None for token ids.
        completions: What follows each prompt (None where nothing does); None when no row has one.
        ids: Token ids of each row, without padding; None for prompts.
    """

    name: str
    rows: pd.DataFrame
    prompts: Sequence[Any] | None = None
    completions: Sequence[str | None] | None = None
    ids: Sequence[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def encoded(self, model: HookedModel, **options: Any) -> Iterator[tuple[int, list[Encoded]]]:
        """The first row's number and the encodings, a chunk of rows at a time."""
        for start in range(0, len(self), CHUNK):
            chosen = slice(start, start + CHUNK)
            if self.ids is not None:
                yield start, [_as_encoded(ids, model, start + i) for i, ids in enumerate(self.ids[chosen])]
            elif self.prompts is not None:
                yield start, self._encode(model, chosen, options)

    def take(self, numbers: np.ndarray) -> Corpus:
        """The rows of these numbers, in their order."""

        def chosen(values: Sequence[Any] | None) -> Sequence[Any] | None:
            return None if values is None else [values[number] for number in numbers]

        rows = self.rows.iloc[numbers].reset_index(drop=True)
        return Corpus(self.name, rows, chosen(self.prompts), chosen(self.completions), chosen(self.ids))

    def row(self, number: int) -> Row:
        """What a token selection may know of a row."""
        from veridical.activations.select import Row

        spans = ("span_start", "span_end")
        span = None
        if all(name in self.rows.columns for name in spans):
            span = (self.rows["span_start"].iat[number], self.rows["span_end"].iat[number])
        prompt = self.prompts[number] if self.prompts is not None else None
        completion = self.completions[number] if self.completions is not None else None
        return Row(number, prompt, bool(completion), span)

    def _encode(self, model: HookedModel, chosen: slice, options: dict[str, Any]) -> list[Encoded]:
        prompts = list(self.prompts[chosen]) if self.prompts is not None else []
        completions = list(self.completions[chosen]) if self.completions is not None else None
        try:
            return model.encode(prompts, completions, **options)
        except DataError as error:
            # Row numbers count from the start of the chunk there.
            said = re.sub(r"\brow (\d+)", lambda m: f"row {int(m[1]) + chosen.start}", str(error), count=1)
            raise DataError(said) from error


def read_data(data: Any) -> Corpus:
    """Brings whatever `collect` is given into one form.

    Args:
        data: `Pairs`; a list of texts; a list of chats (each a list of messages); a `datasets.Dataset` with
            a column `text`, `prompt` (and perhaps `completion`) or `input_ids`; a token tensor `[rows,
            pos]`; or a mapping of `input_ids` and `attention_mask`, as tokenizers return it.

    Raises:
        DataError: No rows, or rows that are none of these.
    """
    if isinstance(data, Corpus):
        return data
    if isinstance(data, str | bytes):
        raise InputError(
            f"data is one string ({data[:40]!r}); expected Pairs (`Pairs.load(...)`), a list of texts or "
            "chats, a datasets.Dataset, or a token tensor"
        )
    if isinstance(data, torch.Tensor | np.ndarray):
        corpus = _from_ids(data, None)
    elif isinstance(data, Mapping) and "input_ids" in data:
        corpus = _from_ids(data["input_ids"], data.get("attention_mask"))
    elif hasattr(data, "prompts") and hasattr(data, "to_pandas"):
        corpus = _from_pairs(data)
    elif hasattr(data, "column_names") and hasattr(data, "to_pandas"):
        corpus = _from_dataset(data)
    elif isinstance(data, Sequence):
        corpus = _from_list(data)
    else:
        raise InputError(
            f"data is a {type(data).__name__}; expected Pairs, a list of texts or chats, a datasets.Dataset, "
            "or a token tensor (a DataFrame goes through Pairs.from_pandas)"
        )
    if len(corpus) == 0:
        raise DataError(f"the data ({corpus.name}) are empty: there is nothing to collect")
    return corpus


def as_table(rows: pd.DataFrame) -> pa.Table:
    """The rows as an Arrow table, as they are kept in `rows.parquet`."""
    import pyarrow as pa

    try:
        table = pa.Table.from_pandas(rows, preserve_index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(
            f"a column mixes types that a table cannot hold: {' '.join(str(error).split())}"
        ) from error
    return table.replace_schema_metadata(None)


def from_table(table: pa.Table) -> pd.DataFrame:
    """The rows of a table, with lists as lists: from disk the same as those that never left memory."""
    frame = table.to_pandas()
    for name in frame.columns:
        if frame[name].dtype == object:
            frame[name] = [_plain(value) for value in frame[name]]
    return frame


def rows_fingerprint(rows: pd.DataFrame) -> str:
    """A digest of every value of the table, stable across library versions."""
    columns = [str(name) for name in rows.columns]
    values = zip(*(rows[name] for name in rows.columns)) if columns else ([] for _ in range(len(rows)))
    lines = (json.dumps([_plain(v) for v in line], default=str, ensure_ascii=False) for line in values)
    return fingerprint([json.dumps(columns), *lines])


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value


def _as_encoded(ids: np.ndarray, model: HookedModel, number: int) -> Encoded:
    from veridical.tokens import Encoded

    if model.context_length is not None and len(ids) > model.context_length:
        raise DataError(f"row {number} has {len(ids)} tokens; the model's context is {model.context_length}")
    return Encoded(tuple(ids.tolist()), "", None, 0, len(ids))


def _from_pairs(pairs: Any) -> Corpus:
    completions = pairs.completions
    name = getattr(pairs, "name", None) or "pairs"
    return Corpus(
        name, pairs.to_pandas(), list(pairs.prompts), None if completions is None else list(completions)
    )


def _from_dataset(dataset: Any) -> Corpus:
    rows = dataset.to_pandas()
    for column in ("prompt", "text"):
        if column in rows.columns:
            prompts = [_plain(value) for value in rows[column]]
            _check_prompts(prompts)
            said = rows["completion"].tolist() if "completion" in rows.columns else None
            said = None if said is None else [value if isinstance(value, str) else None for value in said]
            return Corpus(
                "dataset", rows, prompts, said if said and any(v is not None for v in said) else None
            )
    if "input_ids" in rows.columns:
        ids = [np.asarray(value, dtype=np.int64) for value in rows["input_ids"]]
        if "attention_mask" in rows.columns:
            ids = [row[np.asarray(mask, dtype=bool)] for row, mask in zip(ids, rows["attention_mask"])]
            rows = rows.drop(columns="attention_mask")
        return Corpus("dataset", rows.drop(columns="input_ids").assign(length=[len(i) for i in ids]), ids=ids)
    raise unknown(
        "column", "text", rows.columns, "collect reads `text`, `prompt` (with `completion`) or `input_ids`"
    )


def _from_list(data: Sequence[Any]) -> Corpus:
    prompts = list(data)
    _check_prompts(prompts)
    kind = "chats" if prompts and not isinstance(prompts[0], str) else "texts"
    return Corpus(f"{len(prompts)} {kind}", pd.DataFrame({"prompt": prompts}), prompts)


def _check_prompts(prompts: Sequence[Any]) -> None:
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            continue
        messages = isinstance(prompt, list | tuple) and len(prompt) > 0
        if not messages or not all(isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in prompt):
            raise DataError(
                f"row {number} is {str(prompt)[:60]!r} ({type(prompt).__name__}); expected a text, or a list "
                "of messages with role and content"
            )


def _from_ids(ids: Any, mask: Any) -> Corpus:
    table = _matrix(ids, "input_ids")
    if table.dtype.kind not in "iu":
        raise DataError(f"a tensor of {table.dtype} is not token ids; expected integers of shape [rows, pos]")
    kept = np.ones(table.shape, dtype=bool) if mask is None else _matrix(mask, "attention_mask").astype(bool)
    if kept.shape != table.shape:
        raise DataError(f"attention_mask has shape {kept.shape}, input_ids {table.shape}; expected the same")
    lengths = kept.sum(1)
    if len(lengths) and lengths.min() == 0:
        raise DataError(f"row {int(lengths.argmin())} holds padding only")
    rows = pd.DataFrame({"length": lengths.astype(np.int64)})
    return Corpus(f"{len(table)} rows of tokens", rows, ids=[row[keep] for row, keep in zip(table, kept)])


def _matrix(values: Any, name: str) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.ndim != 2:
        raise DataError(f"{name} has shape {array.shape}; expected [rows, pos]")
    return array
