import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake import FakeModel
from test_store import OPTIONS, TEXTS, digest

from veridical.activations import collect
from veridical.activations.distributed import World

HERE = Path(__file__).parent
SCRIPT = """
import sys
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads(1)
import torch.distributed as dist
from fake import FakeModel
from veridical.activations import collect
import os, signal
rank = int(os.environ["RANK"])
model = FakeModel()
run, calls = model.run, []
def counting(*args, **kwargs):
    calls.append(1)
    if rank == {die} and len(calls) > 60:
        {how}
    return run(*args, **kwargs)
model.run = counting
acts = collect(model, {texts!r}, store={folder!r}, **{options!r})
open({folder!r} + f"-rank{{rank}}", "w").write(f"{{len(calls)}} {{len(acts)}}")
"""


def torchrun(ranks, folder, die=-1, how="pass", tmp_path=None):
    script = tmp_path / "script.py"
    script.write_text(
        SCRIPT.format(here=str(HERE), die=die, how=how, texts=TEXTS, folder=str(folder), options=OPTIONS)
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc-per-node={ranks}", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


@pytest.fixture
def alone(tmp_path):
    return collect(FakeModel(), TEXTS, store=tmp_path / "alone", **OPTIONS)


@pytest.mark.slow
def test_two_processes_write_the_same_bytes_as_one(tmp_path, alone):
    ran = torchrun(2, tmp_path / "two", tmp_path=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert digest(tmp_path / "two") == digest(alone.folder)
    calls = [(tmp_path / f"two-rank{rank}").read_text().split() for rank in (0, 1)]
    assert all(int(ran) > 20 for ran, _ in calls), "both did some of the work"
    assert all(int(vectors) == len(alone) for _, vectors in calls)


@pytest.mark.slow
def test_a_process_that_dies_is_made_up_for_by_another_number_of_processes(tmp_path, alone):
    folder = tmp_path / "died"
    ran = torchrun(2, folder, die=1, how="os.kill(os.getpid(), signal.SIGKILL)", tmp_path=tmp_path)
    assert ran.returncode != 0
    assert digest(folder) != digest(alone.folder)
    assert torchrun(3, folder, tmp_path=tmp_path).returncode == 0
    assert digest(folder) == digest(alone.folder)


@pytest.mark.slow
def test_one_failure_ends_all_with_its_reason(tmp_path):
    ran = torchrun(2, tmp_path / "failed", die=1, how="raise ValueError('broken')", tmp_path=tmp_path)
    assert ran.returncode != 0
    assert "process 1 of 2 failed: ValueError: broken" in ran.stderr


def test_shards_are_dealt_out_once_each():
    worlds = [World(rank, 3) for rank in range(3)]
    dealt = [world.mine([0, 2, 3, 5, 6, 7]) for world in worlds]
    assert sorted(number for mine in dealt for number in mine) == [0, 2, 3, 5, 6, 7]
