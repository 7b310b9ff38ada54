"""Sweeps of activation patches, against TransformerLens's `patching.get_act_patch_*`.

    python tests/benchmarks/bench_patch.py            # prints
    python tests/benchmarks/bench_patch.py --write    # also updates results/patch.md and patch.json
    python tests/benchmarks/bench_patch.py --cost     # what a call of a block costs, for `bands`

A GPT-2 of 12 layers with random weights, and a `HookedTransformer` with the same weights. Both patch clean
activations into a corrupt run of other tokens, the same at no position, one example, and judge by the
logit difference at the last position. Ours is `vd.patch` as a user calls it, with both runs, the table and
the metric; theirs is the patching function alone, its cache of clean activations made beforehand. The two
take turns, the first of a turn alternating; a ratio is theirs over ours within a turn. Theirs is one whole
forward for each patch, so in the long cases it is timed on every n-th patch and the seconds are multiplied.
A case whose two results differ by more than 1e-4 of the largest value ends in an error.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pandas as pd
import torch
import transformers
from shared import lines_of, options_of, show, told

import veridical as vd
from veridical.interventions import patch

LAYERS, VOCABULARY = 12, 50257
CASES: list[dict[str, Any]] = [
    {"sites": "resid_pre.*", "width": 96, "positions": 16, "asked": 15, "every": 1, "turns": 3},
    {"sites": "resid_pre.*", "width": 768, "positions": 16, "asked": 5, "every": 5, "turns": 3},
    {"sites": "resid_pre.*", "width": 768, "positions": 64, "asked": 8, "every": 19, "turns": 2},
    {"sites": "z.*", "width": 96, "positions": 16, "asked": 8, "every": 17, "turns": 2},
    {"sites": "z.*", "width": 768, "positions": 16, "asked": 8, "every": 59, "turns": 2},
]
"""`every`: theirs is timed on each so many-eth patch."""


def main() -> None:
    """Runs the cases and prints or writes them."""
    options = read_options()
    torch.set_num_threads(options.threads)
    if options.cost:
        print(cost())
        return
    lines = lines_of("patch", CASES, options.only, lambda case: measure(case, options))
    result = told(options, lines)
    show("patch", result, table(result), options.write)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = options_of(__doc__, turns=None, threads=2)
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--ours", action="store_true", help="time ours only")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of cases; the others' lines stay")
    return parser.parse_args()


def measure(case: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both over the turns, their ratio, and how far their results are apart."""
    from transformer_lens import patching

    plain, lens = pair(case["width"])
    model = vd.load(plain, check=False)
    count = case["positions"]
    random = torch.Generator().manual_seed(1)
    clean = torch.randint(5, VOCABULARY, (1, count), generator=random)
    corrupt = torch.randint(5, VOCABULARY, (1, count), generator=random)
    heads = "all" if case["sites"].startswith("z") else None
    index: pd.DataFrame = indices(count, heads is not None).iloc[:: case["every"]]
    setter = patching.layer_pos_head_vector_patch_setter if heads else patching.layer_pos_patch_setter
    with torch.no_grad():
        _, cache = lens.run_with_cache(clean)
    found: dict[str, Any] = {}

    def ours() -> None:
        found["ours"] = patch(
            model, clean, corrupt, sites=case["sites"], heads=heads, answers=10, wrong=20, progress=False
        )

    def theirs() -> None:
        # What get_act_patch_resid_pre and get_act_patch_attn_head_out_by_pos do, for these patches.
        with torch.no_grad():
            found["theirs"] = patching.generic_activation_patch(
                lens,
                corrupt,
                cache,
                lambda logits: logits[0, -1, 10] - logits[0, -1, 20],
                patch_setter=setter,
                activation_name=case["sites"].removesuffix(".*"),
                index_df=index.reset_index(drop=True),
            )

    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    turns = options.turns or case["turns"]
    ours()
    for turn in range(turns):
        order = (("ours", ours), ("theirs", theirs))
        for name, act in order if turn % 2 else order[::-1]:
            if name == "ours" or not options.ours:
                times[name].append(timed(act) * (case["every"] if name == "theirs" else 1))
    if options.ours:
        print(case, times)
        return {**case, "ours_s": round(statistics.median(times["ours"]), 3)}
    apart = difference(found["ours"], found["theirs"], index)
    assert apart < 1e-4, f"results are {apart:.2g} apart"
    ratios = [b / a for a, b in zip(times["ours"], times["theirs"])]
    return {
        **case,
        "turns": turns,
        "patches": len(found["ours"].table),
        "ours_s": round(statistics.median(times["ours"]), 3),
        "theirs_s": round(statistics.median(times["theirs"]), 3),
        "ratio": round(statistics.median(ratios), 1),
        "low": round(min(ratios), 1),
        "high": round(max(ratios), 1),
        "apart": float(f"{apart:.2g}"),
    }


