"""Training sparse autoencoders: speed and quality against SAELens, sparsify, dictionary_learning, in one run.

    python tests/benchmarks/bench_sae.py --peers DIR           # prints; DIR as sae_peers.py says
    python tests/benchmarks/bench_sae.py --only step           # one part: step, eight, planted, revival
    python tests/benchmarks/bench_sae.py --peers DIR --write   # also updates results/sae.md and sae.json

step: one TopK step at d 256, F 2,048, k 32, batch 2,048, float32, with 512 dead latents, which the auxiliary
loss of each works on. Beside it the bound of a dense step, six products of B x d x F. All take turns in one
process; what counts is the ratio within a turn, given as the median over turns and its range.

eight: eight TopK SAEs (four learning rates, two k) from one store, end to end, against SAELens training them
one after the other, and against its `MultiSAETrainer`, which steps eight on one stream at one learning rate.
Ours reads a store on the disk. SAELens reads its own cache of the same vectors on the disk, mixing as its
runner does by default; it is also given them from memory, which shows what its training alone takes. Ours is
timed before and after each of them (`--against` names them), and its mean is what it is compared by.

planted: 256 unit features in 64 dimensions, each active with p 0.02, 1.5 million vectors; k 5, F 256,
learning rate 1e-3, batch 1,024, three seeds. MCC: mean cosine of features and decoder rows, matched one to
one.

revival: d 32, F 128, 48 latents dead at the start, by encoder rows a thousandth as large or by a bias of -8,
1,500 steps of 128 vectors. How many are still silent over the last tenth.

The ratios move when the machine is busy with something else; `--cpu --threads 1` counts CPU seconds instead.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_peers import Ours, available, quietly
from torch import Tensor

import veridical as vd
from veridical.provenance import versions
from veridical.saes.mcc import match_features

CLOCK: Callable[[], float] = time.perf_counter
RESULTS = Path(__file__).parent / "results"
HOOK = "blocks.0.hook_resid_post"
D, WIDTH, K, BATCH, DEAD = 256, 2048, 32, 2048, 512
PEERS = ("sae-lens", "eai-sparsify", "dictionary-learning")
RIVALS = {
    "store": ("SAELens from its store, one after the other", 4.0),
    "memory": ("SAELens from memory, one after the other", None),
    "together": ("SAELens from memory, MultiSAETrainer", 3.0),
}
ASKED = {"SAELens": 3.0, "sparsify": 1.9, "dictionary_learning": 2.5, "six products": 1.1}


def main() -> None:
    """Runs the parts and prints or writes them."""
    global CLOCK
    options = read_options()
    torch.set_num_threads(options.threads)
    if options.cpu:
        CLOCK = time.process_time
    if options.peers is not None:
        sys.path.insert(0, str(options.peers))
    peers = available()
    parts: dict[str, Callable[..., dict[str, Any]]] = {
        "step": bench_step, "eight": bench_eight, "planted": bench_planted, "revival": bench_revival
    }  # fmt: skip
    results: dict[str, Any] = {}
    for name, part in parts.items():
        if options.only in (None, name):
            results[name] = part(peers, options)
            print(TABLES[name](results[name]), flush=True)
    if options.write:
        write(results, options)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", choices=["step", "eight", "planted", "revival"])
    parser.add_argument("--peers", type=Path, help="folder with sparsify and dictionary_learning")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="CPU seconds, which a busy machine moves less")
    parser.add_argument("--repeats", type=int, default=15, help="turns of the step")
    parser.add_argument("--against", choices=list(RIVALS), nargs="*", default=list(RIVALS), help="of eight")
    parser.add_argument("--tokens", type=int, default=200_000, help="vectors of the eight")
    parser.add_argument("--rows", type=int, default=1_500_000, help="vectors of planted")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    return parser.parse_args()


# One step


def bench_step(peers: dict[str, type], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each, taking turns."""
    x = planted(BATCH * 4, D, 4 * D, 0.01, 0)
    contenders = {"ours": Ours, **peers}
    made = {name: cls(D, WIDTH, K, 1e-4, BATCH, 10**6, 0) for name, cls in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in [*made, "six products"]}
    products = six_products(x[:BATCH])
    for turn in range(options.repeats + 2):
        batch = x[turn % 4 * BATCH :][:BATCH]
        for name, one in made.items():
            if turn == 0:
                one.step(batch)
            one.parameters()[0][:DEAD] *= 1e-3  # never among the k largest, positive as often as not
            one.hold_dead(DEAD)
            took = timed(lambda one=one, batch=batch: one.step(batch))
            if turn > 1:
                seconds[name].append(took)
        took = timed(products)
        if turn > 1:
            seconds["six products"].append(took)
    rows = {
        name: {
            "tokens_s": BATCH / statistics.median(times),
            "ratio": ratio_of(times, seconds["ours"]),
            "asked": ASKED.get(name),
        }
        for name, times in seconds.items()
    }
    return {"rows": rows, "threads": options.threads, "repeats": options.repeats}


