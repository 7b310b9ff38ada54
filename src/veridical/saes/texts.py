"""The texts of `veridical sae`: loaded, asked about, parted into trained on and held out, cut into pieces."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from veridical.config import BeliefConfig
from veridical.console import step
from veridical.errors import ConfigError, DataError, unknown
from veridical.pairs.splits import assign
from veridical.running import BELIEF_LABELS, check_beliefs_into, limited

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.pairs import Pairs
    from veridical.saes.verbs import Texts

log = logging.getLogger(__name__)
NESTED = ("prompt", "completion", "text", "input_ids", "attention_mask", "span_start", "span_end")
"""Columns that do not fit a piece of a text."""


def load_texts(
    folder: Path, model: HookedModel, options: Texts, seed: int, columns: Sequence[str] = ()
) -> Pairs:
    """The data that the options name, with the labels of belief where these are asked for.

    Args:
        folder: Where the answers of the belief check are kept.
        model: The model that is asked.
        options: Name, limit, and so on.
        seed: Seed of the pairs that `limit` keeps, and of the belief check.
        columns: Label columns that will be read.

    Raises:
        UnknownNameError: A column that the data won't have.
    """
    from veridical.pairs import Pairs

    named = {"prompt": options.text} if options.text else None
    with step("data"):
        pairs = Pairs.load(str(options.data), adapter=options.adapter, columns=named)
    if options.split is not None:
        if "split" not in pairs:
            raise unknown("column", "split", pairs.columns)
        pairs = pairs.filter(split=options.split)
    if options.limit is not None:
        pairs = limited(pairs, options.limit, seed)
    log.info("  %s", pairs)
    for name in columns:
        if name not in pairs.columns and name not in BELIEF_LABELS:
            raise unknown("column", name, [*pairs.columns, *sorted(BELIEF_LABELS)])
    missing = bool(set(columns) & BELIEF_LABELS - set(pairs.columns))
    if options.beliefs or (options.beliefs is None and missing):
        with step("beliefs"):
            config = BeliefConfig(seed=seed, progress=options.progress)
            pairs = check_beliefs_into(folder / "beliefs", model, pairs, config)
    return pairs


def parted(pairs: Pairs, share: float, seed: int) -> tuple[Pairs, Pairs]:
    """The texts to train on and those held out, whole pairs: the test rows of a split column, or a share.

    Raises:
        ConfigError: A share that leaves nothing on one side.
    """
    held = held_rows(pairs.groups, np.asarray(pairs["split"]) if "split" in pairs else None, share, seed)
    return pairs.filter(~held), pairs.filter(held)


def held_rows(groups: np.ndarray, split: np.ndarray | None, share: float, seed: int) -> np.ndarray:
    """Which rows are held out, `[rows]` bool."""
    if not 0 < share < 1:
        raise ConfigError(f"holdout = {share}: expected a share above 0 and below 1")
    held = np.zeros(len(groups), dtype=bool) if split is None else split == "test"
    if held.any() and not held.all():
        return held
    if len(np.unique(groups)) < 2:
        raise DataError("the data are one text: none can be held out")
    return assign(groups, {"train": 1 - share, "test": share}, seed) == "test"


def cut(model: HookedModel, pairs: Pairs, context: int | None) -> Any:
    """The pairs as they are, or as pieces of `context` tokens, each with its row's labels.

    A text that begins with the begin-of-sequence token has it at the start of every piece: models spend a
    large activation on it and behave otherwise without.

    Returns:
        `Pairs`, or a `datasets.Dataset` with `input_ids`, `pair` and the label columns.
    """
    if context is None:
        return pairs
    if context < 2 or (model.context_length and context > model.context_length):
        raise ConfigError(
            f"context = {context}: expected 2 or more, and at most the model's {model.context_length} tokens"
        )
    import datasets

    encoded = model.encode(pairs.prompts, pairs.completions, max_length=1 << 40)
    begin = getattr(model.tokenizer, "bos_token_id", None)
    pieces, owners = [], []
    for row, one in enumerate(encoded):
        ids = np.asarray(one.ids, dtype=np.int32)
        lead = ids[:1] if begin is not None and ids[0] == begin else ids[:0]
        body, room = ids[len(lead) :], context - len(lead)
        for at in range(0, max(len(body), 1), room):
            pieces.append(np.concatenate([lead, body[at : at + room]]))
            owners.append(row)
    frame = pairs.to_pandas()
    frame = frame.drop(columns=[name for name in NESTED if name in frame.columns])
    frame = frame.iloc[owners].reset_index(drop=True)
    frame["pair"] = pairs.groups[owners]
    return datasets.Dataset.from_pandas(frame.assign(input_ids=pieces), preserve_index=False)
