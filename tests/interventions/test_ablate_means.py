"""Means, resampling, projection and SAE features in ablation, each against a slow loop over single texts."""

import warnings

import numpy as np
import pytest
import torch

import veridical as vd
from tiny_models import make
from veridical.errors import DataError, InputError, UnknownNameError
from veridical.interventions import Means, ablate, mean_activations
from veridical.probes.erasure import LeaceEraser, ProjectionEraser

TEXTS = ["the capital of France is Paris", "gold?", "what is the symbol of silver? it is Ag"]
OTHER = ["tell the truth", "yes or no, true or false", "Rome", "the capital of Italy is Rome and it is true!"]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def model(hooked):
    return hooked("llama")


def single(model, site, texts=OTHER):
    """The site's values of each text run by itself, float64."""
    name = model.resolve(site)[0].name
    return [
        model.run(model.batch([one]), read=[site]).values[name][0].double() for one in model.encode(texts)
    ]


def values(model, site, side="left", texts=TEXTS, inputs=None):
    """The site's values at the real tokens of each row, as the model goes on with them."""
    inputs = model.batch(model.encode(texts), padding_side=side) if inputs is None else inputs
    name = model.resolve(site)[0].name
    found = model.run(inputs, read=[site]).values[name]
    return [row[mask.bool()] for row, mask in zip(found, inputs["attention_mask"])]


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(
        found.double(), expected.double().expand_as(found), rtol=tolerance, atol=tolerance
    )


def sources(model, site, tmp_path, by_position):
    """The same mean by every way of giving it."""
    acts = vd.collect(model, OTHER, sites=[site], tokens="all", batch_tokens=16)
    stored = vd.collect(model, OTHER, sites=[site], tokens="all", store=tmp_path / "store", batch_tokens=16)
    means = mean_activations(model, OTHER, site, by_position=by_position, batch_tokens=16)
    given = {site: means[site]}
    yield from (acts, stored, OTHER, means, given)


