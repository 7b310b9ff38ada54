"""What it costs to ablate during a generation, against the same generation without.

    python tests/benchmarks/bench_ablate.py            # prints
    python tests/benchmarks/bench_ablate.py --write    # also updates results/ablate.md and ablate.json

A GPT-2 of width 768, 12 layers and 12 heads with random weights generates greedily. Each turn is one plain
generation and, right beside it, one under an ablation, the first of the two alternating. The overhead is the
ratio of the fastest turns, less 1, since what disturbs a turn only ever adds to it; beside it stands the
middle half of the ratios turn by turn. On a CPU the time is that of the processor, which other processes do
not lengthen much; on a GPU it is that of the clock. Entering the context (means already taken) and leaving it
are inside. `nothing` is plain against plain: what the measurement itself gives. Beside it stands the time
that is spent inside our hooks, as a share of the generation.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from shared import options_of, show, told

import veridical as vd
from veridical.interventions import ablate, mean_activations
from veridical.interventions.ablation_hooks import Edit
from veridical.probes.passes import Passes

ALLOWED = 0.05
SITE, HEADS = "resid_post.6", "z.6"


def main() -> None:
    """Runs the comparison for each batch size and prints or writes it."""
    options = read_options()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("error", UserWarning)  # of an ablation that changed nothing
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval().to(device)
    model = vd.load(module, check=False)
    lines = [line for batch in (1, 8) for line in measure(model, batch, options)]
    result = told(options, lines, prompt=options.prompt, new_tokens=options.new)
    show("ablate", result, table(result), options.write)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = options_of(__doc__, turns=7)
    parser.add_argument("--new", type=int, default=8, help="tokens that are generated")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
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
    """For each ablation the seconds plain and ablated, turn by turn."""
    ids = torch.randint(3, 50000, (batch, options.prompt), device=model.device)
    settings = {"max_new_tokens": options.new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings["attention_mask"] = torch.ones_like(ids)
    lines = []
    for name, context in contexts(model).items():
        made: dict[str, torch.Tensor] = {}

        def run(which: str, context: Callable[[], Any], made: dict[str, torch.Tensor] = made) -> float:
            start = now()
            with context():
                made[which] = model.model.generate(ids, **settings)
            return now() - start

        times: dict[str, list[float]] = {"plain": [], "ablated": []}
        pair = {"plain": contextlib.nullcontext, "ablated": context}
        for turn in range(-1, options.turns):
            for which in ("plain", "ablated") if turn % 2 else ("ablated", "plain"):
                seconds = run(which, pair[which])
                if turn >= 0:
                    times[which].append(seconds)
        assert name != "nothing" or torch.equal(made["plain"], made["ablated"])
        with inside_hooks() as spent:
            whole = run("ablated", context)
        lines.append(line(name, batch, times, spent[0] / whole))
    return lines


@contextlib.contextmanager
def inside_hooks() -> Iterator[list[float]]:
    """Sums up the time that is spent in what an ablation runs in a pass (without the copy of the value)."""
    spent, saved = [0.0], (Edit.__call__, Passes.note)

    def timing(inner: Callable) -> Callable:
        def timed(*given: Any) -> Any:
            start = now()
            found = inner(*given)
            spent[0] += now() - start
            return found

        return timed

    Edit.__call__, Passes.note = timing(Edit.__call__), timing(Passes.note)  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        Edit.__call__, Passes.note = saved  # type: ignore[method-assign]


def line(name: str, batch: int, times: dict[str, list[float]], inside: float) -> dict:
    """The figures of one ablation."""
    ratios = sorted(a / p for p, a in zip(times["plain"], times["ablated"]))
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "batch": batch,
        "ablation": name,
        "plain_s": round(min(times["plain"]), 4),
        "ablated_s": round(min(times["ablated"]), 4),
        "overhead": round(min(times["ablated"]) / min(times["plain"]) - 1, 4),
        "low": round(low - 1, 4),
        "high": round(high - 1, 4),
        "inside_hooks": round(inside, 5),
    }


def now() -> float:
    """Seconds: of the processor, or of the clock once a GPU has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def table(result: dict) -> str:
    """The result as Markdown."""
    columns = "batch | ablation | plain | ablated | overhead (middle half of the turns' ratios) | under 5 %"
    head = f"| {columns} | inside hooks |"
    lines = [
        f"| {line['batch']} | {line['ablation']} | {line['plain_s']} s | {line['ablated_s']} s | "
        f"{line['overhead']:+.2%} ({line['low']:+.2%} to {line['high']:+.2%}) | "
        f"{'yes' if line['overhead'] < ALLOWED else 'NO'} | {line['inside_hooks']:.2%} |"
        for line in result["lines"]
    ]
    said = (
        f"GPT-2 shape, 12 layers of width 768 with random weights, {result['prompt']} tokens of prompt and "
        f"{result['new_tokens']} generated; fastest of {result['turns']} alternating turns, "
        f"{result['threads']} threads, on {result['device']}. `nothing` is plain against plain: what the "
        "measurement itself gives.\n\nCommand: `python tests/benchmarks/bench_ablate.py --write`"
    )
    return "\n".join(
        [
            "# Ablation during a generation\n",
            head,
            "|" + " --- |" * 7,
            *lines,
            "",
            said,
            "",
        ]
    )


if __name__ == "__main__":
    main()
