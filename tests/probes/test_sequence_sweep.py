"""Probes over token sequences: forms of data, saving, sweeps, bad input."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_score
from sklearn.utils.estimator_checks import check_estimator

import veridical as vd
from sequence_data import ALL, every, sequences
from veridical.errors import DataError, NonFiniteError
from veridical.probes.attention import AttentionProbe
from veridical.probes.kinds import KINDS, kind
from veridical.probes.logistic import LogisticProbe
from veridical.probes.max_tokens import MaxTokenProbe
from veridical.probes.mean_tokens import MeanTokenProbe
from veridical.probes.packed import Layout
from veridical.probes.rolling import RollingProbe
from veridical.probes.sequence import Sequences

torch.set_num_threads(1)


# Forms of data


@every
def test_all_forms_of_data_give_the_same(make):
    x, y, _ = sequences("one", n=60, width=5, low=6, high=6)
    cube = np.stack(x)
    rows = np.repeat(np.arange(60) * 2 + 5, 6)
    forms = [cube, torch.from_numpy(cube), [torch.from_numpy(t) for t in x], Sequences.of(x)]
    forms.append(Sequences.of(np.concatenate(x), rows=rows))
    probe = make(C=0.1).fit(x, y)
    for form in forms:
        assert np.array_equal(make(C=0.1).fit(form, y).coef_, probe.coef_)
        assert np.array_equal(probe.decision_function(form), probe.decision_function(x))
    low = [torch.from_numpy(t).to(torch.bfloat16) for t in x]
    exact = [t.double().numpy() for t in low]
    assert np.array_equal(probe.decision_function(low), probe.decision_function(exact))


def test_sequences_can_be_picked():
    x, _, _ = sequences(n=9, width=3)
    made = Sequences.of(x)
    assert len(made) == 9
    assert np.array_equal(made[4].numpy(), x[4])
    assert np.array_equal(made[-1].numpy(), x[-1])
    some = made[[7, 2, 2]]
    assert [np.array_equal(some[i].numpy(), x[j]) for i, j in enumerate((7, 2, 2))] == [True] * 3
    np.testing.assert_allclose(made.means().numpy(), [t.mean(0) for t in x])
    assert len(made[np.arange(9) > 5]) == 3
    with pytest.raises(IndexError):
        made[9]


@pytest.mark.parametrize("seed", range(3))
def test_the_layout_holds_every_token_once(seed):
    lengths = torch.from_numpy(np.random.default_rng(seed).integers(1, 8, 20))
    layout = Layout.of(lengths)
    assert sorted(layout.tokens.tolist()) == list(range(int(lengths.sum())))
    owner = torch.repeat_interleave(torch.arange(20), lengths)
    for position, first, last, count in layout.blocks():
        assert last - first == count
        tokens = layout.tokens[first:last]
        assert torch.equal(owner[tokens], layout.order[:count])
        begins = torch.cumsum(lengths, 0) - lengths
        assert torch.equal(tokens - begins[owner[tokens]], torch.full((count,), position))


def test_works_in_sklearn_tools():
    x, y, _ = sequences("one", n=200, shift=4.0)
    probe = clone(MaxTokenProbe(C=0.01))
    assert cross_val_score(probe, x, y, scoring="roc_auc").mean() > 0.9
    assert cross_val_score(probe, Sequences.of(x), y, scoring="roc_auc").mean() > 0.9


@every
@pytest.mark.filterwarnings("ignore")
def test_sklearn_accepts_the_estimator(make):
    """A plain matrix holds sequences of one token each, so scikit-learn's own checks apply."""
    check_estimator(make())


# Saving


@every
def test_a_saved_probe_gives_the_same_numbers(make, tmp_path):
    x, y, _ = sequences("one", n=60, width=5)
    probe = make(C=0.1).fit(x, np.array(["no", "yes"])[y])
    loaded = vd.load_probe(probe.save(tmp_path / "p"))
    assert type(loaded) is type(probe)
    assert loaded.get_params() == probe.get_params()
    assert np.array_equal(loaded.decision_function(x), probe.decision_function(x))
    assert np.array_equal(loaded.token_scores(x[0]), probe.token_scores(x[0]))
    assert loaded.predict(x).tolist() == probe.predict(x).tolist()
    assert "one for each sequence" in (tmp_path / "p" / "README.md").read_text()


def test_every_estimator_is_known_by_name():
    for make in ALL:
        probe = make()
        assert kind(probe.name) is type(probe)
        assert KINDS[probe.name] == type(probe).__name__


# Sweeps

