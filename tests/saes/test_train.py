"""`train_saes` as it is called: what it takes, what it returns, what it refuses."""

import logging

import numpy as np
import pytest
import torch
from planted_features import activations
from sae_makers import CONFIGS

import veridical as vd
from veridical.errors import ConfigError, DataError, InputError, NonFiniteError, UnknownNameError
from veridical.saes.stream import TensorStream

D = 12
SMALL = {"width": 32, "batch": 128, "lr": 3e-3}


def config(**options):
    return vd.SAEConfig(**{**SMALL, "k": 4, **options})


@pytest.fixture(scope="module")
def vectors():
    return activations(128 * 60)


def test_many_together_in_one_pass(vectors):
    configs = [config(k=k, lr=lr) for k in (2, 4) for lr in (1e-2, 3e-3)]
    configs += [config(architecture="relu", sparsity=1.0), config(width=48)]
    runs = vd.train_saes(vectors, configs)
    assert len(runs) == 6
    frame = runs.to_frame()
    assert list(frame["width"]) == [32] * 5 + [48]
    assert (frame["fvu"] < 0.7).all()
    assert (frame["l0"].iloc[:2] <= 2).all()
    assert frame["name"].is_unique
    trained = int(len(vectors) * 0.98) // 128 * 128
    assert (frame["tokens"] == trained).all()
    best = runs.best(l0=2.5)
    assert best.config.k == 2
    assert runs["topk-f48-k4-lr0.003"].width == 48
    assert runs[0].scale == 1
    assert "SAERuns(6 SAEs" in repr(runs)
    assert runs.figure().data
    assert "held out" in runs.report_section().tables[0][0].lower() or runs.report_section().tables
    history = runs.history()
    assert set(history["name"]) == set(frame["name"])
    assert history.groupby("name")["fvu"].last().max() < history.groupby("name")["fvu"].first().max()


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_every_architecture_learns(architecture):
    x = activations(256 * 200, count=16)
    y = torch.relu(x @ torch.randn(D, D, generator=torch.Generator().manual_seed(9))) + 1
    sites = {
        "resid_pre.0": x,
        "mlp_out.0": y,
        "resid_post.0": x,
        "resid_post.1": 5 * x.flip(1) + 3,
    }
    options = {k: v for k, v in CONFIGS[architecture].items() if k not in ("prefixes", "sites", "bandwidth")}
    if architecture == "crosscoder":
        options["sites"] = ("resid_post.0", "resid_post.1")
    elif "transcoder" not in architecture:
        options["site"] = "resid_pre.0"
    runs = vd.train_saes(sites, config(architecture=architecture, **{**options, "batch": 256, "lr": 1e-2}))
    figures = runs.runs[0].figures
    assert figures.fvu < 0.5
    assert 0 < figures.l0 < 24
    assert figures.dead < 0.5


def test_jumprelu_follows_its_penalty_in_a_short_run():
    """Adam moves a log-threshold by at most the learning rate in a step: it must not start far off."""
    options = {"architecture": "jumprelu", "width": 48, "batch": 128, "lr": 3e-3, "tokens": 51_200}
    runs = vd.train_saes(activations(8192), [vd.SAEConfig(sparsity=s, **options) for s in (0.1, 3.0)])
    weak, strong = (run.figures for run in runs)
    assert strong.l0 < 0.6 * weak.l0 < 0.6 * 48 / 6
    assert weak.fvu < strong.fvu < 0.2


def test_a_list_of_batches_a_function_and_an_array_train_alike(vectors):
    batches = list(vectors.split(100))
    options = {**SMALL, "k": 4, "tokens": 128 * 30}
    listed = vd.train_saes(batches, **options)
    made = vd.train_saes(lambda: iter(batches), **options)
    assert torch.equal(listed[0].W_dec, made[0].W_dec)
    assert listed.to_frame()["fvu"][0] < 0.7
    array = vd.train_saes(vectors.numpy(), **options)
    assert array.to_frame()["fvu"][0] < 0.7


def test_the_same_seed_gives_the_same_bits_and_another_does_not(vectors):
    one, same, other = (vd.train_saes(vectors, config(seed=s)) for s in (0, 0, 1))
    assert torch.equal(one[0].W_dec, same[0].W_dec)
    assert not torch.equal(one[0].W_dec, other[0].W_dec)
    elsewhere = vd.train_saes(vectors, config(), seed=1)
    assert not torch.equal(one[0].W_dec, elsewhere[0].W_dec)


def test_together_equals_alone_through_the_front_door(vectors):
    configs = [config(k=k, lr=lr, seed=s) for s, (k, lr) in enumerate([(2, 1e-2), (4, 3e-3), (4, 1e-3)])]
    together = vd.train_saes(vectors, configs)
    for number, one in enumerate(configs):
        alone = vd.train_saes(vectors, one)
        torch.testing.assert_close(together[number].W_dec, alone[0].W_dec, rtol=1e-4, atol=1e-5)


def test_members_of_unlike_length_and_batch(vectors):
    runs = vd.train_saes(vectors, [config(tokens=1024), config(tokens=12_800), config(batch=64)])
    assert list(runs.to_frame()["tokens"]) == [1024, 12_800, 7424]
    assert len(vectors) < 12_800  # a second pass began


