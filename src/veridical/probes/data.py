"""What a sweep is fitted on: vectors by site, label columns by vector, and which rows count for what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import yaml

from veridical.errors import DataError, InputError, NonFiniteError, unknown
from veridical.probes.streamed import StreamedRows
from veridical.probes.texts import read_texts

if TYPE_CHECKING:
    from veridical.activations import Activations
    from veridical.config import ProbeConfig

Where = str | Sequence[str] | Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """Vectors with everything known about each.

    Attributes:
        sites: Names, in order of depth.
        take: Site and positions to the vectors there, `[len(positions), ...]`, as they are stored.
        shapes: Shape of one vector at each site.
        columns: Label columns, one value per vector.
        groups: `[n]`, pair of each vector.
        units: `[n]`, data row of each vector (several vectors can come from one row).
        texts: `[n]`, what the model had read at that vector; None where it is not known.
        facts: Tokens, model and fingerprints, for the record.
        notes: What a reader should know about how rows or texts were taken.
    """

    sites: tuple[str, ...]
    take: Callable[[str, np.ndarray], torch.Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    columns: Mapping[str, np.ndarray]
    groups: np.ndarray
    units: np.ndarray
    texts: np.ndarray | None
    facts: Mapping[str, str | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.groups)

    def column(self, name: str) -> np.ndarray:
        """One label column; an unknown name is an error that gives the nearest."""
        if name not in self.columns:
            raise unknown("column", name, self.columns)
        return self.columns[name]

    def flag(self, name: str) -> np.ndarray | None:
        """A column as `[n]` bool with missing values False; None where there is no such column."""
        if name not in self.columns:
            return None
        return np.array([not missing(value) and bool(value) for value in self.columns[name]])

    def width(self, site: str) -> int:
        """Features of one vector at a site, trailing axes flattened."""
        return int(np.prod(self.shapes[site]))

    def count(self, rows: np.ndarray) -> int:
        """How many vectors `vectors` gives for `rows`."""
        return len(rows)

    def vectors(self, site: str, rows: np.ndarray, device: torch.device | None = None) -> torch.Tensor:
        """Vectors `[len(rows), d]` in float64, trailing axes flattened; NaN or infinity is refused."""
        x = self.take(site, rows)
        x = x.to(device or x.device).reshape(len(rows), -1).to(torch.float64)
        self._check_finite(site, rows, torch.isfinite(x).all(1))
        return x

    def stream(
        self, site: str, rows: np.ndarray, memory: int, device: torch.device | None = None
    ) -> StreamedRows:
        """The same vectors, read a chunk at a time whenever they are needed, within `memory` bytes."""
        width = self.width(site)
        where = device or self.take(site, rows[:1]).device

        def read(at: slice) -> torch.Tensor:
            return self.take(site, rows[at]).to(where).reshape(-1, width).to(torch.float64)

        def check(finite: torch.Tensor) -> None:
            self._check_finite(site, rows, finite)

        return StreamedRows.of(read, (len(rows), width), where, memory, check)

    def _check_finite(self, site: str, rows: np.ndarray, finite: torch.Tensor) -> None:
        """Refuses vectors of which not all, `[len(rows)]` bool, are finite; names the first."""
        if bool(finite.all()):
            return
        first = int(torch.argmin(finite.to(torch.int8)))
        bad, at = int((~finite).sum()), int(rows[first])
        raise NonFiniteError(
            f"site {site} has NaN or infinity in {bad} of {len(rows)} vectors, first in vector {at} "
            f"(row {self.units[at]}, pair {self.groups[at]}); fp16 overflows at 65504: collect in "
            "bfloat16 or float32"
        )


@dataclass(frozen=True)
class Task:
    """Which vectors are fitted on and which are held out.

    Attributes:
        fit: Positions of the vectors for selection and fitting.
        test: Positions of the held-out vectors.
        positive: `[n]` bool over all vectors; meaningful on `fit` and `test`.
        classes: `[2]`, negative and positive label.
        excluded: Vectors left out, by reason.
        split: How the test pairs were chosen, in words.
    """

    fit: np.ndarray
    test: np.ndarray
    positive: np.ndarray
    classes: np.ndarray
    excluded: Mapping[str, int]
    split: str


def read_source(
    acts: Activations | Mapping[str, Any],
    target: Any,
    groups: Any,
    texts: Any,
    rows: Any,
) -> Source:
    """Brings a store's activations or a dict of arrays into one form; `target` may be an array of labels."""
    source = (
        _from_arrays(acts, groups, texts, rows)
        if isinstance(acts, Mapping)
        else _from_store(acts, groups, texts)
    )
    if target is None or isinstance(target, str):
        return source
    labels = as_column(target, "target", len(source))
    return Source(**{**vars(source), "columns": {**source.columns, TARGET: labels}})


TARGET = "target"
"""Name of the label column when labels are given as an array."""


