"""Transfer between sets: who carries over to whom, and that nothing leaks on the way."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from veridical.errors import DataError, UnknownNameError
from veridical.probes import LogisticProbe
from veridical.probes.transfer import transfer_matrix
from veridical.reporting.section import Reportable

QUICK = {"folds": 4, "strengths": (0.01, 1.0), "bootstrap": 60, "text_baseline": False, "progress": False}
SITE = "blocks.3.hook_resid_post"


def make(feature, pairs=80, seed=0, shift=3.0, width=12):
    """Pairs of one row of each class, parted along one feature."""
    random = np.random.default_rng(seed)
    labels = np.tile([0, 1], pairs)
    x = random.normal(size=(2 * pairs, width))
    x[:, feature] += shift * (labels - 0.5)
    return x, pd.DataFrame({"label": labels, "pair": [f"{seed}-{i // 2}" for i in range(2 * pairs)]})


@pytest.fixture(scope="module")
def three():
    """Two sets along one direction, a third along another."""
    made = {
        name: make(feature, seed=seed)
        for seed, (name, feature) in enumerate({"a": 0, "b": 0, "c": 5}.items())
    }
    acts = {
        name: {SITE: x, "noise": np.random.default_rng(9).normal(size=x.shape)}
        for name, (x, _) in made.items()
    }
    return acts, {name: rows for name, (_, rows) in made.items()}


@pytest.fixture(scope="module")
def found(three):
    acts, rows = three
    return transfer_matrix(acts, rows=rows, **QUICK)


def test_a_shared_direction_carries_over_and_another_does_not(found):
    wide = found.matrix()
    assert (np.diag(wide) > 0.9).all()
    assert wide.loc["a", "b"] > 0.9
    assert wide.loc["b", "a"] > 0.9
    for cell in found.to_frame().to_dict("records"):
        if (cell["trained_on"] == "c") != (cell["tested_on"] == "c"):
            assert abs(cell["auroc"] - 0.5) < 0.2
    said = " ".join(found.findings())
    assert "Not surely better than chance" in said
    assert {probe.site for probe in found.probes.values()} == {SITE}


def test_cells_equal_plain_fits(three, found):
    acts, rows = three
    for a in "abc":
        probe = found.probes[a]
        plain = LogisticProbe(C=probe.C).fit(acts[a][SITE], rows[a]["label"])
        np.testing.assert_allclose(probe.coef_, plain.coef_, rtol=1e-6, atol=1e-9)
        for b in set("abc") - {a}:
            cell = found.to_frame().query("trained_on == @a and tested_on == @b").iloc[0]
            expected = roc_auc_score(rows[b]["label"], plain.decision_function(acts[b][SITE]))
            assert cell["auroc"] == pytest.approx(expected)
            assert cell["shared_pairs"] == 0
            assert cell["rows"] == 160


def test_pairs_in_both_sets_do_not_leak():
    """Every pair has a vector and a random label of its own: known from the other scenario, or not at all."""
    random = np.random.default_rng(0)
    pairs = np.repeat(np.arange(60), 2)
    x = np.repeat(random.normal(size=(60, 80)), 2, axis=0)
    rows = pd.DataFrame(
        {
            "pair": pairs,
            "label": np.repeat(random.random(60) < 0.5, 2),
            "scenario": np.tile(["spy", "quiz"], 60),
        }
    )
    plain = LogisticProbe().fit(x[::2], rows["label"][::2])
    assert roc_auc_score(rows["label"][1::2], plain.decision_function(x[1::2])) == 1
    found = transfer_matrix({SITE: x}, by="scenario", rows=rows, **QUICK)
    assert found.names == ("quiz", "spy")
    frame = found.to_frame()
    assert (abs(frame["auroc"] - 0.5) < 0.25).all()
    assert frame.query("trained_on != tested_on")["shared_pairs"].tolist() == [60, 60]
    assert frame["rows"].tolist() == [60] * 4
    # In separate stores the same names mean the same pairs.
    acts = {name: {SITE: x[i::2]} for i, name in enumerate(("spy", "quiz"))}
    tables = {name: rows[i::2] for i, name in enumerate(("spy", "quiz"))}
    other = transfer_matrix(acts, rows=tables, **QUICK).to_frame()
    assert (abs(other["auroc"] - 0.5) < 0.25).all()


def test_rows_without_pairs_are_not_taken_for_the_same_pairs(three):
    acts, rows = three
    bare = {name: table[["label"]] for name, table in rows.items()}
    frame = transfer_matrix(acts, rows=bare, **QUICK).to_frame()
    assert (frame["shared_pairs"] == 0).all()


def test_repeated_texts_under_other_pairs_are_left_out(three):
    acts, rows = three
    letters = np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz"), size=(3, 160, 8))
    words = {name: ["".join(word) for word in part] for name, part in zip(rows, letters)}
    tables = {name: table.assign(text=words[name]) for name, table in rows.items()}
    tables["b"].loc[:9, "text"] = tables["a"].loc[:9, "text"]
    found = transfer_matrix(acts, rows=tables, **{**QUICK, "text_baseline": True})
    frame = found.to_frame().set_index(["trained_on", "tested_on"])
    assert frame.loc[("a", "b"), "left_out"] == 10
    assert frame.loc[("a", "b"), "rows"] == 150
    assert frame.loc[("b", "a"), "left_out"] == 10
    assert frame["left_out"].sum() == 20
    assert any("20 tested rows repeat" in said for said in found.findings())
    assert (abs(frame["text_auroc"] - 0.5) < 0.2).all()
    assert frame.loc[("a", "b"), "lead_over_text_low"] > 0.2


def test_text_that_solves_one_set_is_seen_in_its_cells(three):
    acts, rows = three
    tables = {name: table.assign(text="word") for name, table in rows.items()}
    words = [f"{'yes' if y else 'no'} {i}" for i, y in enumerate(rows["a"]["label"])]
    tables["a"]["text"] = words
    for name in "bc":
        tables[name]["text"] = [f"thing {name} {i}" for i in range(160)]
    frame = transfer_matrix(acts, rows=tables, **{**QUICK, "text_baseline": True}).to_frame()
    cell = frame.query("trained_on == 'a' and tested_on == 'a'").iloc[0]
    assert cell["text_auroc"] > 0.99
    assert cell["lead_over_text_high"] < 0.1


def test_a_site_by_its_short_name_and_the_same_seed_gives_the_same(three):
    acts, rows = three
    one, two = (transfer_matrix(acts, rows=rows, site="resid_post.3", **QUICK) for _ in range(2))
    pd.testing.assert_frame_equal(one.to_frame(), two.to_frame(), check_exact=True)
    assert set(one.to_frame()["site"]) == {SITE}


def test_it_can_be_shown(found):
    assert isinstance(found, Reportable)
    assert "\n" not in repr(found)
    assert "<table" in found._repr_html_()
    heat = found.figure().data[0]
    np.testing.assert_allclose(np.array(heat.z, dtype=float), found.matrix().to_numpy())
    assert heat.text[0][0] == f"{found.matrix().iloc[0, 0]:.2f}"
    assert len(found.report_section().tables[0][1]) == 9


def test_bad_input_is_refused_in_one_line(three):
    acts, rows = three
    one_class = {**rows, "c": rows["c"].assign(label=1)}
    words = {**rows, "c": rows["c"].assign(label=np.where(rows["c"]["label"] == 1, "yes", "no"))}
    few = ({**acts, "c": {s: x[:6] for s, x in acts["c"].items()}}, {**rows, "c": rows["c"][:6]})
    bad = [
        (DataError, "label has one class only", acts, {"rows": one_class}),
        (DataError, "expected the same two classes", acts, {"rows": words}),
        (DataError, "1 set arrived", {"a": acts["a"]}, {"rows": {"a": rows["a"]}}),
        (DataError, "3 pairs are left to fit the probe of c on 4 folds", *few[:1], {"rows": few[1]}),
        (DataError, "means nothing to a transfer matrix", acts, {"rows": rows, "shuffles": 3}),
        (DataError, "no site in common", {**acts, "c": {"other": acts["c"][SITE]}}, {"rows": rows}),
        (DataError, "expected a dict of name", [acts], {"rows": rows}),
        (DataError, "expected 2 to 40", acts["a"], {"rows": rows["a"], "by": "pair"}),
        (UnknownNameError, "unknown site", acts, {"rows": rows, "site": "resid_post.4"}),
        (UnknownNameError, "unknown column 'lied'", acts, {"rows": rows, "target": "lied"}),
        (UnknownNameError, "unknown set 'd'", acts, {"rows": {**rows, "d": rows["a"]}}),
        (UnknownNameError, "nearest: label", acts["a"], {"rows": rows["a"], "by": "labl"}),
    ]
    for kind, said, given, options in bad:
        with pytest.raises(kind, match=said) as caught:
            transfer_matrix(given, **{**QUICK, **options})
        assert "\n" not in str(caught.value)
