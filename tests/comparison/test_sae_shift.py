"""SAEs and crosscoders on two models: direct figures, planted features named, nothing by chance."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import veridical as vd
from tiny_models import make
from veridical.comparison import compare
from veridical.comparison.config import CompareConfig
from veridical.comparison.crosscoder import Drawn, crosscoded
from veridical.comparison.duo import pair_of
from veridical.comparison.resampling import Resampling
from veridical.comparison.sae_shift import Firing, discoveries, shifted
from veridical.errors import DataError, InputError
from veridical.saes import SAEConfig
from veridical.saes.topk import TopK

WIDTH, LATENTS = 6, 12


class Step(SimpleNamespace):
    """A batch of one text, of what the meters read of it."""

    def __len__(self):
        return 1


def batch(group, x, y, resampling):
    return Step(
        streams={"resid_post.0": (x, y)},
        row=torch.zeros(len(x), dtype=torch.long),
        counts=torch.tensor([float(len(x))], dtype=torch.float64),
        numbers=np.array([group]),
        groups=np.array([group]),
        ids=torch.arange(len(x)),
        weights=resampling.weights([group]),
        flips=resampling.flips([group]),
    )


@pytest.fixture
def sae():
    """The positive axes, then the negative ones, two at a token."""
    made = TopK(SAEConfig(architecture="topk", width=LATENTS, k=2, site="resid_post.0"), WIDTH).double()
    with torch.no_grad():
        made.W_dec.copy_(torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)]).double())
        made.W_enc.copy_(made.W_dec)
    return made


def read(sae, streams, signs=20):
    resampling = Resampling(200, signs=signs)
    meter = Firing("SAE", "resid_post.0", sae, resampling)
    for group, (x, y) in enumerate(streams):
        meter.add(batch(group, x, y, resampling))
    return meter


def drawn(seed, texts=120, tokens=8):
    """Vectors whose axes 0 to 3 are active at some tokens each, with a little noise everywhere."""
    random = torch.Generator().manual_seed(seed)
    active = (torch.rand(texts, tokens, WIDTH, generator=random, dtype=torch.float64) < 0.3).double()
    active[..., 4:] = 0
    noise = 0.01 * torch.randn(texts, tokens, WIDTH, generator=random, dtype=torch.float64)
    return active * (1 + torch.rand(active.shape, generator=random, dtype=torch.float64)) + noise


def test_figures_are_the_direct_ones(sae):
    x, y = drawn(0), drawn(1)
    meter = read(sae, zip(x, y))
    table = meter.error_frame().set_index(["measure", "of"])
    rates = []
    for of, vectors in (("policy", x), ("reference", y)):
        flat = vectors.flatten(0, 1)
        with torch.no_grad():
            latents = sae.encode(flat)
            left = (flat - sae(flat)).square().sum() / (flat - flat.mean(0)).square().sum()
        line = table.loc["unexplained", of]
        assert line["value"] == pytest.approx(float(left), rel=1e-9)
        assert line["low"] < line["value"] < line["high"]
        assert table.loc["L0", of]["value"] == pytest.approx(float((latents > 0).sum(1).double().mean()))
        rates.append((latents > 1e-3).double().mean(0).numpy())
    latents = meter.latent_frame().set_index("latent")
    for latent, line in latents.iterrows():
        assert line["policy"] == pytest.approx(rates[0][latent])
        assert line["reference"] == pytest.approx(rates[1][latent])
        assert line["change"] == pytest.approx(rates[0][latent] - rates[1][latent])


def test_a_planted_feature_appears_and_one_vanishes(sae):
    y = drawn(0)
    random = torch.Generator().manual_seed(3)
    y[..., 4:] = 0.0
    x = y.clone()
    x[..., 5] += 3.0 * (torch.rand(x.shape[:2], generator=random) < 0.2)
    x[..., 0] = 0.0
    tables = shifted([read(sae, zip(x, y))], {})
    named = tables["SAE latents"].query("named").set_index("latent")["kind"]
    assert named[5] == "appears"
    assert named[0] == "vanishes"
    summary = tables["SAE features"].iloc[0]
    assert summary["appears"] >= 1
    assert summary["vanishes"] >= 1
    assert summary["by_chance"] < 0.5


def test_equal_streams_show_nothing(sae):
    x = drawn(0)
    meter = read(sae, zip(x, x))
    table = meter.error_frame()
    assert (table[table["of"] == "change"][["value", "low", "high"]] == 0).all(axis=None)
    assert meter.latent_frame().empty
    assert meter.summary()["by_chance"] == 0


def test_noise_is_rarely_named(sae):
    """Two samples of one distribution, pair by pair: a false one in few of 40 tries."""
    hits = [
        read(sae, zip(drawn(2 * s), drawn(2 * s + 1)), 4).latent_frame()["named"].any() for s in range(40)
    ]
    assert np.mean(hits) < 0.15


def test_discoveries_are_those_of_benjamini_and_hochberg():
    p = np.array([0.01, 0.04, 0.03, 0.002, 0.9, 0.2])
    assert discoveries(p).tolist() == [True, False, False, True, False, False]
    assert not discoveries(np.ones(4)).any()


def crosscoder_tokens(x, y, **options):
    resampling = Resampling(10)
    meter = Drawn("resid_post.0", resampling, 4000)
    for group, (a, b) in enumerate(zip(x, y)):
        meter.add(batch(group, a, b, resampling))
    return meter, CompareConfig(**options)


def test_a_crosscoder_finds_the_planted_exclusive_feature():
    """One direction of the policy alone among sparse shared ones; the reference against itself has none."""
    random = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(32, 32, generator=random, dtype=torch.float64))[0]
    fires = torch.rand(300, 10, 17, generator=random) < 0.08
    active = (fires * (1 + torch.rand(300, 10, 17, generator=random))).double()
    both = active @ basis[:17]
    x, y = both, both - active[..., 16:] * basis[16]
    meter, config = crosscoder_tokens(x, y, crosscoder_width=48, crosscoder_k=2, crosscoder_passes=100)
    tables = crosscoded(meter, config, str)
    ours, null = (tables["crosscoder"].iloc[at] for at in (0, 1))
    assert ours["policy only"] >= 1
    assert ours["reference only"] == 0
    assert null["policy only"] == null["reference only"] == 0
    best = tables["crosscoder latents"].query("confirmed").iloc[0]
    assert best["only"] == "policy"
    assert best["share"] > 0.9
    assert abs(best["error"]) < 0.2
    assert best["rate"] == pytest.approx(0.08, abs=0.04)


def test_the_drawn_tokens_are_uniform_and_few():
    x = drawn(0, texts=50, tokens=10)
    resampling = Resampling(10)
    meter = Drawn("resid_post.0", resampling, 60)
    for group, vectors in enumerate(x):
        meter.add(batch(group, vectors, vectors + 1, resampling))
    assert len(meter.keys) == len(meter.groups) == len(meter.vectors[0]) == 60
    for at in range(60):
        assert (x[meter.groups[at]] == meter.vectors[0][at]).all(1).any()
        torch.testing.assert_close(meter.vectors[1][at], meter.vectors[0][at] + 1)
    assert len(np.unique(meter.groups)) > 25
    with pytest.raises(DataError, match="60 tokens were read"):
        crosscoded(meter, CompareConfig(), str)


def test_in_a_comparison(tokenizer, duo_of):
    """Both come from the one pass; an SAE of another width is left out by name."""
    duo, texts = duo_of(1), [f"the capital of {place} is what?" for place in ("France", "Italy", "gold") * 20]
    sae = TopK(SAEConfig(architecture="topk", width=40, k=4, site="resid_post.1"), 32)
    other = TopK(SAEConfig(architecture="topk", width=40, k=4, site="resid_post.1"), 31)
    quick = {"samples": 0, "behaviour_pairs": 0, "bootstrap": 40, "weights": False}
    found = compare(duo, texts, saes=[sae, other], crosscoder="resid_post.1", crosscoder_passes=1, **quick)
    assert found.table("SAE error").query("of == 'change' and measure == 'unexplained'")["value"].item() != 0
    assert len(found.table("crosscoder")) == 2
    whole = " ".join(found.findings())
    assert "features of SAE 0" in whole
    assert "A crosscoder has" in whole
    assert "Left out: SAE 1 (topk-f40-k4), as it reads vectors 31 wide." in whole
    with pytest.raises(InputError):
        compare(duo, texts, crosscoder="resid_post.9", **quick)
    narrow = vd.load(make("gpt2"), tokenizer=tokenizer, check=False)
    if narrow.d_model != duo.policy.d_model:
        assert "SAEs" in pair_of(narrow, duo.reference).not_applicable
