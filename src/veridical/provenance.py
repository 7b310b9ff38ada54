"""What made a result: versions, seed and fingerprints, saved beside every output."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from importlib import metadata
from typing import Any

PACKAGES = (
    "veridical",
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "numpy",
    "scikit-learn",
    "transformer-lens",
    "trl",
    "peft",
    "accelerate",
)


def provenance(**facts: Any) -> dict[str, Any]:
    """Versions of what computes, and the `facts` given (seed, fingerprints, ...), as plain JSON values."""
    return {"python": platform.python_version(), "packages": versions(), **facts}


def versions() -> dict[str, str]:
    """Installed versions of the packages that can change a number; those not installed are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def fingerprint(parts: Iterable[str | bytes]) -> str:
    """A short stable digest of `parts` (BLAKE2b, 32 hex digits); the boundaries between parts count."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part.encode("utf-8") if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()
