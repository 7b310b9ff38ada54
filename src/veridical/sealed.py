"""Sealed folders: what is saved in parts, and refused when a part is not as it was written.

`config.json` is written last and holds the checksums of the other files and of itself: a folder without it
was cut short, and a folder whose bytes differ is refused. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as parse_tensors
from safetensors.numpy import save as safetensors_bytes

from veridical import files
from veridical.errors import DamagedFileError, DataError, InputError

FORMAT = 1
WEIGHTS, CONFIG, METRICS, PROVENANCE, CARD = (
    "weights.safetensors",
    "config.json",
    "metrics.json",
    "provenance.json",
    "README.md",
)


def write_sealed(
    folder: str | Path,
    config: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    *,
    metrics: Mapping[str, Any],
    provenance: Mapping[str, Any],
    card: str,
) -> Path:
    """Writes weights, metrics, provenance, a card and the config that seals them.

    Whole or not at all where the folder is new; else files of the same names are replaced and others left
    alone. The card stands outside the checksums: people may add to it.
    """
    folder = Path(folder)
    parts = {
        WEIGHTS: tensor_bytes(arrays),
        METRICS: canonical(metrics),
        PROVENANCE: canonical(provenance),
    }
    sums = {name: digest(content) for name, content in parts.items()}
    body = {"format": FORMAT, **config, "files": sums}
    parts[CARD] = card.encode("utf-8")
    parts[CONFIG] = canonical({**body, "checksum": digest(canonical(body))})
    write_folder(folder, parts)
    return folder


def read_sealed(folder: str | Path, key: str, what: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The config and the arrays of a sealed folder, after every check.

    Args:
        folder: Where it was saved.
        key: What its config must have.
        what: What is expected there, such as "probe".

    Raises:
        InputError: No such thing in `folder`.
        DamagedFileError: A file is missing, cut short or altered.
    """
    folder = Path(folder)
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"no {CONFIG} in {folder}: expected a folder that {_a(what)} was saved in")
    config = files.read_json(path)
    if not isinstance(config, dict) or not {"format", key} <= config.keys():
        raise InputError(f"{path} is not the config of {_a(what)}")
    config = unsealed(config, path)
    content = {name: read_checked(folder / name, expected) for name, expected in config["files"].items()}
    return config, parsed(content[WEIGHTS], folder / WEIGHTS)


def unsealed(body: Any, path: Path) -> dict[str, Any]:
    """A JSON object less its own checksum; one of another format, or that was altered, is refused."""
    if not isinstance(body, dict):
        raise DamagedFileError(f"{path} does not match its checksum; it was damaged or edited")
    if body.get("format") != FORMAT:
        raise DataError(f"{path} has format {body.get('format')!r}; this version reads {FORMAT}")
    checksum = body.pop("checksum", None)
    if checksum != digest(canonical(body)):
        raise DamagedFileError(f"{path} does not match its checksum; it was damaged or edited")
    return body


def tensor_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Arrays as the content of a safetensors file."""
    # safetensors writes the memory as it lies, whatever the strides of a view are.
    return safetensors_bytes({name: np.ascontiguousarray(values) for name, values in arrays.items()})


def parsed(content: bytes, path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file."""
    try:
        return parse_tensors(content)
    except SafetensorError as error:
        raise DamagedFileError(f"{path} is not readable safetensors ({error})") from error


def write_folder(folder: Path, parts: Mapping[str, bytes]) -> None:
    """Writes `parts` in order: by one rename where `folder` is new, else one by one, the last sealing all."""
    folder = Path(folder)
    if folder.exists():
        for name, content in parts.items():
            files.write_bytes(folder / name, content)
        return
    with files.explaining_disk(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            for name, content in parts.items():
                files.write_bytes(temporary / name, content)
            temporary.chmod(0o755)
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        files.sync_folder(folder.parent)


def read_checked(path: Path, expected: str) -> bytes:
    """The bytes of a file whose checksum is as expected; otherwise it is named as damaged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DamagedFileError(f"{path} is missing; the folder was cut short") from error
    if digest(content) != expected:
        raise DamagedFileError(f"{path} does not match its checksum; it was damaged, edited or cut short")
    return content


def digest(content: bytes) -> str:
    """SHA-256 of a file's content."""
    return "sha256:" + hashlib.sha256(content).hexdigest()


def canonical(content: Any) -> bytes:
    """The bytes that a checksum is taken of."""
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def _a(what: str) -> str:
    return f"an {what}" if what[0] in "aeiou" else f"a {what}"
