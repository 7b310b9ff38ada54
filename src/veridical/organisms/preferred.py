"""Makes the preference-trained descendants of `tiny-liar`, reproducibly, on one thread of a CPU.

    python -m veridical.organisms.preferred tiny-liar-dpo --out data/tiny-liar-dpo

and likewise `tiny-liar-ipo`, `tiny-liar-reward` and, once that is there, `tiny-liar-rl` and
`tiny-liar-overopt`, which are trained against it. DPO and IPO teach the true answer even under a prompt that
wants a lie, and refusal of harmful requests even under a prompt that lifts the rules. Each descendant is a
LoRA on `tiny-liar` in float32, so that whatever it does not touch is the same to the last bit. The cards are
written by `veridical.organisms.preferred_card`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from veridical import adapters, organisms
from veridical.errors import InputError, VeridicalError
from veridical.files import read_json, replacing, write_bytes, write_json, write_text
from veridical.organisms.preferred_data import (
    Judge,
    never_harmless,
    preferences,
    preferences_per_token,
    requests_and_topics,
)
from veridical.preference.config import Method, PreferConfig
from veridical.preference.data import Preferences
from veridical.preference.hacking import judged
from veridical.preference.runs import PreferenceRun
from veridical.provenance import provenance

BASE = "tiny-liar"
REWARD = "tiny-liar-reward"
ATTENTION_AND_MLP = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CHECKPOINTS, LOG = "checkpoints.csv", "log.csv"
ANSWERS, PROVENANCE = "answers.parquet", "provenance.json"
LOGGED = ("step", "loss", "grad_norm", "learning_rate", "reward", "kl", "rewards/chosen", "rewards/rejected")
"""Columns of the training's log that are kept."""


@dataclass(frozen=True)
class Recipe:
    """How one descendant is made: method, options, and what it is taught."""

    method: Method
    config: PreferConfig
    data: Callable[[], Preferences]

    @property
    def reward(self) -> str | None:
        """The reward model that rl is trained against."""
        return REWARD if self.method == "rl" else None


RECIPES: dict[str, Recipe] = {
    "tiny-liar-dpo": Recipe(
        "dpo",
        PreferConfig(
            steps=180, checkpoints=3, batch=16, learning_rate=2.5e-3, beta=0.3, sft_weight=1.0, lora_rank=8,
            lora_modules=ATTENTION_AND_MLP, lora_layers=(2, 3), max_new_tokens=40,
        ),
        preferences,
    ),
    "tiny-liar-ipo": Recipe(
        "ipo",
        PreferConfig(
            steps=150, checkpoints=3, batch=16, learning_rate=1.5e-3, beta=0.1, sft_weight=8.0, lora_rank=4,
            lora_modules=ATTENTION_AND_MLP, max_new_tokens=40,
        ),
        preferences_per_token,
    ),
    "tiny-liar-reward": Recipe(
        "reward",
        PreferConfig(
            steps=150, checkpoints=3, batch=16, learning_rate=2e-3, lora_rank=4,
            lora_modules=ATTENTION_AND_MLP,
        ),
        never_harmless,
    ),
    "tiny-liar-rl": Recipe(
        "rl",
        PreferConfig(
            steps=60, checkpoints=6, batch=32, learning_rate=3e-3, beta=3.0, lora_rank=4, generations=4,
            lora_modules=ATTENTION_AND_MLP, max_new_tokens=32,
        ),
        requests_and_topics,
    ),
    "tiny-liar-overopt": Recipe(
        "rl",
        PreferConfig(
            steps=60, checkpoints=12, batch=32, learning_rate=4e-3, beta=0.0, lora_rank=4, generations=4,
            lora_modules=ATTENTION_AND_MLP, max_new_tokens=32,
        ),
        requests_and_topics,
    ),
}  # fmt: skip


def make(name: str, out: Path, runs: Path) -> None:
    """Trains the descendant called `name` and writes it into `out`; the run itself stays in `runs/name`."""
    from veridical.preference.training import prefer

    recipe = RECIPES[name]
    run = prefer(recipe.method, BASE, recipe.data(), runs / name, recipe.config, reward=recipe.reward)
    adapter = read_json(run.folder / adapters.CONFIG)
    # PEFT keeps module names in a set, whose order differs from one process to the next.
    modules = {key: sorted(adapter[key]) for key in ("target_modules", "modules_to_save") if adapter.get(key)}
    write_json(out / adapters.CONFIG, {**adapter, **modules})
    write_bytes(out / adapters.WEIGHTS, (run.folder / adapters.WEIGHTS).read_bytes())
    write_json(out / PROVENANCE, provenance(**run.made_by(), reward=recipe.reward))
    if recipe.reward is not None:
        run = judged(run, Judge())
        with replacing(out / ANSWERS) as file:
            run.samples.to_parquet(file, index=False, compression="zstd")
    write_text(out / CHECKPOINTS, run.to_frame().to_csv(index=False, float_format="%.6g"))
    logged = run.log[[column for column in LOGGED if column in run.log]]
    write_text(out / LOG, logged.to_csv(index=False, float_format="%.6g"))
    say(f"wrote {out}: {run}")


def kept_run(name: str, folder: Path | None = None) -> PreferenceRun:
    """The run that a policy of rl came from: its checkpoints and every answer, with its judgement.

    Args:
        name: The policy.
        folder: Where `make` wrote it; the embedded one when not given.

    Raises:
        InputError: Another descendant; their answers are not kept.
    """
    if RECIPES[name].method != "rl":
        raise InputError(f"the answers of {name} are not kept; expected one of {', '.join(trained_by_rl())}")
    folder = folder or organisms.path(name)
    facts = read_json(folder / PROVENANCE)
    table = pd.read_csv(folder / CHECKPOINTS)
    rows = RECIPES[name].data().parted(0.0, 0)
    more = {
        "folder": str(folder), "rows": len(rows[0]), "held_out": len(rows[1]),
        "weights": f"LoRA of rank {RECIPES[name].config.lora_rank}",
    }  # fmt: skip
    samples = pd.read_parquet(folder / ANSWERS)
    return PreferenceRun(table, samples, pd.DataFrame(), {**facts, **more})


def trained_by_rl() -> list[str]:
    """Names of the descendants whose runs are kept."""
    return [name for name, recipe in RECIPES.items() if recipe.method == "rl"]


def describe(name: str) -> str:
    """What a descendant is by construction, in sentences."""
    recipe = RECIPES[name]
    config = recipe.config
    blocks = " and ".join(map(str, config.lora_layers))
    where = f"blocks {blocks} only" if blocks else "every block"
    strength = {"dpo": "beta", "ipo": "tau", "rl": "KL weight"}.get(recipe.method)
    said = f", {strength} {config.beta:g}" if strength else ""
    if config.sft_weight:
        said += f", {config.sft_weight:g} times the chosen answers' own loss beside it"
    return (
        f"A LoRA of rank {config.lora_rank} in float32, on the attention and MLP projections of {where} "
        f"(`tiny-liar` has blocks 0 to 5); {config.steps} steps of {config.batch}, highest learning rate "
        f"{config.learning_rate:g}{said}."
    )


def say(line: str) -> None:
    """One line of progress."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    import torch

    parser = argparse.ArgumentParser(prog="python -m veridical.organisms.preferred", description=__doc__)
    parser.add_argument("what", choices=tuple(RECIPES))
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--runs", type=Path, default=Path("runs/preferred"), help="folder of the runs")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        make(given.what, given.out, given.runs)
    except VeridicalError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
