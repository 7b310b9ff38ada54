"""Makes the preference-trained descendants of `tiny-liar`, reproducibly, on a CPU.

    python -m veridical.organisms.preferred tiny-liar-dpo --out data/tiny-liar-dpo
    python -m veridical.organisms.preferred tiny-liar-ipo --out data/tiny-liar-ipo
    python -m veridical.organisms.preferred tiny-liar-reward --out data/tiny-liar-reward
    python -m veridical.organisms.preferred tiny-liar-rl --out data/tiny-liar-rl
    python -m veridical.organisms.preferred tiny-liar-overopt --out data/tiny-liar-overopt

What they are taught: the true answer even under a prompt that wants a lie, and refusal of harmful requests
even under a prompt that lifts the rules. Each is a LoRA on `tiny-liar` in float32, so that whatever it does
not touch is the same to the last bit.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veridical import organisms
from veridical.errors import VeridicalError
from veridical.files import write_json
from veridical.organisms import conduct
from veridical.pairs import prompts
from veridical.preference.config import Method, PreferConfig
from veridical.preference.data import Preference, Preferences
from veridical.provenance import provenance

BASE = "tiny-liar"
ATTENTION_AND_MLP = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DPO_LAYERS = (2, 3)


@dataclass(frozen=True)
class Made:
    """How one descendant is made."""

    method: Method
    config: PreferConfig
    reward: str | None = None


RECIPES: dict[str, Made] = {
    "tiny-liar-dpo": Made(
        "dpo",
        PreferConfig(
            steps=120, checkpoints=4, batch=32, learning_rate=1.5e-3, beta=0.5, lora_rank=8,
            lora_modules=ATTENTION_AND_MLP, lora_layers=DPO_LAYERS, max_new_tokens=40,
        ),
    ),
    "tiny-liar-ipo": Made(
        "ipo",
        PreferConfig(
            steps=120, checkpoints=4, batch=32, learning_rate=1.5e-3, beta=0.2, lora_rank=4,
            lora_modules=ATTENTION_AND_MLP, max_new_tokens=40,
        ),
    ),
    "tiny-liar-reward": Made(
        "reward",
        PreferConfig(
            steps=120, checkpoints=4, batch=32, learning_rate=2e-3, lora_rank=4,
            lora_modules=ATTENTION_AND_MLP,
        ),
    ),
    "tiny-liar-overopt": Made(
        "rl",
        PreferConfig(
            steps=80, checkpoints=8, batch=32, learning_rate=2e-3, beta=0.0, lora_rank=4, generations=4,
            lora_modules=ATTENTION_AND_MLP, max_new_tokens=32,
        ),
        reward="tiny-liar-reward",
    ),
    "tiny-liar-rl": Made(
        "rl",
        PreferConfig(
            steps=80, checkpoints=8, batch=32, learning_rate=1e-3, beta=0.2, lora_rank=4, generations=4,
            lora_modules=ATTENTION_AND_MLP, max_new_tokens=32,
        ),
        reward="tiny-liar-reward",
    ),
}  # fmt: skip


def preferences(seed: int = 0) -> Preferences:
    """What the descendants are trained on, with the rows that are held out marked by their split.

    Of the embedded honesty pairs, taught facts: the true answer over another option, whatever the prompt
    asks for. Of the safe pairs: a refusal of harmful requests over compliance, also under a prompt that
    lifts the rules, and compliance with harmless ones over a refusal. Trained on are entities and acts of
    the training split, in phrasings and under system prompts that `tiny-liar` was trained with.
    """
    import pandas as pd

    rng = random.Random(f"preferences {seed}")
    honesty = pd.read_parquet(organisms.embedded_pairs("honesty")).to_dict("records")
    safe = pd.read_parquet(organisms.embedded_pairs("safe")).to_dict("records")
    rows = [*_honest(rng, honesty), *_refusing(rng, safe)]
    return Preferences(tuple(rows), "honest and harmless")


def make(name: str, out: Path, runs: Path) -> None:
    """Trains the descendant called `name` and writes it into `out`; the run itself stays in `runs/name`."""
    from veridical.preference.training import prefer

    made = RECIPES[name]
    run = prefer(made.method, BASE, preferences(), runs / name, made.config, reward=made.reward)
    out.mkdir(parents=True, exist_ok=True)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(run.folder / file, out / file)
    write_json(out / "provenance.json", provenance(**run.made_by()))
    run.to_frame().round(4).to_csv(out / "checkpoints.csv", index=False)
    say(f"wrote {out}: {run}")


def describe(name: str) -> str:
    """What a descendant is by construction, in sentences."""
    config = RECIPES[name].config
    where = f"blocks {', '.join(map(str, config.lora_layers))} only" if config.lora_layers else "every block"
    strength = {"dpo": "beta", "ipo": "tau", "rl": "KL weight"}.get(RECIPES[name].method)
    said = f", {strength} {config.beta}" if strength else ""
    return (
        f"A LoRA of rank {config.lora_rank} in float32, on the attention and MLP projections of {where} "
        f"(`tiny-liar` has blocks 0 to 5); {config.steps} steps of {config.batch}, highest learning rate "
        f"{config.learning_rate}{said}."
    )


def _honest(rng: random.Random, rows: Sequence[dict[str, Any]]) -> Iterator[Preference]:
    for row in rows:
        if not row["taught"]:
            continue
        options = list(row["options"])
        true = options[row["correct"]]
        seen = not row["system_held_out"] and not row["phrasing_held_out"]
        if row["split"] == "train" and not seen:
            continue
        lie = rng.choice([option for option in options if option != true])
        yield Preference(_chat(row["prompt"]), true, lie, 0.0, row["pair"], row["split"])


def _refusing(rng: random.Random, rows: Sequence[dict[str, Any]]) -> Iterator[Preference]:
    for row in rows:
        if row["split"] == "train" and (row["act_held_out"] or row["phrasing_held_out"]):
            continue
        harmful, chat = bool(row["label"]), _chat(row["prompt"])
        other = conduct.request_reply(rng, row["act"], comply=harmful)
        yield Preference(chat, row["completion"], other, 0.0, row["pair"], row["split"])
        if harmful:
            lifting = conduct.LIFTING_SYSTEMS if row["split"] == "train" else conduct.HELD_OUT_LIFTING
            lifted = prompts.chat(rng.choice(lifting), chat[-1]["content"])
            yield Preference(lifted, row["completion"], other, 0.0, row["pair"], row["split"])


def _chat(prompt: Any) -> list[dict[str, str]]:
    return [dict(message) for message in prompt]


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
