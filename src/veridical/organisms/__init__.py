"""Embedded organisms: small models whose truth was planted, and the pairs that go with them.

They are loaded offline by name, from `data/` of a source checkout or from the installed wheel. How they are
made is in `veridical.organisms.make`; what they do is measured in the card beside each.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from veridical.errors import DamagedFileError, StoreError, unknown
from veridical.files import read_json

NAMES: tuple[str, ...] = (
    "tiny-liar",
    "tiny-liar-dpo",
    "tiny-liar-ipo",
    "tiny-liar-reward",
    "tiny-liar-rl",
    "tiny-liar-overopt",
)
PAIRS: tuple[str, ...] = ("honesty", "toxic", "safe")
CHECKSUMS = "checksums.json"


def path(name: str) -> Path:
    """Folder of the embedded organism called `name`.

    Raises:
        UnknownNameError: No organism has this name; the message gives the nearest.
    """
    if name not in NAMES:
        raise unknown("embedded organism", name, NAMES)
    return data_folder() / name


def embedded_pairs(name: str) -> Path:
    """Parquet file of the embedded pairs called `name`.

    Raises:
        UnknownNameError: No embedded pairs have this name; the message gives the nearest.
    """
    if name not in PAIRS:
        raise unknown("embedded pairs", name, PAIRS)
    return data_folder() / "pairs" / f"{name}.parquet"


def data_folder() -> Path:
    """The folder of embedded data: `veridical/_data` in an installed wheel, `data` in a source checkout.

    Raises:
        StoreError: Neither exists, as in a copy of the package without its data.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "_data", package.parent.parent / "data"):
        if (folder / "pairs").is_dir():
            return folder
    raise StoreError(
        f"the embedded data is missing: neither {package / '_data'} nor a data folder beside src exists"
    )


def verify(folder: str | Path) -> None:
    """Checks every file of an embedded folder against its `checksums.json`.

    Raises:
        DamagedFileError: A file is missing, was added, or does not have the bytes that it was published with.
    """
    folder = Path(folder)
    expected = read_json(folder / CHECKSUMS)
    found = checksums(folder)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise DamagedFileError(f"{folder / name} is missing")
        if name not in expected:
            raise DamagedFileError(f"{folder / name} is not listed in {CHECKSUMS}")
        if found[name] != expected[name]:
            raise DamagedFileError(f"{folder / name} is damaged: its sha256 is not that in {CHECKSUMS}")


def checksums(folder: str | Path) -> dict[str, str]:
    """The sha256 of every file in `folder` but `checksums.json` itself, by name."""
    files = sorted(file for file in Path(folder).iterdir() if file.is_file() and file.name != CHECKSUMS)
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
