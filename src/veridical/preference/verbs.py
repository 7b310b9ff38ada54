"""The options of the jobs of `veridical prefer`. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic.dataclasses import dataclass
from tyro.conf import Suppress

from veridical.config import STRICT, Count, Seed
from veridical.errors import ConfigError
from veridical.inputs import OutFolder
from veridical.preference.config import (
    ConstitutionConfig,
    DistilConfig,
    Generations,
    NotNegative,
    Positive,
    PreferConfig,
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Preferring(PreferConfig):
    """What every job of `veridical prefer` takes."""

    model: str | None = None
    """Model that training begins at, and the reference: a folder, a hub name, or an embedded organism.
    Required."""
    data: str | None = None
    """Data: a file or hub data set with prompt, chosen and rejected, hh-rlhf, or labelled pairs (with
    --preferred). Required."""
    preferred: int | None = None
    """The label that is preferred, where the data are labelled pairs; there is no default."""
    limit: Count | None = None
    """Keep at most this many rows, drawn with the seed; all when not given."""
    reward: str | None = None
    """Reward model that is trained on (rl) or recorded at checkpoints: a folder or an embedded one."""
    out: OutFolder = None
    """Folder of the run; runs/METHOD-MODEL-DATA when not given. A stopped run goes on."""

    def require(self, verb: str) -> None:
        """Refuses a run that lacks an input.

        Raises:
            ConfigError: One of them was not given.
        """
        require(self, verb, "model", "data", *(["reward"] if verb == "prefer rl" else []))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PreferSFTVerb(Preferring):
    """Fine-tunes a model on the chosen answers, and measures every checkpoint against where it began.

    Example: veridical prefer sft --model tiny-liar --data toxic --preferred 0 --steps 100

    Writes OUT/model (full weights, or a LoRA with --lora-rank), OUT/training with checkpoints, and a report.
    """

    beta: Suppress[NotNegative] = 0.1
    """Not read here."""
    sft_weight: Suppress[NotNegative] = 0.0
    """Not read here."""
    generations: Suppress[Generations] = 4
    """Not read here."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PreferRewardVerb(Preferring):
    """Trains a reward model on pairs of answers; its score is read at the end token behind the answer.

    Example: veridical prefer reward --model tiny-liar --data toxic --preferred 0 --steps 100

    A column margin in the data is by how much the chosen answer should be ahead.
    """

    beta: Suppress[NotNegative] = 0.1
    """Not read here."""
    sft_weight: Suppress[NotNegative] = 0.0
    """Not read here."""
    generations: Suppress[Generations] = 4
    """Not read here."""
    samples: Suppress[Count] = 128
    """Not read here."""
    max_new_tokens: Suppress[Count] = 32
    """Not read here."""
    reward: Suppress[str | None] = None
    """Not read here."""

    def require(self, verb: str) -> None:
        """Refuses also what is inherited and says nothing for a reward model."""
        super().require(verb)
        for name in ("samples", "max_new_tokens", "reward"):
            if getattr(self, name) != self.__dataclass_fields__[name].default:
                raise ConfigError(f"{name} = {getattr(self, name)}: {verb} does not read it; leave it out")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PreferDPOVerb(Preferring):
    """Trains a model on preferences with DPO against its frozen start; the first loss must be ln 2.

    Example: veridical prefer dpo --model tiny-liar --data toxic --preferred 0 --lora-rank 8 --steps 100

    Every checkpoint is loaded from disk and measured: exact KL to the reference on its own samples, entropy,
    length, held-out preferences, and how far both answers' likelihoods moved.
    """

    beta: Positive = 0.1
    """Strength of the tie to the reference; lower lets the policy go further."""
    generations: Suppress[Generations] = 4
    """Not read here."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PreferIPOVerb(Preferring):
    """Trains a model on preferences with IPO against its frozen start; --beta is tau.

    Example: veridical prefer ipo --model tiny-liar --data toxic --preferred 0 --lora-rank 8 --steps 100

    The first loss must be 1 / (4 tau^2). Log-probabilities are per token of the answer.
    """

    beta: Positive = 0.1
    """tau, the strength of the tie to the reference; not on the scale of DPO's beta."""
    generations: Suppress[Generations] = 4
    """Not read here."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PreferRLVerb(Preferring):
    """Trains a model against a reward model with RLOO and a KL penalty to its frozen start.

    Example: veridical prefer rl --model tiny-liar --data toxic --reward runs/reward-tiny-liar-toxic/model

    TRL no longer has PPO. The report has the frontier of reward and KL, the fitted curve of over-optimisation
    where there are checkpoints enough, and a check for reward hacking.
    """

    sft_weight: Suppress[NotNegative] = 0.0
    """Not read here."""
    beta: NotNegative = 0.05
    """Weight of the KL penalty."""
    learning_rate: Positive = 1e-5
    """Highest learning rate: a linear rise over the first tenth of the steps, then a linear fall to zero."""
    judge: str | None = None
    """A second reward model that is not trained on; the check for hacking asks whether it falls."""
    kl_budget: float | None = None
    """Nats per answer that the policy may leave the reference by before the check says so."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PreferDistilVerb(DistilConfig, Preferring):
    """Trains a smaller student on its teacher's soft labels and on the answers themselves (distillation).

    Example: veridical prefer distil --model tiny-liar --data safe --answers teacher --layers 3

    The student has some of the teacher's blocks, or is another model of the same tokenizer (--student). Every
    checkpoint is held against the teacher; `veridical compare OUT/model --reference TEACHER` says what was
    lost.
    """

    model: str | None = None
    """The teacher: a folder, a hub name, or an embedded organism. Required."""
    student: str | None = None
    """Model that the student begins as; made of the teacher (--layers, --init) when not given."""
    beta: Suppress[NotNegative] = 0.1
    """Not read here."""
    sft_weight: Suppress[NotNegative] = 0.0
    """Not read here."""
    generations: Suppress[Generations] = 4
    """Not read here."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PreferConstitutionVerb(ConstitutionConfig):
    """Lets a model criticise and revise its answers by principles, and label pairs (constitutional AI).

    Example: veridical prefer constitution --model Qwen/Qwen3-0.6B --data red_team.txt --principles hhh

    Writes OUT/sft.jsonl and OUT/preferences.jsonl, which prefer sft, reward, dpo and ipo take as --data,
    OUT/trace.jsonl with everything that was asked and written, and a report. A stopped run goes on.
    """

    model: str | None = None
    """Chat model that answers, criticises and revises: a folder, a hub name, or an embedded organism.
    Required."""
    data: str | None = None
    """Red-team prompts: a text file with one in each line, a table with a column prompt, or labelled pairs.
    Required."""
    principles: str = "hhh"
    """Principles: a YAML or JSON file, or an embedded name (hhh: harmless, honest, helpful)."""
    judge: str | None = None
    """Model that labels; --model itself when not given."""
    device: str | None = None
    """Device such as cpu or cuda:0; chosen with a stated reason when not given."""
    model_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Number format of the weights; chosen with a stated reason when not given."""
    out: OutFolder = None
    """Folder of the run; runs/constitution-MODEL-DATA when not given."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PreferGuidelinesVerb:
    """Turns completions that labellers ranked into preferences, and says how far the labellers agree.

    Example: veridical prefer guidelines --data rankings.jsonl --criteria criteria.yaml

    Writes OUT/preferences.jsonl, which prefer reward, dpo and ipo take as --data, and a report with kappa and
    alpha. Ties give no preference; a fail (an empty rank) loses to whatever did not fail.
    """

    data: str | None = None
    """Rankings: rows with prompt, completions and ranks (1 is best), or one row for each completion with
    prompt, completion and rank; and where there are several, labeller and criterion. Required."""
    criteria: Path | None = None
    """YAML file of criteria with their questions and weights; helpful, honest and harmless when not given."""
    out: OutFolder = None
    """Folder for everything the job writes; runs/guidelines-DATA when not given."""
    seed: Seed = 0
    """Seed of the intervals."""


def require(options: Any, verb: str, *names: str) -> None:
    """Refuses a job that lacks an input.

    Raises:
        ConfigError: One of them was not given.
    """
    for name in names:
        if not getattr(options, name):
            raise ConfigError(
                f"{verb} needs --{name} (or `{name}:` in its recipe); see veridical {verb} --help"
            )


VERBS: dict[str, type] = {
    "prefer sft": PreferSFTVerb,
    "prefer reward": PreferRewardVerb,
    "prefer dpo": PreferDPOVerb,
    "prefer ipo": PreferIPOVerb,
    "prefer rl": PreferRLVerb,
    "prefer distil": PreferDistilVerb,
    "prefer constitution": PreferConstitutionVerb,
    "prefer guidelines": PreferGuidelinesVerb,
}
