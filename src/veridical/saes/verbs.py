"""The options of `veridical sae train`, `sweep`, `eval` and `features`. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic.dataclasses import dataclass

from veridical.config import STRICT, Count, DType, Minutes, Seed
from veridical.inputs import Folders, Inputs, OutFolder
from veridical.saes.config import SAEConfig
from veridical.saes.sweep_config import SweepConfig

Members = Annotated[tuple[dict[str, Any], ...], tyro.conf.Suppress]
"""A list of mappings, which only a recipe can hold."""
Mapped = Annotated[dict[str, Any], tyro.conf.Suppress]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Texts(Inputs):
    """The texts that a model reads, and what is asked of it first."""

    text: str | None = None
    """Column that holds the text, where the data are plain texts rather than pairs."""
    context: int | None = None
    """Cut texts into pieces of this many tokens; labels go with every piece."""
    beliefs: bool | None = None
    """Ask the model first what it believes, so that rows end in its own answers and have the labels of that;
    by default when such a label is asked for."""
    split: str | None = None
    """Only the rows whose split column has this value, such as test."""
    read: str | int = "all"
    """Tokens that are read of each text: all, last, mean, answer, prompt_last, span, or an index."""
    batch_tokens: Count = 2048
    """Tokens in one batch of the model, padding included."""
    bootstrap: Count = 500
    """Resamples of whole texts (or pairs) for the 95 % intervals."""
    progress: bool | None = None
    """Progress bars; by default only on a terminal."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SAETraining(Texts):
    """Where training vectors come from, what is held out, and where results go."""

    activations: Path | None = None
    """Train on this store of `veridical collect --tokens all`, in place of --model and --data."""
    on_the_fly: bool = False
    """Run the model as training goes on and store no activations."""
    store_dtype: DType = "float32"
    """Number format of the activations that are stored."""
    holdout: float = 0.05
    """Share of the texts (or pairs) that is never trained on; test rows of a split column in the data win."""
    eval_texts: int = 400
    """Held-out texts that the finished SAEs are judged on, at most."""
    checkpoint_minutes: Minutes = 5.0
    """Minutes between checkpoints; the last two are kept."""
    tracker: Literal["trackio", "wandb"] | None = None
    """Log every SAE as a run of its own to trackio or wandb; nothing is sent when not given."""
    project: str = "veridical"
    """Project that the tracker's runs are put into."""
    keep: Path | None = None
    """Folder that the SAEs are also saved into, each as KEEP/NAME."""
    out: OutFolder = None
    """Folder for everything the run writes; runs/sae-MODEL-DATA when not given."""

    @property
    def order_seed(self) -> int:
        """Seed of the order of the vectors, of what is held out, and of the pairs that `limit` keeps."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SAETrainVerb(SAEConfig, SAETraining):
    """Trains sparse autoencoders on a model's activations, many at once, and writes a report.

    Example: veridical sae train --model tiny-liar --data honesty --site resid_post.4 --k 16 --tokens 1000000

    Reads activations into OUT/activations (or --activations, or --on-the-fly), trains, judges on held-out
    texts beside PCA and a random dictionary, and saves each SAE in OUT/saes/NAME as a SAELens folder. A run
    that was stopped goes on. In a recipe, `saes:` is a list of what differs between several SAEs
    (`saes: [{k: 16}, {k: 32}]`), which are trained together.
    """

    data_seed: Seed = 0
    """Seed of the order of the vectors, of what is held out, and of the pairs that --limit keeps."""
    saes: Members = ()
    """What differs between several SAEs."""

    @property
    def order_seed(self) -> int:
        """See `SAETraining`."""
        return self.data_seed


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SAESweepVerb(SweepConfig, SAETraining):
    """Trains a list or a grid of SAEs and cancels early those that fall behind their peers.

    Example: veridical sae sweep --config saes/recipes/tiny_liar_sweep.yaml --slots 4

    The recipe holds the members: `grid:` (lists of values by option, every combination), `configs:` (one by
    one) and `common:` (options of all); `veridical sae train --help` lists the options. At rungs of tokens
    seen, members are judged on explained variance among peers of like L0, and one that is cancelled gives its
    place to the next. Otherwise as `sae train`. --engine ray spreads members over a Ray cluster.
    """

    common: Mapped = field(default_factory=dict)
    """Options of every member that does not set them itself."""
    grid: Mapped = field(default_factory=dict)
    """Lists of values by option."""
    configs: Members = ()
    """Members one by one."""
    resources: Mapped = field(default_factory=dict)
    """What a member takes of a Ray cluster, such as {cpu: 2, gpu: 1}."""
    store: Path | None = None
    """Folder of checkpoints; OUT/training when not given. With engine ray, one that all machines see."""
    holdout: float = 0.05
    """Share of the texts (or pairs) that is never trained on; test rows of a split column in the data win."""
    seed: Seed = 0
    """Seed of the order of the vectors, of what is held out, and of the pairs that --limit keeps."""

    @property
    def order_seed(self) -> int:
        """See `SAETraining`."""
        return self.seed


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SAEEvalVerb(Texts):
    """Judges saved SAEs on texts: variance explained, L0, dead latents, cross-entropy recovered, labels.

    Example: veridical sae eval saes/tiny-liar/layer1-k16 --model tiny-liar --data honesty --target lied

    Reads folders of Veridical, SAELens, sparsify and dictionary_learning. With several, their L0 and FVU are
    drawn in one figure. Give texts that they were not trained on.
    """

    saes: Folders = ()
    """Folders of saved SAEs. Required."""
    site: str | None = None
    """Where they read, for SAEs that do not say."""
    target: str | None = None
    """Label column for probes on few latents, and for feature absorption."""
    where: tuple[str, ...] = ()
    """Row conditions of those probes, such as instructed_to_lie=True."""
    label_tokens: str | int = "last"
    """The one token of each row that those probes read, such as prompt_last."""
    seed: Seed = 0
    """Seed of resamples, splits and the random dictionary, and of the pairs that --limit keeps."""
    out: OutFolder = None
    """Folder for everything the run writes; runs/sae-eval-MODEL-DATA when not given."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SAEFeaturesVerb(Texts):
    """Shows an SAE's features: an index, pages with examples and logit effects, and what separates a label.

    Example: veridical sae features saes/tiny-liar/layer1-k16 --model tiny-liar --data honesty --target lied

    Pages are for the features given, else for those that separate --target, else for the most active.
    """

    sae: tyro.conf.Positional[Path | None] = None
    """Folder of a saved SAE. Required."""
    site: str | None = None
    """Where it reads, for an SAE that does not say."""
    features: tuple[int, ...] = ()
    """Features that get a page."""
    pages: int = 12
    """Pages, where no features are given."""
    examples: int = 8
    """Texts on a page, strongest first."""
    target: str | None = None
    """Label column of two classes; features that separate it are ranked on one half of the pairs and measured
    on the other."""
    where: tuple[str, ...] = ()
    """Row conditions of that comparison, such as instructed_to_lie=True."""
    label_tokens: str | int = "last"
    """The token of each row at which the classes are compared, such as prompt_last; all compares the largest
    activation in the row."""
    seed: Seed = 0
    """Seed of drawn examples, halves and permutations, and of the pairs that --limit keeps."""
    out: OutFolder = None
    """Folder for everything the run writes; runs/sae-features-MODEL-DATA when not given."""
