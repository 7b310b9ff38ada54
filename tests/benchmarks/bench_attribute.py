"""Edge attribution of every edge of a 12 x 12-head model, against TransformerLens 4's `attribution_patch`.

    python tests/benchmarks/bench_attribute.py --peer /path/to/transformer-lens-4            # prints
    python tests/benchmarks/bench_attribute.py --peer ... --write   # also results/attribute.md and .json

A GPT-2 with random weights, one clean and one corrupt prompt that differ in one token, and the logit
difference. TransformerLens 4 cannot be installed beside sae-lens, so it runs in a process of its own, with
its folder (`pip install --target FOLDER --no-deps 'transformer-lens>=4'`) first in the path; ours runs in
this one, before and after it, and the medians of all turns are compared. Loading is left out on both sides;
what `attribute` does beyond (the check that parts add up, fingerprints of model and data) counts in. Both
score every edge at every position; the time of ours summed over positions stands beside. That the scores
agree is measured too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers

import veridical as vd
from veridical.interventions import attribute
from veridical.interventions.attribution import Attribution
from veridical.interventions.edges import sizes
from veridical.provenance import versions

RESULTS = Path(__file__).parent / "results"
PEER = Path(__file__).parent / "edges_peer.py"
CASES = ((96, 16), (768, 16), (768, 64))
"""Width and positions."""
WANTED = 20


def main() -> None:
    """Runs every case and prints or writes the table."""
    options = read_options()
    torch.set_num_threads(options.threads)
    lines = [measure(width, positions, options) for width, positions in CASES[: options.cases]]
    stored, here = sizes(128, layers=32, heads=32, kv_heads=32, d_model=4096, d_head=128)
    result = {
        "device": platform.processor() or "cpu",
        "threads": options.threads,
        "turns": options.turns,
        "lines": lines,
        "memory": {"stored_gb": stored * 4 / 1e9, "here_gb": here * 4 / 1e9, "share": here / stored},
        "peer": peer_version(options.peer),
        "versions": versions(),
    }
    print(table(result))
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "attribute.md").write_text(table(result))
        (RESULTS / "attribute.json").write_text(json.dumps(result, indent=2) + "\n")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", type=Path, required=True, help="folder that holds transformer_lens 4")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first so many")
    return parser.parse_args()


def measure(width: int, positions: int, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both, and how far their scores are apart, for one case."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=width, n_layer=12, n_head=12)
    module = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "attn" in name and parameter.dim() > 1:
                parameter.mul_(3)  # so that attention depends on its input
    clean = torch.randint(5, config.vocab_size, (1, positions))
    corrupt = clean.clone()
    corrupt[0, positions // 3] += 1
    job = {
        "clean": clean[0].tolist(),
        "corrupt": corrupt[0].tolist(),
        "answer": 3,
        "wrong": 4,
        "turns": options.turns,
        "threads": options.threads,
    }
    model = vd.load(module, check=False)

    def run(**more: Any) -> Attribution:
        return attribute(
            model, clean, corrupt, metric="logit_diff", answers=3, wrong=4, method="edges", **more
        )

    apart = run(by_position=True)
    ours = timed(lambda: run(by_position=True), options.turns)
    summed = timed(run, options.turns)
    with tempfile.TemporaryDirectory() as name:
        theirs, difference = ask_peer(Path(name), module, job, options, apart)
    ours += timed(lambda: run(by_position=True), options.turns)
    summed += timed(run, options.turns)
    mine = statistics.median(ours)
    return {
        "width": width,
        "positions": positions,
        "edges": int(np.isfinite(apart.edge_scores[0, 0]).sum()) if apart.edge_scores is not None else 0,
        "ours_s": round(mine, 3),
        "summed_s": round(statistics.median(summed), 3),
        "theirs_s": round(statistics.median(theirs), 3),
        "ratio": round(statistics.median(theirs) / mine, 1),
        "low": round(min(theirs) / max(ours), 1),
        "high": round(max(theirs) / min(ours), 1),
        "largest_difference": difference,
    }


def timed(act: Any, turns: int) -> list[float]:
    """Seconds of each of several calls."""
    seconds = []
    for _ in range(turns):
        start = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - start)
    return seconds


def ask_peer(
    folder: Path,
    module: transformers.GPT2LMHeadModel,
    job: dict[str, Any],
    options: argparse.Namespace,
    ours: Attribution,
) -> tuple[list[float], float]:
    """Seconds of TransformerLens, and the largest difference of a score, relative to the largest score."""
    module.save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    (folder / "job.json").write_text(json.dumps(job))
    path = os.pathsep.join([str(options.peer.resolve()), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, str(PEER), str(folder)], check=True, env={**os.environ, "PYTHONPATH": path}
    )
    seconds = json.loads((folder / "result.json").read_text())["seconds"]
    edges, scores = json.loads((folder / "edges.json").read_text()), np.load(folder / "scores.npy")
    assert ours.edge_scores is not None
    senders = {name: at for at, name in enumerate(ours.senders)}
    receivers = {name: at for at, name in enumerate(ours.receivers)}
    index = np.array([(line[6], senders[sender(line)], receivers[receiver(line)]) for line in edges]).T
    found = ours.edge_scores[0][tuple(index)]
    assert len(edges) == int(np.isfinite(ours.edge_scores).sum())
    return seconds, float(np.abs(found - scores).max() / np.abs(scores).max())


def sender(line: list[Any]) -> str:
    """Our name of the peer's writer."""
    kind, layer, head = line[:3]
    return {"embed": "embed", "mlp_out": f"mlp.{layer}"}.get(kind, f"head.{layer}.{head}")


