"""The trace of a generation: one line for each thing asked of the model, kept as it goes.

A JSON Lines file: a head that says what was asked for, then the lines of one step (the same stage for one
batch of prompts) after those of another. Each line carries its checksum, and the number of lines of its step:
a step that a kill left incomplete is cut off when the file is opened again, a damaged line is named.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veridical.errors import DamagedFileError, InputError, StoreMismatchError
from veridical.files import explaining_disk, sync_folder

Line = dict[str, Any]
SUM = "checksum"


class Trace:
    """A trace that is written to; made by `open_trace`."""

    def __init__(self, path: Path, steps: list[list[Line]], size: int) -> None:
        self.path, self._size = path, size
        self.steps = steps

    def step(self, number: int) -> list[Line] | None:
        """The lines of a step that was done before, or None."""
        return self.steps[number] if number < len(self.steps) else None

    def add(self, lines: Sequence[Mapping[str, Any]]) -> list[Line]:
        """Writes the next step to disk and returns its lines.

        Raises:
            DiskFullError: Steps that were complete are kept.
        """
        made = [{"step": len(self.steps), "of": len(lines), **line} for line in lines]
        content = b"".join(map(_packed, made))
        with explaining_disk(self.path), self.path.open("r+b") as file:
            file.seek(self._size)  # over what a step that failed half-way may have left
            file.truncate()
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self._size += len(content)
        self.steps.append([json.loads(_body(line)) for line in made])
        return self.steps[-1]


def open_trace(path: Path, head: Mapping[str, Any]) -> Trace:
    """The trace at `path`, to go on with, or a new one.

    Raises:
        StoreMismatchError: It was made from something else than `head`; names the first difference.
        DamagedFileError: A line is not as it was written.
    """
    path = Path(path)
    if not path.is_file() or b"\n" not in path.read_bytes():  # not even the head is whole
        content = _packed({"asked": head})
        with explaining_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        sync_folder(path.parent)
        return Trace(path, [], len(content))
    there, steps, size = _read(path)
    for name, value in json.loads(_body(head)).items():
        if there.get(name) != value:
            old, new = there.get(name), value
            if isinstance(value, dict) and isinstance(old, dict):
                name = next(key for key in value if old.get(key) != value[key])
                old, new = old.get(name), value[name]
            raise StoreMismatchError(
                f"{path.parent} holds a run with {name} = {old!r}, asked for is {new!r}; give another folder "
                "or delete it"
            )
    return Trace(path, steps, size)


def read_trace(path: str | Path) -> tuple[dict[str, Any], list[Line]]:
    """(what was asked for, every line of every whole step).

    Raises:
        InputError: No trace there.
        DamagedFileError: A line is not as it was written.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no trace at {path}")
    head, steps, _ = _read(path)
    return head, [line for step in steps for line in step]


def _read(path: Path) -> tuple[dict[str, Any], list[list[Line]], int]:
    """Head, whole steps, and where the last of them ends."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    lines = [_unpacked(line, number, path) for number, line in enumerate(whole.split(b"\n")[:-1], start=1)]
    if not lines or "asked" not in lines[0]:
        raise DamagedFileError(
            f"{path} does not begin with what was asked for; it is no trace or was damaged"
        )
    ends, at = [], 0
    for line in whole.split(b"\n")[:-1]:
        at += len(line) + 1
        ends.append(at)
    steps: list[list[Line]] = []
    done, begin = 1, 1
    while begin < len(lines):
        count = lines[begin]["of"]
        if begin + count > len(lines):
            break
        steps.append(lines[begin : begin + count])
        begin += count
        done = begin
    return lines[0]["asked"], steps, ends[done - 1]


def _packed(line: Mapping[str, Any]) -> bytes:
    body = _body(line)
    return f"{body[:-1]}, {json.dumps(SUM)}: {json.dumps(_sum(body))}}}\n".encode()


def _unpacked(line: bytes, number: int, path: Path) -> Line:
    try:
        found = json.loads(line)
        said = found.pop(SUM)
    except (ValueError, KeyError, TypeError, AttributeError):
        found, said = {}, None
    if said is None or said != _sum(_body(found)):
        raise DamagedFileError(f"{path}, line {number} does not match its checksum; it was damaged or edited")
    return found


def _body(line: Mapping[str, Any]) -> str:
    body = json.dumps(line, ensure_ascii=False, allow_nan=False)
    try:
        body.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold and UTF-8 can not
        return json.dumps(line, allow_nan=False)
    return body


def _sum(body: str) -> str:
    return hashlib.blake2b(body.encode(), digest_size=8).hexdigest()
