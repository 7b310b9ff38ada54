"""Edge attribution by TransformerLens 4, in a process of its own, for `bench_attribute.py`.

Reads a job from a JSON file and writes its scores; then, for each line on standard input, times
`attribution_patch` at edge granularity and answers with the seconds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis import EdgeAttributionConfig, attribution_patch


def main() -> None:
    """Runs the job that the command line names."""
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    module = transformers.GPT2LMHeadModel.from_pretrained(
        folder / "model", attn_implementation="eager"
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    model = TransformerBridge.boot_transformers("gpt2", hf_model=module, tokenizer=tokenizer, device="cpu")
    clean, corrupt = (torch.tensor([job[side]]) for side in ("clean", "corrupt"))
    config = EdgeAttributionConfig(granularity="edge")

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, job["answer"]] - logits[0, -1, job["wrong"]]

    found = attribution_patch(model, clean, corrupt, metric, config)
    lines = [
        (
            sender.kind,
            sender.layer,
            sender.head,
            receiver.kind,
            receiver.layer,
            receiver.head,
            sender.position,
        )
        for sender, receiver in found.edge_scores
    ]
    (folder / "edges.json").write_text(json.dumps(lines))
    np.save(folder / "scores.npy", np.array(list(found.edge_scores.values())))
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        attribution_patch(model, clean, corrupt, metric, config)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
