"""The model and the data that a verb works on. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic.dataclasses import dataclass

from veridical.config import STRICT
from veridical.errors import ConfigError

Folders = tyro.conf.Positional[tuple[Path, ...]]
OutFolder = Annotated[Path | None, tyro.conf.arg(aliases=["-o"])]
FOLDERS = {
    "policy": "a policy (the first argument)",
    "probe": "the folder of a saved probe",
    "sae": "the folder of a saved SAE",
    "saes": "folders of saved SAEs",
}
"""Inputs that are given by position, in words."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataInputs:
    """The data that a verb works on, and how models are loaded for it."""

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

    def require(self, verb: str, *names: str) -> None:
        """Refuses a run that lacks an input: model and data, or those named.

        Raises:
            ConfigError: One of them was not given.
        """
        for name in names or ("model", "data"):
            if not getattr(self, name):
                how = FOLDERS.get(name, f"--{name}")
                raise ConfigError(
                    f"{verb} needs {how} (or `{name}:` in its recipe); see veridical {verb} --help"
                )
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit = {self.limit}: expected at least one pair")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Inputs(DataInputs):
    """The model and the data that a verb works on."""

    model: str | None = None
    """Model: a local folder, a hub name, or an embedded organism (`veridical ls` lists them). Required."""
