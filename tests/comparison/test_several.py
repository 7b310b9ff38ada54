"""Several policies: one pass of each, figures of pairs against direct formulas, maps, alike or not."""

import copy
import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from comparison_oracles import changed, direct_cka

import veridical as vd
from tiny_models import make
from verb_data import tokenizer as other_tokenizer
from veridical.comparison.alike import of_changes, of_rewards
from veridical.comparison.many import jensen_shannon, pass_all, texts_of
from veridical.comparison.policies import Policies
from veridical.comparison.several import compare_many
from veridical.errors import DataError, InputError

QUICK = {"bootstrap": 40, "behaviour_pairs": 24, "max_new_tokens": 2, "progress": False}
TEXTS = ["the capital of France is Paris", "tell the truth or tell a lie", "gold? it is Au", "one two three"]


@pytest.fixture(scope="module")
def base(tiny, tokenizer):
    return vd.load(copy.deepcopy(tiny("llama")), tokenizer=tokenizer, check=False)


@pytest.fixture(scope="module")
def options():
    """Questions with two options, one pair each."""
    nouns = ["gold", "iron", "zinc", "lead", "tin", "silver", "copper", "neon", "sulphur", "carbon"]
    rows = [
        {"pair": noun, "prompt": f"the symbol of {noun} is", "completion": None, "label": 0,
         "options": [" Au", " truth"], "correct": at % 2}
        for at, noun in enumerate(nouns)
    ]  # fmt: skip
    return vd.Pairs.from_pandas(pd.DataFrame(rows))


def handle(base, model):
    return vd.load(model, tokenizer=base.tokenizer, check=False)


def three(base):
    """a and b share a change and differ a little; c has another change at the same place."""
    one = changed(base.model, 1, scale=2.0)
    return {
        "a": handle(base, one),
        "b": handle(base, changed(one, 2, scale=0.05, seed=3)),
        "c": handle(base, changed(base.model, 1, scale=2.0, seed=5)),
    }


@pytest.fixture(scope="module")
def found(base, options):
    return compare_many(three(base), base, options, trained_on=["x", "x", "y"], depths=3, **QUICK)


def streams(model, ids, layer):
    with torch.no_grad():
        return [model.run(model.batch([row]), read=[f"resid_post.{layer}"])[f"resid_post.{layer}"][0].numpy()
                for row in ids]  # fmt: skip


def test_each_model_reads_the_texts_once(base, options, monkeypatch):
    models = [base, *three(base).values()]
    counts = {}
    for model in models:
        run = model.run
        monkeypatch.setattr(model, "run", lambda *a, run=run, m=model, **o: (
            counts.update({id(m): counts.get(id(m), 0) + 1}), run(*a, **o))[1])  # fmt: skip
    texts = texts_of(models, options, True)
    pass_all(models, [0, 0, 0, 0], texts, [["resid_post.1"]] * 4, batch_tokens=4096, progress=False)
    assert list(counts.values()) == [1, 1, 1, 1]


def test_pairs_are_those_of_direct_formulas(base, options, found):
    models = {"tiny": base, **three(base)}
    ids = [row.ids for row in base.encode(list(options.prompts))]
    logs = {}
    for name, model in models.items():
        with torch.no_grad():
            logs[name] = torch.cat([model.logits(torch.tensor([row]))[0] for row in ids]).double()
    for a, b in (("a", "b"), ("a", "c")):
        part = found.pairs[(found.pairs["a"] == a) & (found.pairs["b"] == b)]
        for layer in range(3):
            rows = [np.concatenate(streams(models[name], ids, layer)) for name in (a, b)]
            line = part[(part["measure"] == "cka") & (part["place"] == f"resid_post.{layer}")].iloc[0]
            assert line["value"] == pytest.approx(direct_cka(*rows), abs=1e-4)
            ends = {
                name: np.stack([row[-1] for row in streams(models[name], ids, layer)])
                for name in ("tiny", a, b)
            }
            line = part[(part["measure"] == "cka of changes") & (part["place"] == f"resid_post.{layer}")]
            if layer > 0:
                expected = direct_cka(ends[a] - ends["tiny"], ends[b] - ends["tiny"])
                assert line["value"].iloc[0] == pytest.approx(expected, abs=1e-3)
            else:
                assert np.isnan(line["value"].iloc[0]), "nothing changed there"
        ours, theirs = (logs[name].softmax(-1) for name in (a, b))
        middle = (ours + theirs) / 2
        apart = 0.5 * sum((p * (p.log() - middle.log())).sum(-1) for p in (ours, theirs))
        line = part[part["measure"] == "divergence"].iloc[0]
        assert line["value"] == pytest.approx(float(apart.mean()), rel=1e-4)
    table = found.models.set_index("model")
    kl = (logs["a"].softmax(-1) * (logs["a"].log_softmax(-1) - logs["tiny"].log_softmax(-1))).sum(-1)
    assert table["kl"]["a"] == pytest.approx(float(kl.mean()), rel=1e-4)


