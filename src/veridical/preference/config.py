"""What a preference training is made of: the API's options, the flags, a recipe's keys, the saved JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import pydantic
from pydantic.dataclasses import dataclass

from veridical.config import STRICT, Count, Seed
from veridical.errors import ConfigError

Method = Literal["sft", "reward", "dpo", "ipo", "rl"]
METHODS: tuple[Method, ...] = ("sft", "reward", "dpo", "ipo", "rl")
Positive = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, pydantic.Field(ge=0, lt=1)]
NotNegative = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PreferConfig:
    """How a model is trained on preferences, and what is recorded at its checkpoints."""

    steps: Count = 200
    """Updates of the weights."""
    batch: Count = 16
    """Pairs (sft: answers; rl: sampled answers) in one update."""
    learning_rate: Positive = 1e-4
    """Highest learning rate: a linear rise over the first tenth of the steps, then a linear fall to zero."""
    beta: NotNegative = 0.1
    """Strength of the tie to the reference: beta of DPO, tau of IPO, weight of the KL penalty in rl."""
    sft_weight: NotNegative = 0.0
    """Weight of the chosen answers' own loss (mean over their tokens) beside that of dpo or ipo; it keeps
    them likely, which neither does (Pang et al. 2024)."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm."""
    lora_rank: Annotated[int, pydantic.Field(ge=0)] = 0
    """Rank of a LoRA that is trained in place of the weights; 0 trains the weights themselves."""
    lora_modules: tuple[str, ...] = ()
    """Linear layers that get a LoRA, by the last part of their name; all but the unembedding if not given."""
    lora_layers: tuple[int, ...] = ()
    """Blocks that get a LoRA, counted from 0; all if not given."""
    checkpoints: Count = 4
    """Checkpoints, spread evenly; a stopped run goes on from the last, and each is measured."""
    max_length: int | None = None
    """Longest row in tokens, answer included; the model's context when not given. Longer is an error."""
    max_new_tokens: Count = 32
    """Longest sampled answer in tokens (rl, and the samples that are measured)."""
    generations: Annotated[int, pydantic.Field(ge=2)] = 4
    """Answers to one prompt in rl, each judged against the mean of the others."""
    samples: Count = 128
    """Prompts that every checkpoint answers once, for reward, KL, entropy and length; and held-out
    preferences, at most, whose order and likelihoods are looked at."""
    test_fraction: Share = 0.2
    """Share of the prompts that is never trained on and that checkpoints are measured on (a split column in
    the data wins)."""
    seed: Seed = 0
    """Seed of order, initial LoRA, sampling and held-out prompts."""
    progress: bool | None = None
    """Progress bars; by default only on a terminal."""


def first_loss(config: PreferConfig, method: Method, margins: Sequence[float]) -> tuple[float, float] | None:
    """Between which values the loss lies before the first update; None for sft, where only the data say.

    Args:
        config: Options.
        method: Which loss.
        margins: Margins of the rows (reward models only).

    Policy and reference are one then, and the head of a reward model is zero: ln 2 for DPO (Rafailov et al.
    2023, equation 7, at a margin of 0), 1 / (4 tau^2) for IPO (Azar et al. 2023, equation 17, likewise),
    log(1 + exp(margin)) for a reward model, and 0 for RLOO, whose advantages sum to 0 over the answers to one
    prompt and whose ratios are 1. What `sft_weight` adds to the first two depends on the data.
    """
    if method == "sft":
        return None
    if method == "rl":
        return 0.0, 0.0
    if method == "reward":
        losses = [max(margin, 0.0) + math.log1p(math.exp(-abs(margin))) for margin in margins]
        return min(losses), max(losses)
    least = 1 / (4 * config.beta**2) if method == "ipo" else math.log(2)
    return least, math.inf if config.sft_weight else least


def checked(config: PreferConfig, method: Method) -> PreferConfig:
    """The options, after a check that they fit the method and one another.

    Raises:
        ConfigError: They do not; says how.
    """
    if method in ("dpo", "ipo") and config.beta <= 0:
        raise ConfigError(f"beta = {config.beta}: {method} needs a beta above 0")
    if config.sft_weight and method not in ("dpo", "ipo"):
        raise ConfigError(f"sft_weight = {config.sft_weight}: {method} has none; it goes with dpo and ipo")
    if method == "rl" and config.batch % config.generations:
        raise ConfigError(
            f"batch = {config.batch} is no multiple of generations = {config.generations}; "
            "each prompt of a batch gets that many answers"
        )
    if not config.lora_rank and (config.lora_modules or config.lora_layers):
        raise ConfigError("lora_modules and lora_layers need a lora_rank above 0")
    if config.steps % config.checkpoints:
        raise ConfigError(
            f"steps = {config.steps} is no multiple of checkpoints = {config.checkpoints}; "
            "checkpoints are spread evenly and the last is the end"
        )
    return config
