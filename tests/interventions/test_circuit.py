"""Finding circuits: known ones in micro-models, exact ends, pruning, held-out rows, controls, saving."""

import micro
import numpy as np
import pytest
import torch

import veridical as vd
from tiny_models import make
from veridical.errors import InputError, ModelError, UnknownNameError
from veridical.interventions.circuit import find_circuit
from veridical.interventions.connected import connected, random_circuit
from veridical.interventions.graph import Graph
from veridical.interventions.paths import patch_paths

METHODS = ["edges", "exact"]


def rows(count=12, length=6, seed=0):
    random = torch.Generator().manual_seed(seed)
    clean, corrupt = torch.randint(3, 299, (2, count, length), generator=random)
    return clean, corrupt


def given(texts):
    return {"metric": "logit_diff", "answers": texts.answers, "wrong": texts.wrong}


@pytest.fixture(scope="module")
def exact_llama():
    return vd.load(make("llama").double(), check=False)


# Known circuits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", micro.FAMILIES)
@pytest.mark.parametrize("what", ["key", "query", "value"])
def test_induction_is_found(family, what, method):
    """Nothing but the edges that were written by hand, at every size from theirs on."""
    sharpness = micro.EXACT if method == "exact" else micro.SOFT
    model = micro.handle(micro.induction(family, sharpness=sharpness))
    texts = micro.contrast(what, rows=12)
    found = find_circuit(
        model, texts.clean, texts.corrupt, method=method, controls=2, **given(texts), prune=0.01
    )
    assert set(found.edges) == micro.edges(texts.truth, family)
    assert found.faithfulness == pytest.approx(1, abs=0.02)
    assert found.without == pytest.approx(0, abs=0.02)
    assert found.random.max() < 0.5


def test_chain_is_found():
    texts = micro.chain_texts()
    found = find_circuit(
        micro.handle(micro.chain()), texts.clean, texts.corrupt, method="exact", keep=3, **given(texts)
    )
    assert set(found.edges) == set(micro.CHAIN)
    np.testing.assert_allclose(found.scores, micro.chain_texts().truth.effect, rtol=1e-5)
    assert found.faithfulness == pytest.approx(1, rel=1e-6)
    assert found.without == pytest.approx(0, abs=1e-6)


def test_circuit_among_noise():
    """Heads and MLPs that add a little of their own: the written edges still come first."""
    texts = micro.contrast("key", rows=12)
    model = micro.handle(micro.induction("gpt2", noise=0.005))
    found = find_circuit(model, texts.clean, texts.corrupt, method="exact", faithfulness=0.95, **given(texts))
    assert set(found.edges) == micro.edges(texts.truth, "gpt2")


# Exact ends, and measured values


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "gemma3", "olmo2"])
def test_empty_is_corrupt_and_full_is_clean(name):
    model = vd.load(make(name).double(), check=False)
    clean, corrupt = rows(4)
    found = find_circuit(
        model, clean, corrupt, metric="logit_diff", answers=9, wrong=10, method="exact", keep=0.5, controls=0
    )
    np.testing.assert_allclose(found.curve["faithfulness"].iloc[[0, -1]], [0, 1], atol=1e-12)
    assert found.curve["edges"].tolist()[0] == 0
    assert found.curve[["edges", "kept"]].iloc[-1].tolist() == [found.facts["all_edges"]] * 2


def test_faithfulness_is_that_of_patching_all_other_edges(exact_llama):
    clean, corrupt = rows(12)
    metric = {"metric": "logit_diff", "answers": 9, "wrong": 10}
    found = find_circuit(exact_llama, clean, corrupt, **metric, method="exact", keep=90, controls=2)
    outside = [edge.name for edge in found.graph.edges if edge.name not in found.edges]
    sets = [outside, list(found.edges)]
    exact = patch_paths(exact_llama, clean, corrupt, **metric, edges=sets, direction="noising")
    for held, column in ((found.choosing, "faithfulness"), (found.held_out, "held_out")):
        low, high = exact.corrupt[held].mean(), exact.clean[held].mean()
        expected = (exact.values[:, held].mean(1) - low) / (high - low)
        np.testing.assert_allclose(found.checks[column].iloc[:2], expected, rtol=1e-9)
    assert found.faithfulness == found.checks["held_out"].iloc[0]
    assert sorted([*found.choosing, *found.held_out]) == list(range(12))
    assert len(found.held_out) == 6


def test_held_out_rows_have_no_part_in_the_choice(exact_llama):
    """Other texts in the held-out rows change no edge, score or faithfulness on the choosing rows."""
    clean, corrupt = rows(12)
    metric = {"metric": "logit_diff", "answers": 9, "wrong": 10}
    for method in METHODS:
        first = find_circuit(exact_llama, clean, corrupt, **metric, method=method, controls=1)
        other = clean.clone()
        other[first.held_out] = other[first.held_out].flip(1)
        second = find_circuit(exact_llama, other, corrupt, **metric, method=method, controls=1)
        assert second.edges == first.edges
        np.testing.assert_allclose(second.scores, first.scores, rtol=1e-9)
        np.testing.assert_allclose(second.curve["faithfulness"], first.curve["faithfulness"], atol=1e-9)
        assert abs(second.faithfulness - first.faithfulness) > 1e-6


