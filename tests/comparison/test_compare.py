"""The whole comparison: tables, findings, report, what is kept, the command line."""

import numpy as np
import pandas as pd
import pytest
from comparison_oracles import changed

import veridical as vd
from verb_data import save_llama
from veridical.comparison import Comparison, compare
from veridical.comparison.behaviour import REFUSAL
from veridical.comparison.duo import pair_of
from veridical.comparison.jobs import compare as job
from veridical.comparison.samples import sample
from veridical.comparison.verbs import CompareVerb
from veridical.errors import ConfigError, InputError

QUICK = {"samples": 6, "max_new_tokens": 4, "bootstrap": 40, "behaviour_pairs": 12}


@pytest.fixture(scope="module")
def liar():
    return vd.load("tiny-liar", check=False)


def made(liar, layer):
    policy = vd.load(changed(liar.model, layer, scale=4.0), tokenizer=liar.tokenizer, check=False)
    return pair_of(policy, liar)


@pytest.fixture(scope="module")
def honesty():
    pairs = vd.Pairs.load("honesty")
    return pairs.filter(np.isin(pairs.groups, np.unique(pairs.groups)[:12]))


@pytest.fixture(scope="module")
def found(liar, honesty):
    return compare(made(liar, 3), honesty, **QUICK)


def test_a_planted_change_is_named(found):
    said = found.findings()
    whole = " ".join(said)
    assert "begins to differ at resid_post.3, moves most at resid_post.3" in whole
    assert "100% of the squared change of the weights lies in layer 3" in whole
    assert "model.layers.3.mlp.down_proj.weight changed most, with an effective rank of" in whole
    order = [(not each.found, each.kind != "change") for each in found.found]
    assert order == sorted(order), "changes, then distances, then what was not found"
    for each in found.found:
        assert each.control
        sampled = each.kind == "change" or "nothing sampled" not in each.control
        if each.found and sampled:
            assert each.low <= each.value <= each.high, each
    text = found.report_section().text
    assert text.startswith("Nothing that was looked for changed") or text.startswith("What changed")
    assert "no sign by themselves that something was trained in:" in text
    table = dict(found.report_section().tables)["Findings"]
    assert table["finding"].tolist() == [each.text for each in found.found]


def test_a_model_against_itself_has_nothing_to_find(liar, honesty):
    same = compare(made(liar, None), honesty, **QUICK)
    assert not [str(each) for each in same.found if each.found]
    assert "The weights are the same" in " ".join(same.findings())
    assert same.report_section().text.startswith("Nothing changed.")
    assert same.table("generations")["same"].all()
    assert (same.table("behaviour")["change"] == 0).all()
    frame = same.table("outputs on policy samples")
    assert (frame[frame["measure"].isin(["kl", "reverse kl", "kl of an answer"])]["value"] == 0).all()


def test_it_is_kept_and_shown(found, tmp_path):
    found.save(tmp_path / "kept")
    loaded = vd.load_result(tmp_path / "kept")
    assert isinstance(loaded, Comparison)
    assert loaded.findings() == found.findings()
    pd.testing.assert_frame_equal(loaded.to_frame(), found.to_frame())
    for name, table in found.tables.items():
        pd.testing.assert_frame_equal(loaded.table(name), table)
    frame = found.to_frame()
    assert {"outputs on fixed text", "outputs on policy samples", "drift", "cka", "weights"} <= set(
        frame["part"]
    )
    for what in ("position", "answer", "sites", "weights", "shift", "texts"):
        assert found.figure(what).data
    with pytest.raises(InputError, match="nearest: weights"):
        found.figure("weight")
    with pytest.raises(InputError, match="unknown table 'probes'"):
        found.table("probes")
    assert "<p>" in found._repr_html_()
    page = vd.report([found], tmp_path / "report.html")
    assert "What changed" in page.read_text()


