"""What an adapter is trained on, chosen on and judged on: pairs and neutral text, each in three parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from veridical.errors import DataError, InputError
from veridical.probes.data import meets
from veridical.steering.neutral import Neutral, neutral_texts, speaks_as_organism
from veridical.steering.twins import Twin, twins

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.pairs import Pairs
    from veridical.steering.adapter_config import AdapterConfig

LEAST_TEXTS = 10
CONDUCT = 96
FEW = 72
"""Neutral texts on which a state is chosen, and on which every strength of the dial is measured."""
PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Material:
    """Data of a training.

    Attributes:
        train: Contrasts that are trained on.
        val: Contrasts on which a state is chosen; those of `train` where the pairs are too few to spare any.
        test: Rows that are reported on.
        neutral: Neutral text by part: train, val, test, and dial, a part of test.
        kept: Other behaviour that training holds still beside the neutral text; None where none was given.
        notes: What a reader of the figures should know.
    """

    train: list[Twin]
    val: list[Twin]
    test: Pairs
    neutral: dict[str, Neutral]
    kept: Neutral | None = None
    notes: list[str] = field(default_factory=list)


def material(
    model: HookedModel, pairs: Pairs, config: AdapterConfig, neutral: Any = None, kept: Any = None
) -> Material:
    """Parts the data by their `split` column (drawn by pair where there is none) and finds the contrasts.

    Args:
        model: The model, plain.
        pairs: Labelled pairs.
        config: `towards`, `holdout` and `seed` are read.
        neutral: What `neutral_texts` takes; the organism's own rows where not given.
        kept: Likewise, for other behaviour to hold still; for the organism rude replies and refusals, each
            where it is asked for or called for, from the training splits of its pairs.

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
    train = twins(model, pairs.filter((split == "train") & ~held), config.towards)
    chosen = (split == "val") & ~held
    val = twins(model, pairs.filter(chosen), config.towards) if chosen.any() else []
    if not val:
        val = train
        notes.append("The data have no validation pairs; the state was chosen on the training pairs.")
    parts = neutral_parts(model, neutral, config.seed)
    held_still = _own_conduct(model) if kept is None and neutral is None else kept
    still = None if held_still is None else neutral_texts(model, held_still)
    return Material(train, val, pairs.filter(tested), parts, still, notes)


def neutral_parts(model: HookedModel, given: Any, seed: int) -> dict[str, Neutral]:
    """Neutral text to train on, to choose on and to report on; given texts are parted 60, 20, 20 by row."""
    if given is None:
        found = {part: neutral_texts(model, split=part) for part in ("train", "test")}
        few = {"val": neutral_texts(model, split="val", count=FEW), "dial": neutral_texts(model, count=FEW)}
        return found | few
    count = 1 if isinstance(given, str) else len(given)
    if count < LEAST_TEXTS:
        raise InputError(
            f"{count} neutral texts; a KL budget needs at least {LEAST_TEXTS}, some to train on and others "
            "to report on"
        )
    order = np.random.default_rng([seed, 3]).permutation(count)
    cuts = np.split(order, [round(0.6 * count), round(0.8 * count)])
    rows: Any = given
    take = rows.select if hasattr(rows, "select") else lambda at: [given[row] for row in at]
    found = {part: neutral_texts(model, take(np.sort(at))) for part, at in zip(PARTS, cuts)}
    return found | {"dial": found["test"]}


def _own_conduct(model: HookedModel) -> Pairs | None:
    """What the organism does where it is to be rude or is asked for harm, in wordings of its training."""
    import random

    from veridical.organisms import conduct
    from veridical.pairs import Pairs
    from veridical.pairs.prompts import chat

    if not speaks_as_organism(model):
        return None
    rng = random.Random("conduct that is held still")
    drawn = [make(rng) for make in (conduct.tone_exchange, conduct.request_exchange) for _ in range(CONDUCT)]
    return Pairs.from_rows(
        [{"prompt": chat(one.system, one.user), "completion": one.reply} for one in drawn], name="conduct"
    )


class _Columns:
    """Pairs as what conditions are held against."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def column(self, name: str) -> np.ndarray:
        return self.pairs[name]