def test_held_out_vectors_are_never_trained_on():
    stream = TensorStream({"x": torch.randn(7680, 5)}, 0.1, 3)
    held = {tuple(row) for row in stream.held_out["x"].tolist()}
    seen = [tuple(row) for batch, _ in zip(stream.batches(128), range(54 * 2)) for row in batch["x"].tolist()]
    assert len(held) == 768
    assert not held & set(seen)
    assert len(set(seen)) == 54 * 128


def test_one_diverging_member_is_cancelled_alone(vectors, caplog):
    bad = config(lr=1e30, name="wild")
    with caplog.at_level(logging.WARNING):
        runs = vd.train_saes(vectors, [config(seed=1), bad, config(seed=2)])
    assert "wild is cancelled: its loss became" in caplog.text
    assert "learning rate 1e+30" in caplog.text
    frame = runs.to_frame().set_index("name")
    assert frame["cancelled"].notna().tolist() == [False, True, False]
    assert frame["tokens"]["wild"] < 1024
    with pytest.raises(InputError, match="wild was cancelled"):
        runs["wild"]
    alone = vd.train_saes(vectors, config(seed=1))
    torch.testing.assert_close(runs[0].W_dec, alone[0].W_dec, rtol=1e-4, atol=1e-5)
    assert "cancelled" in runs.report_section().text
    only = vd.train_saes(vectors, bad)
    with pytest.raises(DataError, match="none of 1 SAEs"):
        only.best()
    assert only.figure is not None
    assert only.report_section().figures == ()


@pytest.mark.parametrize(
    ("data", "options", "error", "said"),
    [
        ("x", {"k": 33}, ConfigError, "k is 33, but there are only 32 latents"),
        ("x", {"batch": 8000}, DataError, "batch is 8,000, but there are only"),
        ("x", {"site": "resid_post.1"}, UnknownNameError, "unknown site 'resid_post.1'"),
        ("x", {"kk": 3}, UnknownNameError, "nearest: k"),
        ("x", {"k": "many"}, ConfigError, "k = 'many'"),
        ("x", {"tokens": 12}, ConfigError, "less than a batch"),
        ("x", {"betas": (0.9, 1.0)}, ConfigError, r"betas are \(0.9, 1.0\); expected rates from 0"),
        ("x", {"bandwidth": 0.0}, ConfigError, "bandwidth is 0.0; expected a finite number above 0"),
        ("x", {"name": "a/b"}, ConfigError, "name = 'a/b': expected letters"),
        ("x", {"name": "n" * 300}, ConfigError, "at most 100"),
        ("x", {"width": 10**12}, ConfigError, "GB of weights, and this machine"),
        ("two", {"architecture": "crosscoder", "sites": ("a", "a")}, ConfigError, "expected each once"),
        ("two", {}, InputError, "names no site, and the data hold several: a, b"),
        ("two", {"architecture": "crosscoder", "sites": ("a", "b")}, InputError, "widths"),
        ("uneven", {"site": "a"}, DataError, "one number for all"),
        ("ints", {}, DataError, "expected floats"),
        ("flat", {}, DataError, r"expected floats \[rows, d\]"),
        ("string", {}, InputError, "one string"),
        ("number", {}, InputError, "data is a int"),
        ("batches", {}, ConfigError, "give tokens"),
        ("short", {"tokens": 1280}, DataError, "ended after 128 training vectors"),
        ("zeros", {}, DataError, "all zero"),
    ],
)
def test_bad_input_is_one_clear_line(vectors, data, options, error, said):
    made = {
        "x": lambda: vectors,
        "two": lambda: {"a": vectors, "b": vectors[:, :5]},
        "uneven": lambda: {"a": vectors, "b": vectors[:5]},
        "ints": lambda: torch.ones(600, 5, dtype=torch.int64),
        "flat": lambda: vectors[:, 0],
        "string": lambda: "acts.pt",
        "number": lambda: 3,
        "batches": lambda: [vectors],
        "short": lambda: iter([vectors[:200]]),
        "zeros": lambda: torch.zeros(600, 5),
    }[data]()
    with pytest.raises(error, match=said) as caught:
        vd.train_saes(made, **{**SMALL, "k": 4, **options})
    assert "\n" not in str(caught.value)


def test_nan_in_the_data_is_named(vectors):
    broken = vectors.clone()
    broken[5000, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="x holds NaN or infinity in a sample") as caught:
        vd.train_saes(broken, config(), holdout=0)
    assert "\n" not in str(caught.value)
    late = [*vectors.repeat(2, 1).split(128), broken[4992:5120]]
    with pytest.raises(NonFiniteError, match="NaN or infinity after 15,360 training vectors"):
        vd.train_saes(late, config(tokens=25_600), holdout=0)
    with pytest.raises(NonFiniteError, match="x holds NaN"):
        vd.train_saes(np.full((600, 4), np.nan, dtype=np.float32), config(k=4, width=8))


@pytest.mark.parametrize("seed", [-1, 10**30])
def test_a_seed_that_is_none_is_refused(vectors, seed):
    with pytest.raises(ConfigError, match=f"seed is {seed}; expected a number from 0"):
        vd.train_saes(vectors, [config(seed=seed)])


@pytest.mark.parametrize("holdout", [1.0, -0.1])
def test_holdout_is_a_share(vectors, holdout):
    with pytest.raises(InputError, match="holdout is"):
        vd.train_saes(vectors, config(), holdout=holdout)