@pytest.mark.parametrize("site", ["resid_post.1", "z.1", "v.0", "mlp_post.2", "q.1"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_mean_over_every_token(model, site, side, tmp_path):
    """Over all tokens of all texts: not the mean of last tokens, not the mean of the texts' means."""
    runs = single(model, site)
    expected = torch.cat(runs).mean(0)
    wrong = [
        torch.stack([run[-1] for run in runs]).mean(0),
        torch.stack([run.mean(0) for run in runs]).mean(0),
        torch.cat(runs).mean().expand_as(expected),
    ]
    for over in sources(model, site, tmp_path, False):
        with ablate(model, site, mode="mean", over=over):
            for found in values(model, site, side):
                close(found, expected)
    assert all((expected - mean).abs().max() > 0.01 for mean in wrong)


@pytest.mark.parametrize("site", ["resid_post.1", "z.1"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_mean_at_each_position(model, site, side, tmp_path):
    runs = single(model, site)
    longest = max(map(len, runs))
    expected = torch.stack(
        [torch.stack([run[at] for run in runs if len(run) > at]).mean(0) for at in range(longest)]
    )
    for over in sources(model, site, tmp_path, True):
        with ablate(model, site, mode="mean", over=over, by_position=True):
            for found in values(model, site, side):
                close(found, expected[: len(found)])


def test_mean_of_heads_at_positions(model):
    """Only the chosen heads and tokens move."""
    runs = single(model, "z.1")
    mean, plain = torch.cat(runs).mean(0), values(model, "z.1")
    with ablate(model, "z.1", mode="mean", over=OTHER, heads=[0, 3], positions=[1, -1]):
        for found, before in zip(values(model, "z.1"), plain):
            expected = before.clone()
            for at in (1, -1):
                expected[at, [0, 3]] = mean[[0, 3]].float()
            close(found, expected, 1e-6)
            assert torch.equal(found[:, 1:3], before[:, 1:3])


@pytest.mark.parametrize("side", ["left", "right"])
def test_mean_of_the_batch(model, side):
    plain = values(model, "mlp_out.1", side)
    expected = torch.cat(plain).double().mean(0)
    with ablate(model, "mlp_out.1", mode="mean", over="batch"):
        for found in values(model, "mlp_out.1", side):
            close(found, expected)
    longest = max(map(len, plain))
    with ablate(model, "mlp_out.1", mode="mean", over="batch", by_position=True):
        for found in values(model, "mlp_out.1", side):
            for at, vector in enumerate(found):
                close(vector, torch.stack([row[at] for row in plain if len(row) > at]).double().mean(0))
    assert longest > min(map(len, plain))


def test_mean_in_generation_is_a_fixed_edit(model):
    mean = torch.cat(single(model, "mlp_out.1")).mean(0).float()
    with model.hooks(write={"mlp_out.1": lambda value: mean.expand_as(value).clone()}):
        expected = model.generate(TEXTS, max_new_tokens=6)
    with ablate(model, "mlp_out.1", mode="mean", over=OTHER):
        assert model.generate(TEXTS, max_new_tokens=6) == expected


def test_mean_by_position_in_generation(model):
    """Left-padded rows with a cache, against each text read anew at every step with its own rows set."""
    texts = ["what is it, what is it? " * 2]
    table = mean_activations(model, texts, "mlp_out.1", by_position=True)["mlp_out.1"].float()

    def edit(value):
        return table[: value.shape[1]].expand_as(value).clone()

    inputs = model.batch(model.encode(TEXTS), padding_side="left")
    width, count = inputs["input_ids"].shape[1], 5
    assert len(table) > width + count
    ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with ablate(model, "mlp_out.1", mode="mean", over={"mlp_out.1": table}, by_position=True):
        made = model.model.generate(
            **ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    for row, one in enumerate(model.encode(TEXTS)):
        slow = list(one.ids)
        for _ in range(count):
            logits = model.run(model.batch([slow]), write={"mlp_out.1": edit}).logits
            slow.append(int(logits[0, -1].argmax()))
        assert made[row, width:].tolist() == slow[len(one.ids) :]


def test_the_moments_of_a_store_serve(model, tmp_path, monkeypatch):
    """A mean over a large store reads no vector of it."""
    acts = vd.collect(model, OTHER, sites=["z.1"], tokens="all", store=tmp_path / "store")
    monkeypatch.setattr(type(acts), "chunks", None)
    with ablate(model, "z.1", mode="mean", over=acts):
        close(values(model, "z.1")[0], torch.cat(single(model, "z.1")).mean(0))


def test_means_refuse_what_does_not_fit(model):
    def refused(match, over, error=InputError, texts=TEXTS, site="resid_post.1", **options):
        with pytest.raises(error, match=match), ablate(model, site, mode="mean", over=over, **options):
            model.logits(texts)

    acts = vd.collect(model, OTHER, sites=["z.1"], tokens="all")
    refused("z", acts, UnknownNameError)
    refused(r"shape \(4,\); expected \(32,\)", {"resid_post.1": torch.zeros(4)})
    refused("no mean for it", {"resid_post.0": torch.zeros(32)}, UnknownNameError)
    refused("NaN", {"resid_post.1": torch.full((32,), float("nan"))})
    refused("means were taken at positions 0 to", OTHER[:1], by_position=True)
    means = mean_activations(model, OTHER, "resid_post.1")
    refused("by_position=True, but the means were taken with False", means, by_position=True)
    last = vd.collect(model, OTHER, sites=["resid_post.1"], tokens="last")
    refused("no token was read at position 0", last, by_position=True, positions=-1)
    pooled = vd.collect(model, OTHER, sites=["resid_post.1"], tokens="mean")
    refused("has no positions", pooled, by_position=True, positions=-1)
    refused("the data", [], DataError)
    other = vd.load(make("llama", hidden_size=16), check=False)
    narrow = vd.collect(other, torch.arange(8).reshape(2, 4) + 5, sites=["resid_post.1"], tokens="all")
    refused(r"the store holds \(16,\)", narrow)
    assert isinstance(means, Means)
    assert "over" in repr(means)


def test_a_store_of_last_tokens_is_warned_about(model):
    last = vd.collect(model, OTHER, sites=["z.1"], tokens="last")
    with (
        pytest.warns(UserWarning, match="mean is over those only"),
        ablate(model, "z.1", mode="mean", over=last),
    ):
        model.logits(TEXTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ablate(model, "z.1", mode="mean", over=last, positions=-1):
            model.logits(TEXTS)


def test_means_beyond_their_positions_only_where_they_are_wanted(model):
    short = mean_activations(model, ["gold?"], "resid_post.1", by_position=True)
    assert len(short.counts) < 8
    with ablate(model, "resid_post.1", mode="mean", over=short, by_position=True, positions=1):
        for found in values(model, "resid_post.1"):
            close(found[1], short["resid_post.1"][1])


def origins(found, donors):
    """For each vector the donors that it equals, as (row, position)."""
    listed = [(row, at, vector) for row, run in enumerate(donors) for at, vector in enumerate(run)]
    return [{(row, at) for row, at, vector in listed if torch.equal(vector, one)} for one in found]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("by_position", [False, True])
def test_resampling_from_the_batch(model, side, by_position):
    """Each value is one of a real token of another row, and with by_position of the same position."""
    texts = [TEXTS[0], TEXTS[2], OTHER[3], TEXTS[1]]
    inputs = model.batch(model.encode(texts), padding_side=side)
    plain = values(model, "resid_pre.1", inputs=inputs)
    # The first position is the same in all rows, and the longest row's end is in no other.
    common = slice(1, sorted(map(len, plain))[-2])
    with ablate(model, "resid_pre.1", mode="resample", by_position=by_position, positions=common, seed=3):
        found = values(model, "resid_pre.1", inputs=inputs)
        again = values(model, "resid_pre.1", inputs=inputs)
    met = set()
    for row, (new, old) in enumerate(zip(found, plain)):
        assert torch.equal(new[0], old[0])
        for at, sources in enumerate(origins(new[common], plain), 1):
            assert any(r != row for r, _ in sources)
            assert not by_position or any(r != row and place == at for r, place in sources)
            met |= {r for r, _ in sources}
    assert met == {0, 1, 2, 3}
    assert all(torch.equal(a, b) for a, b in zip(found, again))
    with ablate(model, "resid_pre.1", mode="resample", by_position=by_position, positions=common, seed=4):
        other = values(model, "resid_pre.1", inputs=inputs)
    assert any(not torch.equal(a, b) for a, b in zip(found, other))


def test_draws_are_even(model):
    """Each other token is drawn as often as any, within what chance allows."""
    inputs = model.batch([[5, 6, 7], [8, 9], [10]], padding_side="left")
    plain, counts = values(model, "embed", inputs=inputs), np.zeros((3, 11))
    for seed in range(600):
        with ablate(model, "embed", mode="resample", seed=seed):
            found = values(model, "embed", inputs=inputs)
        for row, sources in enumerate(origins([run[0] for run in found], plain)):
            (r, at) = min(sources)
            counts[row, [5, 8, 10][r] + at] += 1
    assert np.abs(counts[0, [8, 9, 10]] / 600 - 1 / 3).max() < 0.07
    assert np.abs(counts[1, [5, 6, 7, 10]] / 600 - 1 / 4).max() < 0.07
    assert np.abs(counts[2, 5:10] / 600 - 1 / 5).max() < 0.07


def test_one_donor_for_all_sites(model):
    texts = [TEXTS[0], TEXTS[2]]
    plain = {site: values(model, site, texts=texts) for site in ("z.1", "embed")}
    with ablate(model, ["embed", "z.0"], mode="resample", seed=1):
        embed = values(model, "embed", texts=texts)
    with ablate(model, "z.1", mode="resample", seed=1):
        z = values(model, "z.1", texts=texts)
    for row in (0, 1):
        for a, b in zip(origins(embed[row], plain["embed"]), origins(z[row], plain["z.1"])):
            assert a & b


@pytest.mark.parametrize("by_position", [False, True])
def test_resampling_from_a_store(model, by_position, tmp_path):
    acts = vd.collect(model, OTHER, sites=["z.1", "z.0"], tokens="all", store=tmp_path / "s", batch_tokens=12)
    donors, plain = [run.float() for run in single(model, "z.1")], values(model, "z.1")
    options = {"mode": "resample", "over": acts, "by_position": by_position, "heads": 2, "seed": 5}
    with ablate(model, "z.1", positions=slice(0, 6), **options):
        found = values(model, "z.1")
    for new, old in zip(found, plain):
        assert torch.equal(new[:, [0, 1, 3]], old[:, [0, 1, 3]])
        for at, vector in enumerate(new[:6, 2]):
            near = [
                (row, place)
                for row, run in enumerate(donors)
                for place, other in enumerate(run[:, 2])
                if torch.allclose(other, vector, atol=1e-5)
            ]
            assert any(not by_position or place == at for _, place in near)
    with ablate(model, "z.1", **{**options, "by_position": False}):
        first = model.generate(TEXTS, max_new_tokens=4), model.logits(TEXTS)
        assert torch.equal(model.logits(TEXTS), first[1])
        assert model.generate(TEXTS, max_new_tokens=4) == first[0]
    if by_position:
        with pytest.raises(InputError, match="no vector at position"), ablate(model, "z.1", **options):
            model.logits(["what is it, what is it, what is it, what is it, what is it, what is it, what?"])
    with ablate(model, "z.1", **{**options, "over": OTHER}, positions=slice(0, 6)):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(values(model, "z.1"), found))


def test_projection_takes_directions_out(model):
    random = np.random.default_rng(0)
    directions = random.normal(size=(3, 32))
    plain = values(model, "resid_post.1")
    slow = [np.asarray(run, dtype=np.float64) for run in plain]
    orthonormal = np.linalg.qr(directions.T)[0]
    mean = torch.cat(single(model, "resid_post.1")).mean(0).numpy()
    for over, centre in ((None, 0), (OTHER, mean)):
        with ablate(model, "resid_post.1", mode="project", directions=directions, over=over):
            for found, x in zip(values(model, "resid_post.1"), slow):
                expected = x - (x - centre) @ orthonormal @ orthonormal.T
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_projection_by_probe_and_eraser(model):
    acts = vd.collect(model, OTHER + TEXTS, sites=["resid_post.1"], tokens="all")
    x = acts["resid_post.1"].double().numpy()
    y = (np.arange(len(x)) % 2).astype(int)
    probe = vd.probes.MassMeanProbe().fit(x, y)
    expected = ProjectionEraser(probe.direction_)
    for directions, eraser in ((probe, expected), (expected, expected), (LeaceEraser().fit(x, y),) * 2):
        plain = values(model, "resid_post.1")
        with ablate(model, "resid_post.1", mode="project", directions=directions):
            for found, before in zip(values(model, "resid_post.1"), plain):
                torch.testing.assert_close(found, eraser.transform(before), rtol=1e-5, atol=1e-5)


def test_projection_per_head_and_over_all_heads(model):
    random = np.random.default_rng(1)
    one, wide = random.normal(size=8), random.normal(size=32)
    plain = values(model, "z.1")
    mean = torch.cat(single(model, "z.1")).mean(0)
    with ablate(model, "z.1", mode="project", directions=one, heads=[1, 2], over=OTHER):
        for found, before in zip(values(model, "z.1"), plain):
            q = torch.as_tensor(one / np.linalg.norm(one))
            x = before.double()
            expected = x - ((x - mean) @ q)[..., None] * q
            expected[:, [0, 3]] = x[:, [0, 3]]
            close(found, expected, 1e-5)
    with ablate(model, "z.1", mode="project", directions=wide):
        for found in values(model, "z.1"):
            assert (found.flatten(1).double() @ torch.as_tensor(wide)).abs().max() < 1e-4
    with (
        pytest.raises(InputError, match="over all heads"),
        ablate(model, "z.1", mode="project", directions=wide, heads=1),
    ):
        pass


def test_projection_in_half_precision_is_computed_in_float32():
    module = make("llama").to(torch.bfloat16)
    model = vd.load(module, check=False)
    inputs = model.batch([[5, 6, 7, 8]])
    direction = np.random.default_rng(0).normal(size=32)
    x = model.run(inputs, read=["resid_post.1"])["resid_post.1"].double()
    q = torch.as_tensor(direction / np.linalg.norm(direction))
    with ablate(model, "resid_post.1", mode="project", directions=direction):
        found = model.run(inputs, read=["resid_post.1"])["resid_post.1"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, (x - (x @ q)[..., None] * q).to(torch.bfloat16))


def test_images(hooked):
    """Means over an image set, at patches."""
    model = hooked("vit")
    images = torch.randn(70, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    run = model.run({"pixel_values": images}, read=["mlp_out.1"])
    expected = run["mlp_out.1"].double()
    with ablate(model, "mlp_out.1", mode="mean", over=images, positions=[0, 3]):
        found = model.run({"pixel_values": images[:5]}, read=["mlp_out.1"])["mlp_out.1"]
    close(found[:, [0, 3]], expected.flatten(0, 1).mean(0))
    assert torch.equal(found[:, [1, 2, 4]], run["mlp_out.1"][:5, [1, 2, 4]])
    with ablate(model, "mlp_out.1", mode="mean", over={"pixel_values": images}, by_position=True):
        found = model.run({"pixel_values": images[:5]}, read=["mlp_out.1"])["mlp_out.1"]
    close(found, expected.mean(0))
    with ablate(model, "mlp_out.1", mode="resample", seed=2, by_position=True):
        found = model.run({"pixel_values": images[:5]}, read=["mlp_out.1"])["mlp_out.1"]
    assert not torch.equal(found, run["mlp_out.1"][:5])