def six_products(x: Tensor) -> Callable[[], None]:
    """The products of a dense step: forward and two backward, of encoder and decoder."""
    random = torch.Generator().manual_seed(1)
    W, latents = torch.randn(WIDTH, D, generator=random), torch.randn(BATCH, WIDTH, generator=random)
    wide, narrow, weights = torch.empty(BATCH, WIDTH), torch.empty(BATCH, D), torch.empty(WIDTH, D)

    def run() -> None:
        torch.mm(x, W.T, out=wide)
        torch.mm(latents, W, out=narrow)
        torch.mm(x, W.T, out=wide)
        torch.mm(latents.T, x, out=weights)
        torch.mm(latents.T, x, out=weights)
        torch.mm(latents, W, out=narrow)

    return run


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one call."""
    began = CLOCK()
    run()
    return CLOCK() - began


def ratio_of(theirs: list[float], ours: list[float]) -> list[float]:
    """Median, least and largest of theirs over ours, turn by turn."""
    ratios = sorted(one / other for one, other in zip(theirs, ours))
    return [statistics.median(ratios), ratios[0], ratios[-1]]


# Eight at once


def table_model(table: Tensor) -> Any:
    """A stand-in for a model, whose vector for token id n is row n of a table."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "activations"))
    from fake import FakeModel

    class TableModel(FakeModel):
        def width(self, site: Any) -> tuple[int, ...]:
            return (table.shape[1],)

        def run(self, inputs: Any, read: Any = (), write: Any = None, stop: bool = False) -> None:
            for name in read:
                read[name](table[inputs["input_ids"]])

    return TableModel(layers=1)


def bench_eight(peers: dict[str, type], options: argparse.Namespace) -> dict[str, Any]:
    """End to end: eight SAEs on the same vectors."""
    length = 100
    count = options.tokens // length * length
    table = planted(count, D, 4 * D, 0.01, 0)
    sizes = {"width": WIDTH, "batch": BATCH, "warmup": 0.0, "decay": 0.0}
    configs = [vd.SAEConfig(k=k, lr=lr, **sizes) for k in (16, 32) for lr in (1e-4, 2e-4, 4e-4, 8e-4)]
    with tempfile.TemporaryDirectory() as folder:
        ids = torch.arange(count).view(-1, length)
        store = Path(folder) / "store"
        acts = vd.collect(table_model(table), ids, sites="resid_post.0", tokens="all", store=store)
        vd.train_saes(table[: 4 * BATCH], configs[0], progress=False)  # imports count for nobody

        def ours() -> float:
            return timed(lambda: vd.train_saes(acts, configs, holdout=0.01, progress=False))

        def from_store() -> float:
            cache = Path(folder) / "saelens"
            saelens_cache(table, length, cache)
            return one_after_the_other(lambda: saelens_cached(cache, length))

        def from_memory() -> float:
            return one_after_the_other(lambda: shuffled(table))

        def one_after_the_other(vectors: Callable[[], Any]) -> float:
            return sum(timed(lambda one=one: saelens_alone(vectors(), count, one)) for one in configs)

        def together() -> float:
            return timed(lambda: saelens_together(table, configs))

        rivals = {"store": from_store, "memory": from_memory, "together": together}
        rows = {}
        if "SAELens" in peers:
            saelens_alone(shuffled(table), 4 * BATCH, configs[0])
            before = ours()
            for name in options.against:
                took, after = rivals[name](), ours()
                beside, before = (before + after) / 2, after
                rows[name] = {"seconds": took, "ours": beside, "ratio": took / beside}
    return {"rows": rows, "tokens": count, "threads": options.threads}


def shuffled(table: Tensor, key: str | None = None) -> Any:
    """Batches of rows in random order, pass after pass."""
    while True:
        order = torch.randperm(len(table))
        for at in range(0, len(table) - BATCH + 1, BATCH):
            batch = table[order[at : at + BATCH]]
            yield batch if key is None else {key: batch}


def saelens_parts(config: vd.SAEConfig, count: int) -> tuple[Any, Any]:
    """A SAELens SAE and trainer config like one of ours."""
    with quietly():
        from sae_lens.config import SAETrainerConfig
        from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=D, d_sae=WIDTH, k=config.k, normalize_activations="expected_average_only_in"
        )
    )
    total = int(count * 0.99) // BATCH * BATCH
    trainer = SAETrainerConfig(
        total_training_samples=total,
        train_batch_size_samples=BATCH,
        lr=config.learning_rate(D),
        lr_end=config.learning_rate(D),
        n_batches_for_norm_estimate=4,
    )
    return sae, trainer


