"""Saved probes: a folder of safetensors, JSON and a card that gives the same numbers in any process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from veridical.probes.card import card
from veridical.probes.kinds import kind
from veridical.probes.origin import Origin
from veridical.provenance import provenance
from veridical.sealed import read_sealed, write_sealed

if TYPE_CHECKING:
    from veridical.probes.base import LinearProbe


def save_probe(probe: LinearProbe, folder: str | Path) -> Path:
    """Saves a fitted probe into `folder`, whole or not at all where the folder is new.

    Files of the same names are replaced; others in the folder are left alone.
    """
    from sklearn.utils.validation import check_is_fitted

    check_is_fitted(probe)
    origin = probe.origin_
    config = {
        "kind": probe.name,
        "parameters": probe.parameters(),
        "classes": probe.classes_.tolist(),
        "classes_dtype": probe.classes_.dtype.str,
        "n_features": probe.n_features_in_,
        "n_iter": int(probe.n_iter_[0]),
        "origin": origin.to_dict(),
    }
    return write_sealed(
        folder,
        config,
        probe.arrays(),
        metrics={"metrics": dict(origin.metrics), "rows": dict(origin.rows)},
        provenance=provenance(**origin.facts()),
        card=card(probe),
    )


def load_probe(folder: str | Path) -> LinearProbe:
    """Loads a saved probe; a file that is not as it was written is named and refused.

    Raises:
        InputError: No probe in `folder`.
        DamagedFileError: A file is missing, cut short or altered.
    """
    config, tensors = read_sealed(folder, "kind", "probe")
    probe = kind(config["kind"]).made(config["parameters"])
    classes = np.array(config["classes"], dtype=np.dtype(config["classes_dtype"]))
    probe.restore(classes, tensors, config["n_iter"])
    probe.origin_ = Origin.from_dict(config["origin"])
    return probe
