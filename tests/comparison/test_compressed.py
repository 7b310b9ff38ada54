"""Compressed copies: what is rounded and zeroed, what is left alone, and that comparison sees it."""

import copy

import numpy as np
import pytest
import torch

import veridical as vd
from tiny_models import make
from veridical.comparison import compare
from veridical.comparison.compressed import compressed, pruned, quantised
from veridical.comparison.duo import pair_of
from veridical.errors import InputError

QUICK = {
    "samples": 4,
    "max_new_tokens": 3,
    "bootstrap": 20,
    "behaviour_pairs": 6,
    "where": 4,
    "progress": False,
}


@pytest.fixture(scope="module")
def liar():
    return vd.load("tiny-liar", check=False)


@pytest.fixture(scope="module")
def honesty():
    pairs = vd.Pairs.load("honesty")
    return pairs.filter(np.isin(pairs.groups, np.unique(pairs.groups)[:8]))


def weights(model):
    return {name: value.detach() for name, value in model.model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rounding_is_that_of_the_formula(family):
    model = vd.load(make(family), check=False)
    for bits in (8, 4, 2):
        made, top = weights(quantised(model, bits)), 2 ** (bits - 1) - 1
        touched = 0
        for name, before in weights(model).items():
            inside = ".layers." in name or ".h." in name
            if not inside or before.dim() != 2:
                assert torch.equal(made[name], before), name
                continue
            touched += 1
            rows = before.T if family == "gpt2" else before  # gpt2 keeps [in, out]
            step = rows.abs().amax(1, keepdim=True).double() / top
            expected = (rows.double() / step).round() * step
            expected = expected.T if family == "gpt2" else expected
            assert made[name].double() == pytest.approx(expected, abs=1e-6)
            assert len(torch.unique((rows[0].double() / step[0]).round())) <= 2 * top + 1
        assert touched
    assert all(torch.equal(a, b) for a, b in zip(weights(model).values(), make(family).parameters()))


def test_pruning_zeroes_the_smallest():
    model = vd.load(make("llama"), check=False)
    made = weights(pruned(model, 0.5))
    for name, before in weights(model).items():
        zero = made[name] == 0
        if ".layers." in name and before.dim() == 2:
            assert float(zero.float().mean()) == pytest.approx(0.5, abs=0.01)
            assert before[zero].abs().max() <= before[~zero].abs().min()
            assert torch.equal(made[name][~zero], before[~zero])
        else:
            assert torch.equal(made[name], before)
    assert not hasattr(pruned(model, 0.5).model.model.layers[0].mlp.down_proj, "weight_mask")


def test_nothing_pruned_is_zero_everywhere(liar, honesty):
    found = compare(pair_of(compressed(liar, "prune-0"), liar), honesty, **QUICK)
    assert not [str(each) for each in found.found if each.found]
    assert (found.table("weights")["norm"] == 0).all()
    line = found.table("outputs on fixed text").set_index(["region", "measure"]).loc[("all", "kl"), "value"]
    assert line == 0


def test_eight_bits_change_little_and_half_pruned_shows_what_broke(liar, honesty):
    kl, told = {}, {}
    for how in ("int8", "int4", "prune-50", "prune-90"):
        found = compare(pair_of(compressed(liar, how), liar), honesty, **QUICK)
        table = found.table("outputs on fixed text").set_index(["region", "measure"])
        kl[how] = float(table.loc[("all", "kl"), "value"])
        told[how] = found.table("behaviour").set_index(["measure", "rows"])["policy"]
        assert f"tiny-liar, {'int' if 'int' in how else 'pruned'}" in found.facts["policy"]
        assert "weights" in found.tables, "the measures of weights apply"
    assert kl["int8"] < 1e-3 < kl["int4"] < kl["prune-50"] < kl["prune-90"]
    honest = ("truthful", "not told to lie")
    assert told["prune-90"][honest] < told["int8"][honest], "what it knew is gone"


def test_what_cannot_be_compressed(liar):
    for how in ("int9", "int1", "fp8", "prune", "prune-101", ""):
        with pytest.raises(InputError, match="expected int2 to int8, or prune-N"):
            compressed(liar, how)
    with pytest.raises(InputError, match="bits is 16"):
        quantised(liar, 16)
    with pytest.raises(InputError, match="share is 2"):
        pruned(liar, 2)
    bare = vd.load(torch.nn.Sequential(torch.nn.Linear(2, 2)), check=False)
    with pytest.raises(InputError, match="no plain weight matrices"):
        pruned(bare, 0.5)


def test_a_model_that_torchao_quantised(liar, honesty):
    torchao = pytest.importorskip("torchao.quantization")
    module = copy.deepcopy(liar.model)
    torchao.quantize_(module, torchao.Int8WeightOnlyConfig())
    policy = vd.load(module, tokenizer=liar.tokenizer, check=False)
    found = compare(pair_of(policy, liar), honesty, **QUICK)
    ours = compare(pair_of(quantised(liar), liar), honesty, **QUICK)
    both = [
        float(
            each.table("outputs on fixed text").set_index(["region", "measure"]).loc[("all", "kl"), "value"]
        )
        for each in (found, ours)
    ]
    assert 0 < both[0] < 1e-3
    assert 0 < both[1] < 1e-3
    assert policy.fingerprint() != liar.fingerprint()