def saelens_alone(vectors: Any, count: int, config: vd.SAEConfig) -> None:
    """One SAE by `SAETrainer.fit` on an iterator of batches."""
    from sae_lens.training.sae_trainer import SAETrainer

    sae, trainer = saelens_parts(config, count)
    SAETrainer(trainer, sae, vectors).fit()


def saelens_cache(table: Tensor, length: int, folder: Path) -> None:
    """Vectors as SAELens's `CacheActivationsRunner` leaves them: texts of `length` tokens, one column."""
    from datasets import Array2D, Dataset, Features, Sequence, Value

    texts = len(table) // length
    columns = {
        HOOK: table.view(texts, length, -1).numpy(),
        "token_ids": np.arange(texts * length, dtype=np.int32).reshape(texts, length),
    }
    kinds = {
        HOOK: Array2D((length, table.shape[1]), "float32"),
        "token_ids": Sequence(Value("int32"), length=length),
    }
    with quietly():
        Dataset.from_dict(columns, features=Features(kinds)).save_to_disk(str(folder))


def saelens_cached(folder: Path, length: int) -> Any:
    """SAELens's reader of such a folder, mixing as its runner does by default."""
    from sae_lens.training.activations_store import ActivationsStore

    return ActivationsStore(
        model=None,
        dataset=None,
        streaming=False,
        hook_name=HOOK,
        hook_head_index=None,
        context_size=length,
        d_in=D,
        n_batches_in_buffer=64,
        total_training_tokens=0,
        store_batch_size_prompts=32,
        train_batch_size_tokens=BATCH,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        cached_activations_path=str(folder),
    )


def saelens_together(table: Tensor, configs: list[vd.SAEConfig]) -> None:
    """All of them by `MultiSAETrainer.fit`, at one learning rate."""
    from sae_lens.training.multi_sae_trainer import MultiSAETrainer

    made = {config.label: saelens_parts(config, len(table)) for config in configs}
    saes = {name: sae for name, (sae, _) in made.items()}
    trainer = next(iter(made.values()))[1]
    MultiSAETrainer(trainer, saes, dict.fromkeys(saes, "site"), shuffled(table, "site")).fit()


# Quality


def planted(rows: int, d: int, count: int, p: float, seed: int) -> Tensor:
    """Vectors `[rows, d]`: `count` unit features, each active with probability `p`, strength 0.5 to 1.5."""
    random = torch.Generator().manual_seed(seed)
    directions, out = unit_features(count, d, seed), torch.empty(rows, d)
    for at in range(0, rows, 50_000):
        size = (min(50_000, rows - at), count)
        active = torch.rand(size, generator=random) < p
        out[at : at + size[0]] = (active * (torch.rand(size, generator=random) + 0.5)) @ directions
    return out


def unit_features(count: int, d: int, seed: int) -> Tensor:
    """Directions `[count, d]` of norm 1."""
    directions = torch.randn(count, d, generator=torch.Generator().manual_seed(1000 + seed))
    return directions / directions.norm(dim=1, keepdim=True)


def bench_planted(peers: dict[str, type], options: argparse.Namespace) -> dict[str, Any]:
    """MCC and FVU of each, per seed."""
    d, count, batch = 64, 256, 1024
    found: dict[str, dict[str, list[float]]] = {}
    for seed in range(options.seeds):
        x = planted(options.rows, d, count, 0.02, seed)
        held, x = x[-20_000:], x[:-20_000]
        steps = len(x) // batch
        for name, cls in {"ours": Ours, **peers}.items():
            one = cls(d, count, 5, 1e-3, batch, steps, seed)
            for at in range(0, steps * batch, batch):
                one.step(x[at : at + batch])
            residual = (held - one.reconstruct(held)).square().sum()
            entry = found.setdefault(name, {"mcc": [], "fvu": []})
            entry["mcc"].append(match_features(one.decoder, unit_features(count, d, seed)).mcc)
            entry["fvu"].append(float(residual / (held - held.mean(0)).square().sum()))
    return {"rows": found, "vectors": options.rows}


