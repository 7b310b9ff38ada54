"""Probes on policy and reference: what is read, and what a planted gap is said to come from."""

import numpy as np
import pandas as pd
import pytest
import torch
from comparison_oracles import rotated

import veridical as vd
from tiny_models import make
from veridical.activations.select import selection
from veridical.comparison import compare
from veridical.comparison.duo import pair_of
from veridical.comparison.probe_transfer import (
    ANEW,
    BACK,
    ON_POLICY,
    ON_REFERENCE,
    STEPS,
    TURNED,
    Transfer,
    Wanted,
    explained,
)  # fmt: skip
from veridical.comparison.resampling import Resampling, exchanged
from veridical.pairs import Pairs
from veridical.probes.data import read_source

QUICK = {"samples": 0, "behaviour_pairs": 0, "bootstrap": 60}


@pytest.fixture(scope="module")
def pairs():
    """Pairs whose two answers differ, about made-up things, so that rows are many and no two alike."""
    random, rows = np.random.default_rng(0), []
    for number in range(60):
        thing = "".join(random.choice(list("abcdefghij"), 6))
        for label, said in ((1, " it is true"), (0, " that is false")):
            rows.append(
                {"pair": f"p{number}", "prompt": f"is {thing} gold?", "completion": said, "label": label}
            )
    return Pairs.from_rows(rows)


@pytest.fixture(scope="module")
def base():
    return make("llama").double()


@pytest.fixture(scope="module")
def probe(base, tokenizer, pairs):
    acts = vd.collect(
        vd.load(base, tokenizer=tokenizer, check=False), pairs, sites=["resid_post.1"], tokens="last"
    )
    return vd.fit_probes(acts, shuffles=2, bootstrap=10).best()


def duo_with(policy, base, tokenizer):
    return pair_of(*(vd.load(model, tokenizer=tokenizer, check=False) for model in (policy, base)))


def test_a_model_against_itself_has_no_gap(base, tokenizer, pairs, probe):
    found = compare(duo_with(base, base, tokenizer), pairs, [probe], **QUICK)
    gaps = found.table("probe gaps")
    assert (gaps[["value", "low", "high"]] == 0).all(axis=None)
    assert (gaps["p"] == 1).all()
    assert (gaps["explained"] == "").all()
    table = found.table("probes").set_index("reading")
    assert table.loc[ON_REFERENCE, "auroc"] == table.loc[ON_POLICY, "auroc"] == probe.origin_.metrics["auroc"]
    assert table.loc[ON_REFERENCE, "accuracy"] == probe.origin_.metrics["accuracy"], "the probe's own split"


def test_a_rotated_basis_breaks_the_probe_and_is_named(base, tokenizer, pairs, probe):
    found = compare(duo_with(rotated(base), base, tokenizer), pairs, [probe], **QUICK)
    np.testing.assert_allclose(found.table("cka")["cka"], 1, atol=1e-9)
    table = found.table("probes").set_index("reading")["auroc"]
    assert table[ON_REFERENCE] > 0.95
    assert table[ON_POLICY] < 0.8
    assert table[TURNED] == pytest.approx(table[ON_REFERENCE], abs=0.01)
    assert table[ANEW] > 0.95
    gap = found.table("probe gaps").query("gap == 'to the policy' and measure == 'auroc'").iloc[0]
    assert gap["explained"] == "rotation"
    assert gap["high"] < 0
    assert gap["p"] < 0.05


def test_readings_are_those_of_collected_activations(base, tokenizer, pairs, probe):
    duo = duo_with(rotated(base), base, tokenizer)
    found = compare(duo, pairs, [probe], **QUICK).table("probes").set_index("reading")
    acts = vd.collect(duo.policy, pairs, sites=["resid_post.1"], tokens="last", dtype="float32")
    sweep = vd.fit_probes(acts, probe=vd.LogisticProbe(), strengths=(probe.C,), shuffles=20)
    assert found.loc[ANEW, "auroc"] == pytest.approx(sweep[sweep.best_site].metrics["auroc"].value, abs=1e-6)
    assert found.loc["control: shuffled labels, on the policy", "auroc"] == pytest.approx(
        np.mean(sweep[sweep.best_site].control), abs=0.02
    )
    assert found.loc["control: text alone", "auroc"] == pytest.approx(sweep.text["auroc"].value)