QUICK = {"bootstrap": 50, "shuffles": 3, "text_baseline": False, "progress": False, "strengths": (0.001, 0.1)}


def sweep_data(n=240, **options):
    x, y, direction = sequences("one", n=n, width=6, shift=5.0, high=12, **options)
    noise, _, _ = sequences("noise", n=n, width=6, high=12, seed=9)
    noise = [np.random.default_rng(i).normal(size=t.shape) for i, t in enumerate(x)]
    return {"noise": noise, "signal": x}, y, np.repeat(np.arange(n // 2), 2), direction


@every
def test_a_sweep_finds_the_site_and_reports_what_every_sweep_does(make):
    acts, y, pairs, direction = sweep_data()
    sweep = vd.fit_probes(acts, probe=make(), target=y, groups=pairs, **QUICK)
    frame = sweep.to_frame().set_index("site")
    assert sweep.best_site == "signal"
    assert frame.loc["signal", "auroc"] > (0.75 if make is MeanTokenProbe else 0.9)
    assert frame.loc["noise", "auroc_low"] < 0.6
    assert sweep["signal"].metrics["auroc"].value > sweep.selected_control.mean() + 0.2
    assert sweep.counts["fit_pairs"] + sweep.counts["test_pairs"] == 120
    assert any("length alone has AUROC" in note for note in sweep.notes)
    assert sweep.best().direction_ @ direction > 0.8
    assert "AUROC" in repr(sweep)
    said = sweep.report_section().text
    assert f"fitted on {sweep.counts['fit_vectors']} sequences of" in said
    assert " vectors" not in said
    assert "sequences" in sweep.calibration().report_section().text
    sweep.figure()


@every
def test_a_probe_of_a_sweep_is_the_estimator_fitted_by_hand(make):
    acts, y, pairs, _ = sweep_data()
    split = np.where(pairs < 80, "train", "test")
    sweep = vd.fit_probes(
        acts, probe=make(), target="label", rows={"label": y, "pair": pairs, "split": split}, **QUICK
    )
    probe, result = sweep.best(), sweep["signal"]
    fitted = [t for t, part in zip(acts["signal"], split) if part == "train"]
    by_hand = type(probe)(**probe.get_params()).fit(fitted, y[split == "train"])
    np.testing.assert_allclose(probe.coef_, by_hand.coef_, rtol=1e-4, atol=1e-6)
    held = [t for t, part in zip(acts["signal"], split) if part == "test"]
    wanted = roc_auc_score(y[split == "test"], by_hand.decision_function(held))
    assert result.metrics["auroc"].value == pytest.approx(wanted, abs=1e-9)


def test_a_sweep_loads_as_it_was_saved(tmp_path):
    acts, y, pairs, _ = sweep_data()
    sweep = vd.fit_probes(acts, probe=AttentionProbe(heads=2), target=y, groups=pairs, **QUICK)
    sweep.save(tmp_path / "sweep")
    loaded = type(sweep).load(tmp_path / "sweep")
    for result, other in zip(sweep.results, loaded.results):
        x = acts[result.site]
        assert np.array_equal(result.probe.decision_function(x), other.probe.decision_function(x))
    pd.testing.assert_frame_equal(sweep.to_frame(), loaded.to_frame())


def test_a_sweep_gives_texts_firing_rates_and_says_when_there_are_no_pairs():
    acts, y, pairs, _ = sweep_data()
    told = np.ones(240, dtype=bool)
    rows = {"lied": y == 1, "confused": np.zeros(240, dtype=bool), "refused_to_lie": y == 0}
    rows |= {"instructed_to_lie": told, "pair": pairs}
    texts = [f"text {i}" for i in range(240)]
    options = {**QUICK, "text_baseline": True}
    sweep = vd.fit_probes(acts, probe="max_tokens", target="lied", rows=rows, texts=texts, **options)
    assert sweep.text is not None
    firing = sweep.firing_frame().set_index("rows_of")
    assert firing.loc["lied", "fires_balanced"] > 0.8
    assert firing.loc["refused_to_lie", "fires_balanced"] < 0.3
    assert firing.loc["lied", "rows"] == sweep.counts["test_positive"]
    alone = vd.fit_probes(acts, probe="mean_tokens", target=y, **QUICK)
    assert any("each sequence is its own pair" in note for note in alone.notes)


def test_a_store_with_several_tokens_per_row_is_read_by_row(hooked):
    model = hooked("llama")
    random = np.random.default_rng(0)
    words = ["the", "capital", "of", "France", "is", "Paris", "and", "Rome", "silver", "gold", "true"]
    prompts = [" ".join(random.choice(words, random.integers(3, 9))) for _ in range(60)]
    data = pd.DataFrame(
        {
            "pair": np.repeat(np.arange(30), 2),
            "prompt": [f"{p}{' yes' if i % 2 else ' no'}" for i, p in enumerate(prompts)],
            "label": np.tile([False, True], 30),
        }
    )
    acts = vd.collect(model, vd.Pairs.from_pandas(data), sites="resid_post.0", tokens="all", progress=False)
    assert len(acts) > 150
    sweep = vd.fit_probes(acts, probe="max_tokens", **{**QUICK, "strengths": (0.1, 10.0)})
    assert sweep.counts["fit_vectors"] + sweep.counts["test_vectors"] == 60
    assert sweep[sweep.best_site].metrics["auroc"].value > 0.9
    site = acts.sites[0]
    sequences = Sequences.of(acts[site], rows=acts.index["row"])
    scores = sweep.best().decision_function(sequences)
    assert scores.shape == (60,)
    row = acts.index["row"].to_numpy()
    one = sweep.best().decision_function([acts[site][row == 17]])
    assert scores[17] == pytest.approx(one[0])
    view = vd.view_tokens(model, sweep.best(), str(data["prompt"][17]))
    np.testing.assert_allclose(
        view.to_frame()["decision"], sweep.best().token_scores(acts[site][row == 17]), atol=1e-4
    )


# Bad input


def test_bad_data_is_refused_in_one_line():
    x, y, _ = sequences(n=20, width=3)
    probe = MaxTokenProbe().fit(x, y)
    broken = [t.copy() for t in x]
    broken[3][1, 0] = np.inf
    wide = [*x[:-1], np.zeros((2, 4))]
    bad = [
        (lambda: MaxTokenProbe().fit(x, y[:-1]), r"y has shape \(19,\); expected one label for each of 20"),
        (lambda: MaxTokenProbe().fit(x, None), "y is None"),
        (lambda: MaxTokenProbe().fit(x, np.zeros(20)), "one class only"),
        (lambda: MaxTokenProbe().fit(broken, y), "NaN or infinity, the first in sequence 3"),
        (lambda: MaxTokenProbe().fit(wide, y), "sequence 19 has vectors of width 4; the first has 3"),
        (lambda: MaxTokenProbe().fit([*x[:-1], np.zeros((0, 3))], y), "sequence 19 has no tokens"),
        (lambda: MaxTokenProbe().fit([*x[:-1], np.zeros(3)], y), r"sequence 19 has shape \(3,\)"),
        (lambda: probe.decision_function([np.zeros((2, 5))]), "5 features; the probe reads 3"),
        (lambda: Sequences.of(np.zeros((4, 3)), rows=[0, 1, 0, 1]), "sequence 0 do not stand together"),
        (lambda: Sequences.of(np.zeros((4, 3)), rows=[0, 1]), r"rows has shape \(2,\)"),
        (lambda: Sequences.of(np.zeros(4)), r"sequences have shape \(4,\)"),
        (lambda: MaxTokenProbe(C=0).fit(x, y), "C is 0"),
        (lambda: MaxTokenProbe(tol=0).fit(x, y), "tol is 0"),
        (lambda: MaxTokenProbe(max_iter=0).fit(x, y), "max_iter is 0"),
        (lambda: RollingProbe(window=0).fit(x, y), "window is 0"),
        (lambda: AttentionProbe(heads=0).fit(x, y), "heads is 0"),
        (lambda: probe.scores(LogisticProbe().space(torch.eye(4)), torch.zeros(7, 1)), "not of sequences"),
    ]
    for call, said in bad:
        with pytest.raises(DataError, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_bad_sweep_is_refused_in_one_line():
    acts, y, pairs, _ = sweep_data(n=60)
    with pytest.raises(DataError, match="dict of activations is empty"):
        vd.fit_probes({}, probe="max_tokens", target=y)
    with pytest.raises(DataError, match="sequences at signal have other lengths than those at noise"):
        vd.fit_probes(
            {**acts, "signal": [*acts["signal"][:-1], np.zeros((99, 6))]}, probe="mil", target=y, **QUICK
        )
    with pytest.raises(DataError, match="target has shape"):
        vd.fit_probes(acts, probe="mil", target=y[:-1], groups=pairs, **QUICK)
    acts["signal"][4][1, 2] = np.nan
    with pytest.raises(NonFiniteError, match="site signal"):
        vd.fit_probes(acts, probe="mil", target=y, groups=pairs, **QUICK)