def test_implicit_rewards(base, options, found):
    rewards = {}
    for name, model in three(base).items():
        ours, theirs = (
            m.option_logprobs(list(options.prompts), list(options["options"])) for m in (model, base)
        )
        gained = np.array(ours) - np.array(theirs)
        right = options["correct"].astype(int)
        margin = gained[np.arange(10), right] - gained[np.arange(10), 1 - right]
        assert found.models.set_index("model")["implicit reward"][name] == pytest.approx(
            margin.mean(), abs=1e-5
        )
        rewards[name] = (gained - gained.mean(1, keepdims=True)).ravel()
    for a, b in (("a", "b"), ("a", "c")):
        line = found.pairs[(found.pairs["a"] == a) & (found.pairs["b"] == b)]
        line = line[line["measure"] == "reward correlation"].iloc[0]
        assert line["value"] == pytest.approx(np.corrcoef(rewards[a], rewards[b])[0, 1], abs=1e-4)


def test_the_planted_kin_are_found(found):
    table = found.alike().set_index(["a", "b"])
    assert table.loc[("a", "b"), "inside"] > 0.95
    assert table.loc[("a", "b"), "inside_alike"]
    assert table.loc[("a", "b"), "inside"] > table.loc[("a", "c"), "inside"] + 0.3
    assert table.loc[("a", "b"), "same_training"]
    assert not table.loc[("a", "c"), "same_training"]
    said = found.findings()
    assert any(line.startswith("a and b are alike") and "inside" in line for line in said)
    assert any(line.startswith("Inside, policies trained on the same are +") for line in said)


def test_equal_policies_and_an_unchanged_one(base, options):
    one = changed(base.model, 1, scale=2.0)
    policies = {"one": handle(base, one), "twin": handle(base, copy.deepcopy(one)),
                "same": handle(base, copy.deepcopy(base.model))}  # fmt: skip
    found = compare_many(policies, base, options, depths=2, **QUICK)
    twins = found.pairs[(found.pairs["a"] == "one") & (found.pairs["b"] == "twin")].set_index("measure")[
        "value"
    ]
    assert twins["divergence"] == 0
    assert twins["same behaviour"] == 1
    assert twins["reward correlation"] == pytest.approx(1, abs=1e-9)
    assert twins["cka of changes"].to_numpy() == pytest.approx([1, 1], abs=1e-9)
    assert found.models.set_index("model")["kl"]["same"] == 0
    assert not {"same"} & set(found.alike()[["a", "b"]].to_numpy().ravel()), "nothing changed in it"
    assert found.matrix("divergence").loc[found.models["model"][0], "same"] == 0


def test_maps_show_the_distances_with_their_stress(found):
    for by, measure in (("inside", "cka"), ("behaviour", "same behaviour"), ("reward", "reward correlation")):
        places, stress = found.map(by)
        table = found.matrix(measure)
        assert places["model"].tolist() == table.index.tolist()
        wanted = 1 - table.to_numpy()
        at = places[["x", "y"]].to_numpy()
        seen = np.linalg.norm(at[:, None] - at[None], axis=-1)
        upper = np.triu_indices(len(at), 1)
        by_hand = np.sqrt(((seen - wanted)[upper] ** 2).sum() / max((seen[upper] ** 2).sum(), 1e-30))
        assert stress == pytest.approx(by_hand, abs=5e-3)
        assert np.abs(seen - wanted).max() <= 0.2 * wanted.max() + 1e-9
    inside = found.pairs[found.pairs["measure"] == "cka"]
    even = dataclasses.replace(found, pairs=inside.assign(value=0.5))
    assert even.map("inside")[1] > 0.1, "four models at one distance do not fit into a plane"
    with pytest.raises(InputError, match="unknown map 'colour'"):
        found.map("colour")
    with pytest.raises(InputError, match="unknown measure"):
        found.matrix("kl")


