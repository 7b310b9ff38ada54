"""The adapter against its baselines on `tiny-liar`: one table, on what none of them was made from.

    python tests/benchmarks/bench_interventions.py --seeds 0 1 2 3 4 --write

For each seed an adapter, a DPO adapter under the same KL budget, a mean-difference vector calibrated to that
KL, a random direction of the vector's length, an instruction, the best of several instructions in several
places on validation pairs, and examples. All are made from training entities under system prompts that are
not held out, and measured by `veridical.steering.evaluate` on test entities. Written are one line per seed,
intervention and measure, and the means with their spread.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pandas as pd
import torch

import veridical as vd
from veridical.pairs.prompts import HONEST
from veridical.steering import FewShot, Prompt, engineered_prompt, evaluate, random_like
from veridical.steering.train import train_adapter

RESULTS = Path(__file__).parent / "results"
BUDGET = 0.05
LINES, TABLE = RESULTS / "interventions.csv", RESULTS / "interventions.md"


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = vd.load("tiny-liar")
    whole = vd.Pairs.load("honesty").filter(taught=True, protected=False)
    free = whole.filter((whole["split"] != "test") & ~whole["system_held_out"])
    for seed in options.seeds:
        began = time.perf_counter()
        found = evaluate(
            model, interventions(model, free, whole, seed), whole.filter(split="test"), seeds=(seed,),
            strengths=(), rows=96, answers=16, progress=False,
        )  # fmt: skip
        frame = found.table.assign(seed=seed)
        print(frame.to_string(), f"\n{time.perf_counter() - began:.0f} s", flush=True)
        if options.write:
            keep(frame, seed)


def interventions(model: Any, free: vd.Pairs, whole: vd.Pairs, seed: int) -> dict[str, Any]:
    """What is compared, by name; made from `free`, except that adapters get `whole` and hold out the same."""
    ours, dpo = (
        train_adapter(
            model, whole, objective=objective, kl_budget=BUDGET, holdout=("system_held_out=True",), seed=seed,
            progress=False,
        )
        for objective in ("representation", "dpo")
    )  # fmt: skip
    vector = vd.SteeringVector.fit(model, free, seed=seed, target_kl=BUDGET, progress=False)
    vector = vector.calibrate(model, target_kl=BUDGET)
    texts = [prompt.text for prompt in HONEST if not prompt.held_out]
    return {
        "prompt": Prompt(texts[0]),
        "engineered prompt": engineered_prompt(model, free.filter(split="val"), texts[:4], seed=seed),
        "few-shot": FewShot.of(free, seed=seed),
        "random direction": random_like(vector, seed),
        "mean-difference vector": vector,
        "DPO adapter": dpo,
        "adapter": ours,
    }


def keep(frame: pd.DataFrame, seed: int) -> None:
    """Adds a seed to what is written, and makes the table of all."""
    RESULTS.mkdir(exist_ok=True)
    before = pd.read_csv(LINES) if LINES.is_file() else frame.iloc[:0]
    lines = pd.concat([before[before["seed"] != seed], frame], ignore_index=True)
    lines.round(5).to_csv(LINES, index=False)
    grouped = lines.groupby(["measure", "intervention"], sort=False)["value"]
    spread = grouped.agg(["mean", "min", "max"]).reset_index()
    spread["shown"] = [f"{r['mean']:.3f} ({r['min']:.3f} to {r['max']:.3f})" for _, r in spread.iterrows()]
    wide = spread.pivot(index="measure", columns="intervention", values="shown")
    wide = wide[[name for name in dict.fromkeys(lines["intervention"]) if name in wide]]
    wide = wide.loc[list(dict.fromkeys(lines["measure"]))]
    head = f"# Interventions on tiny-liar, {lines['seed'].nunique()} seeds: mean (least to most)\n\n"
    rows = [["measure", *wide.columns], ["---"] * (1 + len(wide.columns))]
    rows += [[str(name), *map(str, line)] for name, line in zip(wide.index, wide.to_numpy())]
    TABLE.write_text(head + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n")


if __name__ == "__main__":
    main()
