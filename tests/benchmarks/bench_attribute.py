"""Edge attribution of every edge of a 12 x 12-head model, against TransformerLens 4's `attribution_patch`.

    python tests/benchmarks/bench_attribute.py --peer /path/to/transformer-lens-4            # prints
    python tests/benchmarks/bench_attribute.py --peer ... --write   # also results/attribute.md and .json

A GPT-2 with random weights, one clean and one corrupt prompt that differ in one token, and the logit
difference. TransformerLens 4 cannot be installed beside sae-lens, so it runs in a process of its own, with
its folder (`pip install --target FOLDER --no-deps 'transformer-lens>=4'`) first in the path; ours runs in
this one. They take turns: ours several times, theirs once; the ratio of a turn is theirs over the median of
ours, and the ratio of a case the median of its turns. Loading and a first call are left out on both sides;
what `attribute` does beyond (the check that parts add up, fingerprints of model and data) counts in. Both
score every edge at every position; the time of ours summed over positions stands beside. That the scores
agree is measured too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from shared import lines_of, options_of, show, told

import veridical as vd
from veridical.interventions import attribute
from veridical.interventions.attribution import Attribution
from veridical.interventions.edges import sizes

PEER = Path(__file__).parent / "edges_peer.py"
CASES = tuple({"width": width, "positions": count} for width, count in ((96, 16), (768, 16), (768, 64)))
WANTED = 20
OURS = 3
"""Runs of ours in one turn."""


def main() -> None:
    """Runs the cases and prints or writes the table."""
    options = read_options()
    torch.set_num_threads(options.threads)
    lines = lines_of("attribute", CASES, options.only, lambda case: measure(case, options))
    stored, here = sizes(128, layers=32, heads=32, kv_heads=32, d_model=4096, d_head=128)
    memory = {"stored_gb": stored * 4 / 1e9, "here_gb": here * 4 / 1e9, "share": here / stored}
    result = told(options, lines, memory=memory, peer=peer_version(options.peer))
    show("attribute", result, table(result), options.write)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = options_of(__doc__, turns=3, threads=2)
    parser.add_argument("--peer", type=Path, required=True, help="folder that holds transformer_lens 4")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of cases; the others' lines stay")
    return parser.parse_args()


def measure(case: dict[str, int], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both, and how far their scores are apart, for one case."""
    torch.manual_seed(0)
    width, positions = case["width"], case["positions"]
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
        "threads": options.threads,
    }
    model = vd.load(module, check=False)

    def run(**more: Any) -> Attribution:
        return attribute(
            model, clean, corrupt, metric="logit_diff", answers=3, wrong=4, method="edges", **more
        )

    apart, _ = run(by_position=True), run()
    ours, theirs, summed = [], [], []
    with tempfile.TemporaryDirectory() as name, peer_of(Path(name), module, job, options) as ask:
        difference = distance(Path(name), apart)
        for _ in range(options.turns):
            ours.append(statistics.median(timed(lambda: run(by_position=True), OURS)))
            theirs.append(ask())
            summed += timed(run, 1)
    ratios = [their / our for our, their in zip(ours, theirs)]
    return {
        **case,
        "edges": int(np.isfinite(apart.edge_scores[0, 0]).sum()) if apart.edge_scores is not None else 0,
        "ours_s": round(statistics.median(ours), 3),
        "summed_s": round(statistics.median(summed), 3),
        "theirs_s": round(statistics.median(theirs), 3),
        "ratio": round(statistics.median(ratios), 1),
        "low": round(min(ratios), 1),
        "high": round(max(ratios), 1),
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


@contextlib.contextmanager
def peer_of(
    folder: Path, module: transformers.GPT2LMHeadModel, job: dict[str, Any], options: argparse.Namespace
) -> Iterator[Callable[[], float]]:
    """TransformerLens in its own process, which has written its scores; each call times one run of it."""
    module.save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    (folder / "job.json").write_text(json.dumps(job))
    path = os.pathsep.join([str(options.peer.resolve()), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, str(PEER), str(folder)],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        said, told = process.stdin, process.stdout
        assert said is not None
        assert told is not None

        def answer(wanted: Callable[[str], bool]) -> str:
            for line in told:
                if wanted(line.strip()):
                    return line.strip()
            raise SystemExit("TransformerLens ended early")

        answer(lambda line: line == "ready")

        def ask() -> float:
            said.write("\n")
            said.flush()
            return float(answer(lambda line: line.replace(".", "").replace("e-", "").isdigit()))

        yield ask
        said.close()


def distance(folder: Path, ours: Attribution) -> float:
    """The largest difference of a score, relative to the largest score."""
    edges, scores = json.loads((folder / "edges.json").read_text()), np.load(folder / "scores.npy")
    assert ours.edge_scores is not None
    senders = {name: at for at, name in enumerate(ours.senders)}
    receivers = {name: at for at, name in enumerate(ours.receivers)}
    index = np.array([(line[6], senders[sender(line)], receivers[receiver(line)]) for line in edges]).T
    found = ours.edge_scores[0][tuple(index)]
    assert len(edges) == int(np.isfinite(ours.edge_scores).sum())
    return float(np.abs(found - scores).max() / np.abs(scores).max())


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
        f"GPT-2 shape, 12 layers of 12 heads, one pair of prompts; {result['turns']} turns, {OURS} runs here "
        f"for one of TransformerLens {result['peer']}, {result['threads']} threads, on {result['device']}. "
        "The difference is relative to the largest score.\n\nMemory by the formula of"
        "  `veridical.interventions.edges`, at 32 layers of 32 heads, width 4096, 128 tokens: "
        f"{memory['here_gb']:.2f} GB of {memory['stored_gb']:.2f} GB for senders and receivers "
        f"({memory['share']:.1%}).\n\n"
        "Command: `python tests/benchmarks/bench_attribute.py --peer FOLDER --write`"
    )
    ruler = "| " + " | ".join(["---"] * 9) + " |"
    return "\n".join(["# Attribution of every edge\n", head, ruler, *lines, "", said, ""])


if __name__ == "__main__":
    main()
