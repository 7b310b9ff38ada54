"""The store: a folder of shards, and the manifest that says what they are.

    manifest.json              the truth: what was asked, every file with size and checksums, the status
    shard-00000.safetensors    moments, checksums, index (row, position, token id), vectors per site
    rows.parquet               one line per data row, every column
    vocabulary.json            text of the token ids that were read
    moments.safetensors        mean and variance per site over all vectors

A shard counts once its record `shard-00000.json` exists, which is written after its data are durable; when
all are there the records are merged into the manifest. Whatever is killed in between is done again and
nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import xxhash

from veridical.activations.moments import Moments, merge
from veridical.activations.plan import Shard, TokenTable
from veridical.activations.writer import Layout, ShardFile
from veridical.errors import DamagedFileError, StoreError, StoreMismatchError
from veridical.files import explaining_disk, read_json, write_bytes, write_json
from veridical.provenance import fingerprint, provenance

if TYPE_CHECKING:
    from veridical.config import CollectConfig

FORMAT, VERSION = "veridical-activations", 1
MANIFEST, ROWS, VOCABULARY, MOMENTS = (
    "manifest.json",
    "rows.parquet",
    "vocabulary.json",
    "moments.safetensors",
)
SIDE_FILES = (ROWS, VOCABULARY, MOMENTS)


@dataclass(frozen=True)
class Request:
    """What a store is asked to hold: everything that decides its bytes, and what the model is called."""

    model: dict[str, Any]
    data: dict[str, Any]
    sites: dict[str, tuple[int, ...]]
    tokens: dict[str, Any]
    dtype: str
    batches: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        sites = {site: list(shape) for site, shape in self.sites.items()}
        return {
            "model": self.model,
            "data": self.data,
            "sites": sites,
            "tokens": self.tokens,
            "dtype": self.dtype,
            "batches": self.batches,
        }

    def identity(self) -> dict[str, Any]:
        """What decides the bytes: the same weights under another path are the same model."""
        model = {name: value for name, value in self.model.items() if name != "path"}
        return {**self.to_dict(), "model": model}

    def fingerprint(self) -> str:
        return fingerprint([json.dumps(self.identity(), sort_keys=True)])

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Request:
        return cls(**{**saved, "sites": {site: tuple(shape) for site, shape in saved["sites"].items()}})


@dataclass(frozen=True)
class Entry:
    """A shard as the manifest lists it; `checksum`, of the head of its file, is None until it is written."""

    shard: Shard
    bytes: int
    checksum: str | None = None

    @property
    def name(self) -> str:
        return f"shard-{self.shard.number:05d}"

    @property
    def file(self) -> str:
        return f"{self.name}.safetensors"

    def to_dict(self) -> dict[str, Any]:
        shard = self.shard
        return {
            "file": self.file,
            "rows": [shard.first_row, shard.last_row],
            "vectors": [shard.first_vector, shard.last_vector],
            "bytes": self.bytes,
            "checksum": self.checksum,
        }

    @classmethod
    def from_dict(cls, number: int, saved: dict[str, Any]) -> Entry:
        return cls(Shard(number, *saved["rows"], *saved["vectors"]), saved["bytes"], saved["checksum"])


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says."""

    request: Request
    entries: tuple[Entry, ...]
    files: dict[str, dict[str, Any]]
    complete: bool = False

    def layout(self, shard: Shard) -> Layout:
        return Layout(shard.vectors, self.request.sites, self.request.dtype)

    def write(self, folder: Path) -> None:
        write_json(
            folder / MANIFEST,
            {
                "format": FORMAT,
                "version": VERSION,
                "status": "complete" if self.complete else "partial",
                "request": self.request.to_dict(),
                "files": self.files,
                "shards": [entry.to_dict() for entry in self.entries],
            },
        )

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads the manifest.

        Raises:
            StoreError: No store in the folder, or one of another format.
            DamagedFileError: A manifest that cannot be read.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise StoreError(f"no activation store in {folder}: it has no {MANIFEST}")
        saved = read_json(path)
        if not isinstance(saved, dict) or saved.get("format") != FORMAT:
            raise StoreError(f"{path} is not the manifest of an activation store")
        if saved.get("version") != VERSION:
            raise StoreError(
                f"{path} has format version {saved.get('version')}; this Veridical reads {VERSION}"
            )
        try:
            return cls(
                Request.from_dict(saved["request"]),
                tuple(Entry.from_dict(i, entry) for i, entry in enumerate(saved["shards"])),
                saved["files"],
                saved["status"] == "complete",
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedFileError(f"{path} is damaged: {error!r}") from error


def prepare(
    folder: Path, request: Request, shards: list[Shard], rows: pd.DataFrame, vocabulary: dict[int, str]
) -> Manifest:
    """Makes the folder ready to be written, or to be continued; returns its manifest.

    Raises:
        StoreMismatchError: The folder holds a store of something else; names every difference.
        DamagedFileError: A shard that was complete has another size now; says how to make it again.
    """
    with explaining_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    side_files = {
        ROWS: lambda path: _write_rows(path, rows),
        VOCABULARY: lambda path: _write_vocabulary(path, vocabulary),
    }
    if (folder / MANIFEST).is_file():
        return _continue(folder, Manifest.read(folder), request, side_files)
    for old in [*folder.glob("shard-*.safetensors"), *folder.glob("shard-*.json")]:
        old.unlink()  # of a store whose manifest was deleted
    files = {name: write(folder / name) for name, write in side_files.items()}
    entries = [Entry(shard, Layout(shard.vectors, request.sites, request.dtype).size) for shard in shards]
    manifest = Manifest(request, tuple(entries), files)
    manifest.write(folder)
    return manifest


def missing(folder: Path, manifest: Manifest) -> list[int]:
    """Numbers of the shards that are still to be written."""
    return [
        entry.shard.number
        for entry in manifest.entries
        if not (folder / entry.file).is_file() or (entry.checksum is None and _record(folder, entry) is None)
    ]


def new_shard(folder: Path, manifest: Manifest, number: int, table: TokenTable) -> ShardFile:
    """Starts writing a shard; whatever an earlier run left of it is removed."""
    entry = manifest.entries[number]
    (folder / f"{entry.name}.json").unlink(missing_ok=True)
    shard = entry.shard
    return ShardFile(
        folder / entry.file, manifest.layout(shard), table.index(shard.first_row, shard.last_row)
    )


def record(folder: Path, manifest: Manifest, number: int, checksum: str) -> None:
    """Says that a shard is complete."""
    entry = manifest.entries[number]
    write_json(folder / f"{entry.name}.json", {"bytes": entry.bytes, "checksum": checksum})


def finalise(folder: Path, manifest: Manifest, config: CollectConfig) -> Manifest:
    """Merges the records and the moments of all shards, and declares the store complete."""
    from veridical.activations.source import shard_moments
    from veridical.config import to_dict

    entries = gathered(folder, manifest)
    parts = [shard_moments(folder, entry, manifest.layout(entry.shard)) for entry in entries]
    moments = {site: merge(part[site] for part in parts) for site in manifest.request.sites}
    saved = _write_file(folder / MOMENTS, moments_bytes(moments))
    done = Manifest(manifest.request, entries, {**manifest.files, MOMENTS: saved}, complete=True)
    write_json(folder / "config.json", {**to_dict(config), "store": None})
    facts = {
        "store": manifest.request.fingerprint(),
        "model": manifest.request.model,
        "data": manifest.request.data,
    }
    write_json(folder / "provenance.json", provenance(**facts))
    done.write(folder)
    for entry in entries:
        (folder / f"{entry.name}.json").unlink(missing_ok=True)
    return done


def gathered(folder: Path, manifest: Manifest) -> tuple[Entry, ...]:
    """The entries of all complete shards, with the checksums of their records."""
    absent = set(missing(folder, manifest))
    found = []
    for entry in manifest.entries:
        if entry.shard.number not in absent:
            found.append(Entry(entry.shard, entry.bytes, entry.checksum or _record(folder, entry)))
    return tuple(found)


def remove_leftovers(folder: Path) -> None:
    """Removes temporary files of a killed run."""
    names = (
        "manifest.json",
        ROWS,
        VOCABULARY,
        MOMENTS,
        "config.json",
        "provenance.json",
        "section.json",
        "shard-",
    )
    for name in names:
        for old in folder.glob(f".{name}*.tmp"):
            old.unlink(missing_ok=True)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds the folder against a second run that would write it at the same time."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    with explaining_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(
                f"another process is writing {folder}; wait for it or choose another folder"
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def check_file(path: Path, size: int) -> None:
    """Raises DamagedFileError for a file that is missing or of another size; says what to do."""
    advice = "delete it and run the same collection again: only this file is made again"
    if not path.is_file():
        raise DamagedFileError(f"{path} is missing; run the same collection again to make it")
    found = path.stat().st_size
    if found != size:
        raise DamagedFileError(f"{path} has {found:,} bytes, not the {size:,} that were written; {advice}")


def check_content(path: Path, saved: dict[str, Any]) -> bytes:
    """The content of a small file, checked against size and checksum."""
    check_file(path, saved["bytes"])
    content = path.read_bytes()
    if xxhash.xxh3_128_hexdigest(content) != saved["checksum"]:
        raise DamagedFileError(
            f"{path} is not what was written (its checksum differs); delete it and run the same collection "
            "again"
        )
    return content


def moments_bytes(moments: dict[str, Moments]) -> bytes:
    """Merged moments as safetensors."""
    import torch
    from safetensors.torch import save

    count = next(iter(moments.values())).count
    tensors = {"count": torch.tensor([count], dtype=torch.int64)}
    for site, moment in moments.items():
        tensors[f"mean:{site}"] = moment.mean
        tensors[f"m2:{site}"] = moment.m2
    return save(tensors)


def _continue(
    folder: Path,
    manifest: Manifest,
    request: Request,
    side_files: dict[str, Callable[[Path], dict[str, Any]]],
) -> Manifest:
    different = differences(manifest.request.identity(), request.identity())
    if different:
        raise StoreMismatchError(
            f"{folder} holds a store of something else: {'; '.join(different)} (there -> asked). Choose "
            "another folder, or delete this one"
        )
    for entry in gathered(folder, manifest):
        check_file(folder / entry.file, entry.bytes)  # a lost one is made again, a damaged one is named
    for entry in manifest.entries:
        if entry.checksum is not None:  # a run was killed between the manifest and removing the records
            (folder / f"{entry.name}.json").unlink(missing_ok=True)
    files = dict(manifest.files)
    for name, write in side_files.items():
        if (folder / name).is_file():
            check_content(folder / name, files[name])
        else:
            files[name] = write(folder / name)
    absent = set(missing(folder, manifest))
    entries = [Entry(e.shard, e.bytes, None) if e.shard.number in absent else e for e in manifest.entries]
    complete = manifest.complete and not absent and (folder / MOMENTS).is_file()
    continued = Manifest(manifest.request, tuple(entries), files, complete)
    if continued != manifest:
        continued.write(folder)
    return continued


def differences(there: dict[str, Any], asked: dict[str, Any], under: str = "") -> list[str]:
    """One phrase for every leaf of two nested dictionaries that differs."""
    found = []
    for key in dict.fromkeys([*there, *asked]):
        old, new = there.get(key), asked.get(key)
        if old == new:
            continue
        if key == "sites":
            old, new = [list(sites) for sites in (there[key], asked[key])]
        name = f"{under}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{name} ")
        else:
            found.append(f"{name}: {_short(old)} -> {_short(new)}")
    return found


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _record(folder: Path, entry: Entry) -> str | None:
    path = folder / f"{entry.name}.json"
    return read_json(path)["checksum"] if path.is_file() else None


def _write_rows(path: Path, rows: pd.DataFrame) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from veridical.activations.data import as_table

    sink = pa.BufferOutputStream()
    pq.write_table(as_table(rows), sink, compression="zstd")
    return _write_file(path, sink.getvalue().to_pybytes())


def _write_vocabulary(path: Path, vocabulary: dict[int, str]) -> dict[str, Any]:
    content = json.dumps({str(i): text for i, text in sorted(vocabulary.items())}, ensure_ascii=False)
    return _write_file(path, content.encode())


def _write_file(path: Path, content: bytes) -> dict[str, Any]:
    write_bytes(path, content)
    return {"bytes": len(content), "checksum": xxhash.xxh3_128_hexdigest(content)}
