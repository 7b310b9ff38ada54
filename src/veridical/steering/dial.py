"""The strength dial: what one adapter does from negative to positive strength, and where it is monotone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from veridical.steering.behaviour import Target
from veridical.steering.neutral import NeutralMeter

if TYPE_CHECKING:
    from veridical.hooked import HookedModel

At = Callable[[float], AbstractContextManager[Any]]
"""Makes a context in which the model is steered at a strength."""
STRENGTHS = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
ROWS = 96
"""Rows of the target, of what is kept, and of neutral text, that every strength is measured on."""
SLACK = 0.005
"""A rise of less than this between two strengths is no rise."""


def dial(
    model: HookedModel,
    at: At,
    target: Target,
    meter: NeutralMeter,
    strengths: Sequence[float] = STRENGTHS,
) -> pd.DataFrame:
    """One line per strength.

    Columns: `strength`; `target`, the share of the target's rows that show the behaviour, and
    `target_chance`, its mean probability; `kept`, the share of rows to be left alone that are still right,
    and `kept_chance` (NaN without such rows); `kl` on neutral text (nats a token) and `perplexity` there.

    Args:
        model: The model, plain.
        at: Makes the context of a strength.
        target: The behaviour.
        meter: Of the neutral text.
        strengths: Which ones; 0 is always among them.
    """
    lines = []
    for strength in sorted({*map(float, strengths), 0.0}):
        with at(strength):
            shown, stays = target.of(model), target.stays(model)
        moved = meter(lambda strength=strength: at(strength))
        lines.append(
            {
                "strength": strength,
                "target": float(shown.values.mean()),
                "target_chance": float(shown.chance.mean()),
                "kept": float("nan") if stays is None else float(stays.values.mean()),
                "kept_chance": float("nan") if stays is None else float(stays.chance.mean()),
                "kl": moved.kl.value,
                "perplexity": moved.perplexity,
            }
        )
    return pd.DataFrame(lines)


def monotone_range(table: pd.DataFrame, falls: bool) -> tuple[float, float]:
    """The widest run of measured strengths around 0 over which the dial is monotone: the range to claim.

    What must not rise (with `falls`) from one strength to the next by more than `SLACK`, or fall (without),
    is how far the behaviour shows: the mean probability of it on the target's rows, averaged with that of a
    wrong answer on `kept` where there are such rows. On one of the two alone a dial can stand at its stop.

    Args:
        table: Of `dial`.
        falls: Whether the behaviour is to fall with strength.
    """
    ordered: Any = table.sort_values("strength").reset_index(drop=True)
    shows = ordered["target_chance"].to_numpy(float)
    if ordered["kept_chance"].notna().all():
        shows = (shows + 1 - ordered["kept_chance"].to_numpy(float)) / 2
    good = np.diff(shows) * (1 if falls else -1) <= SLACK
    strengths = ordered["strength"].to_numpy(float)
    low = high = int(np.flatnonzero(strengths == 0)[0])
    while low > 0 and good[low - 1]:
        low -= 1
    while high < len(good) and good[high]:
        high += 1
    return float(strengths[low]), float(strengths[high])
