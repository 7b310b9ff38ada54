"""What an adapter is trained on, chosen on and judged on: pairs and neutral text, each in three parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from veridical.errors import DataError, InputError
from veridical.probes.data import meets
from veridical.steering.neutral import Neutral, neutral_texts
from veridical.steering.twins import Twin, twins

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.pairs import Pairs
    from veridical.steering.adapter_config import AdapterConfig

LEAST_TEXTS = 10
CHOOSING = 64
PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Material:
    """Data of a training.

    Attributes:
        train: Contrasts that are trained on.
        val: Contrasts on which a state is chosen; those of `train` where the pairs are too few to spare any.
        test: Rows that are reported on.
        neutral: Neutral text by part.
        notes: What a reader of the figures should know.
    """

    train: list[Twin]
    val: list[Twin]
    test: Pairs
    neutral: dict[str, Neutral]
    notes: list[str] = field(default_factory=list)


def material(model: HookedModel, pairs: Pairs, config: AdapterConfig, neutral: Any = None) -> Material:
    """Parts the data by their `split` column (drawn by pair where there is none) and finds the contrasts.

    Args:
        model: The model, plain.
        pairs: Labelled pairs.
        config: `toward`, `holdout` and `seed` are read.
        neutral: What `neutral_texts` takes; the organism's own rows where not given.

    Raises:
        DataError: Nothing to learn, or no row to test on.
        InputError: Fewer than ten neutral texts.
    """
    notes: list[str] = []
    if "split" not in pairs:
        pairs = pairs.split(seed=config.seed)
        notes.append("The data have no split; 60 % of the pairs were trained on, 20 % chose, 20 % tested.")
    split = pairs["split"].astype(str)
    held = meets(_Columns(pairs), config.holdout) if config.holdout else np.zeros(len(pairs), dtype=bool)  # type: ignore[arg-type]
    tested = (split == "test") & (held if config.holdout else True)
    for part, rows in (("train", (split == "train") & ~held), ("test", tested)):
        if not rows.any():
            raise DataError(f"{pairs.name} has no row to {part} on; its splits are {sorted(set(split))}")
    train = twins(model, pairs.filter((split == "train") & ~held), config.toward)
    chosen = (split == "val") & ~held
    val = twins(model, pairs.filter(chosen), config.toward) if chosen.any() else []
    if not val:
        val = train
        notes.append("The data have no validation pairs; the state was chosen on the training pairs.")
    return Material(train, val, pairs.filter(tested), neutral_parts(model, neutral, config.seed), notes)


def neutral_parts(model: HookedModel, given: Any, seed: int) -> dict[str, Neutral]:
    """Neutral text to train on, to choose on and to report on; given texts are parted 60, 20, 20 by row."""
    if given is None:
        return {
            part: neutral_texts(model, split=part, count=CHOOSING if part == "val" else None, seed=seed)
            for part in PARTS
        }
    count = 1 if isinstance(given, str) else len(given)
    if count < LEAST_TEXTS:
        raise InputError(
            f"{count} neutral texts; a KL budget needs at least {LEAST_TEXTS}, some to train on and others to "
            "report on"
        )
    order = np.random.default_rng([seed, 3]).permutation(count)
    cuts = np.split(order, [round(0.6 * count), round(0.8 * count)])
    take = given.select if hasattr(given, "select") else lambda rows: [given[row] for row in rows]
    return {part: neutral_texts(model, take(np.sort(rows))) for part, rows in zip(PARTS, cuts)}


class _Columns:
    """Pairs as what conditions are held against."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def column(self, name: str) -> np.ndarray:
        return self.pairs[name]
