"""The options of each verb: those of the API's config it stands on, and where its inputs and outputs are.

One dataclass is the verb's flags, the keys of its recipe and the `config.json` that it saves; that file is a
recipe that runs the verb again. Nothing here imports torch, so that `--help` is quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic.dataclasses import dataclass

from veridical.config import STRICT, BeliefConfig, CollectConfig, ProbeConfig
from veridical.errors import ConfigError

Folders = tyro.conf.Positional[tuple[Path, ...]]
OutFolder = Annotated[Path | None, tyro.conf.arg(aliases=["-o"])]
DemoFolder = Annotated[Path, tyro.conf.arg(aliases=["-o"])]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Inputs:
    """The model and the data that a verb works on."""

    model: str | None = None
    """Model: a local folder, a hub name, or an embedded organism (`veridical ls` lists them). Required."""
    data: str | None = None
    """Data: an embedded name, a csv/jsonl/parquet file, a data set folder, or a hub id. Required."""
    adapter: str | None = None
    """How to read the data (truthfulqa, statements, ...); recognised by its columns when not given."""
    limit: int | None = None
    """Keep at most this many pairs, drawn with the seed; for a quick look."""
    device: str | None = None
    """Device such as cpu or cuda:0; chosen with a stated reason when not given."""
    model_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Number format of the model's weights; chosen with a stated reason when not given."""
    trust_remote_code: bool = False
    """Run code that the model's repository brings along. Only for repositories you trust."""

    def require(self, verb: str) -> None:
        """Refuses a run that lacks its model or data.

        Raises:
            ConfigError: One of the two was not given.
        """
        for name in ("model", "data"):
            if not getattr(self, name):
                raise ConfigError(
                    f"{verb} needs --{name} (or `{name}:` in its recipe); see veridical {verb} --help"
                )
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit = {self.limit}: expected at least one pair")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CollectVerb(CollectConfig, Inputs):
    """Reads a model's activations on a data set into a store that can be resumed.

    Example: veridical collect --model Qwen/Qwen3-0.6B --data pairs.csv --tokens all --store runs/acts

    A run that was stopped goes on where it was. --config recipe.yaml gives options by name;
    flags win.
    """

    store: Path | None = None
    """Folder of the store and of what made it; runs/collect-MODEL-DATA when not given."""
    seed: int = 0
    """Seed of the pairs that --limit keeps."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ProbeVerb(ProbeConfig, CollectConfig, BeliefConfig, Inputs):
    """Fits probes for a label at every site of a model, with controls, and writes a report.

    Example: veridical probe --model Qwen/Qwen3-0.6B --data TruthfulQA.csv --tokens answer --limit 200

    Loads the pairs, collects activations into OUT/activations (a stopped run goes on), fits and judges
    the probes, and writes OUT/report.html. --config recipe.yaml gives options by name; flags win.
    """

    out: OutFolder = None
    """Folder for everything the run writes; runs/probe-MODEL-DATA when not given."""
    store: Path | None = None
    """Folder of the activations; OUT/activations when not given."""
    beliefs: bool | None = None
    """Check first what the model believes and where it lies; by default when a label of that is asked for."""
    on_long: Literal["error", "truncate"] = "truncate"
    """What to do with a prompt over max_length; how many rows were cut is said."""


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
    """Lists embedded models and pairs, and the probes, stores and runs in a folder.

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
    "report": ReportVerb,
    "ls": LsVerb,
}