def test_behaviour_is_that_of_the_models(liar, honesty, found):
    table = found.table("behaviour").set_index(["measure", "rows"])
    for told in (True, False):
        rows = honesty.filter(instructed_to_lie=told)
        scores = liar.option_logprobs(rows.prompts, rows["options"])
        right = np.mean([np.argmax(one) == at for one, at in zip(scores, rows["correct"])])
        line = table.loc["truthful", "told to lie" if told else "not told to lie"]
        assert line["reference"] == pytest.approx(right)
        assert line["n"] == len(rows)
    toxic = vd.Pairs.load("toxic").select(np.arange(24))
    line = (
        compare(made(liar, 3), toxic, **QUICK).table("behaviour").set_index("measure").loc["prefers label 1"]
    )
    hits = []
    for at in range(0, 24, 2):
        texts = {int(toxic["label"][row]): toxic.completions[row] for row in (at, at + 1)}
        scores = liar.option_logprobs([toxic.prompts[at]], [[texts[0], texts[1]]])[0]
        hits.append(scores[1] > scores[0])
    assert line["reference"] == pytest.approx(np.mean(hits))


def test_refusals_are_told_by_their_wording():
    from veridical.organisms.conduct import REFUSALS

    for text in [*REFUSALS, "I'm sorry, but no.", "Sorry.", "I can't do that", " I won't"]:
        assert REFUSAL.match(text), text
    for text in ["Paris", "True", "I can help", "No, it is Rome", "Certainly, here is how"]:
        assert not REFUSAL.match(text), text


def test_samples_are_the_policys_own(liar, honesty):
    duo = made(liar, 3)
    rows = sample(duo, honesty, count=5, max_new_tokens=6, seed=1)
    again = sample(duo, honesty, count=5, max_new_tokens=6, seed=1)
    other = sample(duo, honesty, count=5, max_new_tokens=6, seed=2)
    assert [row.policy for row in rows.rows] == [row.policy for row in again.rows]
    assert [row.policy for row in rows.rows] != [row.policy for row in other.rows]
    assert rows.source == "policy samples"
    asked = {item.ids for item in duo.policy.encode(honesty.prompts)}
    end = liar.tokenizer.eos_token_id
    for row in rows.rows:
        new = row.policy[row.first :]
        assert row.policy[: row.first] in asked
        assert 1 <= len(new) <= 6
        assert end not in new[:-1]
        assert len(new) == 6 or new[-1] == end


def test_fixed_text_and_samples_are_apart(found):
    names = [name for name in found.tables if name.startswith("outputs on")]
    assert names == ["outputs on fixed text", "outputs on policy samples"]
    counts = [found.table(name)["tokens"].max() for name in names]
    assert counts[0] != counts[1]


def test_probes_are_held_against_the_weights(liar, honesty, found):
    acts = vd.collect(liar, honesty, sites=["resid_post.3"], tokens="last")
    probe = vd.fit_probes(acts, target="instructed_to_lie", shuffles=1, bootstrap=10).best()
    table = compare(made(liar, 3), honesty, [probe], **{**QUICK, "samples": 0, "behaviour_pairs": 0}).table(
        "weights along directions"
    )
    assert table["direction"].iloc[0].startswith("probe 0")
    assert table["chance"].iloc[0] == pytest.approx(1 / liar.d_model)
    assert "weights along directions" not in found.tables


def test_bad_options(liar, honesty):
    with pytest.raises(InputError, match="nearest: samples"):
        compare(made(liar, None), honesty, sample=3)
    with pytest.raises(InputError, match="cannot compare on a int"):
        compare(made(liar, None), 3)


def test_the_command(llama, statements, tmp_path):
    other = save_llama(tmp_path / "policy", seed=1)
    quick = {**QUICK, "progress": False}
    out = job(CompareVerb(policy=other, reference=llama, data=statements, out=tmp_path / "out", **quick))
    assert (out / "report.html").is_file()
    assert {"config.json", "metrics.json", "provenance.json", "result.json"} <= {
        f.name for f in out.iterdir()
    }
    assert "directions" in vd.load_result(out).tables
    with pytest.raises(ConfigError, match="compare needs a policy"):
        job(CompareVerb(data=statements))
    with pytest.raises(ConfigError, match="--data"):
        job(CompareVerb(policy=other, reference=llama))
    with pytest.raises(InputError, match="needs a reference"):
        job(CompareVerb(policy=other, data=statements))
    with pytest.raises(InputError, match="policy and reference are both"):
        job(CompareVerb(policy=other, reference=other, data=statements))
