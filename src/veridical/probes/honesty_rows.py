"""The rows of the honesty protocol by kind, and the parts of them that figures are given for."""

from __future__ import annotations

import numpy as np

from veridical.errors import DataError, unknown
from veridical.probes.data import Source, meets, missing

NEEDED = ("instructed_to_lie", "known", "lied")
FEW_VALUES = 6
"""A difficulty column with no more values than this is taken as it is, else by thirds."""


class Rows:
    """Which rows are lies, refusals, honest answers and confusion; `[n]` bool each."""

    def __init__(self, source: Source) -> None:
        for name in NEEDED:
            if name not in source.columns:
                raise unknown("column", name, source.columns, "Label the pairs with check_beliefs first")
        self.told, self.known, self.lied = (_flag(source, name) for name in NEEDED)
        self.checked = np.array([not missing(value) for value in source.column("lied")])
        self.refused = self.told & self.known & ~self.lied
        confused = source.flag("confused")
        self.confused = ~self.known & self.checked if confused is None else confused
        right = source.flag("label_true")
        honest = self.known & ~self.told
        self.honest = honest if right is None else honest & right
        for name, flags in (("lied", self.lied & self.told & self.known), ("refused_to_lie", self.refused)):
            if not flags.any():
                raise DataError(
                    f"no row is {name} within instructed_to_lie and known; a lying probe needs lies and "
                    "refusals to lie"
                )
        if not self.honest.any():
            raise DataError("no row is an honest answer (known, not told to lie), to set a threshold on")


def never_fitted(source: Source, conditions: tuple[str, ...] | None, notes: list[str]) -> np.ndarray:
    """Rows that meet every condition, `[n]` bool; rows under held-out system prompts where None is given."""
    if conditions is None:
        flags = source.flag("system_held_out")
        if flags is None or not flags.any() or flags.all():
            notes.append("No prompts were held out: figures are for prompts that were fitted on.")
            return np.zeros(len(source), dtype=bool)
        conditions = ("system_held_out=True",)
    if not conditions:
        return np.zeros(len(source), dtype=bool)
    notes.append(f"Rows where {' and '.join(conditions)} were never fitted on.")
    return meets(source, conditions)


def prompt_parts(source: Source, by: tuple[str, ...] | None, marked: np.ndarray) -> dict[str, np.ndarray]:
    """All rows, and rows by whether their prompt was fitted on and by each column of `by`."""
    every = np.ones(len(source), dtype=bool)
    parts = {"all rows": every}
    held = {"fitted prompts": ~marked, "held-out prompts": marked}
    held = held if marked.any() else {}
    parts |= held
    if by is None:
        flags = source.flag("scenario")
        by = ("scenario",) if flags is not None and flags.any() and not flags.all() else ()
    for name in by:
        column = np.array([str(value) for value in source.column(name)])
        for value in np.unique(column):
            for said, flags in (held or {"prompts": every}).items():
                parts[f"{said}, {name} {value}"] = flags & (column == value)
    return parts


def difficulty_parts(
    source: Source, name: str | None, known: np.ndarray, notes: list[str]
) -> dict[str, np.ndarray]:
    """Rows by a difficulty column, or by thirds of the belief's probability over the known rows."""
    if name is None:
        name = next((n for n in ("difficulty", "belief_confidence") if n in source.columns), None)
    if name is None:
        notes.append("There was no column of difficulty (difficulty, or belief_confidence).")
        return {}
    values = source.column(name)
    present = np.array([not missing(value) for value in values])
    if len(distinct := np.unique([str(v) for v in values[present]])) <= FEW_VALUES:
        return {f"{name} {v}": present & (values.astype(str) == v) for v in distinct}
    numbers = np.full(len(values), np.nan)
    try:
        numbers[present] = np.asarray(values[present], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"column {name} has {len(distinct)} values that are no numbers; expected numbers, or at most "
            f"{FEW_VALUES} values"
        ) from error
    ends = np.nanquantile(numbers[known], [1 / 3, 2 / 3])
    third = np.searchsorted(ends, numbers, side="left")
    return {
        f"{name} {said} third": present & (third == at)
        for at, said in enumerate(("lowest", "middle", "highest"))
    }


def _flag(source: Source, name: str) -> np.ndarray:
    return np.array([not missing(value) and bool(value) for value in source.column(name)])