def synthetic(seed=0, count=200, width=10):
    """Vectors of a reference whose first axis holds the label, in pairs of both classes."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(2 * count, width))
    label = np.tile([0, 1], count)
    x[:, 0] += 3.0 * (label - 0.5)
    return x, label, np.repeat(np.arange(count), 2)


def transferred(x, y, label, groups):
    table = {"label": label, "pair": groups}
    fitted = vd.fit_probes({"here": x}, rows=table, target="label", shuffles=1, bootstrap=10)
    wanted = Wanted("probe", fitted.best(), "here", selection("last"))
    sides = (read_source({"here": v}, None, None, None, table) for v in (x, y))
    return Transfer.of(wanted, *sides, Resampling(100))


def turned(width=10):
    random = torch.Generator().manual_seed(1)
    return torch.linalg.qr(torch.randn(width, width, generator=random, dtype=torch.float64))[0].numpy()


def sheared(x):
    """The second axis is added to the first, so strongly that turning does not undo it."""
    return x + 4.0 * np.outer(x[:, 1], np.eye(x.shape[1])[0])


PLANTED = {
    "shift": lambda x, noise: x + 4.0 * np.eye(10)[0] + 0.05 * noise,
    "rotation": lambda x, noise: x @ turned() + 0.05 * noise,
    "other linear change": lambda x, noise: sheared(x) + 0.05 * noise,
    "loss": lambda x, noise: np.concatenate([noise[:, :1], x[:, 1:]], 1),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_gap_is_explained(planted):
    x, label, groups = synthetic()
    noise = np.random.default_rng(5).normal(size=x.shape)
    found = transferred(x, PLANTED[planted](x, noise), label, groups)
    gaps = pd.DataFrame(found.gaps())
    gaps = gaps[(gaps["gap"] == "to the policy") & (gaps["measure"] == "accuracy")].iloc[0]
    assert gaps["value"] < -0.1
    assert gaps["p"] < 0.05
    assert gaps["explained"] == planted
    assert gaps["share"] > 0.5
    assert sum(gaps[name] for name in STEPS) == pytest.approx(1)
    again = pd.DataFrame(found.gaps()).query("gap == 'trained anew' and measure == 'auroc'").iloc[0]
    assert (again["p"] < 0.05) == (planted == "loss")
    table = pd.DataFrame(found.lines()).set_index("reading")
    assert table.loc["control: shuffled labels, on the policy", "auroc"] == pytest.approx(0.5, abs=0.1)
    assert table.loc["control: mapped by shuffled pairs", "auroc"] == pytest.approx(0.5, abs=0.1)
    if planted != "loss":
        assert table.loc[BACK, "accuracy"] < table.loc[ANEW, "accuracy"] - 0.1


def test_shares_add_up_and_never_pass_the_gap():
    reached = dict.fromkeys((ON_REFERENCE, ANEW, "trained anew on the reference", BACK), 0.9)
    reached |= {
        ON_POLICY: 0.5,
        "reference's probe on the policy, shifted": 0.6,
        TURNED: 0.95,
        "reference's probe on the policy, mapped": 0.97,
    }
    found = explained(reached)
    assert found["explained"] == "rotation"
    assert [found[name] for name in STEPS] == pytest.approx([0.25, 0.75, 0.0, 0.0])


def test_exchanges_are_a_test_at_its_level():
    """Under the null a p below 0.05 comes up in a twentieth; pairs, not rows, change places."""
    hits = 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        both = np.repeat(random.integers(0, 2, (2, 30)), 2, axis=1).astype(float)
        groups = np.repeat(np.arange(30), 2)
        value = float((both[0] - both[1]).mean())
        hits += exchanged(value, lambda a, b: float((a - b).mean()), *both, groups, seed, 99) <= 0.05
    assert hits / 200 < 0.09


def test_probes_that_cannot_be_read_are_named(base, tokenizer, pairs, probe):
    by_hand = vd.LogisticProbe().fit(np.random.default_rng(0).normal(size=(40, 32)), np.arange(40) % 2)
    table = pairs.to_pandas().to_dict("records")
    unlabelled = Pairs.from_rows(
        [{"pair": row["pair"], "prompt": row["prompt"] + row["completion"]} for row in table]
    )
    duo = duo_with(base, base, tokenizer)
    found = compare(duo, unlabelled, [probe, by_hand], weights=False, **QUICK)
    left = found.table("probes left out").set_index("probe")["why"]
    assert "no column label" in left["probe for label at resid_post.1"]
    assert "which site, token and label" in left["probe 1"]
    assert "probes" not in found.tables
    assert any("no column label" in line for line in found.findings())
