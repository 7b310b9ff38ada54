import contextlib
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fake import FakeModel

from veridical.activations import Activations, collect
from veridical.activations import store as stores
from veridical.activations import writer as writers
from veridical.errors import (
    DamagedFileError,
    DiskFullError,
    InputError,
    NonFiniteError,
    StoreError,
    StoreMismatchError,
)

TEXTS = [chr(97 + i % 26) * (3 + (i * 7) % 40) for i in range(300)]
OPTIONS = {"tokens": "all", "batch_tokens": 32, "shard_mb": 1}
HERE = Path(__file__).parent


def digest(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).iterdir())
    }


@pytest.fixture
def whole(tmp_path):
    """An uninterrupted store of several shards."""
    acts = collect(FakeModel(), TEXTS, store=tmp_path / "whole", **OPTIONS)
    assert len(acts._source.entries) >= 3
    return acts


@pytest.fixture(scope="module")
def whole_bytes(tmp_path_factory):
    """Digests of the files of an uninterrupted store."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    collect(FakeModel(), TEXTS, store=folder, **OPTIONS)
    return digest(folder)


@pytest.fixture
def some_left(tmp_path):
    """A store that stopped after some shards, as after a kill."""
    model = FakeModel(poison=1)
    run, calls = model.run, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) > 120:
            time.sleep(0.3)  # what was complete is committed in the background
            raise RuntimeError("stopped")
        return run(*args, **kwargs)

    model.run = failing
    with pytest.raises(RuntimeError, match="stopped"):
        collect(model, TEXTS, store=tmp_path / "some", **OPTIONS)
    return tmp_path / "some"


def test_a_store_is_plain_safetensors_that_others_can_read(whole):
    from safetensors.torch import load_file

    shards = [load_file(whole.folder / entry.file) for entry in whole._source.entries]
    name = "blocks.1.hook_resid_post"
    assert torch.equal(torch.cat([shard[name] for shard in shards]), whole[name])
    assert torch.cat([shard["row"] for shard in shards]).tolist() == whole.index["row"].tolist()
    moments = load_file(whole.folder / "moments.safetensors")
    assert int(moments["count"]) == len(whole)


def test_the_same_collection_again_opens_it_and_runs_nothing(whole):
    model, before = FakeModel(), digest(whole.folder)
    acts = collect(model, TEXTS, store=whole.folder, **OPTIONS)
    assert model.batches == []
    assert digest(whole.folder) == before
    assert acts.fingerprint == whole.fingerprint


def test_two_runs_give_the_same_bytes(tmp_path, whole):
    collect(FakeModel(), TEXTS, store=tmp_path / "again", **OPTIONS)
    assert digest(tmp_path / "again") == digest(whole.folder)


def test_a_stopped_run_is_continued_to_the_same_bytes(whole, some_left):
    done = list(some_left.glob("shard-*.json"))
    assert done
    with pytest.raises(StoreError, match=r"is not finished: \d of \d+ shards"):
        Activations.open(some_left)
    some = Activations.open(some_left, partial=True)
    assert 0 < len(some) < len(whole)
    assert torch.equal(some["resid_post.2"], whole["resid_post.2"][: len(some)])
    assert some.moments["resid_post.2"].count == len(some)
    model = FakeModel()
    collect(model, TEXTS, store=some_left, **OPTIONS)
    assert len(model.batches) < 200
    assert digest(some_left) == digest(whole.folder)


SCRIPT = """
import sys
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads(1)
from fake import FakeModel
from veridical.activations import collect
from veridical.activations import store, writer
import os, time
{patch}
print("ready", flush=True)
collect(FakeModel(delay={delay}), {texts!r}, store={folder!r}, **{options!r})
print("done", flush=True)
"""


def start(folder, delay=0.0, patch=""):
    code = SCRIPT.format(
        here=str(HERE), patch=patch, delay=delay, texts=TEXTS, folder=str(folder), options=OPTIONS
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
def test_killed_at_any_time_and_run_again_ends_with_the_same_bytes(tmp_path, whole_bytes):
    folder = tmp_path / "killed"
    for wait in (0.1, 0.4, 0.25):
        process = start(folder, delay=0.003)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (
        not (folder / "manifest.json").is_file()
        or json.loads((folder / "manifest.json").read_text())["status"] == "partial"
    )
    assert start(folder).wait() == 0
    assert digest(folder) == whole_bytes


DIE = "lambda *a, **k: os.kill(os.getpid(), 9)"
MOMENTS_OF_DEATH = {
    "before the manifest": f"store.Manifest.write = {DIE}",
    "before a shard's data are durable": f"writer.os.fsync = {DIE}",
    "between a shard's data and its record": f"store.record = {DIE}",
    "after the first record": "old = store.record\ndef record(*a):\n    old(*a); os.kill(os.getpid(), 9)\n"
    "store.record = record",
    "before the moments": f"store.moments_bytes = {DIE}",
    "before the manifest says complete": f"store.provenance = {DIE}",
    "in the middle of cleaning up": "old = store.Path.unlink\ndef unlink(self, *a, **k):\n"
    "    finishing = (self.parent / 'config.json').exists()\n"
    "    if finishing and self.name == 'shard-00001.json': os.kill(os.getpid(), 9)\n"
    "    old(self, *a, **k)\nstore.Path.unlink = unlink",
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS_OF_DEATH)
def test_killed_at_each_delicate_moment(tmp_path, whole_bytes, moment):
    folder = tmp_path / "killed"
    process = start(folder, patch=MOMENTS_OF_DEATH[moment])
    assert process.wait() == -signal.SIGKILL
    collect(FakeModel(), TEXTS, store=folder, **OPTIONS)
    assert digest(folder) == whole_bytes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": FakeModel(seed="b")}, "model fingerprint: fake-a -> fake-b"),
        ({"data": TEXTS[:-1]}, "data rows: 300 -> 299"),
        ({"tokens": "last"}, "tokens selection: all -> last"),
        ({"sites": "resid_post.1"}, "sites: .* -> blocks.1.hook_resid_post"),
        ({"dtype": "bfloat16"}, "dtype: float32 -> bfloat16"),
        ({"batch_tokens": 128}, "batches batch_tokens: 32 -> 128"),
    ],
)
def test_a_store_of_something_else_is_refused_and_left_alone(whole, change, said):
    before = digest(whole.folder)
    asked = {"model": FakeModel(), "data": TEXTS, "store": whole.folder, **OPTIONS, **change}
    with pytest.raises(StoreMismatchError, match=said):
        collect(asked.pop("model"), asked.pop("data"), **asked)
    assert digest(whole.folder) == before


def test_the_same_weights_from_another_folder_are_the_same_model(whole):
    before, moved = digest(whole.folder), FakeModel()
    moved.path = "elsewhere/fake"
    again = collect(moved, TEXTS, store=whole.folder, **OPTIONS)
    assert again.request.model["path"] == FakeModel().path != moved.path
    assert digest(whole.folder) == before


def test_changed_labels_are_other_data(tmp_path):
    import datasets

    def data(label):
        return datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, label]})

    collect(FakeModel(), data(1), store=tmp_path / "store")
    with pytest.raises(StoreMismatchError, match="data columns: "):
        collect(FakeModel(), data(0), store=tmp_path / "store")


def test_a_truncated_shard_is_named_and_made_again(whole):
    before = digest(whole.folder)
    shard = whole.folder / "shard-00001.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    for act in (
        lambda: Activations.open(whole.folder),
        lambda: collect(FakeModel(), TEXTS, store=whole.folder, **OPTIONS),
    ):
        with pytest.raises(
            DamagedFileError, match=r"shard-00001.safetensors has .* delete it and run the same"
        ):
            act()
    shard.unlink()
    with pytest.raises(
        DamagedFileError, match=r"shard-00001.safetensors is missing; run the same collection"
    ):
        Activations.open(whole.folder)
    model = FakeModel()
    collect(model, TEXTS, store=whole.folder, **OPTIONS)
    assert digest(whole.folder) == before
    assert sum(rows for rows, _ in model.batches) < len(TEXTS) / 2


@pytest.mark.parametrize("part", ["head", "moments", "index", "first site", "last byte"])
def test_a_flipped_bit_is_found_and_never_read_as_data(whole, part):
    entry = whole._source.entries[1]
    layout = whole._source.layout(1)
    at = {
        "head": 20,
        "moments": layout.offsets["mean:blocks.0.hook_resid_post"][0] + 3,
        "index": layout.offsets["position"][0],
        "first site": layout.offsets["blocks.0.hook_resid_post"][0] + 5,
        "last byte": entry.bytes - 1,
    }[part]
    flip(whole.folder / entry.file, at)
    acts = Activations.open(whole.folder)
    with pytest.raises(DamagedFileError, match=r"shard-00001.safetensors is damaged"):
        acts.verify()
    if part in ("index", "head"):
        with pytest.raises(DamagedFileError, match="shard-00001"):
            _ = acts.index
    if part == "first site":
        with pytest.raises(DamagedFileError, match=r"vectors of blocks.0.hook_resid_post are not what"):
            acts["resid_post.0"]
        with pytest.raises(DamagedFileError):
            list(acts.batches(64, sites="resid_post.0"))
        with pytest.raises(DamagedFileError):
            list(acts.chunks("resid_post.0"))
        assert len(acts["resid_post.1"]) == len(acts)


@pytest.mark.parametrize("name", ["rows.parquet", "vocabulary.json", "moments.safetensors"])
def test_damage_beside_the_shards_is_found(whole, name):
    before = digest(whole.folder)
    flip(whole.folder / name, 30)
    with pytest.raises(DamagedFileError, match=name):
        Activations.open(whole.folder)
    (whole.folder / name).unlink()
    collect(FakeModel(), TEXTS, store=whole.folder, **OPTIONS)
    assert digest(whole.folder) == before


def test_a_manifest_that_cannot_be_read(whole):
    manifest = whole.folder / "manifest.json"
    manifest.write_text(manifest.read_text()[:-40])
    with pytest.raises(DamagedFileError, match=r"manifest.json"):
        Activations.open(whole.folder)
    manifest.write_text("{}")
    with pytest.raises(StoreError, match="not the manifest of an activation store"):
        Activations.open(whole.folder)
    manifest.unlink()
    with pytest.raises(StoreError, match="no activation store"):
        Activations.open(whole.folder)


def flip(path, at):
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk_leaves_what_was_complete(tmp_path, whole, monkeypatch, call):
    real, calls = getattr(os, call), []

    def full(*args):
        calls.append(args)
        if len(list((tmp_path / "store").glob("shard-*.json"))) >= 2 and sys._getframe(
            1
        ).f_code.co_filename == (writers.__file__):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, call, full)
    model = FakeModel(delay=0.001)  # so that the first shards are complete before the later ones begin
    with pytest.raises(DiskFullError, match=r"no space left while writing .*shard-.*complete before is kept"):
        collect(model, TEXTS, store=tmp_path / "store", **OPTIONS)
    assert calls
    monkeypatch.undo()
    assert not list((tmp_path / "store").glob(".*.tmp")), "the space of the unfinished shard is given back"
    kept = Activations.open(tmp_path / "store", partial=True)
    assert len(kept) > 0
    kept.verify()
    collect(FakeModel(), TEXTS, store=tmp_path / "store", **OPTIONS)
    assert digest(tmp_path / "store") == digest(whole.folder)


def test_a_file_system_that_is_really_full(tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=560k", "tmpfs", str(mount)], capture_output=True
        )
    except OSError:
        pytest.skip("no mount command")
    if mounted.returncode:
        pytest.skip("mounting needs root")
    try:
        with pytest.raises(DiskFullError, match="no space left while writing"):
            collect(FakeModel(delay=0.001), TEXTS, store=mount / "store", **OPTIONS)
        kept = Activations.open(mount / "store", partial=True)
        assert len(kept) > 0
        kept.verify()
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def test_nan_keeps_the_shards_before_it(tmp_path):
    model = FakeModel(poison=1, delay=0.001)
    with pytest.raises(NonFiniteError, match="row 299"):
        collect(model, [*TEXTS[:-1], "a\x01b"], store=tmp_path / "store", **OPTIONS)
    kept = Activations.open(tmp_path / "store", partial=True)
    assert len(kept) > 0
    assert torch.isfinite(kept["resid_post.0"]).all()


def test_two_runs_into_one_folder_do_not_mix(tmp_path):
    with stores.alone(tmp_path), pytest.raises(StoreError, match="another process is writing"):
        collect(FakeModel(), TEXTS, store=tmp_path, **OPTIONS)


def test_writing_to_a_tensor_does_not_reach_the_file(tmp_path):
    acts = collect(FakeModel(), TEXTS, store=tmp_path / "store", tokens="last")
    before = digest(tmp_path / "store")
    acts["resid_post.0"].zero_()
    assert digest(tmp_path / "store") == before


def test_the_writer_holds_the_model_back():
    backlog = writers.Backlog(100, "test")
    seen, most = [0], []

    def job(size):
        time.sleep(0.002)
        seen[0] -= size

    with contextlib.closing(backlog):
        for _ in range(30):
            backlog.put(lambda: job(40), 40)
            seen[0] += 40
            most.append(seen[0])
        backlog.drain()
    assert max(most) <= 120
    assert seen[0] == 0


def test_an_error_of_the_writer_reaches_the_caller():
    backlog = writers.Backlog(100, "test")

    def fail():
        raise ValueError("from the thread")

    backlog.put(fail)
    with pytest.raises(ValueError, match="from the thread"):
        backlog.drain()
    with pytest.raises(ValueError, match="from the thread"):
        backlog.put(lambda: None)
    backlog.close()


def test_few_files_are_held_open(tmp_path):
    texts = [chr(97 + i % 26) * 30 for i in range(400)]
    acts = collect(FakeModel(layers=1), texts, store=tmp_path / "store", tokens="all", batch_tokens=2)
    assert len(acts._source.entries) > 70
    assert torch.equal(torch.cat(list(acts.chunks("resid_post.0"))), acts["resid_post.0"])
    acts._source.check_all()
    opened = [Path(os.path.realpath(handle)) for handle in Path("/proc/self/fd").glob("*")]
    assert sum(path.parent == tmp_path / "store" for path in opened) <= 64


def test_chosen_vectors_are_those_of_the_whole_and_checked(whole):
    expected = whole["resid_post.1"]
    random = np.random.default_rng(0)
    for places in (
        np.arange(len(whole)),
        np.arange(7, 900),
        np.flatnonzero(random.random(len(whole)) < 0.3),
        random.permutation(len(whole))[:50],
        np.array([len(whole) - 1, 0, 0]),
        np.empty(0, dtype=int),
    ):
        assert torch.equal(whole.take("resid_post.1", places), expected[torch.from_numpy(places)])
    view = whole.filter(np.arange(len(whole.rows)) % 3 == 1)
    assert torch.equal(view.take("resid_post.1", np.array([3, 11])), view["resid_post.1"][[3, 11]])
    for places in ([len(whole)], [-1], [[0]]):
        with pytest.raises(InputError, match="expected numbers from 0 to"):
            whole.take("resid_post.1", np.array(places))
    entry, layout = whole._source.entries[1], whole._source.layout(1)
    flip(whole.folder / entry.file, layout.offsets["blocks.1.hook_resid_post"][0] + 5)
    acts = Activations.open(whole.folder)
    with pytest.raises(DamagedFileError, match=r"vectors of blocks.1.hook_resid_post are not what"):
        acts.take("resid_post.1", np.array([whole._source.bounds[1][0]]))
