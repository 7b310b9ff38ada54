"""What comparing two models costs beside running them: `vd.compare`'s one pass against two bare forwards.

    python tests/benchmarks/bench_compare.py            # prints
    python tests/benchmarks/bench_compare.py --write    # also updates results/compare.md and compare.json
    python tests/benchmarks/bench_compare.py --memory   # peak memory by number of texts

Two Llamas of 8 layers and width 512 with random weights and 32,000 tokens; 256 texts of 128 tokens. Bare:
both models give logits for all texts in the same batches, without gradients. Ours: all measures of outputs
and representations (KL by token and position, agreement, calibration, shifted tokens, drift, CKA, Procrustes,
logit-lens divergence, difference lens, directions) with 200 resamples, from the same batches to the finished
tables. The two take turns, the first of a turn alternating; a ratio is ours over bare within a turn. What was
asked for: at most 1.3.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers

import veridical as vd
from veridical.comparison.comparing import Asked, one_pass
from veridical.comparison.config import CompareConfig
from veridical.comparison.duo import Duo, pair_of
from veridical.comparison.resampling import Resampling
from veridical.comparison.rows import Rows, rows_of
from veridical.provenance import versions
from veridical.tokens import by_length

RESULTS = Path(__file__).parent / "results"
LAYERS, WIDTH, VOCABULARY, TEXTS, LENGTH = 8, 512, 32000, 256, 128
CONFIG = CompareConfig()


def main() -> None:
    """Measures and prints."""
    options = read_options()
    torch.set_num_threads(options.threads)
    if options.peak:
        duo, rows = material(options.texts)
        ours(duo, rows)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        return
    result = {"device": device(options.threads), "versions": versions(), "texts": options.texts}
    result |= memory() if options.memory else times(options)
    print(json.dumps(result, indent=2))
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / "compare.json"
        before = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**before, **result}, indent=2) + "\n")
        (RESULTS / "compare.md").write_text(table({**before, **result}))


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--profile", action="store_true", help="where ours spends its time")
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--texts", type=int, default=TEXTS)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def material(texts: int) -> tuple[Duo, Rows]:
    """The two models and the texts, with labels in pairs."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=1376,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
    )
    base = transformers.LlamaForCausalLM(config).eval()
    policy = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.002 * torch.randn_like(parameter)
    duo = pair_of(*(vd.load(model, check=False) for model in (policy, base)))
    rows = rows_of(duo, torch.randint(5, VOCABULARY, (texts, LENGTH)))
    return duo, replace(rows, labels=np.arange(texts) % 2, groups=np.arange(texts) // 2)


def ours(duo: Duo, rows: Rows) -> dict[str, Any]:
    """Everything that the one pass gives."""
    data = torch.tensor([row.policy for row in rows.rows])
    return one_pass(Asked(duo, data, rows, (), (), CONFIG, Resampling(CONFIG.bootstrap)))


def bare(duo: Duo, rows: Rows) -> None:
    """Logits of both models for the same batches."""
    with torch.no_grad():
        for batch in by_length([len(row.policy) for row in rows.rows], CONFIG.batch_tokens):
            for model in (duo.policy, duo.reference):
                model.call(model.batch([rows.rows[number].policy for number in batch]))


def times(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both over the turns, and their ratio."""
    duo, rows = material(options.texts)
    small = replace(rows, rows=rows.rows[:16], labels=rows.labels[:16], groups=rows.groups[:16])
    bare(duo, small)
    ours(duo, small)
    if options.profile:
        import cProfile

        cProfile.runctx("ours(duo, rows)", globals(), {"duo": duo, "rows": rows}, sort="tottime")
    found: dict[str, list[float]] = {"bare": [], "ours": []}
    for turn in range(options.turns):
        order = (("bare", bare), ("ours", ours))
        for name, act in order if turn % 2 == 0 else order[::-1]:
            start = time.perf_counter()
            act(duo, rows)
            found[name].append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(found["bare"], found["ours"])]
    return {
        "turns": options.turns,
        "bare_s": round(statistics.median(found["bare"]), 2),
        "ours_s": round(statistics.median(found["ours"]), 2),
        "ratio": round(statistics.median(ratios), 3),
        "low": round(min(ratios), 3),
        "high": round(max(ratios), 3),
    }


def memory() -> dict[str, Any]:
    """Peak resident memory in MB for 32, 64 and 128 texts."""
    peaks = {}
    for texts in (32, 64, 128):
        command = [sys.executable, __file__, "--peak", "--texts", str(texts)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks[str(texts)] = int(said.split()[-1])
    return {"peak_mb": peaks}


def device(threads: int) -> str:
    """The processor, in words."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].split(":")[1].strip() if names else platform.processor()
    return f"{threads} threads of {name}"


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = ["# Comparing two models beside running them\n"]
    if "ratio" in result:
        lines += [
            "| two bare forwards | all measures | ratio (range) | asked |",
            "| --- | --- | --- | --- |",
            f"| {result['bare_s']} s | {result['ours_s']} s | {result['ratio']} ({result['low']} to "
            f"{result['high']}, {result['turns']} turns) | 1.3 |\n",
        ]
    if "peak_mb" in result:
        said = ", ".join(f"{texts} texts {peak} MB" for texts, peak in result["peak_mb"].items())
        lines.append(f"Peak memory of the process: {said}.\n")
    lines.append(
        f"Two Llamas of {LAYERS} layers, width {WIDTH}, {VOCABULARY} tokens, random weights; "
        f"{result['texts']} texts of {LENGTH} tokens, batches of {CONFIG.batch_tokens}; "
        f"{result['device']}.\n\n"
        "Command: `python tests/benchmarks/bench_compare.py --write` (and `--memory --write`)\n"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
