"""Streams: a store, tensors, an iterator, a running model; positions, and what is held out."""

import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from planted_features import activations

import veridical as vd
from veridical.errors import DataError, InputError, NonFiniteError, StoreMismatchError, UnknownNameError
from veridical.saes.model_stream import ModelStream
from veridical.saes.stream import IteratorStream, StoreStream, TensorStream, held_out_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "activations"))

from fake import WIDTH, FakeModel

TEXTS = [f"text {n} says {'abc'[n % 3] * (n % 7 + 3)} and ends at {n * n}" for n in range(60)]


@pytest.fixture(scope="module")
def acts(tmp_path_factory):
    store = tmp_path_factory.mktemp("acts")
    return vd.collect(FakeModel(), TEXTS, sites="resid_post.*", tokens="all", store=store, shard_mb=1)


def streams(acts):
    x = activations(700)
    yield "tensor", lambda: TensorStream({"x": x}, 0.1, 1)
    yield "store", lambda: StoreStream(acts, ["resid_post.1", "resid_post.2"], 0.1, 1)
    yield "iterator", lambda: IteratorStream(list(x.split(33)), 50)
    yield "model", lambda: ModelStream(FakeModel(), TEXTS, ["resid_post.1"], 0.1, 1, "all")


def test_every_stream_goes_on_exactly_where_another_stood(acts):
    for name, make in streams(acts):
        whole, sizes = make(), 0
        expected = list(islice(whole.batches(64), 40))
        for stop in (0, 1, 7, 25):
            first = make()
            list(islice(first.batches(64), stop))
            second = make()
            second.restore(first.state())
            for number, batch in enumerate(islice(second.batches(64), 40 - stop)):
                for site, values in batch.items():
                    assert torch.equal(values, expected[stop + number][site]), (name, stop, number)
                sizes += len(values)
        assert sizes == 64 * (160 - 33), name


def test_every_stream_goes_back_to_where_it_stood(acts):
    """More than once, from anywhere, and its state is that place also before the next batch is read."""
    for name, make in streams(acts):
        expected, stream = list(islice(make().batches(64), 30)), make()
        assert stream.rewinds, name
        begin = stream.state()
        list(islice(stream.batches(64), 9))
        for _ in range(2):
            stream.restore(begin)
            list(islice(stream.batches(64), 4))
            middle = stream.state()
            stream.restore(middle)
            assert stream.state() == middle, name
            for number, batch in enumerate(islice(stream.batches(64), 20)):
                for site, values in batch.items():
                    assert torch.equal(values, expected[4 + number][site]), (name, number)


def test_an_iterator_that_is_read_once_does_not_go_back():
    assert not IteratorStream(iter(activations(300).split(33)), 10).rewinds
    assert IteratorStream(lambda: iter(activations(300).split(33)), 10).rewinds


def test_sample_and_held_out_do_not_move_the_stream(acts):
    for name, make in streams(acts):
        plain, sampled = make(), make()
        sampled.sample(100)
        one, other = (next(iter(stream.batches(64))) for stream in (plain, sampled))
        assert all(torch.equal(one[site], other[site]) for site in one), name
        assert sampled.held_out, name


def test_held_out_texts_of_a_store_are_never_trained_on(acts):
    stream = StoreStream(acts, ["resid_post.1"], 0.2, 0)
    assert stream.vectors + len(stream.held_out["blocks.1.hook_resid_post"]) == len(acts)
    kept, out = held_out_rows(acts, 0.2, 0)
    assert len(kept.rows) == 48
    assert len(out.rows) == 12
    assert not set(kept.rows["prompt"]) & set(out.rows["prompt"])
    site = "blocks.1.hook_resid_post"
    assert {tuple(row) for row in stream.held_out[site].tolist()} == {
        tuple(row) for row in out[site].tolist()
    }
    mine = {tuple(row) for row in kept[site].tolist()}
    steps = stream.vectors // 64
    assert {tuple(r) for b, _ in zip(stream.batches(64), range(steps)) for r in b[site].tolist()} <= mine


