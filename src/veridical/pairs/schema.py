"""Pairs: a checked table of labelled prompts in which both sides of a contrast share a pair id."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from veridical.errors import DataError, unknown
from veridical.pairs import show, splits
from veridical.progress import quiet_datasets
from veridical.provenance import fingerprint

if TYPE_CHECKING:
    import datasets
    import pandas as pd

    from veridical.pairs.beliefs import BeliefReport
    from veridical.reporting.section import Section

Prompt = str | list[dict[str, str]]
NESTED = ("prompt", "options")
MAX_STRATA = 20


class Pairs:
    """Labelled prompts over a `datasets.Dataset`, with a checked schema; never changed in place.

    Columns:
        pair: Group id, shared by both sides of a contrast; every split, fold and bootstrap keeps it together.
            Without this column every row is its own group.
        prompt: Text, or chat messages as a list of {role, content}; the same kind in every row.
        completion: Text that follows the prompt (optional, may be missing in some rows).
        label: 1 for the side that shows the behaviour and 0 for the other (optional); further label columns
            may have any name.
        split: Name of the split, such as train, val, test (optional).
        span_start, span_end: Characters of the text that matter (optional).
        question, options, correct, form, instructed_to_lie, system: For questions; see `check_beliefs`.

    Attributes:
        dataset: The rows.
        name: Short name, shown in reports.
        beliefs: What `check_beliefs` found, or None.
    """

    def __init__(self, dataset: datasets.Dataset, name: str = "pairs", beliefs: BeliefReport | None = None):
        self.dataset = _checked(dataset, name)
        self.name = name
        self.beliefs = beliefs

    # Making

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        adapter: str | None = None,
        columns: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Pairs:
        """Pairs from an embedded name, a csv, tsv, json, jsonl or parquet file, a saved folder, or the hub.

        Args:
            source: What to load; looked up in this order. `./name` is always a path.
            adapter: How to read a known file layout; recognised by its columns when not given, and logged.
                The names are in `veridical.pairs.adapters.ADAPTERS`.
            columns: Schema column to the file's column, such as {"prompt": "text", "label": "toxic"}.
            **options: Options of the adapter; for a hub data set also `subset`, `split` and `revision`.

        Raises:
            UnknownNameError: No such file, embedded name, data set, adapter or column; gives the nearest.
            DataError: A file without rows, or whose layout is not recognised.
        """
        from veridical.pairs.loaders import load

        return load(source, adapter=adapter, columns=columns, **options)

    @classmethod
    def from_pandas(cls, frame: pd.DataFrame, name: str = "pairs") -> Pairs:
        """Pairs from a data frame with the columns of the schema; its index is dropped."""
        return cls.from_rows(frame.to_dict("records"), name=name, columns=[str(column) for column in frame])

    @classmethod
    def from_rows(
        cls, rows: Iterable[Mapping[str, Any]], name: str = "pairs", columns: Sequence[str] | None = None
    ) -> Pairs:
        """Pairs from mappings; a column that some rows lack is None there."""
        import datasets
        import pyarrow as pa

        rows = list(rows)
        names = (
            list(columns) if columns is not None else list(dict.fromkeys(key for row in rows for key in row))
        )
        table = {}
        for column in names:
            values = [_plain(row.get(column)) for row in rows]
            try:
                table[column] = pa.array(values)
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise DataError(
                    f"{name}: column {column!r} mixes kinds of values: {_first_line(error)}"
                ) from error
        return cls(datasets.Dataset(pa.table(table)), name=name)

    # Reading

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in order."""
        return list(self.dataset.column_names)

    def __contains__(self, column: object) -> bool:
        return column in self.dataset.column_names

    def __getitem__(self, key: str | int) -> Any:
        """A column (an array; a list for prompts and options), or a row as a mapping by number."""
        if isinstance(key, int | np.integer):
            if not -len(self) <= key < len(self):
                raise DataError(f"row {key} does not exist; {self.name} has {len(self)} rows")
            return self.dataset[int(key)]
        if key not in self:
            raise unknown("column", key, self.columns)
        values = self.dataset[key][:]
        return values if key in NESTED else np.array(values, dtype=_array_type(values))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.dataset)  # type: ignore[return-value]

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts: texts or lists of chat messages."""
        return self.dataset["prompt"][:]

    @property
    def is_chat(self) -> bool:
        """Whether the prompts are chat messages."""
        return not isinstance(self.dataset[0]["prompt"], str)

    @property
    def completions(self) -> list[str] | None:
        """The completions ("" where a row has none), or None when no row has one."""
        if "completion" not in self:
            return None
        values = self.dataset["completion"][:]
        return [value or "" for value in values] if any(values) else None

    @property
    def groups(self) -> np.ndarray:
        """Pair id of each row; the row number where there is no `pair` column."""
        return self["pair"] if "pair" in self else np.arange(len(self))

    @property
    def texts(self) -> list[str]:
        """All that a row says, prompt and completion, as one text: for baselines that read only text."""
        completions = self.completions or [""] * len(self)
        return [
            f"{show.flat(prompt)}\n{said}" if said else show.flat(prompt)
            for prompt, said in zip(self.prompts, completions)
        ]

    def labels(self, column: str = "label") -> np.ndarray:
        """A label column as int64, checked.

        Raises:
            UnknownNameError: No such column.
            DataError: Missing labels, labels that are no whole numbers, or labels of one class only.
        """
        values = self[column]
        missing = [row for row, value in enumerate(values) if value is None or value != value]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(self)} rows have no {column!r} (first: row {missing[0]}); "
                f"drop them with pairs.filter(lambda row: row[{column!r}] is not None)"
            )
        try:
            numbers = np.array([float(value) for value in values])
        except (TypeError, ValueError) as error:
            raise DataError(
                f"column {column!r} holds {values[0]!r}; labels are whole numbers or booleans"
            ) from error
        if (numbers != np.round(numbers)).any():
            odd = numbers[numbers != np.round(numbers)][0]
            raise DataError(f"column {column!r} holds {odd}; labels are whole numbers")
        classes = np.unique(numbers)
        if len(classes) < 2:
            raise DataError(f"every {column!r} is {int(classes[0])}; labels of two classes are needed")
        return numbers.astype(np.int64)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of the content (columns and rows in their order), the same wherever it was loaded from."""
        names = sorted(self.columns)
        rows = self.dataset.select_columns(names)
        return fingerprint(
            [json.dumps(names), *(json.dumps(row, sort_keys=True, default=str) for row in rows)]
        )

    # Deriving

    def filter(
        self, where: Sequence[bool] | np.ndarray | Callable[[dict], bool] | None = None, **equals: Any
    ) -> Pairs:
        """The rows that meet every condition.

        Args:
            where: A mask over the rows, or a function of a row.
            **equals: Column and the value that it must have, or a list of values it may have.

        Raises:
            UnknownNameError: A column that does not exist.
            DataError: A mask of the wrong length, or no row is left.
        """
        keep = np.ones(len(self), dtype=bool)
        if callable(where):
            keep &= np.array([bool(where(row)) for row in self])
        elif where is not None:
            mask = np.asarray(where)
            if mask.shape != (len(self),) or mask.dtype != bool:
                raise DataError(
                    f"a mask of {len(self)} booleans is needed; {mask.dtype} of shape {mask.shape} arrived"
                )
            keep &= mask
        for column, wanted in equals.items():
            allowed = list(wanted) if isinstance(wanted, list | tuple | set | np.ndarray) else [wanted]
            keep &= np.array([value in allowed for value in self[column]])
        if not keep.any():
            raise DataError(f"no row of {self.name} is left after filtering {len(self)} rows")
        return self.select(np.flatnonzero(keep))

    def select(self, rows: Sequence[int] | np.ndarray) -> Pairs:
        """The rows with these numbers, in this order; a number may come up more than once."""
        return Pairs(self.dataset.select(np.asarray(rows, dtype=np.int64)), self.name, self.beliefs)

    def with_columns(self, **values: Sequence[Any] | np.ndarray) -> Pairs:
        """A copy with columns added or replaced."""
        dataset = self.dataset
        for column, content in values.items():
            if len(content) != len(self):
                raise DataError(f"column {column!r} has {len(content)} values for {len(self)} rows")
            if column in dataset.column_names:
                dataset = dataset.remove_columns(column)
            with quiet_datasets():  # after a filter, datasets rewrites the rows here, with a bar
                dataset = dataset.add_column(column, [_plain(value) for value in content])  # type: ignore[call-arg]
        return Pairs(dataset, self.name, self.beliefs)

    def without_columns(self, *columns: str) -> Pairs:
        """A copy without these columns, where it has them."""
        return Pairs(
            self.dataset.remove_columns([name for name in columns if name in self]), self.name, self.beliefs
        )

    def to_pandas(self) -> pd.DataFrame:
        """The rows as a data frame; messages and options are plain lists."""
        import pandas as pd

        return pd.DataFrame(
            {column: self.dataset[column][:] for column in self.columns}, columns=self.columns
        )

    # Pairs as pairs

    def require_pairs(self, column: str = "label") -> Pairs:
        """These pairs, after a check that every pair has both sides.

        Raises:
            DataError: A pair with rows of one label only; the message names it.
        """
        lone = self._one_sided(column)
        if lone:
            raise DataError(
                f"pair {lone[0]!r} of {self.name} has one side only ({len(lone)} such pairs): a pair needs "
                "rows "
                f"with different {column!r}; drop them with pairs.both_sides({column!r})"
            )
        return self

    def both_sides(self, column: str = "label") -> Pairs:
        """The rows of pairs that have both sides."""
        lone = set(self._one_sided(column))
        return self.filter(np.array([group not in lone for group in self.groups.tolist()]))

    def _one_sided(self, column: str) -> list[Any]:
        seen: dict[Any, set[int]] = {}
        for group, label in zip(self.groups.tolist(), self.labels(column).tolist()):
            seen.setdefault(group, set()).add(label)
        return [group for group, labels in seen.items() if len(labels) < 2]

    def folds(self, n: int = 5, seed: int = 0, stratify: str | None = "label") -> list[splits.Fold]:
        """`n` folds by pair as (train rows, held-out rows), about equal in the labels of `stratify`."""
        return splits.folds(self.groups, n, seed, self._strata(stratify))

    def split(
        self, shares: Mapping[str, float] | None = None, *, seed: int = 0, stratify: str | None = "label"
    ) -> Pairs:
        """A copy with a `split` column drawn by pair; 60 % train, 20 % val and 20 % test by default."""
        shares = shares or {"train": 0.6, "val": 0.2, "test": 0.2}
        return self.with_columns(split=splits.assign(self.groups, shares, seed, self._strata(stratify)))

    def bootstrap(self, n: int = 500, seed: int = 0) -> Iterator[np.ndarray]:
        """`n` resamples of whole pairs, as row numbers."""
        return splits.bootstrap(self.groups, n, seed)

    def oversample(self, column: str, ratio: float = 1.0, seed: int = 0) -> Pairs:
        """A copy in which rows of the rare side of a label are repeated; copies stay in their pair and split.

        Args:
            column: Label of two classes, such as `lied`.
            ratio: Rows of the rare side over rows of the other side that are aimed at.
            seed: Order in which pairs are repeated.
        """
        within = self["split"] if "split" in self.columns else None
        return self.select(splits.oversampled(self.groups, self.labels(column) > 0, ratio, seed, within))

    def _strata(self, column: str | None) -> np.ndarray | None:
        if column is None or column not in self:
            return None
        values = self[column]
        return values if len({str(value) for value in values}) <= MAX_STRATA else None

    # Keeping and showing

    def save(self, path: str | Path) -> Path:
        """Writes a parquet, jsonl or csv file, by its ending, whole or not at all.

        What was found about beliefs goes into `NAME.beliefs.json` beside it.
        """
        from veridical.pairs.loaders import save

        return save(self, path)

    def report_section(self) -> Section:
        """Counts and a few rows."""
        return show.section(self)

    def __repr__(self) -> str:
        return f"Pairs({show.counts(self)}; columns: {', '.join(self.columns)})"

    def _repr_html_(self) -> str:
        return show.to_html(self)