def choose_rows(source: Source, config: ProbeConfig, where: Sequence[str]) -> Task:
    """Applies conditions, drops rows without a label, and holds out test pairs.

    Raises:
        DataError: Nothing is left, one class, too few pairs, or a pair on both sides of the split column.
    """
    labels = source.column(config.target)
    kept = np.ones(len(source), dtype=bool)
    excluded: dict[str, int] = {}
    for condition in where:
        holds = _holds(source, condition)
        excluded[f"not {condition}"] = int((kept & ~holds).sum())
        kept &= holds
        if not kept.any():
            raise DataError(
                f"no row is left where {condition}; the column holds {_values(source, condition)}"
            )
    absent = np.array([missing(value) for value in labels], dtype=bool)
    excluded[f"no value of {config.target}"] = int((kept & absent).sum())
    kept &= ~absent
    used = np.flatnonzero(kept)
    if not len(used):
        raise DataError(f"no row has a value of {config.target}: there is nothing to fit")
    classes, codes = two_classes(labels[used], config.target, where)
    positive = np.zeros(len(source), dtype=bool)
    positive[used] = codes == 1
    is_test, said = _hold_out(source, used, positive, config)
    fit, test = used[~is_test], used[is_test]
    if config.holdout:
        marked = meets(source, config.holdout)
        told = " and ".join(config.holdout)
        excluded[f"{told}, of fitted pairs"] = int(marked[fit].sum())
        excluded[f"not {told}, of held-out pairs"] = int((~marked[test]).sum())
        fit, test = fit[~marked[fit]], test[marked[test]]
        said += f"; of these pairs only rows where {told}, and no such row was fitted on"
    task = Task(fit, test, positive, classes, {k: v for k, v in excluded.items() if v}, said)
    _check_parts(source, task, config)
    return task


def as_conditions(where: Where | None) -> tuple[str, ...]:
    """Conditions as strings such as `instructed_to_lie=True`, from a string, several, or a dict."""
    if where is None:
        return ()
    if isinstance(where, str):
        return (where,)
    if isinstance(where, Mapping):
        return tuple(f"{name}={value}" for name, value in where.items())
    return tuple(where)


def site_name(site: str, sites: Sequence[str]) -> str:
    """The one of `sites` that is meant, in its own words or in short form; an unknown one is an error."""
    from veridical.sites import Site

    if site in sites:
        return site
    try:
        name = Site.parse(site).name
    except InputError:
        name = site
    if name not in sites:
        raise unknown("site", site, sites)
    return name


def meets(source: Source, conditions: Sequence[str]) -> np.ndarray:
    """Which vectors meet every condition, `[n]` bool; a condition that no vector meets is refused."""
    kept = np.ones(len(source), dtype=bool)
    for condition in conditions:
        kept &= _holds(source, condition)
        if not kept.any():
            raise DataError(
                f"no row is left where {condition}; the column holds {_values(source, condition)}"
            )
    return kept


def missing(value: Any) -> bool:
    """None, NaN or pandas' NA."""
    return value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value)


def as_column(values: Any, name: str, length: int) -> np.ndarray:
    """One value per vector, `[length]`."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    column = np.asarray(values)
    if column.ndim != 1 or len(column) != length:
        raise DataError(f"{name} has shape {column.shape}; expected one value for each of {length} vectors")
    return column


def _from_arrays(acts: Mapping[str, Any], groups: Any, texts: Any, rows: Any) -> Source:
    if not acts:
        raise DataError("the dict of activations is empty; expected site names with arrays [rows, d]")
    arrays = {str(site): x if isinstance(x, torch.Tensor) else _tensor(x, site) for site, x in acts.items()}
    lengths = {site: len(x) if x.ndim else 0 for site, x in arrays.items()}
    length = next(iter(lengths.values()))
    for site, x in arrays.items():
        if x.ndim < 2 or lengths[site] != length:
            raise DataError(
                f"site {site} has shape {tuple(x.shape)}; expected [{length}, d] as at the first site"
            )
    if length == 0:
        raise DataError("the activations are empty: there is nothing to fit")
    table = {} if rows is None else {str(k): as_column(v, str(k), length) for k, v in dict(rows).items()}
    pair = table.get("pair", np.arange(length)) if groups is None else as_column(groups, "groups", length)
    if texts is None:
        read, _ = read_texts(table, None)
    else:
        read = as_column(np.array(list(texts), dtype=object), "texts", length)
    notes = (
        () if groups is not None or "pair" in table else ("No pairs were given: each row is its own pair.",)
    )

    def take(site: str, positions: np.ndarray) -> torch.Tensor:
        return arrays[site][torch.as_tensor(positions, device=arrays[site].device)]

    shapes = {site: tuple(x.shape[1:]) for site, x in arrays.items()}
    return Source(tuple(arrays), take, shapes, table, pair, np.arange(length), read, {}, notes)


def _from_store(acts: Activations, groups: Any, texts: Any) -> Source:
    units = acts.index["row"].to_numpy()
    if not len(units):
        raise DataError("the activations are empty: there is nothing to fit")
    columns = {str(name): acts.labels(name) for name in acts.rows.columns}
    pair = acts.groups if groups is None else as_column(groups, "groups", len(units))
    facts = _facts(acts)
    notes: tuple[str, ...] = ()
    if texts is not None:
        read = as_column(np.array(list(texts), dtype=object), "texts", len(units))
    else:
        read, notes = read_texts(columns, facts["tokens"])
    shapes = {site: tuple(acts.take(site, units[:0]).shape[1:]) for site in acts.sites}
    return Source(tuple(acts.sites), acts.take, shapes, columns, np.asarray(pair), units, read, facts, notes)


def _facts(acts: Activations) -> dict[str, str | None]:
    asked = acts.request
    return {
        "tokens": str(asked.tokens["selection"]),
        "model": asked.model.get("path"),
        "model_fingerprint": asked.model["fingerprint"],
        "data_fingerprint": acts.fingerprint,
    }


def _tensor(x: Any, site: Any) -> torch.Tensor:
    array = np.asarray(x)
    if array.dtype.kind not in "fiu":
        raise DataError(f"site {site} holds {array.dtype} values; expected numbers [rows, d]")
    return torch.from_numpy(np.ascontiguousarray(array))


def two_classes(labels: np.ndarray, target: str, where: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The two classes, and which of them each label is, `[n]` 0 or 1; any other number is refused."""
    plain = np.array([value.item() if isinstance(value, np.generic) else value for value in labels.tolist()])
    classes, codes = np.unique(plain, return_inverse=True)
    within = f" where {' and '.join(where)}" if where else ""
    if len(classes) == 1:
        raise DataError(
            f"{target} has one class only ({classes[0]!s}) in {len(labels)} rows{within}; a probe needs two "
            "classes"
        )
    if len(classes) > 2:
        shown = ", ".join(str(c) for c in classes[:6]) + (", ..." if len(classes) > 6 else "")
        raise DataError(f"{target} has {len(classes)} classes ({shown}){within}; expected two")
    return classes, codes.reshape(-1)


