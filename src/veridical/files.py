"""Writing files so that nothing is lost or half-written: temporary file, fsync, atomic rename."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from veridical.errors import DamagedFileError, DiskFullError, InputError

UNWRITABLE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR,
    errno.ENAMETOOLONG,
)  # fmt: skip
"""A place that cannot be written to, whatever is free."""


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Writes `content` to `path` whole or not at all."""
    with replacing(path) as file:
        file.write(content)
    return Path(path)


def write_text(path: str | Path, content: str) -> Path:
    """Writes `content` as UTF-8 to `path` whole or not at all."""
    return write_bytes(path, content.encode("utf-8"))


def write_json(path: str | Path, content: Any) -> Path:
    """Writes `content` as indented JSON, keys in the order given; NaN is refused, as JSON has none."""
    return write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Reads JSON; a file that is not JSON is named as damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedFileError(
            f"{path} is not readable JSON ({error}); it was damaged or cut short"
        ) from error


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file to write that takes the place of `path` only when the block ends without an error."""
    path = Path(path)
    with explaining_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        sync_folder(path.parent)


def sync_folder(folder: str | Path) -> None:
    """Makes a rename inside `folder` durable; a no-op where the system cannot open folders."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


@contextlib.contextmanager
def explaining_disk(path: str | Path) -> Iterator[None]:
    """Turns a full disk or a folder that cannot be written into one clear line."""
    try:
        yield
    except DiskFullError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"no space left while writing {path}; what was complete before is kept: "
                "free some space and run again"
            ) from error
        if error.errno in UNWRITABLE:
            raise InputError(f"cannot write {path}: {error.strerror}") from error
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
