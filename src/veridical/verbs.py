"""The options of each verb: those of the API's config it stands on, and where its inputs and outputs are.

One dataclass is the verb's flags, the keys of its recipe and the `config.json` that it saves; that file is a
recipe that runs the verb again. Nothing here imports torch, so that `--help` is quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic.dataclasses import dataclass

from veridical.comparison.verbs import CompareVerb
from veridical.config import STRICT, BeliefConfig, CollectConfig, Count, ProbeConfig, Seed
from veridical.inputs import Folders, Inputs, OutFolder
from veridical.interventions.verbs import PatchVerb
from veridical.preference.verbs import VERBS as PREFER
from veridical.saes.verbs import SAEEvalVerb, SAEFeaturesVerb, SAESweepVerb, SAETrainVerb
from veridical.steering.verbs import VERBS as STEER

DemoFolder = Annotated[Path, tyro.conf.arg(aliases=["-o"])]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CollectVerb(CollectConfig, Inputs):
    """Reads a model's activations on a data set into a store that can be resumed.

    Example: veridical collect --model Qwen/Qwen3-0.6B --data pairs.csv --tokens all --store runs/acts

    A run that was stopped goes on where it was. --config recipe.yaml gives options by name;
    flags win.
    """

    store: Path | None = None
    """Folder of the store and of what made it; runs/collect-MODEL-DATA when not given."""
    seed: Seed = 0
    """Seed of the pairs that --limit keeps."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Probing(ProbeConfig, CollectConfig, BeliefConfig, Inputs):
    """What every job that fits probes takes."""

    estimator: str = "logistic"
    """Estimator: logistic, ridge, mass_mean, lda, lat, ccs, ttpd; over sequences of tokens: mean_tokens,
    max_tokens, rolling, attention, mil. Parameters follow after colons (ttpd:polarity=negated)."""
    out: OutFolder = None
    """Folder for everything the run writes; runs/probe-MODEL-DATA when not given."""
    store: Path | None = None
    """Folder of the activations; OUT/activations when not given."""
    beliefs: bool | None = None
    """Check first what the model believes and where it lies; by default when a label of that is asked for."""
    on_long: Literal["error", "truncate"] = "truncate"
    """What to do with a prompt over max_length; how many rows were cut is said."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ProbeVerb(Probing):
    """Fits probes for a label at every site of a model, with controls, and writes a report.

    Example: veridical probe --model Qwen/Qwen3-0.6B --data TruthfulQA.csv --tokens answer --limit 200

    Loads the pairs, collects activations into OUT/activations (a stopped run goes on), fits and judges
    the probes, and writes OUT/report.html. --config recipe.yaml gives options by name; flags win. Several
    estimators, separated by commas, are fitted on the same rows and compared. `veridical probe fit` is the
    same; `probe eval`, `probe transfer` and `probe monitor` use what it saved.
    """

    learning_curve: bool = True
    """Put the learning curve at the chosen site (first estimator) into the report. On by default: its draws
    cost about what three to five sites of the sweep cost, and say whether more pairs would help."""
    honesty: bool = True
    """With the target lied, fit the lying and the instruction probe side by side (the honesty protocol)."""
    keep: Path | None = None
    """Folder that the best probe is also saved into: KEEP of logistic, KEEP-NAME of another estimator; of the
    honesty protocol, KEEP-monitor is the probe that had honest answers and confusion among its negatives."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ProbeEvalVerb(Inputs):
    """Judges a saved probe on other data, or on another checkpoint with --force, beside the text alone.

    Example: veridical probe eval runs/probe-qwen/sweep/best --model Qwen/Qwen3-0.6B --data other.csv

    Activations are collected at the probe's own site and tokens; nothing of the probe is fitted again.
    """

    probe: tyro.conf.Positional[Path | None] = None
    """Folder of a saved probe. Required."""
    target: str | None = None
    """Label column; the probe's own when not given."""
    where: tuple[str, ...] | None = None
    """Row conditions; the probe's own when not given."""
    out: OutFolder = None
    """Folder for everything the run writes; runs/probe-eval-MODEL-DATA when not given."""
    bootstrap: Count = 500
    """Resamples of whole pairs for the 95 % intervals."""
    force: bool = False
    """Use the probe on another model than it was fitted on, such as a fine-tuned descendant."""
    seed: Seed = 0
    """Seed of resamples, and of the pairs that --limit keeps."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ProbeTransferVerb(Probing):
    """Tests probes elsewhere: on other data sets, on other parts of one, or moved to another model.

    Example: veridical probe transfer --model tiny-liar --data honesty --by form --target lied

    --data takes several names or files separated by commas; --by splits one data set by a column. With
    --to-model, both models read the one --data, and the probe of --model is moved to the other through a map
    between their activations that is fitted without labels; beside it stand the other's own probe, maps
    fitted on shuffled pairs, and the text alone.
    """

    by: str | None = None
    """Label column by whose values one data set is split."""
    to_model: str | None = None
    """Second model, to which the probe is moved."""
    to_sites: str | None = None
    """Sites of the second model; the same names as --sites when not given."""
    method: Literal["ridge", "procrustes"] = "ridge"
    """How the map between two models is fitted: ridge predicts, procrustes only turns and scales."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ProbeMonitorVerb(Inputs):
    """Runs a saved probe while the model answers, and shows its score at every token.

    Example: veridical probe monitor runs/lied/sweep/best --model tiny-liar --prompts "Who wrote Hamlet?"

    Prompts come from --prompts, or from --data (one generation for each row's prompt).
    """

    probe: tyro.conf.Positional[Path | None] = None
    """Folder of a saved probe. Required."""
    prompts: tuple[str, ...] = ()
    """Texts for the user's turn."""
    system: str = ""
    """System prompt that stands before each of --prompts."""
    max_new_tokens: int = 40
    """Tokens to generate."""
    threshold: str = "fpr1"
    """Where the probe fires: fpr1 (1 % false positives), balanced, or a number in log-odds."""
    batch: int = 16
    """Prompts that are answered together."""
    show: int = 6
    """Answers shown token by token in the report."""
    out: OutFolder = None
    """Folder for everything the run writes; runs/probe-monitor-MODEL when not given."""
    force: bool = False
    """Use the probe on another model than it was fitted on."""
    seed: Seed = 0
    """Seed of the pairs that --limit keeps."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ReportVerb:
    """Puts saved runs together as one page.

    Example: veridical report runs/probe-qwen runs/probe-llama --out compared.html
    """

    folders: Folders = ()
    """Folders that a verb has written."""
    out: DemoFolder = Path("report.html")
    """The HTML file; its config and versions go beside it as NAME.config.json and NAME.provenance.json."""
    title: str = "Veridical report"
    """Heading of the page."""
    intro: str = ""
    """Paragraphs under the heading."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LsVerb:
    """Lists embedded models and pairs, and the probes, SAEs, stores and runs in a folder.

    Example: veridical ls runs
    """

    folder: tyro.conf.Positional[Path] = Path(".")
    """Folder to look through, four levels deep."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DemoVerb:
    """Asks the embedded model tiny-liar what it believes and where that shows; writes one page, offline.

    Example: veridical demo --out demo
    """

    out: DemoFolder = Path("demo")
    """Folder for the page and everything behind it."""
    progress: bool | None = None
    """Progress bars; by default only on a terminal."""


VERBS: dict[str, type] = {
    "demo": DemoVerb,
    "collect": CollectVerb,
    "probe": ProbeVerb,
    "probe eval": ProbeEvalVerb,
    "probe transfer": ProbeTransferVerb,
    "probe monitor": ProbeMonitorVerb,
    "sae train": SAETrainVerb,
    "sae sweep": SAESweepVerb,
    "sae eval": SAEEvalVerb,
    "sae features": SAEFeaturesVerb,
    "patch": PatchVerb,
    **PREFER,
    "compare": CompareVerb,
    **STEER,
    "report": ReportVerb,
    "ls": LsVerb,
}
