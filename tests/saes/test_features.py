"""Features over a data set against brute force; logit effects against the model's own weights; pages."""

import numpy as np
import pytest
import torch
from sae_makers import random_sae

import veridical as vd
from veridical.errors import InputError
from veridical.saes.features import feature_table
from veridical.saes.logit_effects import logit_effects, norm_gain, top_tokens, unembedding

TEXTS = [
    "the capital of France is Paris",
    "what is the symbol of gold? it is Au",
    "<script>alert(1)</script> tell a lie",
    "silver is Ag!",
    "the truth",
    "the capital of Italy is Rome, and that of France is Paris.",
    "the the the the the the the the the the",
]
SITE = "resid_post.1"


@pytest.fixture(scope="module")
def acts(hooked):
    return vd.collect(hooked("llama"), TEXTS, sites=SITE, tokens="all", progress=False)


@pytest.fixture(scope="module")
def sae():
    return random_sae("topk", d_in=32, width=64, site=SITE, scale=2.0)


@pytest.mark.parametrize("block", [3, 10_000])
def test_equals_brute_force(monkeypatch, acts, sae, block):
    import veridical.saes.held_out as held_out

    monkeypatch.setattr(held_out, "BLOCK_BYTES", 4 * sae.width * block)
    table = feature_table(sae, acts, examples=4, random=3)
    latents = sae.folded().encode(acts[SITE]).detach().numpy()
    rows = acts.index["row"].to_numpy()
    fires = latents > 1e-3
    np.testing.assert_allclose(table.frequency, fires.mean(0))
    np.testing.assert_allclose(table.largest, latents.max(0), rtol=1e-6)
    for feature in range(sae.width):
        own = latents[:, feature]
        mean = own[own > 1e-3].mean() if (own > 1e-3).any() else 0
        assert table.mean[feature] == pytest.approx(mean, rel=1e-5)
        assert table.texts[feature] == pytest.approx(len(np.unique(rows[own > 1e-3])) / len(TEXTS))
        best = {row: own[rows == row].max() for row in np.unique(rows)}
        wanted = sorted((value for value in best.values() if value > 1e-3), reverse=True)[:4]
        found = table.examples(feature)
        assert [one.value for one in found] == pytest.approx(wanted, rel=1e-5)
        assert len({one.row for one in found}) == len(found)
        drawn = table.random_examples(feature)
        assert len(drawn) == min(3, int((own > 1e-3).sum()))
        assert all(one.value > 1e-3 for one in drawn)
        assert len({(one.row, one.position) for one in drawn}) == len(drawn)


def test_context_is_that_of_the_row(acts, sae, hooked):
    table = feature_table(sae, acts, context=2)
    feature = int(np.argmax(table.frequency))
    tokens = acts.index["token"].to_numpy()
    for one in table.examples(feature):
        own = tokens[acts.index["row"].to_numpy() == one.row]
        assert one.tokens == tuple(own[max(0, one.position - 2) : one.position + 3])
        assert one.tokens[one.at] == own[one.position]
        assert one.values[one.at] == one.value
        assert len(one.tokens) <= 5


def test_random_examples_are_drawn_evenly(acts, sae):
    """Over many seeds every token on which a feature fires is drawn about equally often, strong or weak."""
    table = feature_table(sae, acts)
    feature = int(np.argmax(table.frequency))
    fires = np.flatnonzero(table.values([feature])[:, 0] > 1e-3)
    seen = np.zeros(len(acts))
    for seed in range(300):
        drawn = feature_table(sae, acts, random=1, examples=1, seed=seed).drawn[0, feature]
        seen[drawn] += 1
    assert seen.sum() == 300
    assert (np.flatnonzero(seen) == fires).all()
    expected = 300 / len(fires)
    assert ((seen[fires] - expected) ** 2 / expected).sum() < 3 * len(fires)


def test_a_model_may_be_given(hooked, acts, sae):
    made = feature_table(sae, hooked("llama"), TEXTS)
    np.testing.assert_allclose(made.frequency, feature_table(sae, acts).frequency)
    assert "features at" in repr(made)
    assert made.to_frame().shape == (64, 5)


