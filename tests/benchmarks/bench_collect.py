"""How fast activations are collected, written and read, against the bare model, TransformerLens and SAELens.

    python tests/benchmarks/bench_collect.py            prints the table
    python tests/benchmarks/bench_collect.py --write    also updates results/collect.md and collect.json
    python tests/benchmarks/bench_collect.py --memory 2 writes and reads a store of 2 GB and prints the
    memory it took

One Llama of width 512 and 8 layers with random weights. Every row compares two ways of doing the same work
on the same tokens in one process, run in turn; the ratio is the median over the turns, above 1 where
Veridical is faster.
"""

import argparse
import contextlib
import functools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"
PARTS = ("bare", "lens", "saelens", "writing", "mixed", "reading")
CONTEXT, BATCH_TOKENS = 128, 2048  # the same batches for everyone
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


@dataclass
class Row:
    """A comparison: seconds of ours and of the other over the turns, and the ratio that is asked for."""

    name: str
    other: str
    required: float | None
    unit: str
    ours: list[float]
    others: list[float]
    amount: float
    part: str = ""

    @property
    def ratio(self) -> float:
        return statistics.median(b / a for a, b in zip(self.ours, self.others))

    def line(self) -> str:
        rates = [self.amount / statistics.median(times) for times in (self.ours, self.others)]
        spread = [b / a for a, b in zip(self.ours, self.others)]
        asked = "" if self.required is None else f"{self.required:g}"
        met = "" if self.required is None else ("yes" if self.ratio >= self.required else "NO")
        return (
            f"| {self.name} | {self.other} | {rates[0]:,.0f} | {rates[1]:,.0f} | {self.unit} "
            f"| {self.ratio:.2f} ({min(spread):.2f} to {max(spread):.2f}) | {asked} | {met} |"
        )


HEADER = (
    "| what | against | ours | theirs | unit | ratio (range) | asked for | met |\n"
    "| --- | --- | ---: | ---: | --- | ---: | ---: | --- |"
)


def compare(
    name: str,
    other: str,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    *,
    amount: float,
    unit: str,
    required: float | None,
    turns: int,
    before: Callable[[], object] = os.sync,
) -> Row:
    """Runs both in turn, after one run of each that does not count, the first of a turn alternating.

    `before` each run, by default, what the last run left to be written is flushed: no burden of this one's.
    """
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for turn in range(-1, turns):
        both = [("ours", ours), ("theirs", theirs)]
        for who, act in both if turn % 2 else both[::-1]:
            before()
            start = time.perf_counter()
            act()
            if turn >= 0:
                times[who].append(time.perf_counter() - start)
    row = Row(name, other, required, unit, times["ours"], times["theirs"], amount)
    print(row.line(), flush=True)
    return row


