"""Rows that occur twice: the same text (or the same vectors) under several pairs.

A copy of a fitted row among the held-out ones is scored from memory. Where a split column parts the copies
it is refused. Where folds and split are ours, pairs that share a row are treated as one pair, and the result
says so.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import xxhash

from veridical.errors import DataError
from veridical.probes.data import Source

COMMON = 0.1
"""A content under more than this share of all pairs, such as a prompt that many share, is no copied row."""
FEW = 10
"""A content under no more pairs than this always is one."""
CHUNK = 1024
"""Vectors that are read at a time."""


def without_copies(source: Source, allow: bool = False) -> Source:
    """The source with pairs that share a row joined into one, or as it is where nothing is repeated.

    Args:
        source: Vectors with pairs, texts and perhaps a split column.
        allow: Leave copies as they are, and say so.

    Raises:
        DataError: The split column has a row in the test whose copy is outside it.
    """
    found = copies(source)
    if found is None:
        return source
    kept, common = found
    notes = list(source.notes)
    if common:
        notes.append(
            f"{common} texts stand under more than {100 * COMMON:.0f} % of the pairs each; they were not "
            "taken for copied rows."
        )
    repeated = np.unique(kept[kept >= 0])
    if len(repeated):
        if allow:
            notes.append(
                f"{len(repeated)} rows occur under several pairs, and were left so (allow_duplicates)."
            )
        else:
            _refuse_across(source, kept)
            joined = _joined(source.groups, kept)
            notes.append(
                f"{len(repeated)} rows occur under several pairs: {len(np.unique(source.groups))} pairs were "
                f"joined into {len(np.unique(joined))}, so that no copy is on both sides of a fold or split."
            )
            source = replace(source, groups=joined)
    return replace(source, notes=tuple(notes))


def copies(source: Source) -> tuple[np.ndarray, int] | None:
    """Number of the repeated content of each vector `[n]`, -1 where it stands under one pair alone; and how
    many contents are too common to be copies. None where nothing stands under several pairs."""
    pairs = np.unique(source.groups.astype(str), return_inverse=True)[1].reshape(-1)
    contents = _contents(source)
    first: dict[object, int] = {}
    under: dict[object, set[int]] = {}
    for at, content in enumerate(contents):
        under.setdefault(content, set()).add(pairs[at])
        first.setdefault(content, len(first))
    several = {content: len(members) for content, members in under.items() if len(members) > 1}
    if not several:
        return None
    limit = max(FEW, COMMON * (pairs.max() + 1))
    common = {content for content, count in several.items() if count > limit}
    kept = [first[c] if c in several and c not in common else -1 for c in contents]
    return np.array(kept), len(common)


def _contents(source: Source) -> list[object]:
    """What each vector's row holds: its whole text, or without texts its vectors at every site."""
    if source.texts is not None:
        # Of a row read at several tokens the longest: beginnings that rows share make no copies of them.
        whole: dict[object, str] = {}
        for unit, text in zip(source.units.tolist(), source.texts):
            whole[unit] = max(whole.get(unit, ""), str(text), key=len)
        return [whole[unit] for unit in source.units.tolist()]
    if source.count(np.arange(len(source))) != len(source):
        return list(range(len(source)))  # sequences of several vectors are not compared
    contents: list[object] = [None] * len(source)
    for site in source.sites:
        digests: list[bytes] = []
        for first in range(0, len(source), CHUNK):
            rows = source.take(site, np.arange(first, min(first + CHUNK, len(source))))
            plain = rows.reshape(len(rows), -1).cpu().contiguous().view(torch.uint8).numpy()
            digests += [xxhash.xxh3_128_digest(row) for row in plain]
        contents = list(zip(contents, digests))
        if len(set(contents)) == len(contents):
            break
    return contents


def _refuse_across(source: Source, kept: np.ndarray) -> None:
    split = source.columns.get("split")
    if split is None:
        return
    test = np.array([str(value).lower() == "test" for value in split])
    across = np.intersect1d(kept[test & (kept >= 0)], kept[~test & (kept >= 0)])
    if not len(across):
        return
    inside, outside = (int(np.flatnonzero((kept == across[0]) & side)[0]) for side in (test, ~test))
    shown = "" if source.texts is None else f" ({_short(source.texts[inside])!r})"
    raise DataError(
        f"row {source.units[inside]} (pair {source.groups[inside]}) of the test split repeats row "
        f"{source.units[outside]} (pair {source.groups[outside]}) outside it{shown}; {len(across)} such "
        "rows: drop one of each, give both one pair and split, or set allow_duplicates=True"
    )


def _joined(groups: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Pairs that share a content under the first one's name, `[n]`."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    names, first, pair = np.unique(groups.astype(str), return_index=True, return_inverse=True)
    pair = pair.reshape(-1)
    rows = np.flatnonzero(kept >= 0)
    content = np.unique(kept[rows], return_inverse=True)[1].reshape(-1) + len(names)
    size = int(content.max()) + 1
    links = coo_array((np.ones(len(rows)), (pair[rows], content)), shape=(size, size))
    _, part = connected_components(links, directed=False)
    lead: dict[int, object] = {}
    for number in range(len(names)):
        lead.setdefault(part[number], groups[first[number]])
    return np.array([lead[part[number]] for number in pair], dtype=groups.dtype)


def _short(text: object) -> str:
    said = " ".join(str(text).split())
    return said if len(said) <= 60 else said[:59] + "…"