def test_pairs_stay_together(hooked):
    clean = vd.Pairs.from_pandas(_table("clean"))
    corrupt = vd.Pairs.from_pandas(_table("corrupt"))
    found = find_circuit(
        hooked("llama"), clean, corrupt, metric="logit_diff", answers=9, wrong=10, method="exact",
        keep=20, controls=1,
    )  # fmt: skip
    assert len(found.held_out) == 6
    assert np.isfinite(found.checks["held_out_low"].iloc[0])


def _table(side):
    import pandas as pd

    words = ["capital", "symbol", "answer", "lie"]
    texts = [
        f"the {words[i % 4]} of {'France' if side == 'clean' else 'Italy'} is" + " no" * (i // 4)
        for i in range(12)
    ]
    return pd.DataFrame({"pair": range(12), "prompt": texts, "label": side == "clean"})


def test_smallest_faithful_circuit(exact_llama):
    clean, corrupt = rows(6)
    metric = {"metric": "logit_diff", "answers": 9, "wrong": 10}
    found = find_circuit(exact_llama, clean, corrupt, **metric, method="exact", faithfulness=0.9, controls=0)
    assert abs(found.checks["faithfulness"].iloc[0] - 1) <= 0.1
    fewer = find_circuit(
        exact_llama, clean, corrupt, **metric, method="exact", keep=len(found) - 1, controls=0
    )
    assert abs(fewer.checks["faithfulness"].iloc[0] - 1) > 0.1


def test_pruning_equals_one_removal_at_a_time(exact_llama):
    """ACDC's loop, one run for each edge, from the logits down and the weakest first."""
    clean, corrupt = rows(4)
    metric = {"metric": "logit_diff", "answers": 9, "wrong": 10}
    options = {**metric, "method": "exact", "keep": 60, "controls": 0}
    whole = find_circuit(exact_llama, clean, corrupt, **options)
    found = find_circuit(exact_llama, clean, corrupt, **options, prune=0.05)
    graph, every = whole.graph, {edge.name for edge in whole.graph.edges}

    def share(kept):
        run = patch_paths(
            exact_llama, clean, corrupt, **metric, edges=[sorted(every - kept)], direction="noising"
        )
        return (run.values[0].mean() - run.corrupt.mean()) / (run.clean.mean() - run.corrupt.mean())

    ranks = dict(zip(whole.edges, whole.ranks))
    order = sorted(ranks, key=lambda e: (-graph.receiver_number(graph.edge(e).receiver), -ranks[e]))
    kept = set(whole.edges)
    now = share(kept)
    for edge in order:
        value = share(kept - {edge})
        if abs(value - now) < 0.05:
            kept, now = kept - {edge}, value
    assert set(found.edges) == {
        e.name for e in connected(graph, [graph.edge(e) for e in whole.edges if e in kept])
    }
    assert 0 < len(found) < len(whole)


# Edges on a way


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "olmo2"])
def test_edges_that_lead_nowhere_change_nothing(name):
    model = vd.load(make(name).double(), check=False)
    graph, random = Graph.of(model), np.random.default_rng(0)
    edges = [edge for edge in graph.edges if random.random() < (0.5 if name == "olmo2" else 0.25)]
    kept = connected(graph, edges)
    assert 0 < len(kept) < len(edges)
    sets = [[e.name for e in graph.edges if e not in set(inside)] for inside in (edges, kept)]
    clean, corrupt = rows(3)
    found = patch_paths(
        model, clean, corrupt, metric="logit_diff", answers=9, wrong=10, edges=sets, direction="noising"
    )
    np.testing.assert_allclose(found.values[0], found.values[1], rtol=1e-10)


def test_ways_by_hand(hooked):
    graph = Graph.of(hooked("llama"))  # heads 0 and 1 share keys and values

    def kept(*names):
        return [edge.name for edge in connected(graph, [graph.edge(name) for name in names])]

    assert kept("embed->head.0.0:k", "head.0.1->logits") == ["embed->head.0.0:k", "head.0.1->logits"]
    assert kept("embed->head.0.0:k", "head.0.2->logits") == []
    assert kept("embed->head.0.0:q", "head.0.1->logits") == []
    assert kept("embed->mlp.0", "mlp.0->mlp.1", "mlp.2->logits", "embed->logits") == ["embed->logits"]


