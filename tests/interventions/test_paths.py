"""Edge and path patching against a receiver at a time, micro-models worked out by hand."""

import random
import warnings

import micro
import numpy as np
import pytest
import torch
from rewiring_oracle import CLEAN, CORRUPT, Slow, metric

import veridical as vd
from tiny_models import TINY, make
from veridical.errors import InputError
from veridical.interventions.inputs import Inputs
from veridical.interventions.metrics import Metric
from veridical.interventions.paths import patch_paths

SINGLE = ("mixtral", "qwen3_moe")  # their kernels take no float64
BARE = ("gemma2",)  # float64 rows of padding are NaN in its own eager attention
FAMILIES = [name for name in TINY if name not in ("bert", "opt_post_norm")]


@pytest.fixture(scope="module")
def case():
    """Model in the exactest format that it has, its rows, and the slow reference (corrupt is the base)."""
    made = {}

    def get(name):
        if name not in made:
            module = make(name)
            model = vd.load(module if name in SINGLE else module.double(), check=False)
            if model.kind == "vision":
                torch.manual_seed(0)
                clean, corrupt = torch.randn(2, 2, 3, 24, 24, dtype=torch.float64)
                base, other = {"pixel_values": corrupt}, {"pixel_values": clean}
                at = None
            else:
                rows = slice(0, 1) if name in BARE else slice(None)
                clean, corrupt = CLEAN[rows], CORRUPT[rows]
                base, other = (model.batch(side, padding_side="left") for side in (corrupt, clean))
                at = base["attention_mask"].bool()
            with torch.no_grad():
                made[name] = model, clean, corrupt, Slow(model, base, other, at)
        return made[name]

    return get


def close(name, found, expected):
    tolerance = 2e-5 if name in SINGLE else 1e-12
    np.testing.assert_allclose(found, expected.numpy(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", FAMILIES)
def test_sets_of_edges_equal_one_receiver_at_a_time(case, name):
    model, clean, corrupt, slow = case(name)
    draw = random.Random(0)
    sets = [[edge.name for edge in slow.graph.edges if draw.random() < share] for share in (0.05, 0.5, 0.9)]
    found = patch_paths(model, clean, corrupt, metric=metric, edges=sets)
    with torch.no_grad():
        for i, names in enumerate(sets):
            close(name, found.values[i], metric(slow.edges(set(names))))
    assert (found.effects != 0).all()


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "gemma3", "opt"])
@pytest.mark.parametrize("batch_tokens", [64, 8192])
def test_each_edge_alone(case, name, batch_tokens):
    model, clean, corrupt, slow = case(name)
    found = patch_paths(
        model, clean, corrupt, metric=metric, edges="*", direction="denoising", batch_tokens=batch_tokens
    )
    assert found.names == tuple(edge.name for edge in slow.graph.edges)
    with torch.no_grad():
        for i in random.Random(1).sample(range(len(found.names)), 16):
            close(name, found.values[i], metric(slow.edges({found.names[i]})))


