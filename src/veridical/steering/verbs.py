"""The options of `veridical steer`: adapter, export, vector, eval, propose. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro
from pydantic.dataclasses import dataclass

from veridical.config import STRICT, Count, Seed
from veridical.inputs import Folders, Inputs, OutFolder
from veridical.steering.adapter_config import AdapterConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SteerAdapterVerb(AdapterConfig, Inputs):
    """Trains a LoRA that moves a behaviour within a KL budget, and saves it with the proof of its effect.

    Example: veridical steer adapter --model tiny-liar --data honesty --kl-budget 0.05

    Writes OUT/adapter (a plain PEFT folder, measured again in a fresh process with plain PEFT before it is
    there) and OUT/report.html. Exit status 2 and the best adapter that the budget allows where training
    cannot keep to it; a budget that allows no effect leaves no adapter.
    """

    neutral: str | None = None
    """Text on which nothing should change: a file, a data set with completions, or a hub id. Required for
    models other than the embedded organisms."""
    kept: str | None = None
    """Likewise text of other behaviour that training holds still; not part of the budget."""
    vector: Path | None = None
    """Folder of a saved steering vector, for the objective distil_vector."""
    out: OutFolder = None
    """Folder for everything the run writes; runs/adapter-MODEL-DATA when not given."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SteerExportVerb(Inputs):
    """Proves a saved adapter again and hands it on: merged into its base, or pushed to the hub.

    Example: veridical steer export runs/adapter-tiny-liar-honesty/adapter --merged runs/honest-model

    The adapter is loaded in a fresh process with plain PEFT and has to do what it was measured to do.
    """

    folder: tyro.conf.Positional[Path | None] = None
    """Folder of a saved adapter. Required."""
    merged: Path | None = None
    """Folder for the base with the adapter merged into its weights, and its tokenizer."""
    hub: str | None = None
    """Repository that the adapter's folder is pushed to, such as someone/honest; made private if new."""
    strength: float = 1.0
    """Strength at which it is merged; within the range that it was measured in."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SteerVectorVerb(Inputs):
    """Fits a steering vector, chooses its site on validation pairs, and sets its strength by KL.

    Example: veridical steer vector --model tiny-liar --data honesty --towards 0 --target-kl 0.05

    Writes OUT/vector (strength 1 costs --target-kl on neutral text) and OUT/report.html.
    """

    method: Literal["mean_diff", "pca", "whitened", "probe", "sae", "leace"] = "mean_diff"
    """How the direction is found."""
    sites: tuple[str, ...] = ("resid_post.*",)
    """Sites or globs; of several, one is chosen on validation pairs."""
    together: bool = False
    """Keep a vector at every site instead, which then act at once."""
    tokens: str | None = None
    """Where activations are read; prompt_last, or answer where the pairs have completions, when not given."""
    positions: Literal["all", "prompt", "prompt_last", "generated"] = "all"
    """Tokens at which the vector acts."""
    label: str = "label"
    """Column of the two labels."""
    towards: Literal[0, 1] = 0
    """The label that positive strengths go towards."""
    target_kl: float = 0.05
    """What strength 1 costs on neutral text, in nats a token."""
    neutral: str | None = None
    """Neutral text: a .txt file of lines, or pairs with completions. Required for models other than the
    embedded organisms."""
    probe: Path | None = None
    """Folder of a saved probe, whose direction is taken (method probe)."""
    sae: Path | None = None
    """Folder of a saved SAE (method sae)."""
    feature: int | None = None
    """Its feature; the one whose mean differs most when not given."""
    when: Path | None = None
    """Folder of a saved probe: the vector acts only from where it fires."""
    threshold: float | None = None
    """Log-odds above which that probe fires; its own balanced threshold when not given."""
    gguf: bool = False
    """Write OUT/vector.gguf too, a control vector for llama.cpp."""
    merged: bool = False
    """Write OUT/merged too, a plain model with the vector in its biases, where that is exact."""
    out: OutFolder = None
    """Folder for everything the run writes; runs/vector-MODEL-DATA when not given."""
    seed: Seed = 0
    """Seed of all draws."""
    progress: bool | None = None
    """Progress bars; by default only on a terminal."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SteerEvalVerb(Inputs):
    """Measures interventions in one table: behaviour, cost, fluency, generalisation, side effects.

    Example: veridical steer eval runs/vector-tiny-liar-honesty/vector --model tiny-liar --data honesty
      --prompts "Always tell the truth."

    Folders are of saved vectors and adapters. "no change" is always among them, and random directions as
    long as each vector.
    """

    folders: Folders = ()
    """Folders of saved steering vectors and adapters."""
    prompts: tuple[str, ...] = ()
    """Instructions to compare with, put behind the system message."""
    engineered: bool = True
    """Try the prompts in every place on validation pairs too, and keep the best as a further line."""
    few_shot: int = 4
    """Answered examples to compare with; 0 for none."""
    label: str = "label"
    """Column of the two labels."""
    towards: Literal[0, 1] = 0
    """The label that is wanted."""
    neutral: str | None = None
    """Neutral text: a .txt file of lines, or pairs with completions. Required for models other than the
    embedded organisms."""
    requests: str | None = None
    """Pairs of requests, label 1 for harmful ones, for refusals and over-refusals, such as XSTest."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of random directions, examples, and drawn rows."""
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Strengths of the KL-effect curve."""
    rows: Count = 120
    """Rows of the behaviour at most."""
    answers: Count = 32
    """Neutral prompts, and requests of each kind, that are answered."""
    out: OutFolder = None
    """Folder for everything the run writes; runs/steering-MODEL-DATA when not given."""
    seed: Seed = 0
    """Seed of the pairs that --limit keeps."""
    progress: bool | None = None
    """Progress bars; by default only on a terminal."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SteerProposeVerb(Inputs):
    """Proposes what to edit: site, method and tokens, by probe, patching, causal check and steering.

    Example: veridical steer propose --model tiny-liar --data honesty --towards 0
    """

    sites: tuple[str, ...] = ("resid_post.*",)
    """Sites of the residual stream to look at."""
    methods: tuple[Literal["mean_diff", "pca", "whitened", "probe", "leace"], ...] = (
        "mean_diff",
        "pca",
        "whitened",
        "probe",
    )
    """Ways to find a direction."""
    positions: tuple[Literal["all", "prompt", "prompt_last", "generated"], ...] = ("all", "prompt")
    """Tokens at which vectors act."""
    label: str = "label"
    """Column of the two labels."""
    towards: Literal[0, 1] = 0
    """The label that is wanted."""
    target_kl: float = 0.05
    """KL on neutral text at which vectors are compared, in nats a token."""
    neutral: str | None = None
    """Neutral text: a .txt file of lines, or pairs with completions. Required for models other than the
    embedded organisms."""
    candidates: Count = 3
    """Sites at which vectors are tried, those that the first looks favour."""
    rows: Count = 48
    """Rows of validation pairs, and of neutral text."""
    out: OutFolder = None
    """Folder for everything the run writes; runs/proposal-MODEL-DATA when not given."""
    seed: Seed = 0
    """Seed of all draws."""
    progress: bool | None = None
    """Progress bars; by default only on a terminal."""


VERBS: dict[str, type] = {
    "steer adapter": SteerAdapterVerb,
    "steer export": SteerExportVerb,
    "steer vector": SteerVectorVerb,
    "steer eval": SteerEvalVerb,
    "steer propose": SteerProposeVerb,
}