def test_nulls_hold_for_unrelated_changes():
    """Of changes that have nothing to do with each other about one in twenty lies above the null."""
    random, above = np.random.default_rng(0), 0
    for seed in range(40):
        ours, theirs = random.normal(size=(40, 8)), random.normal(size=(40, 8))
        found = of_changes(ours, theirs, np.arange(40), seed)
        above += found.low > found.null
    assert above <= 4
    same = of_changes(ours, ours @ np.linalg.qr(random.normal(size=(8, 8)))[0], np.arange(40), 0)
    assert same.value == pytest.approx(1, abs=1e-9), "a rotated basis is alike"
    assert same.low > same.null
    rewards = of_rewards(random.normal(size=60), random.normal(size=60), np.arange(60) // 2, 100, 0)
    assert rewards.low < rewards.null
    with_itself = of_rewards(ours[:, 0], ours[:, 0], np.arange(40), 100, 0)
    assert with_itself.value == pytest.approx(1)


def test_divergence_is_exactly_zero_for_equal_ones():
    logs = torch.randn(7, 50).log_softmax(-1)
    assert (jensen_shannon(logs, logs.clone()) == 0).all()
    far = torch.full((1, 2), -1e4)
    far[0, 0] = 0
    assert float(jensen_shannon(far, far.flip(1))) == pytest.approx(np.log(2))


def test_other_backbones_and_tokens(base, options):
    """Policies of two backbones: inside by CKA of changes, and no divergence where tokens differ."""
    tokenizer = other_tokenizer("causal")
    tokenizer.chat_template = None
    second = vd.load(make("qwen2", vocab_size=400), tokenizer=tokenizer, check=False)
    theirs = vd.load(changed(second.model, 1, scale=2.0), tokenizer=tokenizer, check=False)
    ours = three(base)["a"]
    found = compare_many(
        {"ours": ours, "theirs": theirs}, {"ours": base, "theirs": second}, options, depths=2, **QUICK
    )
    assert "divergence" not in set(found.pairs["measure"])
    pair = found.pairs[(found.pairs["a"] == "ours") & (found.pairs["b"] == "theirs")]
    assert not pair["same_reference"].any()
    assert pair[pair["measure"] == "cka of changes"]["value"].notna().any()
    assert "do not share their tokens" in " ".join(found.facts["notes"])
    assert len(found.alike()) == 1


def test_it_is_kept_and_shown(found, tmp_path):
    found.save(tmp_path / "kept")
    loaded = vd.load_result(tmp_path / "kept")
    assert isinstance(loaded, Policies)
    pd.testing.assert_frame_equal(loaded.pairs, found.pairs)
    assert loaded.findings() == found.findings()
    figure = found.figure("alike")
    assert any("swapped texts" in str(trace.name) for trace in figure.data)
    titles = [note.text for note in found.figure("map").layout.annotations]
    assert len(titles) == 4
    assert all("stress" in title for title in titles)
    assert "alike" in vd.report([found], tmp_path / "report.html").read_text()
    with pytest.raises(InputError, match="unknown figure"):
        found.figure("maps")


def test_what_does_not_fit_is_refused(base, options):
    one = three(base)
    with pytest.raises(InputError, match="expected two or more"):
        compare_many({"a": one["a"]}, base, options)
    with pytest.raises(InputError, match="expected several"):
        compare_many("tiny-liar", base, options)
    with pytest.raises(InputError, match="two policies are called"):
        compare_many([one["a"], one["b"]], base, options)
    with pytest.raises(InputError, match="differ in 'b'"):
        compare_many({"a": one["a"], "b": one["b"]}, {"a": base}, options)
    with pytest.raises(InputError, match="trained_on has 1 entries for 2"):
        compare_many({"a": one["a"], "b": one["b"]}, base, options, trained_on=["x"])
    with pytest.raises(InputError, match="both tiny-liar; expected the model that the policy started from"):
        compare_many({"a": "tiny-liar", "b": one["b"]}, "tiny-liar", options)
    with pytest.raises(DataError, match="expected 4 or more"):
        compare_many({"a": one["a"], "b": one["b"]}, base, TEXTS[:2], **QUICK)
