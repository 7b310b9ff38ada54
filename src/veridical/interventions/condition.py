"""What is checked of a model and of options before any run: direction, counts, hooks, dropout."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal

from veridical.errors import InputError, NonFiniteError, unknown
from veridical.hooks import standing_hooks

if TYPE_CHECKING:
    from torch import Tensor

    from veridical.hooked import HookedModel
    from veridical.interventions.inputs import Inputs

Direction = Literal["denoising", "noising"]
DIRECTIONS = ("denoising", "noising")
CHANCES = ("p", "dropout", "attention_dropout")
"""Where a module keeps its share of dropout, its own or that of a function that it calls."""


def check_direction(direction: str) -> None:
    """Refuses a direction that is none.

    Raises:
        UnknownNameError: Names both.
    """
    if direction not in DIRECTIONS:
        raise unknown("direction", direction, DIRECTIONS, "expected 'denoising' or 'noising'")


def check_count(name: str, value: Any) -> None:
    """Refuses what is no number of things.

    Raises:
        InputError: Not an integer, or less than 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} is {value!r}; expected a number of at least 1")


def check_finite(model: HookedModel, metric: str, values: Tensor) -> None:
    """Refuses a run whose metric means nothing.

    Raises:
        NonFiniteError: NaN or infinity; names the first row.
    """
    wrong = (~values.isfinite()).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise NonFiniteError(
            f"{metric} is {float(values[row])} in the unpatched run of row {row} of {len(values)}: "
            f"{model.path} gives NaN or infinity there, or the metric does"
        )


def warn_of_twins(inputs: Inputs) -> None:
    """Warns of runs between which there is nothing to find."""
    if inputs.twins:
        warnings.warn(
            "clean and corrupt are the same to the last token, so every effect is exactly zero", stacklevel=3
        )


def carries_hooks(model: HookedModel) -> bool:
    """Whether any module has forward hooks, which may tell rows and positions apart."""
    return bool(standing_hooks(model.model))


def warn_of_training(model: HookedModel) -> None:
    """Warns of dropout that makes every run another."""
    active = [
        getattr(part, name, None) for part in model.model.modules() if part.training for name in CHANCES
    ]
    if any(isinstance(chance, float) and chance > 0 for chance in active):
        warnings.warn(
            f"{model.path} is in training mode with dropout, so effects hold its noise; call .eval() first",
            stacklevel=3,
        )