def pair(width: int) -> tuple[Any, Any]:
    """A GPT-2 with random weights, and a `HookedTransformer` with the same."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions.gpt2 import convert_gpt2_weights

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=width, n_layer=LAYERS, n_head=LAYERS, vocab_size=VOCABULARY)
    plain = transformers.GPT2LMHeadModel(config).eval()
    for name, parameter in plain.named_parameters():
        if "wte" not in name and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08 if width < 500 else 0.03)
    lens_config = HookedTransformerConfig(
        n_layers=LAYERS,
        d_model=width,
        n_ctx=1024,
        d_head=width // LAYERS,
        n_heads=LAYERS,
        d_vocab=VOCABULARY,
        d_mlp=4 * width,
        act_fn="gelu_new",
        normalization_type="LN",
        eps=1e-5,
        init_weights=False,
        device="cpu",
    )
    lens = HookedTransformer(lens_config)
    weights = convert_gpt2_weights(plain, lens_config)
    lens.load_state_dict(weights, strict=False)
    # The conversion leaves out the bias of an unembedding that has none.
    lens.unembed.b_U.data.zero_()
    return plain, lens.eval()


def indices(positions: int, heads: bool) -> pd.DataFrame:
    """Every patch in our order, with the columns that TransformerLens's patching wants."""
    across = [range(LAYERS), range(LAYERS), range(positions)] if heads else [range(LAYERS), range(positions)]
    names = ["layer", "head_index", "pos"] if heads else ["layer", "pos"]
    frame = pd.DataFrame(list(itertools.product(*across)), columns=pd.Index(names))
    return frame.reindex(columns=["layer", "pos", *names[1:-1]])


def difference(ours: Any, theirs: torch.Tensor, index: pd.DataFrame) -> float:
    """The largest distance of two results on the patches of `index`, over their largest value."""
    mine = torch.from_numpy(ours.values[index.index.to_numpy(), 0])
    return float((mine - theirs).abs().max() / theirs.abs().max())


def timed(act: Any) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def cost() -> str:
    """Milliseconds of a block's call by tokens, for three widths."""
    lines = []
    for width, heads in ((96, 12), (256, 4), (768, 12)):
        config = transformers.GPT2Config(n_embd=width, n_layer=1, n_head=heads)
        block = transformers.GPT2LMHeadModel(config).eval().transformer.h[0]  # type: ignore[attr-defined]
        for tokens in (1, 16, 64, 256, 1024):
            x = torch.randn(max(1, tokens // 16), min(tokens, 16), width)
            with torch.no_grad():
                block(x)
                seconds = statistics.median(timed(lambda x=x, block=block: block(x)) for _ in range(15))
            size = sum(p.numel() for p in block.parameters())
            rate = 2 * size * tokens / seconds / 1e9
            lines.append(f"width {width}, {tokens:5} tokens: {1e3 * seconds:8.3f} ms, {rate:6.1f} GFLOP/s")
    return "\n".join(lines)


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    head = "| sites | width | positions | patches | TransformerLens | ours | ratio (range) | asked | apart |"
    lines = [
        f"| {line['sites']}{' by head' if line['sites'] == 'z.*' else ''} | {line['width']} "
        f"| {line['positions']} | {line.get('patches', '')} | {line.get('theirs_s', '')} s "
        f"| {line['ours_s']} s "
        f"| {line.get('ratio', '')} ({line.get('low', '')} to {line.get('high', '')}, "
        f"{line['turns']} turn{'s' if line['turns'] > 1 else ''}) "
        f"| {line['asked']} | {line.get('apart', '')} |"
        for line in result["lines"]
    ]
    said = (
        f"GPT-2 of {LAYERS} layers and heads, vocabulary {VOCABULARY}, random weights, one example, "
        f"{result['threads']} threads, on {result['device']}. TransformerLens: `get_act_patch_resid_pre` and "
        "`get_act_patch_attn_head_out_by_pos`. Theirs is timed on every n-th patch, n = "
        f"{', '.join(str(line['every']) for line in result['lines'])} in the table's order, and "
        "multiplied. "
        "Apart: largest difference over the largest value.\n\n"
        "Command: `python tests/benchmarks/bench_patch.py --write`"
    )
    return "\n".join(["# Sweeps of activation patches\n", head, "|" + " --- |" * 9, *lines, "", said, ""])


if __name__ == "__main__":
    main()