def bench_revival(peers: dict[str, type], options: argparse.Namespace) -> dict[str, Any]:
    """Latents that are still dead at the end, by how they were killed."""
    d, width, dead, batch, steps = 32, 128, 48, 128, 1500
    kinds: dict[str, tuple[type, dict[str, Any]]] = {
        "ours": (Ours, {}),
        "ours, straight_through": (Ours, {"aux_variant": "straight_through"}),
        **{name: (cls, {}) for name, cls in peers.items()},
    }
    found: dict[str, dict[str, list[int]]] = {}
    for seed in range(options.seeds):
        x = planted(steps * batch, d, 256, 0.02, seed)
        for name, (cls, extra) in kinds.items():
            for how in ("tiny", "negative"):
                one = cls(d, width, 4, 1e-3, batch, steps, seed, **extra)
                if isinstance(one, Ours):
                    one.calibrate(x[:8192])
                weights, bias = one.parameters()
                if how == "tiny":
                    weights[:dead] *= 1e-3
                else:
                    bias[:dead] = -8.0
                for at in range(0, len(x), batch):
                    one.step(x[at : at + batch])
                still = one.still_dead(dead, steps * batch // 10)
                found.setdefault(name, {}).setdefault(how, []).append(still)
    return {"rows": found, "of": dead}


# Tables


def table_step(found: dict[str, Any]) -> str:
    """Speed of one step."""
    lines = [
        "| | thousand tokens/s | ours is faster by (median, range) | asked |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in found["rows"].items():
        middle, low, high = row["ratio"]
        gain = "" if name == "ours" else f"{middle:.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"| {name} | {row['tokens_s'] / 1e3:.1f} | {gain} | {row['asked'] or ''} |")
    return "\n".join(["## One TopK step", "", *lines, ""])


def table_eight(found: dict[str, Any]) -> str:
    """Eight SAEs, end to end."""
    lines = ["| | seconds | ours beside it | ours is faster by | asked |", "| --- | --- | --- | --- | --- |"]
    for name, (said, asked) in RIVALS.items():
        if row := found["rows"].get(name):
            lines.append(
                f"| {said} | {row['seconds']:.1f} | {row['ours']:.1f} | {row['ratio']:.2f} | {asked or ''} |"
            )
    return "\n".join([f"## Eight SAEs, {found['tokens']:,} vectors", "", *lines, ""])


def table_planted(found: dict[str, Any]) -> str:
    """Recovery of planted features."""
    lines = ["| | MCC by seed | FVU by seed |", "| --- | --- | --- |"]
    for name, row in found["rows"].items():
        shown = [", ".join(f"{value:.3f}" for value in row[figure]) for figure in ("mcc", "fvu")]
        lines.append(f"| {name} | {shown[0]} | {shown[1]} |")
    return "\n".join([f"## Planted features, {found['vectors']:,} vectors", "", *lines, ""])


def table_revival(found: dict[str, Any]) -> str:
    """Dead latents that stay dead."""
    lines = ["| | tiny weights | negative bias |", "| --- | --- | --- |"]
    for name, row in found["rows"].items():
        lines.append(
            f"| {name} | {', '.join(map(str, row['tiny']))} | {', '.join(map(str, row['negative']))} |"
        )
    return "\n".join([f"## Still dead of {found['of']}, by seed", "", *lines, ""])


TABLES = {"step": table_step, "eight": table_eight, "planted": table_planted, "revival": table_revival}


def write(results: dict[str, Any], options: argparse.Namespace) -> None:
    """Updates the parts that were run in results/sae.json, and makes results/sae.md of it."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "sae.json"
    kept = json.loads(file.read_text()) if file.is_file() else {}
    packages = {**versions(), **{name: metadata.version(name) for name in PEERS if installed(name)}}
    facts = {"machine": f"{os.cpu_count()} cores, {platform.machine()}, no GPU", "versions": packages}
    if "eight" in results and kept.get("eight", {}).get("tokens") == results["eight"]["tokens"]:
        results["eight"]["rows"] = {**kept["eight"]["rows"], **results["eight"]["rows"]}
    kept = {**kept, **results, "facts": facts, "threads": options.threads}
    file.write_text(json.dumps(kept, indent=2) + "\n")
    parts = [TABLES[name](kept[name]) for name in TABLES if name in kept]
    said = (
        f"{facts['machine']}, {options.threads} threads; what each part does is said in the benchmark.\n"
        f"Versions: {', '.join(f'{name} {version}' for name, version in packages.items())}.\n\n"
        f"Command: `python tests/benchmarks/bench_sae.py --peers DIR --tokens {options.tokens} --write`\n"
    )
    (RESULTS / "sae.md").write_text("\n".join(["# Training sparse autoencoders", "", *parts, said]))


def installed(name: str) -> bool:
    """Whether a peer is installed."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return bool(metadata.version(name))
    return False


if __name__ == "__main__":
    np.random.seed(0)
    torch.manual_seed(0)
    main()
