"""SAE features in ablation: by the decoder's rows, as `saes.splice` does it, and at chosen tokens only."""

import sys
from pathlib import Path

import pytest
import torch

import veridical as vd
from veridical.errors import InputError
from veridical.interventions import ablate
from veridical.saes import splice

sys.path.insert(0, str(Path(__file__).parent.parent / "saes"))

from sae_makers import random_sae

TEXTS = ["the capital of France is Paris", "gold?", "what is the symbol of silver? it is Ag"]
OTHER = ["tell the truth", "yes or no, true or false", "Rome"]
SITE = "resid_post.1"
FEATURES = [3, 9, 17, 40]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def model(hooked):
    return hooked("llama")


@pytest.fixture
def sae():
    return random_sae("topk", d_in=32, width=64, k=24, site=SITE, scale=2.0)


def values(model, texts=TEXTS):
    inputs = model.batch(model.encode(texts), padding_side="left")
    found = model.run(inputs, read=[SITE])[SITE]
    return [row[mask.bool()] for row, mask in zip(found, inputs["attention_mask"])]


def test_zero_is_splices_own_ablation(model, sae):
    with splice.ablate(model, sae, FEATURES):
        expected = model.logits(TEXTS)
    with ablate(model, sae=sae, features=FEATURES) as found:
        assert torch.equal(model.logits(TEXTS), expected)
    assert list(found.changed.values()) == [True]


def test_at_chosen_tokens_the_others_keep_their_bits(model, sae):
    plain = values(model)
    raw = sae.folded()
    with ablate(model, SITE, sae=sae, features=FEATURES, positions=-1):
        for found, before in zip(values(model), plain):
            expected = before[-1] - raw.encode(before[-1:])[0, FEATURES] @ raw.W_dec[FEATURES]
            torch.testing.assert_close(found[-1], expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(found[:-1], before[:-1])


@pytest.mark.parametrize("by_position", [False, True])
def test_mean_over_texts_and_over_a_store(model, sae, by_position):
    raw = sae.folded()
    latents = [raw.encode(run)[:, FEATURES].double() for run in values(model, OTHER)]
    assert all((torch.cat(latents)[:, number] > 0).any() for number in range(len(FEATURES)))
    longest = max(map(len, latents))
    means = [torch.stack([run[at] for run in latents if len(run) > at]).mean(0) for at in range(longest)]
    acts = vd.collect(model, OTHER, sites=[SITE], tokens="all")
    plain = values(model)
    for over in (OTHER, acts):
        chosen = slice(0, 2)
        with ablate(
            model,
            sae=sae,
            features=FEATURES,
            mode="mean",
            over=over,
            by_position=by_position,
            positions=chosen,
        ):
            for found, before in zip(values(model), plain):
                for at in (0, 1):
                    wanted = means[at] if by_position else torch.cat(latents).mean(0)
                    old = raw.encode(before[at : at + 1])[0, FEATURES]
                    expected = before[at] + (wanted.float() - old) @ raw.W_dec[FEATURES]
                    torch.testing.assert_close(found[at], expected, rtol=1e-4, atol=1e-5)


def test_resampled_features_come_from_other_texts(model, sae):
    raw, plain = sae.folded(), values(model)
    acts = vd.collect(model, OTHER, sites=[SITE], tokens="all")
    donors = {
        "batch": [raw.encode(run)[:, FEATURES] for run in plain],
        "store": [raw.encode(run)[:, FEATURES] for run in values(model, OTHER)],
    }
    for name, over in (("batch", "batch"), ("store", acts)):
        with ablate(model, sae=sae, features=FEATURES, mode="resample", over=over, seed=2):
            found = values(model)
        for row, (new, before) in enumerate(zip(found, plain)):
            rows = [run for at, run in enumerate(donors[name]) if name == "store" or at != row]
            options = torch.cat(rows) @ raw.W_dec[FEATURES]
            old = raw.encode(before)[:, FEATURES] @ raw.W_dec[FEATURES]
            for vector in new - before + old:
                assert (options - vector).abs().max(1).values.min() < 1e-4


def test_bad_features(model, sae):
    for features, match in ((64, "features 0 to 63"), ([], "features is empty")):
        with pytest.raises(InputError, match=match), ablate(model, sae=sae, features=features):
            pass
    with pytest.raises(InputError, match="do not go with"), ablate(model, sae=sae, features=1, heads=0):
        pass