def test_training_from_a_store_with_sites_by_any_name(acts):
    configs = [
        vd.SAEConfig(width=24, k=4, batch=128, lr=3e-3, site=site)
        for site in ("resid_post.0", "resid_post.2")
    ]
    runs = vd.train_saes(acts, configs, holdout=0.1)
    assert list(runs.to_frame()["site"]) == ["resid_post.0", "resid_post.2"]
    assert (runs.to_frame()["fvu"] < 0.6).all()
    full = vd.train_saes(
        acts, vd.SAEConfig(width=24, k=4, batch=128, lr=3e-3, site="blocks.0.hook_resid_post"), holdout=0.1
    )
    assert full[0].W_dec.shape == runs[0].W_dec.shape
    with pytest.raises(UnknownNameError, match=r"nearest: blocks\.2\.hook_resid_post"):
        vd.train_saes(acts, width=24, k=4, batch=128, site="resid_post.7")


def test_a_store_resumes_and_refuses_another(acts, tmp_path):
    options = {"width": 24, "k": 4, "batch": 128, "lr": 3e-3, "site": "resid_post.1"}
    vd.train_saes(acts, **options, store=tmp_path)
    other = acts.filter(lambda rows: rows.index < 50)
    with pytest.raises(StoreMismatchError, match="data is"):
        vd.train_saes(other, **options, store=tmp_path)


def test_a_store_with_nan_is_named(tmp_path):
    broken = vd.collect(FakeModel(), TEXTS, sites="resid_post.1", tokens="all")
    broken["resid_post.1"][5, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=r"blocks.1.hook_resid_post holds NaN") as caught:
        vd.train_saes(broken, width=24, k=4, batch=128, holdout=0.1)
    assert "\n" not in str(caught.value)


def test_one_text_cannot_be_held_out():
    acts = vd.collect(FakeModel(), [TEXTS[0] * 9], sites="resid_post.1", tokens="all")
    with pytest.raises(DataError, match="of one text"):
        vd.train_saes(acts, width=24, k=4, batch=64)
    runs = vd.train_saes(acts, width=24, k=4, batch=64, holdout=0)
    assert runs.runs[0].figures.fvu < 1.5


def test_a_running_model_gives_its_own_vectors():
    model = FakeModel()
    stream = ModelStream(model, TEXTS, ["resid_post.1"], 0.1, 0, "all")
    site = next(iter(stream.widths))
    stored = vd.collect(FakeModel(), TEXTS, sites="resid_post.1", tokens="all")[site]
    known = {tuple(row) for row in stored.tolist()}
    seen = [tuple(row) for batch, _ in zip(stream.batches(64), range(20)) for row in batch[site].tolist()]
    assert set(seen) <= known
    assert len(set(seen)) > 150
    runs = vd.train_saes(
        TEXTS, model=model, site="resid_post.1", width=24, k=4, batch=64, tokens=6400, lr=3e-3
    )
    assert runs.runs[0].figures.fvu < 0.6
    again = vd.train_saes(
        TEXTS, model=FakeModel(), site="resid_post.1", width=24, k=4, batch=64, tokens=6400, lr=3e-3
    )
    assert torch.equal(runs[0].W_dec, again[0].W_dec)


def test_too_few_texts_for_a_batch_are_named():
    with pytest.raises(DataError, match="fewer than one batch of 4096"):
        vd.train_saes(TEXTS[:3], model=FakeModel(), site="resid_post.1", width=24, k=4, tokens=8192)


def test_an_empty_iterator_is_named():
    with pytest.raises(DataError, match="no more than the 26 vectors that are held out"):
        vd.train_saes([], width=16, k=2, batch=64, tokens=1280)
    with pytest.raises(DataError, match="fewer vectors than one batch"):
        vd.train_saes([torch.randn(60, 4)], width=16, k=2, batch=64, tokens=1280)
    with pytest.raises(DataError, match="batch 1 of the iterator"):
        vd.train_saes([torch.randn(600, 4), torch.ones(3)], width=16, k=2, batch=64, tokens=1280)


def test_a_crosscoder_from_a_store(acts):
    options = {"width": 32, "k": 4, "batch": 128, "lr": 3e-3, "holdout": 0.1}
    runs = vd.train_saes(acts, architecture="crosscoder", sites=("resid_post.0", "resid_post.1"), **options)
    assert runs[0].decoders.shape == (2, 32, WIDTH)
    with pytest.raises(InputError, match="transcoder needs site"):
        vd.train_saes(acts, architecture="transcoder", width=32, k=4, batch=128)
