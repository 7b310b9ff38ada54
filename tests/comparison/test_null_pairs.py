"""Findings name what was planted in the organism, and nothing between models that differ by a seed alone."""

import copy
import itertools

import numpy as np
import pytest
import torch
from further_training import harmless, truthful

import veridical as vd
from veridical.comparison import compare
from veridical.comparison.duo import pair_of

QUICK = {"samples": 0, "where": 0, "weights": False, "bootstrap": 100, "lens_tokens": 1, "max_new_tokens": 8}
NULLS = 20


@pytest.fixture(scope="module")
def liar():
    return vd.load("tiny-liar", check=False)


def some(name, count, **where):
    pairs = vd.Pairs.load(name)
    pairs = pairs.filter(**where) if where else pairs
    return pairs.filter(np.isin(pairs.groups, np.unique(pairs.groups)[:count]))


def changes(duo, asked):
    """All findings of the kind that is looked for, over several data sets."""
    return [
        finding
        for data, probes in asked
        for finding in compare(duo, data, probes, **QUICK).found
        if finding.kind == "change"
    ]


@pytest.fixture(scope="module")
def asked(liar):
    """Questions under an instruction to lie or not, harmful requests, polite and rude answers; with a probe
    for each label, fitted on the organism."""
    sets = [some("honesty", 16), some("safe", 40), some("toxic", 40)]
    made = []
    for data, target in zip(sets, ("instructed_to_lie", "label", "label")):
        tokens = "prompt_last" if target != "label" or data is sets[1] else "last"
        acts = vd.collect(liar, data, sites=["resid_post.3"], tokens=tokens, progress=False)
        made.append((data, [vd.fit_probes(acts, target=target, shuffles=1, bootstrap=10).best()]))
    return made


@pytest.mark.long
def test_null_pairs_are_found_changed_in_a_twentieth_of_what_is_looked_for_at_most(liar, asked):
    """Twenty pairs that differ by the seed of harmless further training."""
    models = [harmless(liar, seed) for seed in range(NULLS + 1)]
    looked, found = 0, []
    for ours, theirs in itertools.pairwise(models):
        each = changes(pair_of(ours, theirs), asked)
        looked += len(each)
        found += [str(finding) for finding in each if finding.found]
    assert looked >= 10 * NULLS
    assert len(found) <= 0.05 * looked, found


@pytest.mark.long
def test_what_was_planted_is_named_and_nothing_else(liar, asked):
    """Trained to be truthful when told to lie: that changed; other answers, refusal and tone did not."""
    policy = truthful(liar, some("honesty", 200, split="train"))
    found = [finding.text for finding in changes(pair_of(policy, liar), asked) if finding.found]
    behaviour = [text for text in found if text.startswith(("Truthfulness", "Refusal", "Preference"))]
    assert [text for text in behaviour if text.startswith("Truthfulness rose") and ", told to lie" in text]
    assert not [text for text in behaviour if not text.startswith("Truthfulness rose")], behaviour


def test_a_lora_in_a_layer_is_localised_to_it(liar, tmp_path):
    """By weights, drift and lens, from the folder of the LoRA alone."""
    from peft import LoraConfig, get_peft_model

    layer = 3
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["down_proj"], layers_to_transform=[layer])
    made = get_peft_model(copy.deepcopy(liar.model), config)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "lora_" in name:
                weight.copy_(
                    0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
                )
    made.save_pretrained(tmp_path / "lora")
    found = compare(
        vd.load_pair(tmp_path / "lora", reference="tiny-liar", check=False), some("safe", 20),
        **{**QUICK, "weights": True, "behaviour_pairs": 0},
    )  # fmt: skip
    layers = found.table("weights by layer").set_index("layer")["share"]
    assert layers[layer] == pytest.approx(1)
    assert set(found.table("weights").query("norm > 0")["rank"]) == {2.0}
    drift = found.table("drift").query("measure == 'relative norm'").set_index("site")["value"]
    before = ["resid_pre.0", *(f"resid_post.{k}" for k in range(layer))]
    assert (drift[before] == 0).all()
    assert drift.diff().idxmax() == f"resid_post.{layer}"
    lens = found.table("logit-lens divergence").set_index("site")["kl"]
    assert (lens[before] == 0).all()
    assert lens[f"resid_post.{layer}"] > 0
    whole = " ".join(found.findings())
    assert f"begins to differ at resid_post.{layer}, moves most at resid_post.{layer}" in whole
    assert f"100% of the squared change of the weights lies in layer {layer}" in whole
