"""What a preference training is made of: the API's options, the flags, a recipe's keys, the saved JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import pydantic
from pydantic.dataclasses import dataclass

from veridical.config import STRICT, Count, Seed
from veridical.errors import ConfigError

Method = Literal["sft", "reward", "dpo", "ipo", "rl", "distil"]
METHODS: tuple[Method, ...] = ("sft", "reward", "dpo", "ipo", "rl")
"""Those that train on preferences; distillation takes a teacher, see `distil`."""
Positive = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
Generations = Annotated[int, pydantic.Field(ge=2)]
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
    generations: Generations = 4
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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DistilConfig(PreferConfig):
    """How a student is trained to answer as its teacher."""

    temperature: Positive = 2.0
    """Temperature of both distributions in the soft loss; its gradient is scaled back by the square."""
    soft_weight: NotNegative = 0.5
    """Weight of the soft loss: KL of the student to the teacher at each token of the answer."""
    hard_weight: NotNegative = 0.5
    """Weight of the student's own loss: cross-entropy of the answer's tokens."""
    answers: Literal["data", "teacher"] = "data"
    """Whose answers are learnt: those of the data, or what the teacher draws for the prompts."""
    layers: Count | None = None
    """Blocks of the student where none is given; half of the teacher's when not given."""
    init: Literal["teacher", "random"] = "teacher"
    """What such a student begins with: blocks of the teacher, spread evenly, or random weights."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ConstitutionConfig:
    """How a model criticises and revises its answers, and labels which of two is better."""

    rounds: Annotated[int, pydantic.Field(ge=0)] = 2
    """Critiques and revisions of each answer, one after the other; 0 only labels (with --compare samples)."""
    critiques: bool = True
    """Ask for a critique before each revision; otherwise the revision is asked for at once."""
    revisions: Literal["last", "all"] = "last"
    """What goes into the SFT data: the last revision of each prompt, or every one."""
    labels: bool = True
    """Ask which of two answers is better, for preference data."""
    compare: Literal["revision", "samples"] = "revision"
    """What is labelled: the first answer against the last revision, or two answers drawn to one prompt."""
    votes: Count = 1
    """Principles drawn for each comparison; the probabilities that they give are averaged."""
    tie: Annotated[float, pydantic.Field(ge=0, lt=0.5)] = 0.05
    """A probability within this of one half is a tie, which gives no preference."""
    min_coverage: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.1
    """Least probability that the labeller puts on the two letters together; below it the label is a fail."""
    examples: Annotated[int, pydantic.Field(ge=0)] | None = None
    """Worked examples of the principles file that are shown; all when not given, 0 for none."""
    style: Literal["auto", "chat", "transcript"] = "auto"
    """Turns of a chat, or one transcript of Human and Assistant; auto takes the chat where there is a
    template."""
    system: str = ""
    """System message under which the first answers are given, such as one that asks for help with anything;
    it stands in no critique and in none of the data."""
    temperature: NotNegative = 1.0
    """Of answers, critiques and revisions, drawn from the whole distribution; 0 takes the likeliest token."""
    max_new_tokens: Count = 256
    """Longest answer, critique or revision in tokens."""
    batch: Count = 16
    """Prompts that go through all stages together; what a killed run repeats is at most one stage of one
    batch."""
    limit: Count | None = None
    """Keep at most this many prompts, drawn with the seed; for a quick look."""
    seed: Seed = 0
    """Seed of the principles that are drawn, and of the answers."""
    progress: bool | None = None
    """Progress bar; by default only on a terminal."""


def first_loss(method: Method, beta: float) -> float | None:
    """The loss before the first update, where policy and reference are one; None where the data decide.

    ln 2 for DPO (Rafailov et al. 2023, equation 7, at a margin of 0), 1 / (4 tau^2) for IPO (Azar et al.
    2023, equation 17, likewise), and 0 for RLOO, whose advantages sum to 0 over the answers to one prompt and
    whose ratios are 1.
    """
    return {"dpo": math.log(2), "ipo": 1 / (4 * beta**2) if beta else None, "rl": 0.0}.get(method)


def first_losses(
    config: PreferConfig, method: Method, margins: Sequence[float]
) -> tuple[float, float] | None:
    """Between which values the first loss lies; None where only the data say (sft, distil).

    The head of a reward model begins at zero, so its loss is log(1 + exp(margin)) for each row; `sft_weight`
    adds to `first_loss` what depends on the data.

    Args:
        config: Options.
        method: Which loss.
        margins: Margins of the rows (reward models only).
    """
    if method == "reward":
        losses = [max(margin, 0.0) + math.log1p(math.exp(-abs(margin))) for margin in margins]
        return min(losses), max(losses)
    least = first_loss(method, config.beta)
    return None if least is None else (least, math.inf if config.sft_weight else least)


UNREAD: dict[Method, tuple[str, ...]] = {
    "sft": ("beta", "generations", "sft_weight"),
    "reward": ("beta", "generations", "sft_weight"),
    "dpo": ("generations",),
    "ipo": ("generations",),
    "rl": ("sft_weight",),
    "distil": ("beta", "generations", "sft_weight"),
}
"""Options of `PreferConfig` that a method does not read; a value for one is refused, not ignored."""


def checked(config: PreferConfig, method: Method) -> PreferConfig:
    """The options, after a check that they fit the method and one another.

    Raises:
        ConfigError: They do not; says how.
    """
    if method in ("dpo", "ipo") and config.beta <= 0:
        raise ConfigError(f"beta = {config.beta}: {method} needs a beta above 0")
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
    for name in UNREAD.get(method, ()):
        if getattr(config, name) != PreferConfig.__dataclass_fields__[name].default:
            raise ConfigError(f"{name} = {getattr(config, name)}: {method} does not read it; leave it out")
    return config
