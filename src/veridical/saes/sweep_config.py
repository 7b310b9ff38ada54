"""What a sweep trains and how it judges: API argument, recipe keys and saved JSON in one.

    common: {architecture: topk, tokens: 2000000}
    grid:
      lr: [1e-4, 3e-4, 1e-3]
      k: [16, 32]
    configs:
      - {k: 64, lr: 3e-4}
    slots: 4

Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from veridical.config import STRICT, Minutes, Seed, build, load_recipe
from veridical.errors import ConfigError, unknown
from veridical.saes.config import SAEConfig
from veridical.saes.halving import Rules

FIELDS = tuple(field.name for field in dataclasses.fields(SAEConfig))
LABELLED = ("architecture", "width", "expansion", "k", "sparsity", "lr", "seed")
"""Fields that a config's label shows; a grid over others puts them into the name."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SweepConfig:
    """The members of a sweep, when they are judged, and where they train."""

    common: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of SAEConfig for every member that does not set them itself."""
    grid: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    """Lists of values by field of SAEConfig; every combination is a member, the last field changing fastest.
    Where a field takes a list itself (prefixes, sites), give a list of lists."""
    configs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Members one by one, after those of the grid: fields of SAEConfig by name."""

    slots: int | None = None
    """Members that are trained together; all when not given. At each rung the next on the list take their
    places at once, over the same vectors, so the slots decide nothing but memory and time; a store is read
    again for that, and a running model run again."""
    eta: float = 2.0
    """Of the peers at a rung the best 1/eta go on. 2 is careful; 3 or 4 spend less and lose slow members."""
    rungs: int = 3
    """Times that a member is judged: with eta 2, after 1/8, 1/4 and 1/2 of its tokens."""
    first: int | None = None
    """Tokens at the first rung, each next one eta times as many; tokens / eta**rungs when not given."""
    grace: float = 0.05
    """Share of the run after the end of its warm-up in which nobody is judged: figures in a warm-up say
    which learning rate rises fastest, not which is best."""
    max_dead: float = 0.75
    """Share of dead latents above which a member is cancelled, if its peers' median is not above it too."""
    control: str | None = None
    """Name of the member that only NaN can cancel; the first on the list when not given. It shows what the
    rule would have thrown away."""

    engine: Literal["local", "ray"] = "local"
    """local trains members of like shape as one batched computation on this machine; ray spreads members over
    a Ray cluster, each by itself."""
    resources: dict[str, float] = dataclasses.field(default_factory=dict)
    """What a member takes of a Ray cluster, such as {cpu: 2, gpu: 1}; a core, and a GPU if there is one, when
    not given. Only for engine ray."""
    store: Path | None = None
    """Folder of checkpoints and finished SAEs; a sweep that was stopped goes on from there."""
    holdout: float = 0.02
    """Share of the vectors that is never trained on and that members are judged on."""
    seed: Seed = 0
    """Seed of the order of the vectors and of what is held out."""
    checkpoint_minutes: Minutes = 5.0
    """Minutes between checkpoints; the last two are kept."""
    device: str | None = None
    """Where to train; a GPU if there is one."""
    tracker: Literal["trackio", "wandb"] | None = None
    """Log every member as a run of its own to trackio or wandb; nothing is sent when not given."""
    project: str = "veridical"
    """Project that the tracker's runs are put into."""
    progress: bool | None = None
    """Progress bar; by default only on a terminal or in a notebook."""

    @property
    def rules(self) -> Rules:
        """The part that judges.

        Raises:
            ConfigError: A value outside its range.
        """
        for option, least in (("rungs", 1), ("slots", 1), ("first", 1)):
            value = getattr(self, option)
            if value is not None and value < least:
                raise ConfigError(f"{option} is {value}; expected {least} or more")
        if not self.eta > 1:
            raise ConfigError(f"eta is {self.eta:g}; expected more than 1: of the peers 1/eta go on")
        for option in ("grace", "max_dead"):
            if not 0 <= getattr(self, option) <= 1:
                raise ConfigError(f"{option} is {getattr(self, option)}; expected a share from 0 to 1")
        return Rules(self.eta, self.rungs, self.first, self.grace, self.max_dead)

    def members(self) -> list[SAEConfig]:
        """The configs of all members: those of the grid, then those listed.

        Raises:
            UnknownNameError: A field that SAEConfig does not have; names the nearest.
            ConfigError: A value of the wrong type, an empty list, or no member at all.
        """
        for where, names in (("common", self.common), ("grid", self.grid)):
            _check_fields(names, where)
        for field, values in self.grid.items():
            if not values:
                raise ConfigError(f"grid.{field} is an empty list; expected one value or more")
            if field == "name":
                raise ConfigError("grid.name: a name belongs to one member; give it under configs")
        made = []
        if self.grid:
            for values in itertools.product(*self.grid.values()):
                made.append(_of_grid(self.common, dict(zip(self.grid, values))))
        for number, options in enumerate(self.configs):
            _check_fields(options, f"configs[{number}]")
            made.append(build(SAEConfig, **{**self.common, **options}))
        if not made:
            raise ConfigError(
                "the sweep has no members; give a grid of lists over fields of SAEConfig, or configs"
            )
        return made


def as_sweep(configs: Any, options: dict[str, Any]) -> tuple[SweepConfig, list[SAEConfig]]:
    """The sweep and its members from what `sweep_saes` takes.

    Raises:
        UnknownNameError: An unknown key; names the nearest.
        ConfigError: Members that are none, or no recipe at that path.
    """
    if isinstance(configs, SweepConfig):
        sweep = build(SweepConfig, configs, **options)
        return sweep, sweep.members()
    if isinstance(configs, str | Path):
        configs = load_recipe(configs)
    if isinstance(configs, Mapping):
        sweep = build(SweepConfig, **{**configs, **options})
        return sweep, sweep.members()
    if isinstance(configs, Sequence) and configs and all(isinstance(one, SAEConfig) for one in configs):
        return build(SweepConfig, **options), list(configs)
    kinds = sorted({type(one).__name__ for one in configs}) if isinstance(configs, Sequence) else []
    raise ConfigError(
        f"configs is a {type(configs).__name__}{' of ' + ', '.join(kinds) if kinds else ''}; expected a list "
        "of SAEConfig, a SweepConfig, a mapping with grid or configs, or the path of such a recipe"
    )


def _of_grid(common: Mapping[str, Any], values: dict[str, Any]) -> SAEConfig:
    config = build(SAEConfig, **{**common, **values})
    told = [f"{field}{_word(value)}" for field, value in values.items() if field not in LABELLED]
    return build(SAEConfig, config, name="-".join([config.label, *told])) if told else config


def _word(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "_".join(map(_word, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _check_fields(names: Mapping[str, Any], where: str) -> None:
    for name in names:
        if name not in FIELDS:
            raise unknown(f"field of SAEConfig in {where}:", name, FIELDS)