@pytest.mark.parametrize("size", [1, 7, 100, 1000])
def test_random_circuits_have_the_size_and_are_on_ways(hooked, size):
    graph = Graph.of(hooked("llama"))
    made = random_circuit(graph, size, np.random.default_rng(0))
    assert len(made) == len(set(made)) == min(size, len(graph))
    assert set(made) <= set(graph.edges)
    again = random_circuit(graph, size, np.random.default_rng(0))
    other = random_circuit(graph, size, np.random.default_rng(1))
    assert made == again
    assert size >= len(graph) or made != other
    if size >= 7:
        assert len(connected(graph, made)) >= min(size, len(graph)) - 5


# Given circuits, options, results


def test_a_circuit_of_your_own_is_checked():
    texts = micro.contrast("key", rows=12)
    model = micro.handle(micro.induction("gpt2"))
    names = [*micro.edges(texts.truth, "gpt2"), "embed->head.1.3:q"]
    found = find_circuit(
        model, texts.clean, texts.corrupt, **given(texts), edges=names, method="exact", controls=1
    )
    assert set(found.edges) == set(names[:-1])
    assert found.faithfulness == pytest.approx(1, abs=1e-4)


def test_own_function_as_metric(hooked):
    clean, corrupt = rows(12)
    found = find_circuit(
        hooked("llama"), clean, corrupt, metric=lambda x: x[:, -1, 9] - x[:, -1, 10], keep=40, controls=1
    )
    named = find_circuit(
        hooked("llama"), clean, corrupt, metric="logit_diff", answers=9, wrong=10, keep=40, controls=1
    )
    assert found.edges == named.edges
    assert len(found.held_out) == 6


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "acdc"}, "unknown method 'acdc'"),
        ({"keep": 0}, "expected a number of edges"),
        ({"keep": 3.5}, "expected a number of edges"),
        ({"faithfulness": 1.5}, "at most 1"),
        ({"prune": 0}, "expected a change of faithfulness"),
        ({"holdout": 1}, "expected a share of the rows"),
        ({"controls": -1}, "number of random circuits"),
        ({"edges": ["embed->head.9.0:q"]}, "unknown receiver 'head.9.0:q'; nearest"),
    ],
)
def test_refused_in_one_line(hooked, options, match):
    clean, corrupt = rows(3)
    with pytest.raises(InputError, match=match) as raised:
        find_circuit(hooked("llama"), clean, corrupt, metric="logit_diff", answers=9, wrong=10, **options)
    assert "\n" not in str(raised.value)


def test_nothing_to_explain_is_refused(hooked):
    clean, _ = rows(3)
    with pytest.raises(InputError, match="the same on clean and corrupt rows"):
        find_circuit(hooked("llama"), clean, clean, metric="logit_diff", answers=9, wrong=10)


def test_models_that_do_not_add_up_are_refused(hooked):
    clean, corrupt = rows(3)
    with pytest.raises(ModelError, match="not the sum of its parts"):
        find_circuit(hooked("bert"), clean, corrupt, metric=lambda x: x[:, -1, 0])


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_figures_report_and_saving(hooked, tmp_path, name):
    clean, corrupt = rows(12)
    found = find_circuit(
        hooked(name),
        clean,
        corrupt,
        metric="logit_diff",
        answers=9,
        wrong=10,
        method="exact",
        keep=60,
        controls=3,
    )
    frame = found.to_frame()
    assert frame["rank"].is_monotonic_increasing
    assert frame["score"].abs().is_monotonic_decreasing
    figure = found.figure()
    shown = next(trace for trace in figure.data if trace.mode == "markers")
    assert len(shown.x) == len(found)
    labels = next(trace for trace in figure.data if trace.mode == "markers+text")
    drawn = {edge.sender.name for edge in map(found.graph.edge, found.edges)}
    assert drawn <= set(labels.hovertext)
    assert len(found.random) == 3
    assert found.curve["random"].notna().sum() >= 3
    section = found.report_section()
    assert len(section.figures) == 2
    assert "held-out rows" in section.text
    again = type(found).load(found.save(tmp_path / "circuit"))
    assert again.findings() == found.findings()
    assert again.to_frame().equals(frame)
    assert again.curve.equals(found.curve)
    assert again.graph == found.graph


def test_the_same_for_the_same_seed(hooked):
    clean, corrupt = rows(12)
    options = {
        "metric": "logit_diff",
        "answers": 9,
        "wrong": 10,
        "method": "exact",
        "keep": 40,
        "controls": 2,
    }
    first, second = (find_circuit(hooked("llama"), clean, corrupt, **options) for _ in range(2))
    other = find_circuit(hooked("llama"), clean, corrupt, **options, seed=1)
    assert first.edges == second.edges
    assert first.checks.equals(second.checks)
    assert not first.checks.equals(other.checks)


def test_unknown_edges_name_the_nearest(hooked):
    clean, corrupt = rows(3)
    with pytest.raises(UnknownNameError, match=r"nearest: mlp\.0"):
        find_circuit(
            hooked("llama"), clean, corrupt, metric="logit_diff", answers=9, wrong=10, edges=["mpl.0->logits"]
        )