def receiver(line: list[Any]) -> str:
    """Our name of the peer's reader."""
    kind, layer, head = line[3:6]
    return {"logits": "logits", "mlp_in": f"mlp.{layer}:in"}.get(kind, f"head.{layer}.{head}:{kind[0]}")


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of nothing in particular, which the bridge wants to hold."""
    from tokenizers import Tokenizer, models

    made = Tokenizer(models.WordLevel({"<s>": 0, "<pad>": 1}, unk_token="<s>"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="<s>", pad_token="<pad>"
    ).save_pretrained(folder)


def peer_version(folder: Path) -> str:
    """The peer's version, from its folder's metadata."""
    found = sorted(folder.glob("transformer_lens-*.dist-info"))
    return found[0].name.removeprefix("transformer_lens-").removesuffix(".dist-info") if found else "unknown"


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    head = (
        "| width | positions | edges | TransformerLens | here, by position | ratio (least to most) "
        f"| at least {WANTED} | here, summed | largest difference |"
    )
    lines = [
        f"| {line['width']} | {line['positions']} | {line['edges']} | {line['theirs_s']} s "
        f"| {line['ours_s']} s | {line['ratio']} ({line['low']} to {line['high']}) "
        f"| {'yes' if line['ratio'] >= WANTED else 'NO'} "
        f"| {line['summed_s']} s | {line['largest_difference']:.1e} |"
        for line in result["lines"]
    ]
    memory = result["memory"]
    said = (
        f"GPT-2 shape, 12 layers of 12 heads, one pair of prompts; median of {2 * result['turns']} turns "
        f"here and of {result['turns']} of TransformerLens {result['peer']}, {result['threads']} thread(s), "
        f"on {result['device']}. The difference is relative to the largest score.\n\nMemory by the formula "
        "of `veridical.interventions.edges`, at 32 layers of 32 heads, width 4096, 128 tokens: "
        f"{memory['here_gb']:.2f} GB of {memory['stored_gb']:.2f} GB for senders and receivers "
        f"({memory['share']:.1%}).\n\n"
        "Command: `python tests/benchmarks/bench_attribute.py --peer FOLDER --write`"
    )
    ruler = "| " + " | ".join(["---"] * 9) + " |"
    return "\n".join(["# Attribution of every edge\n", head, ruler, *lines, "", said, ""])


if __name__ == "__main__":
    main()
