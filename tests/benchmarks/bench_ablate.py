"""What it costs to ablate during a generation, against the same generation without.

    python tests/benchmarks/bench_ablate.py            # prints
    python tests/benchmarks/bench_ablate.py --write    # also updates results/ablate.md and ablate.json

A GPT-2 of width 768, 12 layers and 12 heads with random weights generates greedily, plain and under each
ablation in turn, the order rotating. The overhead is the median over the turns of the ratio of the two times,
less 1; its spread is that of the middle half of the turns. Entering the context (means already taken) and
leaving it are inside the time. `nothing` is the plain generation a second time: what the clock alone gives.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers

import veridical as vd
from veridical.interventions import ablate, mean_activations
from veridical.provenance import versions

RESULTS = Path(__file__).parent / "results"
ALLOWED = 0.05
SITE, HEADS = "resid_post.6", "z.6"


def main() -> None:
    """Runs the comparison for each batch size and prints or writes it."""
    options = read_options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval().to(device)
    model = vd.load(module, check=False)
    lines = [line for batch in (1, 8) for line in measure(model, batch, options)]
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu",
        "threads": options.threads,
        "turns": options.turns,
        "prompt": options.prompt,
        "new_tokens": options.new,
        "lines": lines,
        "versions": versions(),
    }
    print(table(result))
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "ablate.md").write_text(table(result))
        (RESULTS / "ablate.json").write_text(json.dumps(result, indent=2) + "\n")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--new", type=int, default=32, help="tokens that are generated")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def contexts(model: vd.HookedModel) -> dict[str, Callable[[], Any]]:
    """The ablations that are compared, each as a function that makes its context."""
    ids = torch.randint(3, 50000, (8, 32))
    means = mean_activations(model, ids, [SITE, HEADS], progress=False)
    direction = np.random.default_rng(0).normal(size=(2, model.d_model))
    return {
        "nothing": contextlib.nullcontext,
        f"zero, {SITE}": lambda: ablate(model, SITE),
        f"mean, {SITE}": lambda: ablate(model, SITE, mode="mean", over=means),
        f"project 2 directions, {SITE}": lambda: ablate(model, SITE, mode="project", directions=direction),
        f"zero, head 3 of {HEADS}": lambda: ablate(model, HEADS, heads=3),
        f"mean, head 3 of {HEADS}": lambda: ablate(model, HEADS, heads=3, mode="mean", over=means),
        f"mean at generated tokens, {SITE}": lambda: ablate(
            model, SITE, mode="mean", over=means, positions=slice(32, None)
        ),
    }


def measure(model: vd.HookedModel, batch: int, options: argparse.Namespace) -> list[dict]:
    """Seconds plain and under each ablation, and their ratio, over the turns."""
    ids = torch.randint(3, 50000, (batch, options.prompt), device=model.device)
    settings = {"max_new_tokens": options.new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings["attention_mask"] = torch.ones_like(ids)
    made = {"plain": contextlib.nullcontext, **contexts(model)}
    times: dict[str, list[float]] = {name: [] for name in made}
    texts: dict[str, torch.Tensor] = {}
    names = list(made)
    for turn in range(-1, options.turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:

            def run(name: str = name) -> None:
                with made[name]():
                    texts[name] = model.model.generate(ids, **settings)

            seconds = timed(run)
            if turn >= 0:
                times[name].append(seconds)
    assert torch.equal(texts["plain"], texts["nothing"])
    assert not torch.equal(texts["plain"], texts[f"mean, {SITE}"])
    return [line(name, batch, times) for name in names[1:]]


def line(name: str, batch: int, times: dict[str, list[float]]) -> dict:
    """The figures of one ablation."""
    ratios = sorted(a / p for p, a in zip(times["plain"], times[name]))
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "batch": batch,
        "ablation": name,
        "plain_s": round(statistics.median(times["plain"]), 4),
        "ablated_s": round(statistics.median(times[name]), 4),
        "overhead": round(statistics.median(ratios) - 1, 4),
        "low": round(low - 1, 4),
        "high": round(high - 1, 4),
    }


def timed(act: Callable[[], None]) -> float:
    """Seconds of one call, the device's work included."""
    start = time.perf_counter()
    act()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def table(result: dict) -> str:
    """The result as Markdown."""
    head = "| batch | ablation | plain | ablated | overhead (middle half of turns) | under 5 % |"
    lines = [
        f"| {line['batch']} | {line['ablation']} | {line['plain_s']} s | {line['ablated_s']} s | "
        f"{line['overhead']:+.2%} ({line['low']:+.2%} to {line['high']:+.2%}) | "
        f"{'yes' if line['overhead'] < ALLOWED else 'NO'} |"
        for line in result["lines"]
    ]
    said = (
        f"GPT-2 shape, 12 layers of width 768 with random weights, {result['prompt']} tokens of prompt and "
        f"{result['new_tokens']} generated; median of {result['turns']} rotating turns, {result['threads']} "
        f"threads, on {result['device']}. `nothing` is the plain generation timed a second time.\n\n"
        "Command: `python tests/benchmarks/bench_ablate.py --write`"
    )
    return "\n".join(
        [
            "# Ablation during a generation\n",
            head,
            "| --- | --- | --- | --- | --- | --- |",
            *lines,
            "",
            said,
            "",
        ]
    )


if __name__ == "__main__":
    main()
