"""Saved probes: a folder of safetensors, JSON and a card that gives the same numbers in any process.

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
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from veridical import files
from veridical.errors import DamagedFileError, DataError, InputError
from veridical.probes.card import card
from veridical.probes.kinds import kind
from veridical.probes.origin import Origin
from veridical.provenance import provenance

if TYPE_CHECKING:
    from veridical.probes.base import LinearProbe

FORMAT = 1
WEIGHTS, CONFIG, METRICS, PROVENANCE, CARD = (
    "weights.safetensors",
    "config.json",
    "metrics.json",
    "provenance.json",
    "README.md",
)


def save_probe(probe: LinearProbe, folder: str | Path) -> Path:
    """Saves a fitted probe into `folder`, whole or not at all where the folder is new.

    Files of the same names are replaced; others in the folder are left alone.
    """
    from sklearn.utils.validation import check_is_fitted

    check_is_fitted(probe)
    folder = Path(folder)
    origin = probe.origin_
    parts = {
        WEIGHTS: save_tensors(probe.arrays()),
        METRICS: canonical({"metrics": dict(origin.metrics), "rows": dict(origin.rows)}),
        PROVENANCE: canonical(
            provenance(
                seed=origin.seed,
                model=origin.model,
                model_fingerprint=origin.model_fingerprint,
                data_fingerprint=origin.data_fingerprint,
            )
        ),
    }
    config: dict[str, Any] = {
        "format": FORMAT,
        "kind": probe.name,
        "parameters": probe.parameters(),
        "classes": probe.classes_.tolist(),
        "classes_dtype": probe.classes_.dtype.str,
        "n_features": probe.n_features_in_,
        "n_iter": int(probe.n_iter_[0]),
        "origin": origin.to_dict(),
        "files": {name: digest(content) for name, content in parts.items()},
    }
    # The card stands outside the checksums: people may add to it.
    parts[CARD] = card(probe).encode("utf-8")
    parts[CONFIG] = canonical({**config, "checksum": digest(canonical(config))})
    write_folder(folder, parts)
    return folder


def load_probe(folder: str | Path) -> LinearProbe:
    """Loads a saved probe; a file that is not as it was written is named and refused.

    Raises:
        InputError: No probe in `folder`.
        DamagedFileError: A file is missing, cut short or altered.
    """
    folder = Path(folder)
    config = _read_config(folder)
    content = {name: read_checked(folder / name, expected) for name, expected in config["files"].items()}
    made = kind(config["kind"])
    try:
        tensors = load_tensors(content[WEIGHTS])
    except SafetensorError as error:
        raise DamagedFileError(f"{folder / WEIGHTS} is not readable safetensors ({error})") from error
    classes = np.array(config["classes"], dtype=np.dtype(config["classes_dtype"]))
    probe = made.made(config["parameters"])
    probe.restore(classes, tensors, config["n_iter"])
    probe.origin_ = Origin.from_dict(config["origin"])
    return probe


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


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"no {CONFIG} in {folder}: expected a folder that a probe was saved in")
    config = files.read_json(path)
    if not isinstance(config, dict) or not {"format", "kind"} <= config.keys():
        raise InputError(f"{path} is not the config of a probe")
    if config["format"] != FORMAT:
        raise DataError(f"{path} has format {config['format']!r}; this version reads {FORMAT}")
    checksum = config.pop("checksum", None)
    if checksum != digest(canonical(config)):
        raise DamagedFileError(f"{path} does not match its checksum; it was damaged or edited")
    return config


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