def _holds(source: Source, condition: str) -> np.ndarray:
    name, negated, value = _parse(condition)
    wanted = yaml.safe_load(value) if value else ""
    column = source.column(name)
    text = value.strip().strip("'\"")
    equal = np.array([not missing(v) and (_same(v, wanted) or str(v) == text) for v in column], dtype=bool)
    absent = np.array([missing(v) for v in column], dtype=bool)
    return ~equal & ~absent if negated else equal


def _same(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, bool) != isinstance(value, bool | np.bool_) and not isinstance(
        value, int | float | np.number
    ):
        return False
    return bool(np.isscalar(value)) and bool(value == wanted)


def _parse(condition: str) -> tuple[str, bool, str]:
    name, equals, value = condition.partition("=")
    if not equals or not name.strip(" !"):
        raise DataError(f"condition {condition!r} is not understood; expected column=value or column!=value")
    return name.strip().removesuffix("!").strip(), name.strip().endswith("!"), value.strip()


def _values(source: Source, condition: str) -> str:
    seen = dict.fromkeys(str(value) for value in source.column(_parse(condition)[0]))
    return ", ".join(list(seen)[:6]) + (", ..." if len(seen) > 6 else "")


def _hold_out(
    source: Source, used: np.ndarray, positive: np.ndarray, config: ProbeConfig
) -> tuple[np.ndarray, str]:
    from veridical.pairs.splits import assign

    named = source.columns.get("split")
    groups = source.groups[used]
    if named is not None:
        is_test = np.array([str(value).lower() == "test" for value in named[used]])
        if is_test.any():
            both = np.intersect1d(groups[is_test].astype(str), groups[~is_test].astype(str))
            if len(both):
                raise DataError(
                    f"pair {both[0]} is in the test split and outside it ({len(both)} such pairs); "
                    "both sides of a pair belong in one split"
                )
            return is_test, "the split column (test held out, the rest for selection and fitting)"
    if not 0 < config.test_fraction < 1:
        raise DataError(f"test_fraction is {config.test_fraction}; expected a share between 0 and 1")
    shares = {"rest": 1 - config.test_fraction, "test": config.test_fraction}
    is_test = assign(groups, shares, config.seed, positive[used]) == "test"
    return is_test, f"{100 * config.test_fraction:.0f} % of the pairs at random (seed {config.seed})"


def _check_parts(source: Source, task: Task, config: ProbeConfig) -> None:
    pairs = len(np.unique(source.groups[task.fit])) if len(task.fit) else 0
    if pairs < max(2, config.folds):
        raise DataError(
            f"{pairs} pairs are left for {config.folds} folds; give more pairs, or ask for fewer folds or a "
            "smaller test fraction"
        )
    for part, rows in (("selection and fitting", task.fit), ("the test", task.test)):
        labels = task.positive[rows]
        if not len(rows) or labels.all() or not labels.any():
            only = task.classes[int(labels.any())] if len(rows) else "none"
            raise DataError(
                f"the rows for {part} hold one class only ({only}); {config.target} needs both classes among "
                f"the fitted and among the held-out pairs"
            )
