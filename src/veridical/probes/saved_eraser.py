"""Saved erasers: a folder of the same form as a saved probe's, with a card that says what is left."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sklearn.utils.validation import check_is_fitted

from veridical.errors import unknown
from veridical.probes.card import eraser_card
from veridical.probes.erasure import Eraser, LeaceEraser, ProjectionEraser
from veridical.probes.origin import Origin
from veridical.provenance import provenance
from veridical.sealed import read_sealed, write_sealed

if TYPE_CHECKING:
    from collections.abc import Mapping

KINDS: Mapping[str, type[Eraser]] = {cls.name: cls for cls in (LeaceEraser, ProjectionEraser)}


def save_eraser(eraser: Eraser, folder: str | Path) -> Path:
    """Saves a fitted eraser into `folder`, whole or not at all where the folder is new.

    The map is kept to the last bit; the running covariances of LEACE are not, so a loaded one takes no more
    batches.
    """
    check_is_fitted(eraser)
    origin = eraser.origin_
    config = {
        "eraser": eraser.name,
        "parameters": eraser.parameters(),
        "n_features": len(eraser.centre_),
        "rank": eraser.rank,
        "origin": origin.to_dict(),
    }
    return write_sealed(
        folder,
        config,
        eraser.arrays(),
        metrics={"metrics": dict(origin.metrics), "rows": dict(origin.rows)},
        provenance=provenance(**origin.facts()),
        card=eraser_card(eraser),
    )


def load_eraser(folder: str | Path) -> Eraser:
    """Loads a saved eraser; a file that is not as it was written is named and refused.

    Raises:
        InputError: No eraser in `folder`.
        DamagedFileError: A file is missing, cut short or altered.
    """
    config, arrays = read_sealed(folder, "eraser", "eraser")
    if config["eraser"] not in KINDS:
        raise unknown("kind of eraser", config["eraser"], KINDS)
    eraser = KINDS[config["eraser"]].restored(arrays, config["parameters"])
    eraser.origin_ = Origin.from_dict(config["origin"])
    return eraser
