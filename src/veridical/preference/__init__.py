"""Preference training: thin recipes over TRL, and what every checkpoint of a run does.

`prefer` in `training` makes a run of one of `sft`, `reward`, `dpo` (with IPO) and `rl`, each in its file over
what `trainers` shares; `data` reads preferences, `measure` samples a checkpoint and takes its exact KL to the
reference, `runs` is the result. `frontier` fits reward against KL over runs, `hacking` asks whether the
reward was hacked. `guidelines` makes preferences from ranked completions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from veridical.lazy import lazy

if TYPE_CHECKING:
    from veridical.preference.config import PreferConfig
    from veridical.preference.data import Preference, Preferences, load_preferences
    from veridical.preference.reward import RewardModel, load_reward
    from veridical.preference.runs import PreferenceRun
    from veridical.preference.training import prefer

__all__ = [
    "PreferConfig",
    "Preference",
    "PreferenceRun",
    "Preferences",
    "RewardModel",
    "load_preferences",
    "load_reward",
    "prefer",
]

_HOME = {
    "PreferConfig": "config",
    "Preference": "data",
    "PreferenceRun": "runs",
    "Preferences": "data",
    "RewardModel": "reward",
    "load_preferences": "data",
    "load_reward": "reward",
    "prefer": "training",
}

__getattr__, __dir__ = lazy(__name__, _HOME)