def _checked(dataset: datasets.Dataset, name: str) -> datasets.Dataset:
    if not len(dataset):
        raise DataError(f"{name} has no rows")
    if "prompt" not in dataset.column_names:
        raise unknown(
            "column",
            "prompt",
            dataset.column_names,
            "Pairs need a prompt; map it with columns={'prompt': ...}",
        )
    for row, prompt in enumerate(dataset["prompt"][:]):
        _check_prompt(prompt, row, name)
    if "completion" in dataset.column_names:
        for row, said in enumerate(dataset["completion"][:]):
            if said is not None and not isinstance(said, str):
                raise DataError(f"{name}, row {row}: the completion is {said!r}; expected text")
    if "pair" in dataset.column_names:
        for row, group in enumerate(dataset["pair"][:]):
            if group is None or group != group:
                raise DataError(
                    f"{name}, row {row}: no pair id; leave the column out for rows without partners"
                )
    return dataset


def _check_prompt(prompt: Any, row: int, name: str) -> None:
    if isinstance(prompt, str):
        return
    if not isinstance(prompt, list) or not prompt:
        raise DataError(
            f"{name}, row {row}: the prompt is {prompt!r}; expected text or a list of chat messages"
        )
    for message in prompt:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise DataError(f"{name}, row {row}: a chat message needs role and content; {message!r} arrived")
        if not isinstance(message["role"], str) or not isinstance(message["content"], str):
            raise DataError(
                f"{name}, row {row}: role and content of a chat message must be text; {message!r} arrived"
            )


def _plain(value: Any) -> Any:
    """Values of numpy and pandas as Python's own, NaN as None."""
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and value != value else value


def _array_type(values: list[Any]) -> Any:
    kinds = {type(value) for value in values}
    if kinds <= {bool}:
        return bool
    if kinds <= {int}:
        return np.int64
    return np.float64 if kinds <= {float, int} else object


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
