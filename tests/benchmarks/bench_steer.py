"""What it costs to steer with a vector during a generation, against the same generation without.

    python tests/benchmarks/bench_steer.py            # prints
    python tests/benchmarks/bench_steer.py --write    # also updates results/steer.md and steer.json

`tiny-liar` and a GPT-2 of 12 layers and width 768 with random weights generate greedily. Each turn is one
plain generation and, right beside it, one inside `with vector(model):`, the first of the two alternating. The
ratio is that of the fastest turns, since what disturbs a turn only ever adds to it; beside it stands the
middle half of the ratios turn by turn. On a CPU the time is that of the processor. The context is entered
once and left after the turns, as it is in use; `entering` is the time that entering and leaving take, with
the check that the vector belongs to the model. `nothing` is plain against plain: what the measurement itself
gives.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from bench_ablate import now
from shared import options_of, show, told

import veridical as vd
from veridical.probes.origin import Origin
from veridical.steering import SteeringVector

ALLOWED = 1.03


def main() -> None:
    """Runs the comparison for each model and batch and prints or writes it."""
    parser = options_of(__doc__, turns=9)
    parser.add_argument("--new", type=int, default=16, help="tokens that are generated")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = []
    for name, model in models().items():
        for batch in options.batches:
            lines += measure(name, model, batch, options)
    result = told(options, lines, prompt=options.prompt, new_tokens=options.new)
    show("steer", result, table(result), options.write)


def models() -> dict[str, vd.HookedModel]:
    """The organism, and a model whose passes take as long as those of a small real one."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    large = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval().to(device)
    return {"tiny-liar": vd.load("tiny-liar"), "GPT-2 shape": vd.load(large, check=False)}


def contexts(model: vd.HookedModel) -> dict[str, Callable[[], Any]]:
    """What is compared, each as a function that makes its context."""
    layer = model.n_layers // 2
    drawn = np.random.default_rng(0).normal(size=model.d_model)
    vector = SteeringVector.given(model, f"resid_post.{layer}", drawn)
    probe = vd.LogisticProbe().adopt(np.array([0, 1]), drawn[None], np.zeros(1), 1)
    site = model.resolve(f"resid_post.{layer - 1}")[0].name
    probe.origin_ = Origin(site=site, target="x", model_fingerprint=model.fingerprint())
    return {
        "nothing": contextlib.nullcontext,
        "vector": lambda: vector(model),
        "vector at 3 sites": lambda: three(model, drawn)(model),
        "vector at the prompt": lambda: vector.at("prompt")(model),
        "vector where a probe fires": lambda: vector.when(probe, 0.0)(model),
    }


def three(model: vd.HookedModel, drawn: np.ndarray) -> SteeringVector:
    """A vector at three layers at once."""
    first, *rest = (SteeringVector.given(model, f"resid_post.{layer}", drawn) for layer in (1, 2, 3))
    for one in rest:
        first = first + one
    return first


def measure(name: str, model: vd.HookedModel, batch: int, options: argparse.Namespace) -> list[dict]:
    """For each context the seconds plain and steered, turn by turn."""
    ids = torch.randint(3, 2000, (batch, options.prompt), device=model.device)
    settings: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    settings |= {"max_new_tokens": options.new, "min_new_tokens": options.new}
    lines = []
    for what, context in contexts(model).items():
        times: dict[str, list[float]] = {"plain": [], "steered": []}
        entering = []
        for turn in range(-1, options.turns):
            for which in ("plain", "steered") if turn % 2 else ("steered", "plain"):
                start = now()
                with context() if which == "steered" else contextlib.nullcontext():
                    inside = now()
                    model.model.generate(ids, **settings)
                    seconds, end = now() - inside, now()
                if which == "steered":
                    entering.append(inside - start + now() - end)
                if turn >= 0:
                    times[which].append(seconds)
        lines.append(line(name, batch, what, times, min(entering)))
    return lines


def line(name: str, batch: int, what: str, times: dict[str, list[float]], entering: float) -> dict:
    """The figures of one context."""
    ratios = sorted(b / a for a, b in zip(times["plain"], times["steered"]))
    low, _, high = statistics.quantiles(ratios, n=4)
    fastest = {which: min(found) for which, found in times.items()}
    return {
        "model": name, "batch": batch, "intervention": what, "plain_s": round(fastest["plain"], 4),
        "steered_s": round(fastest["steered"], 4), "ratio": round(fastest["steered"] / fastest["plain"], 4),
        "low": round(low, 4), "high": round(high, 4), "entering_s": round(entering, 5),
    }  # fmt: skip


def table(result: dict) -> str:
    """The result as Markdown."""
    columns = "model | batch | intervention | plain | steered | ratio (middle half of the turns) | "
    head = f"| {columns}at most {ALLOWED} | entering |"
    lines = [
        f"| {line['model']} | {line['batch']} | {line['intervention']} | {line['plain_s']} s | "
        f"{line['steered_s']} s | {line['ratio']:.3f} ({line['low']:.3f} to {line['high']:.3f}) | "
        f"{'yes' if line['ratio'] <= ALLOWED else 'NO'} | {1000 * line['entering_s']:.1f} ms |"
        for line in result["lines"]
    ]
    said = (
        f"{result['prompt']} tokens of prompt and {result['new_tokens']} generated; fastest of "
        f"{result['turns']} alternating turns, {result['threads']} threads, on {result['device']}.\n\n"
        "Command: `python tests/benchmarks/bench_steer.py --write`"
    )
    return "\n".join(["# Steering during a generation\n", head, "|" + " --- |" * 8, *lines, "", said, ""])


if __name__ == "__main__":
    main()