def test_pages_and_index(tmp_path, hooked, acts, sae):
    table = feature_table(sae, acts, context=6)
    by_use = np.argsort(-table.frequency)
    fires_in_script = [f for f in by_use if any(one.row == 2 for one in table.examples(int(f)))]
    silent = int(np.argmin(table.frequency))
    pages = table.pages([int(by_use[0]), int(fires_in_script[0]), silent], hooked("llama"))
    assert [page.title.startswith("Feature") for page in pages] == [True] * 3
    assert len(pages[0].tables[0][1]) == 10
    assert "Strongest" in pages[0].html[0]
    assert "At random" in pages[0].html[0]
    assert "fires on none" in pages[2].text
    assert not pages[2].html
    index = table.report_section()
    assert len(index.tables[0][1]) == int((table.frequency > 0).sum())
    path = vd.report([index, *pages], tmp_path / "report.html")
    page = path.read_text()
    assert "<script>alert(1)" not in page
    assert "<script" not in pages[1].html[0]
    assert "&lt;" in pages[1].html[0]
    pages[0].save(tmp_path / "page")
    assert type(pages[0]).load(tmp_path / "page").title == pages[0].title


# Logit effects


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox", "qwen3", "opt"])
def test_effects_are_the_linear_path(hooked, family):
    """A step along the feature, with the final norm's scale held, moves the logits by the effect."""
    model = hooked(family)
    last = f"resid_post.{model.n_layers - 1}"
    sae = random_sae("topk", d_in=32, width=16, site=last)
    found = logit_effects(model, sae, [2, 5])
    norm = model.architecture.places[model.resolve("ln_final")[0]].module
    weight = norm.weight.detach().double()
    gain = weight + 1 if "gemma" in family else weight
    torch.testing.assert_close(norm_gain(model).double(), gain, rtol=1e-4, atol=1e-4)
    head = model.model.get_output_embeddings().weight.detach().double()
    effects = (sae.W_dec[[2, 5]].double() * gain) @ head.T
    effects = effects - effects.mean(1, keepdim=True)
    np.testing.assert_allclose(found, effects.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.mean(1), 0, atol=1e-12)


def test_effects_agree_with_steering_at_the_last_site(hooked):
    """What the direct path promotes is what a small step makes likelier, in the model itself."""
    from veridical.saes.splice import steer

    model = hooked("llama")
    sae = random_sae("topk", d_in=32, width=16, site=f"resid_post.{model.n_layers - 1}")
    effects = logit_effects(model, sae, [2])[0]
    inputs = model.batch(model.encode(TEXTS))
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        before = model.run(inputs).logits[real]
        with steer(model, sae, {2: 0.01}):
            change = (model.run(inputs).logits[real] - before).mean(0).double().numpy()
    assert np.corrcoef(change - change.mean(), effects)[0, 1] > 0.9


def test_top_tokens_are_in_order(hooked):
    model = hooked("gpt2")
    sae = random_sae("topk", d_in=32, width=16, site="resid_post.0")
    frame, effects = top_tokens(model, sae, [1, 3], count=5), logit_effects(model, sae, [1, 3])
    own = frame[frame["feature"] == 3]
    np.testing.assert_allclose(own["effect"], np.sort(effects[1])[::-1][:5])
    np.testing.assert_allclose(own["effect_down"], np.sort(effects[1])[:5])
    assert own["promotes"].iloc[0] == model.tokenizer.decode([int(effects[1].argmax())])
    assert unembedding(model).shape == (32, 300)


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 31])
def test_the_probe_of_the_norm_has_mean_0_and_mean_square_1(width):
    from veridical.saes.logit_effects import _probe

    made = _probe(width)
    assert (made != 0).all()
    assert float(made.square().mean()) == pytest.approx(1)
    if width > 1:
        assert float(made.mean()) == pytest.approx(0)


def test_bad_input_is_named(hooked, acts, sae):
    with pytest.raises(InputError, match="came without texts"):
        feature_table(sae, hooked("llama"))
    with pytest.raises(InputError, match="one SAE at one site"):
        feature_table(random_sae("crosscoder"), acts)
    pooled = vd.collect(hooked("llama"), TEXTS, sites=SITE, tokens="mean", progress=False)
    with pytest.raises(InputError, match="averaged over tokens"):
        feature_table(sae, pooled)
    with pytest.raises(InputError, match="feature 64"):
        feature_table(sae, acts).page(64)
    with pytest.raises(InputError, match="not in the residual stream"):
        logit_effects(hooked("llama"), random_sae("topk", d_in=32, site="z.0"), [0])
    early = random_sae("topk", d_in=32, site="resid_post.0")
    with pytest.raises(InputError, match="no unembedding"):
        logit_effects(hooked("vit"), early, [0])
    with pytest.raises(InputError, match="projects the residual stream from 32 to 16"):
        logit_effects(hooked("opt_post_norm"), early, [0])
