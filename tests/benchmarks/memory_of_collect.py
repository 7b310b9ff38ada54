"""Writes a store of some gigabytes, reads it shuffled, and prints the memory that took above the model's own.

    python tests/benchmarks/memory_of_collect.py FOLDER GIGABYTES

The model's own is what the process holds after bare forward passes of the same batches. Counted is private
memory (RssAnon); pages of files that the system maps or caches can be taken back by it at any time.
"""

import sys
import threading
import time
from pathlib import Path

import torch
import transformers

import veridical as vd

CONTEXT, WIDTH, LAYERS = 128, 512, 8


def private() -> float:
    """Megabytes of private memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("RssAnon"))


def main(folder: str, gigabytes: float) -> None:
    config = transformers.LlamaConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        intermediate_size=256,
        vocab_size=1000,
        num_attention_heads=8,
    )
    torch.manual_seed(0)
    model = vd.load(transformers.LlamaForCausalLM(config).eval(), check=False)
    rows = int(gigabytes * 1e9 / (LAYERS * WIDTH * 4 * CONTEXT))
    tokens = torch.randint(3, 1000, (rows, CONTEXT))
    with torch.no_grad():
        for batch in tokens[:128].split(4096 // CONTEXT):
            model.model.model(input_ids=batch, use_cache=False)
    before, most, going = private(), [0.0], True

    def watch() -> None:
        while going:
            most[0] = max(most[0], private() - before)
            time.sleep(0.005)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    acts = vd.collect(model, tokens, tokens="all", store=f"{folder}/store", progress=True)
    written, most[0] = most[0], 0.0
    seen = sum(len(batch["blocks.0.hook_resid_post"]) for batch in acts.batches(4096))
    acts.verify()
    going = False
    watcher.join()
    size = sum(path.stat().st_size for path in Path(folder, "store").glob("shard-*")) / 1e9
    print(f"store of {size:.2f} GB, {seen:,} vectors at {LAYERS} sites")
    print(f"{written:.0f} MB above the model to write it, {most[0]:.0f} MB to read it shuffled and verify it")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
