"""What successive halving spends, and whether it keeps the best, where learning rates are mostly bad.

    python tests/benchmarks/bench_sae_sweep.py            # prints
    python tests/benchmarks/bench_sae_sweep.py --write    # also updates results/sae_sweep.md and .json

Sixteen TopK SAEs on planted features (sparse combinations of known unit directions), with learning rates
from 1e-6 to 1 evenly spaced in the logarithm, in an order that follows from the seed, so that the control
(the first) is a random one. Every seed makes other features, data and initial weights. All sixteen are
trained to the end, then swept over the same stream; the best is the one with the most explained variance on
held-out vectors. Nothing of a member's figures in the full training is seen by the sweep.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import veridical as vd
from veridical.provenance import versions

RESULTS = Path(__file__).parent / "results"
FEATURES, D, P, K, WIDTH, BATCH, STEPS = 48, 16, 0.05, 4, 64, 256, 240
RATES = np.geomspace(1e-6, 1.0, 16)
ALLOWED = 0.45


def main() -> None:
    """Runs all seeds and prints or writes the table."""
    options = read_options()
    torch.set_num_threads(options.threads)
    lines = []
    for seed in range(options.seeds):
        lines += compare(seed, options.slots)
        print(*lines[-len(options.slots) :], sep="\n", flush=True)
    result = {
        "seeds": options.seeds,
        "threads": options.threads,
        "tokens": BATCH * STEPS,
        "lines": lines,
        "summary": [summary(lines, slots) for slots in options.slots],
        "versions": versions(),
    }
    print(table(result))
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "sae_sweep.md").write_text(table(result))
        (RESULTS / "sae_sweep.json").write_text(json.dumps(result, indent=2) + "\n")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=20, help="sweeps, each with data of its own")
    parser.add_argument("--slots", type=int, nargs="*", default=[len(RATES), 4], help="members at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--write", action="store_true", help="update the committed table")
    return parser.parse_args()


def planted(seed: int, rows: int) -> torch.Tensor:
    """Vectors `[rows, D]`: each feature is active with probability P, with a strength from 0.5 to 1.5."""
    random = torch.Generator().manual_seed(1000 + seed)
    directions = torch.nn.functional.normalize(torch.randn(FEATURES, D, generator=random), dim=1)
    active = torch.rand(rows, FEATURES, generator=random) < P
    return (active * (torch.rand(rows, FEATURES, generator=random) + 0.5)) @ directions


def configs(seed: int) -> list[vd.SAEConfig]:
    """The members, in an order that follows from the seed."""
    rates = np.random.default_rng(seed).permutation(RATES)
    shared = {"width": WIDTH, "k": K, "batch": BATCH, "tokens": BATCH * STEPS, "seed": seed}
    return [vd.SAEConfig(lr=float(rate), name=f"lr{rate:.1e}", **shared) for rate in rates]


def compare(seed: int, slots: list[int]) -> list[dict[str, Any]]:
    """One line for each number of slots: what was spent, and what was kept."""
    data, members = planted(seed, 2 * BATCH * STEPS), configs(seed)
    began = time.perf_counter()
    whole = vd.train_saes(data, members, progress=False)
    seconds = time.perf_counter() - began
    explained = {run.name: run.figures.explained_variance for run in whole if run.figures is not None}
    order = sorted(explained, key=lambda name: -explained[name])
    made = []
    for number in slots:
        began = time.perf_counter()
        sweep = vd.sweep_saes(data, members, slots=number, progress=False)
        frame = sweep.to_frame()
        found = sweep.best()
        made.append(
            {
                "seed": seed,
                "slots": number,
                "share": round(sweep.share, 4),
                "kept": found.config.name == order[0],
                "best": order[0],
                "found": found.config.name,
                "lost": round(explained[order[0]] - explained[str(found.config.name)], 5),
                "margin": round(explained[order[0]] - explained[order[1]], 5),
                "control": sweep.control,
                "finished": int(frame["cancelled"].isna().sum()),
                "seconds": round(time.perf_counter() - began, 2),
                "seconds_all": round(seconds, 2),
            }
        )
    return made


def summary(lines: list[dict[str, Any]], slots: int) -> dict[str, Any]:
    """Over seeds."""
    some = [line for line in lines if line["slots"] == slots]
    shares = [line["share"] for line in some]
    return {
        "slots": slots,
        "mean_share": round(float(np.mean(shares)), 4),
        "most_share": max(shares),
        "kept": sum(line["kept"] for line in some),
        "of": len(some),
        "most_lost": max(line["lost"] for line in some),
        "least_margin": min(line["margin"] for line in some),
        "speed": round(float(np.median([line["seconds_all"] / line["seconds"] for line in some])), 2),
    }


def table(result: dict[str, Any]) -> str:
    """The summary as Markdown."""
    lines = [
        "# A sweep of 16 SAEs with mostly bad learning rates",
        "",
        "| slots | tokens spent, mean (most) | at most 45 % | best kept | explained variance lost at most | "
        "speed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in result["summary"]:
        within = "yes" if one["most_share"] <= ALLOWED else "no"
        lines.append(
            f"| {one['slots']} | {one['mean_share']:.1%} ({one['most_share']:.1%}) | {within} | "
            f"{one['kept']} of {one['of']} | {one['most_lost']:.5f} | {one['speed']:.2f} |"
        )
    lines += [
        "",
        f"TopK, {FEATURES} planted features in {D} dimensions, {WIDTH} latents, k {K}, "
        f"{result['tokens']:,} tokens, learning rates 1e-6 to 1 (factor {RATES[1] / RATES[0]:.2f} apart), "
        f"{result['seeds']} seeds. Default rules: eta 2, rungs after 1/8, 1/4 and 1/2 of the tokens, grace 5 "
        "% past the warm-up, the first member as control. Speed: time of training all over time of sweeping, "
        f"median of the seeds, {result['threads']} threads.",
        "",
        "With 4 slots members wait for each other at every rung, over the same vectors, so what is decided "
        "is what is decided with 16; each of the four waves is a smaller computation.",
        "",
        "Command: `python tests/benchmarks/bench_sae_sweep.py --write`",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
