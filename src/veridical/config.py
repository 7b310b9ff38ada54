"""One frozen dataclass for each verb: the API's options, the flags, a recipe's keys, the saved JSON.

A recipe is YAML; an unknown key, there or among keyword arguments, is refused with the nearest valid one.
Nothing here imports torch, so that `veridical --help` is quick.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import yaml
from pydantic.dataclasses import dataclass

from veridical.errors import ConfigError, unknown

STRICT = pydantic.ConfigDict(extra="forbid", validate_default=False)
DType = Literal["float32", "float16", "bfloat16"]
Sites = str | tuple[str, ...]
Count = Annotated[int, pydantic.Field(ge=1)]
Seed = Annotated[int, pydantic.Field(ge=0, lt=2**63)]
Minutes = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CollectConfig:
    """What to read from a model, over which tokens, and where to keep it."""

    sites: Sites = "resid_post.*"
    """Sites to read: names, globs or raw module paths (several: separate with commas)."""
    tokens: str | int = "last"
    """Tokens to read: last, mean, all, answer, prompt_last, span, or an index (-1 is the last real token)."""
    store: Path | None = None
    """Folder of the store; memory only when not given."""
    dtype: DType = "float32"
    """Number format of the stored activations."""
    batch_tokens: Count = 2048
    """Tokens in one batch, padding included. 2048 suits the caches of a few cores; raise it on a GPU."""
    shard_mb: Count = 256
    """Size of one shard file. A shard is the unit of resuming: a killed run repeats at most one."""
    max_length: int | None = None
    """Longest prompt in tokens; the model's context when not given."""
    on_long: Literal["error", "truncate"] = "error"
    """What to do with a prompt over max_length."""
    padding: Literal["right", "left"] = "right"
    """Side of the padding inside a batch; both give the same numbers."""
    progress: bool | None = None
    """Progress bar; by default only on a terminal or in a notebook."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ProbeConfig:
    """How probes are selected, fitted, and judged."""

    target: str = "label"
    """Label column to predict."""
    where: tuple[str, ...] = ()
    """Row conditions such as instructed_to_lie=True; rows that fail one are left out."""
    holdout: tuple[str, ...] = ()
    """Row conditions such as system_held_out=True; rows that meet them all are never fitted on, and the test
    is made of such rows of the held-out pairs alone."""
    folds: int = 5
    """Folds by pair, in which site and strength are chosen."""
    test_fraction: float = 0.3
    """Share of the pairs held out for the reported figures (a split column in the data wins)."""
    strengths: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
    """Inverse L2 strengths C that are tried."""
    bootstrap: Count = 500
    """Resamples of whole pairs for the 95 % intervals."""
    shuffles: int = 20
    """Fits on labels permuted over pairs, for the control."""
    text_baseline: bool = True
    """Fit TF-IDF with logistic regression on the text alone, with the same folds."""
    allow_duplicates: bool = False
    """Leave rows that occur under several pairs as they are; else such pairs are joined, and copies on both
    sides of a split column refused."""
    memory_gb: float = 8.0
    """Memory for the rows of one site, in GB; a site that needs more is read in chunks for every product.
    Fixed, so that a run takes the same path on every machine; 8 leave room for a model in 16 GB."""
    solve_on: str | None = None
    """Device on which the fits are solved, such as cuda:0; where the activations are when not given, which is
    the CPU for a store."""
    seed: Seed = 0
    """Seed of folds, bootstraps and shuffles."""
    progress: bool | None = None
    """Progress bar; by default only on a terminal or in a notebook."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HonestyConfig:
    """How the lying and the instruction probes are fitted side by side, and by what their rows are parted."""

    holdout: tuple[str, ...] | None = None
    """Row conditions that mark rows which are never fitted on; system_held_out=True where not given."""
    by: tuple[str, ...] | None = None
    """Columns by whose values figures are given; where not given, scenario if there is such a column."""
    difficulty: str | None = None
    """Column of difficulty; where not given, difficulty or else thirds of belief_confidence."""
    folds: int = 5
    """Folds by pair: each row is judged by a probe that saw nothing of its pair."""
    strengths: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
    """Inverse L2 strengths C that are tried."""
    bootstrap: Count = 500
    """Resamples of whole pairs for the 95 % intervals."""
    text_baseline: bool = True
    """Fit TF-IDF with logistic regression on the text alone, with the same folds."""
    seed: Seed = 0
    """Seed of folds and bootstraps."""
    progress: bool | None = None
    """Progress bar; by default only on a terminal or in a notebook."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BeliefConfig:
    """How a model is asked for its beliefs, and when an answer counts as knowledge."""

    style: Literal["auto", "text", "letters"] = "auto"
    """Options scored as their own text or as letters; auto takes letters if one is over 4 words long."""
    orders: int = 2
    """Orders of the options per prompt."""
    known_probability: float = 0.75
    """Least mean probability of the believed option for a fact to count as known."""
    known_agreement: float = 0.75
    """Least share of honest prompts and orders that agree on it."""
    known_by: Literal["question", "pair"] = "question"
    """What has to pass those thresholds: each question by itself, or all questions of its pair together."""
    honest_prompts: int = 4
    """Honest system prompts under which every question is asked."""
    lying_prompts: int = 4
    """Lying system prompts, where questions without prompts of their own are made into rows."""
    min_coverage: float = 0.5
    """Probability on the options below which the report asks for another style."""
    batch_tokens: Count = 4096
    """Tokens in one batch."""
    seed: Seed = 0
    """Seed of the option orders."""
    progress: bool | None = None
    """Progress bar; by default only on a terminal or in a notebook."""


Config = TypeVar("Config")


def build(cls: type[Config], base: Config | None = None, **options: Any) -> Config:
    """An instance of `cls` from `base` and `options` (options win).

    Raises:
        UnknownNameError: An option that `cls` does not have; names the nearest.
        ConfigError: A value of the wrong type.
    """
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for name in options:
        if name not in names:
            raise unknown(f"option of {cls.__name__}", name, names)
    values = {} if base is None else {name: getattr(base, name) for name in names}
    try:
        return cls(**{**values, **options})
    except pydantic.ValidationError as error:
        raise ConfigError(_one_line(error, cls.__name__)) from error


def load_recipe(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML recipe."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no recipe at {path}")
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), _Recipes)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error
    if recipe is None:
        return {}
    if not isinstance(recipe, dict):
        raise ConfigError(f"{path} holds a {type(recipe).__name__}; expected keys and values")
    return {str(key).replace("-", "_"): value for key, value in recipe.items()}


class _Recipes(yaml.SafeLoader):
    """YAML, read safely; a key that stands twice is an error and not the last one's value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} twice in one mapping", key.start_mark
                )
            seen.add(key.value if isinstance(key.value, str) else id(key))
        return super().construct_mapping(node, deep)


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as plain JSON values, for saving beside an output."""
    return pydantic.TypeAdapter(type(config)).dump_python(config, mode="json")


def _one_line(error: pydantic.ValidationError, name: str) -> str:
    said = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"]) or name
        said.append(f"{where} = {problem.get('input')!r}: {problem['msg']}")
    return f"invalid {name}: " + "; ".join(dict.fromkeys(said))
