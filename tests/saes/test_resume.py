"""Runs that are killed, whose disk is full, whose checkpoint is damaged or of something else."""

import errno
import json
import logging
import os
import random
import signal
import time

import pytest
import torch
from killing import latest, members, start, wait_for
from planted_features import activations

import veridical as vd
from veridical.errors import DamagedFileError, DiskFullError, StoreMismatchError
from veridical.saes import checkpoint

CONFIGS = [
    vd.SAEConfig(width=32, k=4, batch=128, lr=3e-3, name="a", dead_after=1024),
    vd.SAEConfig(width=32, k=2, batch=128, lr=1e-2, name="b", seed=1, tokens=2560),
    vd.SAEConfig(architecture="batch_topk", width=32, k=3, batch=64, lr=3e-3, name="c"),
    vd.SAEConfig(architecture="gated", width=24, batch=128, lr=3e-3, name="d"),
    vd.SAEConfig(width=32, k=4, batch=128, lr=1e30, name="wild"),
]


def train(store):
    return vd.train_saes(activations(128 * 60), CONFIGS, store=store, checkpoint_minutes=0.0)


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_in_the_same_bytes(tmp_path):
    whole = start(train, tmp_path / "whole", False)
    assert whole.wait(120) == 0
    chance, folder, standing = random.Random(0), tmp_path / "killed" / checkpoint.CHECKPOINTS, [0]
    for _ in range(3):
        process = start(train, tmp_path / "killed", True)
        wait_for(lambda: latest(folder) > standing[-1], process)
        time.sleep(chance.uniform(0.0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        standing.append(latest(folder))
    assert standing[1] < 58, "it was never killed in the middle"
    assert start(train, tmp_path / "killed", False).wait(120) == 0
    expected, found = members(tmp_path / "whole"), members(tmp_path / "killed")
    assert expected.keys() == found.keys()
    assert len(expected) == 10
    for name, content in expected.items():
        assert found[name] == content, name


def test_resumed_run_returns_what_an_unbroken_one_does(tmp_path, monkeypatch):
    from veridical.saes.trainer import _Training

    whole = train(None)
    plain, steps = _Training._step, []

    def stopping(self, group, batch):
        steps.append(1)
        if len(steps) == 90:
            raise KeyboardInterrupt
        plain(self, group, batch)

    monkeypatch.setattr(_Training, "_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    monkeypatch.setattr(_Training, "_step", plain)
    resumed = train(tmp_path)
    for one, other in zip(whole, resumed):
        assert one.name == other.name
        assert one.figures == other.figures
        assert json.dumps(one.history) == json.dumps(other.history) or one.name == "wild"
        assert (one.cancelled is None) == (other.cancelled is None)
    again = train(tmp_path)  # all done: nothing is trained
    assert torch.equal(again["a"].W_dec, whole["a"].W_dec)
    assert again.to_frame()["fvu"].tolist()[:4] == whole.to_frame()["fvu"].tolist()[:4]


def test_the_last_two_checkpoints_are_kept(tmp_path):
    train(tmp_path)
    files = sorted(file.name for file in (tmp_path / checkpoint.CHECKPOINTS).iterdir())
    assert len(files) == 4
    assert files[0][:8] < files[2][:8] == "00000058"


def test_another_config_or_other_data_are_refused(tmp_path):
    x = activations(1024)
    vd.train_saes(x, width=16, k=2, batch=128, store=tmp_path)
    for change, said in (
        ({"k": 3}, r"configs\[0\].k is 2 there, 3 here"),
        ({"seed": 5}, "seed is 0 there, 5 here"),
        ({"holdout": 0.5}, "holdout is 0.02 there, 0.5 here"),
    ):
        with pytest.raises(StoreMismatchError, match=said) as caught:
            vd.train_saes(x, **{"width": 16, "k": 2, "batch": 128, "store": tmp_path, **change})
        assert "\n" not in str(caught.value)
    with pytest.raises(StoreMismatchError, match="data is"):
        vd.train_saes(x + 1, width=16, k=2, batch=128, store=tmp_path)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage, caplog):
    whole = train(tmp_path / "whole")
    train(tmp_path / "broken")
    members = tmp_path / "broken" / checkpoint.MEMBERS
    file = tmp_path / "broken" / checkpoint.CHECKPOINTS / "00000058.safetensors"
    kept = file.read_bytes()
    spoil(file, damage)
    for name in ("a", "c", "d"):
        (members / f"{name}.json").unlink()
    with caplog.at_level(logging.WARNING):
        again = train(tmp_path / "broken")
    assert "00000058.safetensors is" in caplog.text
    assert "going back" in caplog.text
    assert torch.equal(again["a"].W_dec, whole["a"].W_dec)
    assert kept
    for file in (tmp_path / "broken" / checkpoint.CHECKPOINTS).glob("*.safetensors"):
        spoil(file, damage)
    with pytest.raises(DamagedFileError, match="safetensors is"):
        train(tmp_path / "broken")


def spoil(file, damage):
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        half = len(content) // 2
        flipped = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
        file.write_bytes(content[:half] if damage == "cut" else flipped)


def test_a_full_disk_leaves_the_last_checkpoint_and_training_goes_on(tmp_path, monkeypatch, caplog):
    from veridical import files

    plain = files.os.fsync

    def fsync(handle):
        path = os.readlink(f"/proc/self/fd/{handle}")
        if any(f"/.{step:08d}." in path for step in range(20, 40)):
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)
    seen = []
    plain_write = checkpoint.Folder.write

    def write(self, step, *given):
        try:
            plain_write(self, step, *given)
        finally:
            seen.append((step, self.steps()))

    monkeypatch.setattr(checkpoint.Folder, "write", write)
    with caplog.at_level(logging.WARNING):
        runs = train(tmp_path)
    assert "no checkpoint after 20 steps, training goes on: no space left" in caplog.text
    assert dict(seen)[30] == [18, 19]
    assert dict(seen)[45] == [44, 45]
    assert not list((tmp_path / checkpoint.CHECKPOINTS).glob(".*"))
    assert runs["a"].W_dec.isfinite().all()


def test_a_full_disk_at_the_end_is_one_clear_line(tmp_path, monkeypatch):
    from veridical import files

    def fsync(handle):
        if checkpoint.MEMBERS in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(DiskFullError, match="no space left while writing") as caught:
        train(tmp_path)
    assert "\n" not in str(caught.value)
