"""What it costs to monitor a generation with a probe, against the same generation without.

    python tests/benchmarks/bench_monitor.py            # prints
    python tests/benchmarks/bench_monitor.py --write    # also updates results/monitor.md and monitor.json

A Llama of width 512 and 8 layers with random weights generates greedily, with and without the monitor in
turn, the first of a turn alternating. The overhead is the median over the turns of the ratio of the two
times, less 1; its spread is that of the middle half of the turns. Making the table of scores afterwards
counts in; the check that probe and model belong together, once per context, is timed apart.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from shared import options_of, show, told

import veridical as vd
from veridical.probes import LogisticProbe
from veridical.probes.monitored import Scores
from veridical.probes.origin import Origin

SIZE = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
ALLOWED = 0.03


def main() -> None:
    """Runs the comparison for each batch size and prints or writes it."""
    options = read_options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE)).eval().to(device)
    model = vd.load(module, check=False)
    probe = LogisticProbe().adopt(np.array([0, 1]), np.random.default_rng(0).normal(size=512), np.zeros(1), 1)
    probe.origin_ = Origin(site="blocks.4.hook_resid_post", model_fingerprint=model.fingerprint())
    lines = [measure(model, probe, batch, options) for batch in (8, 1)]
    result = told(options, lines, prompt=options.prompt, new_tokens=options.new)
    show("monitor", result, table(result), options.write)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = options_of(__doc__, turns=15)
    parser.add_argument("--new", type=int, default=64, help="tokens that are generated")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    return parser.parse_args()


def measure(model: vd.HookedModel, probe: LogisticProbe, batch: int, options: argparse.Namespace) -> dict:
    """Seconds with and without, and their ratio, over the turns."""
    ids = torch.randint(3, SIZE["vocab_size"], (batch, options.prompt), device=model.device)
    settings = {"max_new_tokens": options.new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings["attention_mask"] = torch.ones_like(ids)
    made: dict[str, Any] = {}
    times: dict[str, list[float]] = {"plain": [], "watched": [], "entering": []}

    def plain() -> None:
        made["plain"] = model.model.generate(ids, **settings)

    def watched(scores: Scores) -> None:
        made["watched"] = model.model.generate(ids, **settings)
        made["rows"] = scores.to_frame()

    for turn in range(-1, options.turns):
        for name in ("plain", "watched") if turn % 2 else ("watched", "plain"):
            if name == "plain":
                seconds = timed(plain)
            else:
                start = time.perf_counter()
                with probe.monitor(model, ends=()) as scores:
                    times["entering"].append(time.perf_counter() - start)
                    seconds = timed(lambda scores=scores: watched(scores))
            if turn >= 0:
                times[name].append(seconds)
    assert torch.equal(made["plain"], made["watched"])
    assert len(made["rows"]) == batch * (options.prompt + options.new - 1)
    ratios = sorted(w / p for p, w in zip(times["plain"], times["watched"]))
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "batch": batch,
        "plain_s": round(statistics.median(times["plain"]), 4),
        "watched_s": round(statistics.median(times["watched"]), 4),
        "entering_s": round(statistics.median(times["entering"]), 4),
        "overhead": round(statistics.median(ratios) - 1, 4),
        "low": round(low - 1, 4),
        "high": round(high - 1, 4),
    }


def timed(act) -> float:
    """Seconds of one call, the device's work included."""
    start = time.perf_counter()
    act()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def table(result: dict) -> str:
    """The result as Markdown."""
    head = (
        "| batch | generation | monitored | overhead (middle half of turns) | under 3 % | check on entering |"
    )
    lines = [
        f"| {line['batch']} | {line['plain_s']} s | {line['watched_s']} s | {line['overhead']:+.2%} "
        f"({line['low']:+.2%} to {line['high']:+.2%}) | {'yes' if line['overhead'] < ALLOWED else 'NO'} "
        f"| {line['entering_s']} s |"
        for line in result["lines"]
    ]
    said = (
        f"Llama, 8 layers of width 512, {result['prompt']} tokens of prompt and {result['new_tokens']} "
        f"generated; median of {result['turns']} alternating turns, {result['threads']} threads, on "
        f"{result['device']}.\n\nCommand: `python tests/benchmarks/bench_monitor.py --write`"
    )
    return "\n".join(
        ["# Monitoring a generation\n", head, "| --- | --- | --- | --- | --- | --- |", *lines, "", said, ""]
    )


if __name__ == "__main__":
    main()