@pytest.mark.parametrize("name", FAMILIES)
def test_paths_link_by_link(case, name):
    model, clean, corrupt, slow = case(name)
    first = "attn.0" if slow.graph.whole_attention else "head.0.1"
    paths = [
        "embed->head.0.1:q->mlp.2->logits",
        "embed->head.0.1:v->head.1.0:k->logits",
        f"{first}->head.1.1:v->mlp.2",
        "embed->mlp.0->head.1.0:k->head.2.3:q->logits",
        "embed->logits",
    ]
    found = patch_paths(model, clean, corrupt, metric=metric, paths=paths)
    with torch.no_grad():
        for i, path in enumerate(paths):
            close(name, found.values[i], metric(slow.path(path.split("->"))))
    # A ViT's class token is the same in both images, so what it says to itself is too.
    assert (found.effects[1:4] != 0).all()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_every_edge_is_the_other_run_and_no_edge_is_this_one(case, name, direction):
    model, clean, corrupt, _slow = case(name)
    everything = patch_paths(
        model, clean, corrupt, metric=metric, edges="*", together=True, direction=direction
    )
    other = everything.clean if direction == "denoising" else everything.corrupt
    np.testing.assert_array_equal(everything.values[0], other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing changed, which is so
        alone = patch_paths(model, clean, clean, metric=metric, edges="*", together=True, direction=direction)
    np.testing.assert_array_equal(alone.effects, 0)


def test_clean_into_clean_changes_nothing_edge_by_edge(case):
    model, clean, _, _ = case("llama")
    with pytest.warns(UserWarning, match="no patch changed the metric"):
        found = patch_paths(model, clean, clean, metric=metric, edges="*")
    np.testing.assert_array_equal(found.effects, 0)


def test_every_path_at_once_is_the_other_run():
    """One layer, so that the paths can be listed: through each port of each head, and the MLP."""
    model = vd.load(make("llama", num_hidden_layers=1).double(), check=False)
    heads = [f"head.0.{h}:q" for h in range(4)] + [f"head.0.{g}:{port}" for g in range(2) for port in "kv"]
    paths = ["embed->logits", "embed->mlp.0->logits"]
    paths += [f"embed->{head}->{end}" for head in heads for end in ("logits", "mlp.0->logits")]
    found = patch_paths(model, CLEAN, CORRUPT, metric=metric, paths=paths, together=True)
    np.testing.assert_allclose(found.values[0], found.clean, rtol=1e-12)
    without = patch_paths(model, CLEAN, CORRUPT, metric=metric, paths=paths[:-1], together=True)
    assert abs(without.values[0] - without.clean).min() > 1e-6


def test_a_path_of_two_nodes_is_an_edge(case):
    model, clean, corrupt, _ = case("llama")
    names = ["head.0.1->head.1.1:v", "mlp.0->head.2.1:k", "mlp.1->logits"]
    edges = patch_paths(model, clean, corrupt, metric=metric, edges=names)
    paths = patch_paths(model, clean, corrupt, metric=metric, paths=names)
    np.testing.assert_allclose(paths.values, edges.values, rtol=1e-12)


@pytest.mark.parametrize("position", [1, -1, [1, 2]])
def test_positions(case, position):
    model, clean, corrupt, slow = case("llama")
    mask = slow.at
    at = torch.zeros_like(mask)
    for row, length in enumerate(mask.sum(1).tolist()):
        places = range(mask.shape[1] - length, mask.shape[1])
        for number in [position] if isinstance(position, int) else position:
            at[row, places[number]] = True
    names = ["embed->head.1.0:k", "mlp.0->head.2.1:v"]
    found = patch_paths(model, clean, corrupt, metric=metric, edges=names, positions=position)
    slow.at = at
    try:
        with torch.no_grad():
            for i, edge in enumerate(names):
                close("llama", found.values[i], metric(slow.edges({edge})))
    finally:
        slow.at = mask


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_texts_of_unequal_length(direction):
    """Aligned by token: what has no partner stays as it is."""
    model = vd.load(make("llama").double(), check=False)
    clean, corrupt = [[5, 9, 17, 40], [5, 6, 7, 8]], [[5, 9, 23, 17, 41, 40], [5, 6, 8]]
    inputs = Inputs.of(model, clean, corrupt, "token")
    inputs = inputs.swapped() if direction == "denoising" else inputs
    names = ["embed->head.1.0:k", "head.0.1->head.1.1:v", "mlp.1->logits"]
    given = {"metric": metric, "align": "token", "direction": direction}
    found = patch_paths(model, clean, corrupt, edges=[[name] for name in names] + [names], **given)
    with torch.no_grad():
        slow = Slow(model, inputs.clean, inputs.corrupt, inputs.matched >= 0, inputs.matched)
        for i, chosen in enumerate([*([name] for name in names), names]):
            close("llama", found.values[i], metric(slow.edges(set(chosen))))
    with pytest.raises(InputError, match="align"):
        patch_paths(model, clean, corrupt, metric=metric, edges=names)


def test_right_padded_rows_give_the_same():
    """The reference on rows padded at the right: each example alone, unpadded."""
    model = vd.load(make("gpt2").double(), check=False)
    found = patch_paths(model, CLEAN, CORRUPT, metric=metric, edges=["head.0.1->head.1.2:v"])
    with torch.no_grad():
        for row in range(2):
            alone = Slow(model, model.batch([CORRUPT[row]]), model.batch([CLEAN[row]]))
            expected = metric(alone.edges({"head.0.1->head.1.2:v"}))
            np.testing.assert_allclose(found.values[0, row], expected.item(), rtol=1e-12)


def test_examples_in_batches_give_the_same(hooked):
    model, rows = hooked("llama"), torch.randint(3, 299, (7, 6), generator=torch.Generator().manual_seed(0))
    other = rows.clone()
    other[:, 2] = 8
    given = {"metric": "logit_diff", "answers": 9, "wrong": 10, "edges": "*"}
    whole = patch_paths(model, rows, other, **given)
    parts = patch_paths(model, rows, other, **given, batch_tokens=18)
    np.testing.assert_allclose(parts.values, whole.values, rtol=1e-4, atol=1e-5)


def test_kl_and_probe_metrics(hooked):
    model, clean, corrupt = hooked("llama"), [[5, 9, 17, 40]], [[5, 9, 23, 41]]
    found = patch_paths(model, clean, corrupt, metric="kl", edges="*", together=True)
    np.testing.assert_allclose(found.values, 0, atol=1e-6)
    assert found.corrupt[0] > 1e-3
    weights = torch.linspace(-1, 1, 32)
    probe = Metric("probe", lambda x: x @ weights.to(x), 1, site="resid_post.1")
    late = patch_paths(model, clean, corrupt, metric=probe, edges="embed->mlp.1")
    assert (late.effects != 0).all()
    with pytest.warns(UserWarning, match="cannot depend on embed->head.2.0:q, mlp.1->logits"):
        beyond = patch_paths(
            model, clean, corrupt, metric=probe, edges=["embed->head.2.0:q", "mlp.1->logits"]
        )
    assert (beyond.effects == 0).all()


# Micro-models


def single_shares(model, texts, direction):
    """Share of the effect of every edge alone."""
    found = patch_paths(
        model, texts.clean, texts.corrupt, metric="logit_diff", answers=texts.answers, wrong=texts.wrong,
        edges="*", direction=direction,
    )  # fmt: skip
    assert abs(found.total) == pytest.approx(texts.truth.effect, rel=1e-4)
    return dict(zip(found.names, found.to_frame()["share"]))


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_chain_by_hand(direction):
    """Without any one of the three edges the sign is lost; with any one of them alone in a corrupt run it is
    only found at the last, which is the only one whose sender says all."""
    shares = single_shares(micro.handle(micro.chain()), micro.chain_texts(), direction)
    assert {edge for edge, share in shares.items() if share != 0} == set(micro.CHAIN)
    np.testing.assert_allclose([shares[edge] for edge in micro.CHAIN], 1, rtol=1e-6)


@pytest.mark.parametrize("family", micro.FAMILIES)
@pytest.mark.parametrize("what", ["key", "query", "value"])
def test_induction_by_hand(family, what):
    texts = micro.contrast(what)
    shares = single_shares(micro.handle(micro.induction(family)), texts, "noising")
    known = micro.edges(texts.truth, family)
    assert {edge for edge, share in shares.items() if abs(share) > 1e-6} == known
    np.testing.assert_allclose([shares[edge] for edge in known], 1, rtol=1e-5)


def test_linear_by_hand():
    """logit difference = 0.5 x(last) + 2 mean(x) - mean(y): one path for each term."""
    model = micro.handle(micro.linear())
    clean, corrupt = torch.tensor([[0, 5, 9, 12]]), torch.tensor([[0, 7, 9, 20]])
    given = {"metric": "logit_diff", "answers": micro.RIGHT, "wrong": micro.WRONG}
    paths = ["embed->logits", "embed->head.0.0:v->logits", "embed->head.0.1:v->logits"]
    found = patch_paths(model, clean, corrupt, paths=paths, **given)
    change = (micro.values()[clean] - micro.values()[corrupt])[0]
    expected = [0.5 * change[-1, 0], 2 * change[:, 0].mean(), -change[:, 1].mean()]
    np.testing.assert_allclose(found.effects[:, 0], expected, rtol=1e-5)
    assert found.effects.sum() == pytest.approx(
        (micro.by_hand(clean) - micro.by_hand(corrupt)).item(), rel=1e-5
    )


def test_edges_out_of_a_node_sum_to_its_patch_on_a_linear_model():
    model = micro.handle(micro.linear())
    clean, corrupt = torch.tensor([[0, 5, 9, 12]]), torch.tensor([[0, 7, 9, 20]])
    given = {"metric": "logit_diff", "answers": micro.RIGHT, "wrong": micro.WRONG}
    edges = patch_paths(model, clean, corrupt, senders="embed", **given)
    with torch.no_grad():
        base, other = (model.batch(side.tolist()) for side in (corrupt, clean))
        embedded = model.run(other, read="embed")["embed"]
        logits = model.run(base, write={"embed": lambda _: embedded}).logits[:, -1]
    patched = (logits[:, micro.RIGHT] - logits[:, micro.WRONG]).numpy()
    np.testing.assert_allclose(edges.effects.sum(0), patched - edges.base, rtol=1e-5)


@pytest.mark.parametrize("family", micro.FAMILIES)
def test_induction_circuit_by_path(family):
    """The previous-token head tells the induction head where to look, by its keys."""
    model, texts = micro.handle(micro.induction(family)), micro.contrast("key")
    group = 1 if family == "llama_grouped" else 2
    found = patch_paths(
        model, texts.clean, texts.corrupt, metric="logit_diff", answers=texts.answers, wrong=texts.wrong,
        paths=[*(f"head.0.1->head.1.{group}:{port}->logits" for port in "kv"), "head.0.1->logits"],
    )  # fmt: skip
    assert found.to_frame()["share"].tolist() == pytest.approx([1, 0, 0], abs=1e-5)
