"""What the training of an adapter is made of: the API's options, the flags, a recipe's keys, the saved
JSON."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic.dataclasses import dataclass

from veridical.config import STRICT, Count, Seed, Sites

Objective = Literal[
    "representation", "rerouting", "hidden_preference", "dpo", "ipo", "loreft", "direft", "distil_vector"
]
OBJECTIVES: tuple[Objective, ...] = (
    "representation", "rerouting", "hidden_preference", "dpo", "ipo", "loreft", "direft", "distil_vector",
)  # fmt: skip
REFT = ("loreft", "direft")
Positive = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdapterConfig:
    """How an adapter is trained, and what it may change."""

    objective: Objective = "representation"
    """What is trained for: representation (states become those of the other prompt), rerouting (circuit
    breakers), hidden_preference, dpo, ipo, distil_vector; for comparison loreft and direft, which are no LoRA
    and are not exported."""
    towards: Literal[0, 1] = 0
    """The label whose behaviour a positive strength moves to; a negative strength moves to the other."""
    kl_budget: Positive = 0.05
    """Most KL(adapted || plain) on neutral text at strength 1, in nats a token, exact over the vocabulary."""
    sites: Sites = ""
    """Sites whose states the losses on states read (several: separate with commas); the residual stream in
    the middle third of the depth if not given."""
    retain: NotNegative = 3.0
    """Weight of the states staying as they are on text of other behaviour, where there is such text."""
    rank: Count = 8
    """Rank of the LoRA, or of the subspace of ReFT."""
    modules: tuple[str, ...] = ()
    """Linear layers that get a LoRA, by the last part of their name; all but the unembedding if not given."""
    layers: tuple[int, ...] = ()
    """Blocks that get a LoRA, counted from 0; if not given, those up to the deepest site read, or all for
    the losses on outputs."""
    steps: Count = 60
    """Updates of the weights."""
    batch: Count = 8
    """Pairs in one update; half as many rows of neutral text and of other behaviour."""
    learning_rate: Positive = 4e-3
    """Highest learning rate: a linear rise over the first tenth of the steps, then a linear fall to a
    tenth."""
    weight_decay: NotNegative = 0.01
    """Decay of the LoRA's weights in AdamW, which keeps the change small."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm."""
    beta: Positive = 0.1
    """Tie to the reference in dpo, tau of ipo, sharpness of hidden_preference."""
    both_ways: bool = True
    """Train negative strengths too: at strength -1 the other side of each pair is aimed at."""
    checks: Count = 4
    """Times that the training is looked at on validation pairs; the best look within the budget is kept."""
    holdout: tuple[str, ...] = ()
    """Row conditions such as system_held_out=True; rows that meet one are never trained on, and the test is
    made of such rows of the held-out pairs alone."""
    seed: Seed = 0
    """Seed of the first weights, of the order of pairs, and of the split where the data have none."""
    progress: bool | None = None
    """Progress bar; by default only on a terminal or in a notebook."""
