"""A training that is killed and started again ends, to the last bit, as one that was never stopped."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from veridical.preference import PreferenceRun, prefer

pytestmark = pytest.mark.filterwarnings("ignore")
FACTS = [("Peru", "Lima", "Oslo"), ("France", "Paris", "Rome"), ("Italy", "Rome", "Paris")]
FACTS += [("Norway", "Oslo", "Lima"), ("Rwanda", "Kigali", "Lima"), ("Japan", "Tokyo", "Oslo")]
ROWS = [
    {"prompt": [{"role": "user", "content": f"What is the capital of {c}?"}], "chosen": good, "rejected": bad}
    for c, good, bad in FACTS
]
SMALL = {"steps": 4, "checkpoints": 2, "batch": 4, "samples": 4, "max_new_tokens": 6, "learning_rate": 1e-3}


def short(prompts, answers):
    return np.array([-float(len(answer)) for answer in answers])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


def same(one: PreferenceRun, other: PreferenceRun) -> bool:
    a, b = weights(one.folder), weights(other.folder)
    return (
        a.keys() == b.keys()
        and all(torch.equal(a[name], b[name]) for name in a)
        and one.table.equals(other.table)
        and one.samples.equals(other.samples)
        and one.log["loss"].equals(other.log["loss"])
    )


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("sft", {}),
        ("reward", {"lora_rank": 2}),
        ("dpo", {}),
        ("ipo", {"lora_rank": 2}),
        ("rl", {"beta": 0.2}),
        ("rl", {"beta": 0.2, "lora_rank": 2}),
    ],
)
def test_a_run_that_stopped_while_saving_goes_on_to_the_same_end(tmp_path, method, options):
    options = {**SMALL, **options, "reward": short if method == "rl" else None}
    whole = prefer(method, "tiny-liar", ROWS, tmp_path / "whole", **options)
    stopped = shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    (stopped / "result.json").unlink()
    shutil.rmtree(stopped / "model")
    shutil.rmtree(stopped / "training" / "checkpoint-4")
    half = stopped / "training" / "checkpoint-4"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"cut")
    assert same(whole, prefer(method, "tiny-liar", ROWS, stopped, **options))


@pytest.mark.parametrize(("method", "beta"), [("dpo", 0.1), ("rl", 0.1)])
def test_a_killed_process_is_gone_on_from(tmp_path, method, beta):
    reward = short if method == "rl" else None
    options = {**SMALL, "steps": 12, "checkpoints": 4, "beta": beta, "lora_rank": 2}
    whole = prefer(method, "tiny-liar", ROWS, tmp_path / "whole", **options, reward=reward)
    out = tmp_path / "killed"
    code = (
        f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]\n"
        "import torch; torch.set_num_threads(1)\n"
        "from test_resume import ROWS, prefer, short\n"
        f"prefer({method!r}, 'tiny-liar', ROWS, {str(out)!r}, **{options!r},"
        f" reward={'short' if reward else 'None'})\n"
    )
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], env=dict(os.environ))
    try:
        began = time.monotonic()
        while not (out / "training" / "checkpoint-3" / "trainer_state.json").is_file():
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() - began < 240
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (out / "result.json").exists()
    assert same(whole, prefer(method, "tiny-liar", ROWS, out, **options, reward=reward))
