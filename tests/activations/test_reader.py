import itertools
import pickle

import numpy as np
import pytest
import torch
from fake import FakeModel

from veridical.activations import collect
from veridical.activations.reader import Blocks
from veridical.activations.recycle import Recycler
from veridical.errors import InputError, StoreMismatchError, UnknownNameError

TEXTS = [chr(97 + i % 26) * (3 + (i * 7) % 40) for i in range(300)]


@pytest.fixture(scope="module")
def acts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader") / "store"
    made = collect(FakeModel(), TEXTS, store=folder, tokens="all", batch_tokens=32, shard_mb=1)
    assert len(made._source.entries) > 2
    return made


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch):
    """Windows of a few hundred vectors, so that an epoch has many."""
    monkeypatch.setattr("veridical.activations.reader.CHUNK_BYTES", 16 * 32)
    init = __import__("veridical.activations.reader", fromlist=["Reader"]).Reader.__init__

    def small(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self._window = max(500 // self._size, 1) * self._size

    monkeypatch.setattr("veridical.activations.reader.Reader.__init__", small)


@pytest.mark.parametrize("where", ["disk", "memory", "filtered"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_vector_comes_exactly_once_and_sites_stay_aligned(acts, where, shuffle):
    if where == "memory":
        acts = collect(FakeModel(), TEXTS, tokens="all", batch_tokens=32)
    if where == "filtered":
        acts = acts.filter(np.arange(len(TEXTS)) % 3 == 1)
    reader = acts.batches(100, shuffle=shuffle, seed=3)
    seen = []
    for batch in reader:
        for site, values in batch.items():
            assert torch.equal(values, acts[site][torch.from_numpy(reader.vectors)])
        seen.append(reader.vectors)
    assert len(seen) == len(reader)
    order = np.concatenate(seen)
    assert np.array_equal(np.sort(order), np.arange(len(acts)))
    assert np.array_equal(order, np.arange(len(acts))) != shuffle


def test_a_worker_gets_the_store_and_not_its_vectors(acts, monkeypatch, tmp_path):
    some = acts.filter(np.arange(len(TEXTS)) % 3 == 1)
    _ = some["resid_post.1"]
    sent = pickle.dumps(some)
    assert len(sent) < 200_000
    monkeypatch.chdir(tmp_path)
    there = pickle.loads(sent)
    assert torch.equal(there["resid_post.1"], some["resid_post.1"])
    assert there.fingerprint == some.fingerprint
    batches = zip(some.batches(64, seed=1), there.batches(64, seed=1), strict=True)
    assert all(torch.equal(one[site], other[site]) for one, other in batches for site in one)


def test_one_site_by_name_gives_tensors(acts):
    batch = next(iter(acts.batches(64, sites="resid_post.1")))
    assert batch.shape == (64, 8)
    assert set(next(iter(acts.batches(64, sites="resid_post.*")))) == set(acts.sites)
    assert list(next(iter(acts.batches(64, sites=["resid_post.2"])))) == ["blocks.2.hook_resid_post"]
    with pytest.raises(UnknownNameError, match=r"unknown site 'resid_post.9'"):
        acts.batches(64, sites="resid_post.9")
    with pytest.raises(UnknownNameError):
        acts.batches(64, sites="mlp_out.*")
    with pytest.raises(InputError, match="expected 1 or more"):
        acts.batches(0)


def test_epochs_differ_and_the_seed_decides(acts):
    def order(seed, epochs=1):
        reader = acts.batches(128, seed=seed, epochs=epochs)
        return np.concatenate([reader.vectors.copy() for _ in reader])

    assert np.array_equal(order(1), order(1))
    assert not np.array_equal(order(1), order(2))
    both = order(1, epochs=2)
    assert not np.array_equal(both[: len(acts)], both[len(acts) :])
    assert np.array_equal(np.sort(both[len(acts) :]), np.arange(len(acts)))


def test_a_second_loop_is_the_next_epoch(acts):
    reader = acts.batches(128, seed=1)
    first = np.concatenate([reader.vectors for _ in reader])
    second = np.concatenate([reader.vectors for _ in reader])
    assert len(first) == len(second) == len(acts)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("stop", [0, 1, 4, 5, 20, 67, 68, 80])
def test_a_reader_resumes_exactly(acts, stop):
    uninterrupted = acts.batches(100, seed=5, epochs=None, sites="resid_post.1")
    wanted = list(itertools.islice(uninterrupted, stop + 30))[stop:]
    first = acts.batches(100, seed=5, epochs=None, sites="resid_post.1")
    for _ in itertools.islice(first, stop):
        pass
    second = acts.batches(100, seed=5, epochs=None, sites="resid_post.1")
    second.load_state_dict(first.state_dict())
    found = list(itertools.islice(second, 30))
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_a_state_of_something_else_is_refused(acts):
    state = acts.batches(100, seed=5).state_dict()
    with pytest.raises(StoreMismatchError, match="seed 5; this reader has 6"):
        acts.batches(100, seed=6).load_state_dict(state)
    with pytest.raises(StoreMismatchError, match="sites"):
        acts.batches(100, seed=5, sites="resid_post.0").load_state_dict(state)
    with pytest.raises(StoreMismatchError, match="activations"):
        acts.filter(np.arange(300) < 9).batches(100, seed=5).load_state_dict(state)


def test_drop_last(acts):
    sizes = [len(batch) for batch in acts.batches(100, sites="resid_post.0", drop_last=True)]
    assert set(sizes) == {100}
    assert len(sizes) == len(acts) // 100


def test_no_long_range_order_is_left(acts):
    """Each quarter of the stream draws on each quarter of the data about equally, in random order."""

    def table(order):
        counts = np.zeros((4, 4))
        np.add.at(counts, (np.arange(len(order)) * 4 // len(order), order * 4 // len(order)), 1)
        return counts / (len(order) / 16)

    reader = acts.batches(100, seed=0)
    order = np.concatenate([reader.vectors for _ in reader])
    # About 26 blocks of 16 vectors in a cell: a standard deviation of 17 %.
    assert table(order).min() > 0.45
    assert table(order).max() < 1.55
    assert abs(np.corrcoef(np.arange(len(order)), order)[0, 1]) < 0.1
    assert np.mean(np.diff(order) == 1) < 0.1
    assert table(np.arange(len(order))).min() == 0, "data order would be seen"


def test_a_window_cuts_blocks_at_its_borders():
    blocks = Blocks(np.array([0, 0, 1]), np.array([0, 3, 0]), np.array([3, 4, 2]), np.array([0, 3, 7]))
    order = np.array([2, 0, 1])
    found = [
        number
        for low, high in ((0, 4), (4, 8), (8, 9))
        for part in [blocks.between(order, low, high)]
        for first, count in zip(part.number, part.count)
        for number in range(first, first + count)
    ]
    assert found == [7, 8, 0, 1, 2, 3, 4, 5, 6]


def test_memory_is_used_again_only_when_nobody_holds_it():
    recycler = Recycler(keep=2)
    first = recycler.empty((4, 2), torch.bfloat16)
    view, place = first[1:], first.data_ptr()
    del first
    assert recycler.empty((4, 2), torch.bfloat16).data_ptr() != place, "a view is still held"
    numbers = view.view(torch.int16).numpy()
    del view
    assert recycler.empty((4, 2), torch.bfloat16).data_ptr() != place, "an array is still held"
    del numbers
    again = [recycler.empty((4, 2), torch.bfloat16) for _ in range(2)]
    assert len({tensor.data_ptr() for tensor in again}) == 2


def test_batches_that_are_kept_keep_their_content(acts):
    reader = acts.batches(100, seed=2, epochs=3, sites="resid_post.0")
    kept = [(batch, reader.vectors) for batch in reader]
    assert all(torch.equal(batch, acts["resid_post.0"][torch.from_numpy(v)]) for batch, v in kept)


def test_leaving_early_ends_the_thread(acts):
    import threading

    for _ in acts.batches(10):
        break
    import gc

    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("veridical-reader")]
