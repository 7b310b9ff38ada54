"""Memory while a store is written and read does not grow with it, measured in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPT = """
import json, sys, threading, time
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads(1)
import fake
from veridical.activations import collect

def private():  # MB of memory that is not a mapped file
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1000

class Wide(fake.FakeModel):
    def width(self, site):
        return (1024,)
    def run(self, inputs, read=(), write=None, stop=False):
        ids = inputs["input_ids"]
        for name, act in read.items():
            act((ids.unsqueeze(-1) * self.fill).float())

peak, going = [0.0], True
def watch():
    while going:
        peak[0] = max(peak[0], private())
        time.sleep(0.002)

model = Wide(layers=2)
model.fill = torch.ones(1024)
texts = ["x" * (20 + i % 60) for i in range({rows})]
options = dict(tokens="all", batch_tokens=2048, shard_mb=32)
collect(model, texts[:100], store={folder!r} + "-warm", **options)
before = private()
threading.Thread(target=watch, daemon=True).start()
acts = collect(model, texts, store={folder!r}, **options)
written = peak[0] - before
seen = 0
for batch in acts.batches(1024, buffer_mb=32):
    seen += len(batch["blocks.0.hook_resid_post"])
for chunk in acts.chunks("resid_post.1"):
    pass
assert seen == len(acts)
going = False
size = sum(entry.bytes for entry in acts._source.entries) / 1e6
print(json.dumps({{"size": size, "written": written, "read": peak[0] - before}}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_store_of_400_mb_is_written_and_read_in_a_fraction_of_that(tmp_path):
    script = SCRIPT.format(here=str(HERE), rows=1000, folder=str(tmp_path / "store"))
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["size"] > 390, found
    assert found["written"] < 150, found
    assert found["read"] < 150, found