class Bench:
    """The model in its three forms, the tokens, and a folder for what is written."""

    def __init__(self, folder: Path, rows: int, turns: int):
        import transformers

        import veridical as vd

        self.folder, self.turns = folder, turns
        torch.manual_seed(0)
        self.module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE)).eval()
        self.model = vd.load(self.module, check=False)
        self.tokens = torch.randint(3, SIZE["vocab_size"], (rows, CONTEXT))
        self.count = 0

    def fresh(self) -> Path:
        """An empty folder; what was written before is removed."""
        shutil.rmtree(self.folder / f"run{self.count}", ignore_errors=True)
        self.count += 1
        return self.folder / f"run{self.count}"

    def bare(self, depth: int | None = None) -> None:
        """The transformer body alone, in the same batches; its first `depth` layers where given."""
        body, layers = self.module.model, self.module.model.layers
        body.layers = layers[:depth]
        try:
            with torch.no_grad():
                for batch in self.tokens.split(BATCH_TOKENS // CONTEXT):
                    body(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False)
        finally:
            body.layers = layers

    def collect(self, **options: object):
        import veridical as vd

        return vd.collect(self.model, self.tokens, batch_tokens=BATCH_TOKENS, progress=False, **options)

    # Against the bare forward

    def against_bare(self) -> list[Row]:
        amount = {"amount": self.tokens.numel(), "unit": "tokens/s", "turns": self.turns}
        body = "the transformer body alone"
        return [
            compare(
                "all layers, last token, to memory", body, lambda: self.collect(tokens="last"), self.bare,
                required=0.95, **amount,
            ),
            compare(
                "all layers, all tokens, to disk", body,
                lambda: self.collect(tokens="all", store=self.fresh()), self.bare, required=0.85, **amount,
            ),
        ]  # fmt: skip

    # Against TransformerLens

    def against_lens(self) -> list[Row]:
        models = {"HookedTransformer": self.hooked_transformer(), "TransformerBridge": self.bridge()}
        rows = []
        for name, model in models.items():
            for return_type in ("logits", None):
                if name == "TransformerBridge" and return_type is None:
                    continue  # it always computes the logits
                said = f"{name}.run_with_cache(names_filter=...)" + ("" if return_type else ", no logits")
                rows.append(
                    compare(
                        "all layers, last token, to memory", said, lambda: self.collect(tokens="last"),
                        lambda m=model, r=return_type: self.lens_loop(m, r), amount=self.tokens.numel(),
                        unit="tokens/s", required=1.6, turns=self.turns,
                    )
                )  # fmt: skip
        return rows

    def lens_loop(self, model, return_type) -> dict[str, torch.Tensor]:
        names = [f"blocks.{layer}.hook_resid_post" for layer in range(SIZE["num_hidden_layers"])]
        kept: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        with torch.no_grad():
            for batch in self.tokens.split(BATCH_TOKENS // CONTEXT):
                _, cache = model.run_with_cache(
                    batch, names_filter=lambda name: name in kept, return_type=return_type
                )
                for name in names:
                    kept[name].append(cache[name][:, -1].clone())
        return {name: torch.cat(parts) for name, parts in kept.items()}

    def hooked_transformer(self):
        from transformer_lens import HookedTransformer, HookedTransformerConfig
        from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights

        head = SIZE["hidden_size"] // SIZE["num_attention_heads"]
        config = HookedTransformerConfig(
            n_layers=SIZE["num_hidden_layers"], d_model=SIZE["hidden_size"], n_ctx=2048, d_head=head,
            n_heads=SIZE["num_attention_heads"], d_mlp=SIZE["intermediate_size"], d_vocab=SIZE["vocab_size"],
            act_fn="silu", normalization_type="RMS", gated_mlp=True, final_rms=True, eps=1e-6, device="cpu",
            positional_embedding_type="rotary", rotary_adjacent_pairs=False, rotary_dim=head,
            original_architecture="LlamaForCausalLM",
        )  # fmt: skip
        model = HookedTransformer(config)
        state = convert_llama_weights(self.module, config)
        model.load_and_process_state_dict(
            state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
        )
        return model.eval()

    def bridge(self):
        from transformer_lens.model_bridge import TransformerBridge

        module = type(self.module)(self.module.config)
        module.load_state_dict(self.module.state_dict())
        module.config._attn_implementation = "eager"
        return TransformerBridge.boot_transformers(
            "llama",
            hf_model=module.eval(),
            tokenizer=plain_tokenizer(self.folder / "tokenizer"),
            device="cpu",
        )

    # Against SAELens

    def against_saelens(self) -> list[Row]:
        rows = []
        lens, tokens = self.hooked_transformer(), self.tokens
        for layer in (0, 3, 7):
            self.tokens = tokens.repeat(4, 1) if layer == 0 else tokens  # or else it is over in a moment
            site = f"resid_post.{layer}"
            hooks = {"HookedTransformer": f"blocks.{layer}.hook_{site.split('.')[0]}",
                     "AutoModelForCausalLM": f"model.layers.{layer}"}  # fmt: skip
            # Shuffling is its default; ours is shuffled when it is read.
            for kind, shuffle in (("HookedTransformer", True), ("AutoModelForCausalLM", True),
                                  ("AutoModelForCausalLM", False)):  # fmt: skip
                said = f"SAELens cache runner, {kind}{'' if shuffle else ', not shuffled'}"
                theirs = functools.partial(self.saelens, kind, hooks[kind], lens, shuffle)
                amount = {"amount": self.tokens.numel(), "unit": "tokens/s", "turns": self.turns}
                rows.append(
                    compare(
                        f"one hook ({site}), all tokens, to disk", said,
                        lambda s=site: self.collect(sites=s, tokens="all", store=self.fresh()), theirs,
                        required=1.3, **amount,
                    )
                )  # fmt: skip
            rows.append(
                compare(
                    f"{layer + 1} of 8 layers run, nothing read or written", said,
                    lambda depth=layer + 1: self.bare(depth), theirs, required=None, **amount,
                )
            )  # fmt: skip
        self.tokens = tokens
        return rows

    def runner(self, kind: str, hook: str, lens, path: Path, shuffle: bool = False):
        """SAELens's runner on this model and these tokens, as its documentation uses it."""
        import datasets
        from sae_lens import cache_activations_runner as theirs
        from sae_lens.config import CacheActivationsRunnerConfig
        from sae_lens.load_model import HookedProxyLM

        config = CacheActivationsRunnerConfig(
            dataset_path="tokens", model_name="llama", model_class_name=kind, hook_name=hook, d_in=512,
            model_batch_size=BATCH_TOKENS // CONTEXT, context_size=CONTEXT,
            training_tokens=self.tokens.numel(),
            new_cached_activations_path=str(path), shuffle=shuffle, prepend_bos=False, device="cpu",
            buffer_size_gb=self.tokens.numel() * 512 * 4 / 1e9, streaming=False,
        )  # fmt: skip
        data = datasets.Dataset.from_dict({"tokens": self.tokens.tolist()}).with_format("torch")
        tokenizer = plain_tokenizer(self.folder / "tokenizer")
        model = (
            lens if kind == "HookedTransformer" else HookedProxyLM(self.module, tokenizer, hook_names=[hook])
        )
        original, theirs.load_model = theirs.load_model, lambda **_: model
        try:
            return theirs.CacheActivationsRunner(config, override_dataset=data)
        finally:
            theirs.load_model = original

    def saelens(self, kind: str, hook: str, lens, shuffle: bool) -> None:
        with quiet():
            runner = self.runner(kind, hook, lens, self.fresh(), shuffle)
            runner.run()
        for handle in self.module.modules():
            handle._forward_hooks.clear()  # SAELens leaves its hooks on the model

    # The writing path alone

    def writing(self) -> list[Row]:
        from sae_lens import cache_activations_runner as theirs

        rows = 512
        given = torch.randn(rows * CONTEXT, 512)
        lens = self.hooked_transformer()
        made = []
        for durable in (True, False):

            def ours(durable=durable):
                self.write_given(given, rows, durable)

            def saelens(durable=durable):
                path = self.fresh()
                with quiet():
                    runner = self.runner("HookedTransformer", "blocks.3.hook_resid_post", lens, path)
                    runner.cfg.buffer_size_gb = rows * CONTEXT * 512 * 4 / 1e9
                    runner.cfg.training_tokens = rows * CONTEXT
                    parts = iter(given.split(BATCH_TOKENS))
                    runner.activations_store.get_raw_llm_batch = lambda: (next(parts), None)
                    runner.features.pop("token_ids", None)
                    start = time.perf_counter()
                    theirs.CacheActivationsRunner.run(runner)
                if durable:
                    for file in path.rglob("*"):
                        with file.open("rb") as handle:
                            os.fsync(handle.fileno())
                return time.perf_counter() - start

            said = "flushed to the disk" if durable else "left to the system to flush"
            made.append(
                compare(
                    f"activations given, to disk, {said}", "SAELens's writer", ours, saelens,
                    amount=given.nbytes / 1e6, unit="MB/s", required=3.0, turns=max(3, self.turns),
                )
            )  # fmt: skip
        return made

    def write_given(self, given: torch.Tensor, rows: int, durable: bool) -> None:
        from veridical.activations import writer
        from veridical.activations.moments import Moments

        path = self.fresh()
        path.mkdir(parents=True)
        layout = writer.Layout(len(given), {"blocks.3.hook_resid_post": (512,)}, "float32")
        index = {name: np.zeros(len(given), dtype=np.int32) for name in writer.INDEX}
        real, writer.os.fsync = os.fsync, os.fsync if durable else (lambda handle: None)
        try:
            with contextlib.closing(writer.Backlog(64 << 20, "bench")) as backlog:
                file = writer.ShardFile(path / "shard-00000.safetensors", layout, index)
                moments = Moments.empty((512,))
                for number, part in enumerate(given.split(BATCH_TOKENS)):
                    moments = moments + Moments.of(part)
                    first = number * BATCH_TOKENS
                    runs = [
                        writer.Run(start, CONTEXT, first + start) for start in range(0, len(part), CONTEXT)
                    ]
                    backlog.put(
                        lambda p=part, r=runs: file.write("blocks.3.hook_resid_post", p, r), part.nbytes
                    )
                backlog.drain()
                file.commit({"blocks.3.hook_resid_post": moments})
        finally:
            writer.os.fsync = real

    # Mixed lengths, and reading back

    def mixed(self) -> list[Row]:
        import veridical as vd

        lengths = np.clip(np.random.default_rng(0).lognormal(4.0, 0.8, 4 * len(self.tokens)), 4, 1024).astype(
            int
        )
        texts = [torch.randint(3, SIZE["vocab_size"], (1, n)) for n in lengths]
        ids = torch.zeros(len(texts), int(lengths.max()), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : text.shape[1]], mask[row, : text.shape[1]] = text, 1

        def in_data_order():
            kept = []
            with torch.no_grad():
                for start in range(0, len(texts), 32):
                    width = int(lengths[start : start + 32].max())
                    rows = slice(start, start + 32)
                    inputs = {"input_ids": ids[rows, :width], "attention_mask": mask[rows, :width]}
                    out = self.module.model(**inputs, use_cache=False, output_hidden_states=True)
                    last = torch.from_numpy(lengths[rows]) - 1
                    kept.append(torch.stack(out.hidden_states[1:])[:, torch.arange(len(last)), last])
            return torch.cat(kept, 1)

        def ours():
            data = {"input_ids": ids, "attention_mask": mask}
            return vd.collect(self.model, data, tokens="last", batch_tokens=BATCH_TOKENS, progress=False)

        return [
            compare(
                f"mixed lengths ({lengths.min()} to {lengths.max()}, median {int(np.median(lengths))})",
                "batches of 32 in data order, padded to their longest", ours, in_data_order,
                amount=int(lengths.sum()), unit="tokens/s", required=2.0, turns=max(2, self.turns // 2),
            )
        ]  # fmt: skip

    def reading(self) -> list[Row]:
        import veridical as vd

        made = []
        for sites, times in (("embed", 16), ("embed,resid_pre.0,resid_mid.0,resid_post.0", 4)):
            # Many cheap vectors: half a gigabyte, of the first layer.
            tokens = self.tokens.repeat(times, 1)
            acts = vd.collect(self.model, tokens, sites=sites, tokens="all", store=self.fresh(), shard_mb=64)
            site = None if "," in sites else sites
            size = sum(entry.bytes for entry in acts._source.entries)
            reader = acts.batches(4096, sites=site)

            def shuffled(reader=reader):
                for _ in reader:
                    pass

            shards = sorted(acts.folder.glob("shard-*.safetensors"))
            for said, sequential, before, required in (
                ("reading the files in order, from a cold cache", in_order, lambda s=shards: forget(s), 0.5),
                ("reading the files in order, in memory already, each as a whole", as_wholes, os.sync, 0.5),
                # Nothing is kept of this one: it says how fast the cache is, not how fast vectors arrive.
                ("copying the files in memory through one buffer of 8 MB", in_order, os.sync, None),
            ):
                made.append(
                    compare(
                        f"shuffled batches of 4096, sites: {len(acts.sites)}", said, shuffled,
                        lambda s=shards, read=sequential: read(s), amount=size / 1e6, unit="MB/s",
                        required=required, turns=2 * self.turns + 1, before=before,
                    )
                )  # fmt: skip
        return made


def in_order(paths: list[Path]) -> None:
    """Reads files into one buffer over and over, which stays in the processor's cache."""
    buffer = bytearray(8 << 20)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def as_wholes(paths: list[Path]) -> None:
    """Reads each file into memory."""
    for path in paths:
        path.read_bytes()


def forget(paths: list[Path]) -> None:
    """Has the system drop files from its cache, as those of a store larger than memory would be."""
    os.sync()
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_tokenizer(folder: Path):
    """A word tokenizer, as both libraries insist on one; the texts are tokens already."""
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    made.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@contextlib.contextmanager
def quiet():
    """Progress bars and log lines of others out of the table."""
    import datasets

    datasets.disable_progress_bars()
    with open(os.devnull, "w") as sink, contextlib.redirect_stderr(sink), contextlib.redirect_stdout(sink):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="update the committed table")
    parser.add_argument("--turns", type=int, default=5, help="runs of each side that count")
    parser.add_argument("--rows", type=int, default=128, help=f"texts of {CONTEXT} tokens")
    parser.add_argument(
        "--only",
        default="",
        help=f"parts to run: {', '.join(PARTS)}; with --write the others keep their rows",
    )
    parser.add_argument("--folder", help="where to write; a temporary folder on the disk when not given")
    parser.add_argument(
        "--memory", type=float, metavar="GB", help="measure memory for a store of this size instead"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.memory:
            script = Path(__file__).with_name("memory_of_collect.py")
            sys.exit(subprocess.run([sys.executable, script, folder, str(options.memory)]).returncode)
        bench = Bench(Path(folder), options.rows, options.turns)
        methods = (bench.against_bare, bench.against_lens, bench.against_saelens, bench.writing, bench.mixed,
                   bench.reading)  # fmt: skip
        parts = dict(zip(PARTS, methods, strict=True))
        chosen = options.only.split(",") if options.only else list(PARTS)
        print(HEADER, flush=True)
        rows = []
        for name in chosen:
            rows += [replace(row, part=name) for row in parts[name]()]
    if options.write:
        save(rows, chosen, options)


def save(rows: list[Row], parts: list[str], options: argparse.Namespace) -> None:
    """Writes the table; the rows of parts that were not run stay as they were."""
    from veridical.provenance import versions

    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "collect.json"
    before = json.loads(file.read_text())["rows"] if file.exists() else []
    kept = [Row(**{k: v for k, v in row.items() if k != "ratio"}) for row in before]
    rows = sorted(
        [*rows, *(row for row in kept if row.part not in parts)], key=lambda row: PARTS.index(row.part)
    )
    machine = f"{cpu()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.system()}"
    packages = {**versions(), "sae-lens": __import__("importlib.metadata").metadata.version("sae-lens")}
    said = ", ".join(f"{name} {version}" for name, version in packages.items())
    command = (
        f"python tests/benchmarks/bench_collect.py --write --turns {options.turns} --rows {options.rows}"
    )
    text = (
        f"# Collecting activations\n\nMade by `{command}`; how each row is measured is said there. Ratios "
        "are medians over alternating turns, above 1 where Veridical is faster.\n\n"
        f"Machine: {machine}.\nVersions: {said}.\n\n"
    )
    table = "\n".join([HEADER, *(row.line() for row in rows)])
    (RESULTS / "collect.md").write_text(f"{text}{table}\n")
    content = {
        "command": command,
        "machine": machine,
        "versions": packages,
        "rows": [{**asdict(row), "ratio": row.ratio} for row in rows],
    }
    (RESULTS / "collect.json").write_text(json.dumps(content, indent=2) + "\n")


def cpu() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
