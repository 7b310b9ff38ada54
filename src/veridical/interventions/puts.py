"""Patches as runs are given them: which values go where, and the edits of a forward that put them there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from veridical.sites import Site

INPUT = -1
"""Entry of rows that start at the model's input."""


@dataclass(frozen=True)
class Put:
    """New values of one site in some rows of a task.

    Attributes:
        site: Where; None for the residual stream at the task's entry.
        rows: `[m]`, row within the task.
        columns: `[m]`, column of the batch (for a pattern, the query).
        values: `[m, ...]`, the values there.
        head: One head; None for all of the site.
    """

    site: Site | None
    rows: Tensor
    columns: Tensor
    values: Tensor
    head: int | None = None


@dataclass(frozen=True)
class Task:
    """One patch, over its examples.

    Attributes:
        key: What the caller knows it by.
        entry: Block at which its rows join; `INPUT`, or the number of blocks for behind the last.
        first: First column that it changes.
        examples: `[rows]`, example of each row.
        puts: What is put where.
    """

    key: int
    entry: int
    first: int
    examples: Tensor
    puts: tuple[Put, ...]


@dataclass(frozen=True)
class Variant:
    """A site with other values at all positions where there are any.

    Attributes:
        site: Of a kind whose effect stays at its position until its block ends.
        head: One head; None for all of the site.
        where: `[batch, pos]` bool.
        values: Of the whole site, as it is read: `[batch, pos, ...]`, of a pattern `[batch, head, pos, pos]`.
    """

    site: Site
    head: int | None
    where: Tensor
    values: Tensor


def task_writes(tasks: Sequence[Task], start: int) -> dict[Site, Callable[[Tensor], Tensor]]:
    """Edits of the sites that are patched where they are, each in its own rows."""
    found: dict[Site, list[tuple[int, Put]]] = {}
    first = 0
    for task in tasks:
        for put in task.puts:
            if put.site is not None:
                found.setdefault(put.site, []).append((first, put))
        first += len(task.examples)

    def editing(site: Site, puts: list[tuple[int, Put]]) -> Callable[[Tensor], Tensor]:
        def edit(value: Tensor) -> Tensor:
            for offset, put in puts:
                rows, columns = put.rows + offset, put.columns - start
                write(value, site, rows, columns, put.head, put.values)
            return value

        return edit

    return {site: editing(site, puts) for site, puts in found.items()}


def write(value: Tensor, site: Site, rows: Tensor, columns: Tensor, head: int | None, values: Tensor) -> None:
    """Puts `values` into a site's value, in place."""
    values = values.to(value)
    if site.kind == "pattern":
        if head is None:
            value[rows, :, columns] = values
        else:
            value[rows, head, columns] = values
    elif head is None:
        value[rows, columns] = values
    else:
        value[rows, columns, head] = values


def read(values: Tensor, site: Site, rows: Tensor, columns: Tensor, head: int | None) -> Tensor:
    """The values of a site at some rows and columns, `[m, ...]`, as `write` takes them."""
    if site.kind == "pattern":
        return values[rows, :, columns] if head is None else values[rows, head, columns]
    return values[rows, columns] if head is None else values[rows, columns, head]


def variant_writes(
    variants: Sequence[Variant], layers: Mapping[int, list[int]]
) -> dict[Site, Callable[[Tensor], Tensor]]:
    """Edits that put each variant of a site into the rows that run for it."""
    found: dict[Site, list[tuple[int, Variant]]] = {}
    for numbers in layers.values():
        for slot, number in enumerate(numbers):
            found.setdefault(variants[number].site, []).append((slot, variants[number]))

    def editing(site: Site, placed: list[tuple[int, Variant]]) -> Callable[[Tensor], Tensor]:
        def edit(value: Tensor) -> Tensor:
            for slot, variant in placed:
                rows, columns = variant.where.nonzero(as_tuple=True)
                new = read(variant.values, site, rows, columns, variant.head)
                write(value, site, rows + slot * len(variant.where), columns, variant.head, new)
            return value

        return edit

    return {site: editing(site, placed) for site, placed in found.items()}
