"""Activations of a model over a data set: vectors by site, with labels, groups and tokens beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from veridical.activations import source as sources
from veridical.activations.data import from_table
from veridical.activations.moments import Moments, merge
from veridical.activations.reader import Reader
from veridical.activations.source import FolderSource, Source
from veridical.activations.store import (
    MOMENTS,
    ROWS,
    VOCABULARY,
    Manifest,
    Request,
    check_content,
    gathered,
)
from veridical.activations.writer import as_view
from veridical.errors import DamagedFileError, InputError, StoreError, unknown
from veridical.provenance import fingerprint

if TYPE_CHECKING:
    from veridical.reporting.section import Section
    from veridical.sites import Site

CHUNK_BYTES = 8 << 20


class Activations:
    """Vectors by site, one for each token that was read, in data order.

    `acts["resid_post.3"]` is a tensor `[vectors, d]` (`[vectors, heads, d_head]` for a site per head) in the
    stored dtype. It is a memory map where one shard holds the site, otherwise it is read into memory. For
    more than memory holds use `chunks` (in order) or `batches` (shuffled).

    Attributes:
        rows: One line per data row with every column of the data.
        folder: Where the store is; None for activations in memory.
    """

    def __init__(
        self,
        source: Source,
        rows: pd.DataFrame,
        vocabulary: dict[int, str],
        moments: dict[str, Moments] | None,
        request: Request,
        picked: np.ndarray | None = None,
        parent: str = "",
    ):
        self.rows = rows
        self._source, self._vocabulary, self._request = source, vocabulary, request
        self._moments, self._picked, self._parent = moments, picked, parent
        self.folder: Path | None = getattr(source, "folder", None)

    @classmethod
    def open(cls, folder: str | Path, *, partial: bool = False) -> Activations:
        """Opens a store that `collect` wrote.

        Args:
            folder: Folder of the store.
            partial: Open what is complete of a store that was not finished.

        Raises:
            StoreError: No store, or one that is not finished and `partial` is not set.
            DamagedFileError: A file has another size than was written. Contents are checked when first read.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        entries = gathered(folder, manifest)
        if manifest.complete:
            entries = manifest.entries
        elif not partial:
            raise StoreError(
                f"the store {folder} is not finished: {len(entries)} of {len(manifest.entries)} shards. Run "
                "the same collection again to complete it, or open it with partial=True"
            )
        source = FolderSource(folder, manifest, entries)
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = from_table(pq.read_table(pa.BufferReader(check_content(folder / ROWS, manifest.files[ROWS]))))
        words = json.loads(check_content(folder / VOCABULARY, manifest.files[VOCABULARY]))
        moments = _read_moments(folder, manifest) if manifest.complete else None
        parent = "" if manifest.complete else f"shards {[entry.shard.number for entry in entries]}"
        return cls(
            source,
            rows,
            {int(i): word for i, word in words.items()},
            moments,
            manifest.request,
            parent=parent,
        )

    @property
    def sites(self) -> list[str]:
        """Canonical names of the sites, in order of depth."""
        return list(self._source.shapes)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the stored vectors."""
        return self._source.dtype

    def __len__(self) -> int:
        """Number of vectors at each site."""
        return (
            self._source.bounds[-1][1] if self._picked is None and self._source.bounds else len(self._picks)
        )

    def __contains__(self, site: object) -> bool:
        return _canonical(site) in self._source.shapes

    def __getitem__(self, site: str | Site) -> Tensor:
        name = self._site(site)
        bounds = self._source.bounds
        if self._picked is None and len(bounds) == 1:
            return self._source.part(name, 0)
        if self._picked is not None:
            return self.take(name, np.arange(len(self)))
        out = torch.empty(len(self), *self._source.shapes[name], dtype=self.dtype)
        for part, (first, last) in enumerate(bounds):
            self._source.read(name, part, 0, as_view(out[first:last]))
        return out

    def take(self, site: str | Site, vectors: np.ndarray) -> Tensor:
        """The vectors of a site at these lines of `index`, `[len(vectors), ...]`, in the stored dtype.

        Shards are memory maps, so that no more is read than what is asked for.
        """
        name, places = self._site(site), np.asarray(vectors, dtype=np.int64)
        if places.ndim != 1 or (len(places) and not 0 <= places.min() <= places.max() < len(self)):
            raise InputError(f"vectors are {places.shape}; expected numbers from 0 to {len(self) - 1}")
        if self._picked is not None:
            places = self._picked[places]
        out = torch.empty(len(places), *self._source.shapes[name], dtype=self.dtype)
        parts = np.searchsorted([last for _, last in self._source.bounds], places, side="right")
        for part in np.unique(parts):
            here = np.flatnonzero(parts == part)
            inside = places[here] - self._source.bounds[part][0]
            out[_run(here)] = self._source.part(name, int(part))[_run(inside)]
        return out

    def chunks(self, site: str | Site, size: int | None = None) -> Iterator[Tensor]:
        """The vectors of a site in order, `size` at a time (about 8 MiB by default), in constant memory."""
        name = self._site(site)
        width = int(np.prod(self._source.shapes[name])) * self.dtype.itemsize
        size = size or max(1, CHUNK_BYTES // width)
        if self._picked is None:
            yield from sources.chunks(self._source, name, size)
        else:
            yield from self.batches(size, sites=name, shuffle=False, buffer_mb=16)

    def batches(
        self,
        size: int,
        *,
        sites: str | list[str] | None = None,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = 1,
        drop_last: bool = False,
        buffer_mb: int = 96,
    ) -> Reader:
        """A stream of batches in constant memory, shuffled, with exact resume.

        Args:
            size: Vectors in a batch.
            sites: One site for batches that are tensors `[size, d]`; several (all by default) for
                dictionaries.
            seed: Decides the order, together with the epoch.
            shuffle: False for data order.
            epochs: Epochs of one `for` loop; None never ends.
            drop_last: Leave out a last batch that is smaller.
            buffer_mb: Memory for shuffling. More mixes wider.
        """
        single = isinstance(sites, str) and not any(mark in sites for mark in "*?[,")
        return Reader(
            self._source, self._picked, self._match(sites), size, single=single, seed=seed, shuffle=shuffle,
            epochs=epochs, drop_last=drop_last, buffer_mb=buffer_mb, fingerprint=self.fingerprint,
        )  # fmt: skip

    @cached_property
    def index(self) -> pd.DataFrame:
        """One line per vector: `row` (line of `rows`), `position` (among the row's real tokens, -1 where
        tokens are averaged), `token_id`, `token`."""
        found = self._source.index()
        if self._picked is not None:
            found = {name: values[self._picked] for name, values in found.items()}
        row = found["row"] if self._picked is None else np.searchsorted(self._kept_rows, found["row"])
        ids = np.array(sorted(self._vocabulary), dtype=np.int64)
        words = [self._vocabulary[i] for i in ids.tolist()]
        token = np.array([*words, None], dtype=object)
        place = np.searchsorted(ids, found["token_id"])
        place = np.where(np.isin(found["token_id"], ids), place, len(ids))
        return pd.DataFrame(
            {"row": row, "position": found["position"], "token_id": found["token_id"], "token": token[place]}
        )

    def labels(self, column: str) -> np.ndarray:
        """A column of `rows` for every vector, shape `[vectors]`."""
        if column not in self.rows.columns:
            raise unknown("column", column, self.rows.columns)
        return self.rows[column].to_numpy()[self.index["row"].to_numpy()]

    @property
    def groups(self) -> np.ndarray:
        """The pair of every vector, for splits that keep pairs together; its row where there are no pairs."""
        return self.labels("pair") if "pair" in self.rows.columns else self.index["row"].to_numpy()

    @cached_property
    def moments(self) -> Mapping[str, Moments]:
        """Count, mean and variance per site, float64, over all vectors as they are stored."""
        return _LazyMoments(self, self._moments)

    def filter(self, mask: Any = None, **equals: Any) -> Activations:
        """The activations of some rows, without copying vectors.

        Args:
            mask: Booleans, one per row, or a function from `rows` to them.
            **equals: Columns and the value (or list of values) that a row must have there.
        """
        keep = np.ones(len(self.rows), dtype=bool)
        if mask is not None:
            given = mask(self.rows) if isinstance(mask, Callable) else mask
            given = np.asarray(given)
            if given.shape != keep.shape or given.dtype != bool:
                raise InputError(
                    f"mask is {given.dtype} of shape {given.shape}; expected one boolean for each of "
                    f"{len(keep)} rows"
                )
            keep &= given
        for column, wanted in equals.items():
            if column not in self.rows.columns:
                raise unknown("column", column, self.rows.columns)
            values = list(wanted) if isinstance(wanted, list | tuple | set) else [wanted]
            keep &= self.rows[column].isin(values).to_numpy()
        if not keep.any():
            raise InputError("the filter keeps no row")
        vectors = np.flatnonzero(keep[self.index["row"].to_numpy()])
        picked = vectors if self._picked is None else self._picked[vectors]
        rows = self.rows.loc[keep].reset_index(drop=True)
        made = Activations(self._source, rows, self._vocabulary, None, self._request, picked, self._parent)
        made._kept_rows = self._kept_rows[keep]
        return made

    def verify(self) -> None:
        """Reads every byte of the store and compares it with its checksum.

        Raises:
            DamagedFileError: Names the file.
        """
        if isinstance(self._source, FolderSource):
            self._source.check_all()

    def to_frame(self) -> pd.DataFrame:
        """One line per vector: its token, and every column of its row."""
        row = self.index["row"].to_numpy()
        beside = self.rows.iloc[row].reset_index(drop=True)
        return pd.concat([self.index, beside.drop(columns=self.index.columns, errors="ignore")], axis=1)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of what was asked (model, data, sites, tokens, dtype) and of the rows that are kept."""
        picks = b"" if self._picked is None else self._picked.tobytes()
        return fingerprint([self._request.fingerprint(), self._parent, picks])

    def report_section(self) -> Section:
        """What was read, where, and how large it is."""
        from veridical.activations.section import section

        return section(self)

    @property
    def request(self) -> Request:
        """What was asked of `collect`, with fingerprints of model and data."""
        return self._request

    def __repr__(self) -> str:
        places = f", in {self.folder}" if self.folder else ""
        tokens = self._request.tokens["selection"]
        return (
            f"Activations({len(self.sites)} sites, {len(self.rows):,} rows, {len(self):,} vectors "
            f"({tokens} token), {str(self.dtype).removeprefix('torch.')}{places})"
        )

    def _repr_html_(self) -> str:
        from veridical.activations.section import table

        return f"<p>{escape(repr(self))}</p>" + str(table(self).to_html(index=False, border=0))

    @cached_property
    def _kept_rows(self) -> np.ndarray:
        return np.arange(len(self.rows))

    @property
    def _picks(self) -> np.ndarray:
        return np.empty(0, dtype=np.int64) if self._picked is None else self._picked

    def _site(self, site: str | Site) -> str:
        name = _canonical(site)
        if name not in self._source.shapes:
            raise unknown("site", site, self.sites, "collect it to read it")
        return name

    def _match(self, sites: str | list[str] | tuple[str, ...] | None) -> list[str]:
        if sites is None:
            return self.sites
        from fnmatch import fnmatchcase

        from veridical.sites import Site

        wanted = sites.split(",") if isinstance(sites, str) else list(sites)
        found: list[str] = []
        for one in wanted:
            if isinstance(one, str) and any(mark in one for mark in "*?["):
                names = [
                    n for n in self.sites if fnmatchcase(n, one) or fnmatchcase(Site.parse(n).short, one)
                ]
                if not names:
                    raise unknown("site", one, self.sites, "collect it to read it")
                found += names
            else:
                found.append(self._site(one.strip() if isinstance(one, str) else one))
        return [name for name in self.sites if name in found]


