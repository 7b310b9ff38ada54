"""Checkpoints of a training run: whole or not there, checksummed, the last two kept.

    run.json                                what was asked; another run in the folder is refused
    checkpoints/00000120.safetensors        every tensor of the state after step 120
    checkpoints/00000120.json               the rest of it, and the checksum of the tensors
    members/<name>.safetensors, .json       the weights of a member that is finished, and what became of it

A checkpoint counts once its `.json` exists, which is written after the tensors are durable.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash
from safetensors.torch import load, save
from torch import Tensor

from veridical.errors import DamagedFileError, StoreMismatchError
from veridical.files import read_json, write_bytes, write_json

log = logging.getLogger(__name__)
RUN, CHECKPOINTS, MEMBERS = "run.json", "checkpoints", "members"
KEPT = 2


class Folder:
    """The folder of a run.

    Args:
        path: Where it is, made when first written to.
        asked: What decides the run's numbers, as plain JSON values.

    Raises:
        StoreMismatchError: The folder holds a run of something else; names what differs.
    """

    def __init__(self, path: str | Path, asked: Mapping[str, Any]) -> None:
        self.path = Path(path)
        asked = json.loads(json.dumps(asked))
        file = self.path / RUN
        if not file.is_file():
            write_json(file, asked)
        elif (found := read_json(file)) != asked:
            raise StoreMismatchError(
                f"{self.path} holds another training run: {_difference(found, asked)}. Choose another store, "
                "or delete this one"
            )
        for leftover in self.path.glob("*/.*.tmp"):  # of a run that was killed while it wrote
            leftover.unlink(missing_ok=True)

    def write(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Writes the checkpoint after `step`, then deletes all but the last two.

        Raises:
            DiskFullError: No space; the checkpoints before are as they were.
        """
        write_pair(self._checkpoint(step), tensors, state)
        for old in self.steps()[:-KEPT]:
            for suffix in (".json", ".safetensors"):
                with contextlib.suppress(FileNotFoundError):
                    self._checkpoint(old).with_suffix(suffix).unlink()

    def latest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The last checkpoint whose bytes are those that were written; None where there is none.

        Raises:
            DamagedFileError: There are checkpoints, and all are damaged.
        """
        damaged = None
        for step in reversed(self.steps()):
            try:
                return read_pair(self._checkpoint(step))
            except DamagedFileError as error:
                damaged = error
                log.warning("%s; going back to the checkpoint before", error)
        if damaged is not None:
            raise damaged
        return None

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are complete, in order."""
        return sorted(int(file.stem) for file in (self.path / CHECKPOINTS).glob("*.json"))

    def write_member(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Keeps the weights of a finished member."""
        write_pair(self.path / MEMBERS / name, tensors, facts)

    def member(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What `write_member` kept; None where there is nothing."""
        stem = self.path / MEMBERS / name
        return read_pair(stem) if stem.with_name(stem.name + ".json").is_file() else None

    def _checkpoint(self, step: int) -> Path:
        return self.path / CHECKPOINTS / f"{step:08d}"


def write_pair(stem: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Writes tensors, then the facts with their checksum, each whole or not at all."""
    content = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    write_bytes(stem.with_name(stem.name + ".safetensors"), content)
    checksum = xxhash.xxh3_128_hexdigest(content)
    write_json(stem.with_name(stem.name + ".json"), {"checksum": checksum, **facts})


def read_pair(stem: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_pair` wrote.

    Raises:
        DamagedFileError: Names the file.
    """
    facts = read_json(stem.with_name(stem.name + ".json"))
    file = stem.with_name(stem.name + ".safetensors")
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise DamagedFileError(f"{file} is missing") from error
    if xxhash.xxh3_128_hexdigest(content) != facts.pop("checksum", None):
        raise DamagedFileError(f"{file} is damaged: its bytes are not those that were written")
    return load(content), facts


def _difference(found: Any, asked: Any, where: str = "") -> str:
    """The first place at which two JSON values differ, in words."""
    if isinstance(found, dict) and isinstance(asked, dict):
        for name in [*found, *(name for name in asked if name not in found)]:
            if found.get(name) != asked.get(name):
                return _difference(
                    found.get(name), asked.get(name), f"{where}.{name}" if where else str(name)
                )
    if isinstance(found, list) and isinstance(asked, list):
        for number, (one, other) in enumerate(zip(found, asked)):
            if one != other:
                return _difference(one, other, f"{where}[{number}]")
        return f"{where} has {len(found)} entries there, {len(asked)} here"
    return f"{where} is {found!r} there, {asked!r} here"