class _LazyMoments(Mapping[str, Moments]):
    """Moments by site: as stored, or for a filtered view computed when first asked for."""

    def __init__(self, acts: Activations, known: dict[str, Moments] | None):
        self._acts, self._known = acts, dict(known or {})

    def __getitem__(self, site: str | Site) -> Moments:
        name = self._acts._site(site)
        if name not in self._known:
            empty = Moments.empty(self._acts._source.shapes[name])
            self._known[name] = merge([empty, *(Moments.of(chunk) for chunk in self._acts.chunks(name))])
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._acts.sites)

    def __len__(self) -> int:
        return len(self._acts.sites)


def _run(places: np.ndarray) -> slice | Tensor:
    """Places as a slice where they follow each other, which needs no copy."""
    first, last = int(places[0]), int(places[-1])
    if last - first + 1 == len(places) and bool((np.diff(places) == 1).all()):
        return slice(first, last + 1)
    return torch.from_numpy(places)


def _canonical(site: Any) -> str:
    from veridical.sites import Site

    if isinstance(site, Site):
        return site.name
    try:
        return Site.parse(str(site)).name
    except InputError:
        return str(site)


def _read_moments(folder: Path, manifest: Manifest) -> dict[str, Moments]:
    from safetensors.torch import load

    if MOMENTS not in manifest.files:
        raise DamagedFileError(f"{folder} has no {MOMENTS} in its manifest; run the same collection again")
    tensors = load(check_content(folder / MOMENTS, manifest.files[MOMENTS]))
    count = int(tensors["count"])
    return {
        site: Moments(count, tensors[f"mean:{site}"], tensors[f"m2:{site}"])
        for site in manifest.request.sites
    }
