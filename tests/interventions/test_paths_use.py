"""Edge and path patching as it is used: bad input, warnings, hooks, results that are drawn and kept."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from rewiring_oracle import CLEAN, CORRUPT, Slow, metric

from veridical.errors import InputError, ModelError, UnknownNameError
from veridical.interventions.paths import patch_paths


def refused(error, match, **given):
    model = refused.model
    with pytest.raises(error, match=match) as raised:
        patch_paths(model, CLEAN, CORRUPT, metric=metric, **given)
    assert "\n" not in str(raised.value)


@pytest.fixture
def llama(hooked):
    refused.model = hooked("llama")


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({}, "give edges="),
        ({"edges": "*", "senders": "embed"}, "one of the three"),
        ({"edges": []}, "no edge was named"),
        ({"edges": "mlp.0"}, "is no edge"),
        ({"edges": "mlp.1->head.1.0:q"}, "reads the stream before mlp.1 writes"),
        ({"paths": "embed"}, "at least two nodes|expected"),
        ({"paths": ["embed->mlp.1->mlp.0"]}, "reads the stream before"),
        ({"paths": ["embed->logits->mlp.0"]}, "nothing comes after the logits|reads"),
        ({"senders": "mlp.2", "receivers": "mlp.1"}, "there is no edge from mlp.2 to mlp.1"),
        ({"edges": "*", "direction": "both"}, "expected 'denoising' or 'noising'"),
        ({"edges": "*", "positions": [9]}, "position 9 lies outside row 0, which has 5 tokens"),
        ({"edges": "*", "batch_tokens": 0}, "expected a number of at least 1"),
        ({"edges": "*", "positions": "last"}, "expected token numbers"),
    ],
)
def test_refused_in_one_line(llama, given, match):
    refused(InputError, match, **given)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"edges": "haed.0.1->logits"}, re.escape("nearest: head.0.1")),
        ({"edges": "head.0.7->logits"}, "heads 0 to 3"),
        ({"edges": "embed->head.1.3:k"}, "2 heads .0 to 1., each shared by 2 of the 4 query heads"),
        ({"senders": "mpl.*"}, "unknown node 'mpl."),
        ({"paths": "embed->hed.0.0:q->logits"}, re.escape("nearest: head.0.0:q")),
    ],
)
def test_unknown_nodes_name_the_nearest(llama, given, match):
    refused(UnknownNameError, match, **given)


def test_a_metric_that_returns_a_scalar_is_refused(hooked):
    with pytest.raises(InputError, match="returned a scalar; expected one number for each row"):
        patch_paths(hooked("llama"), CLEAN, CORRUPT, metric=lambda x: x[:, -1, 0].mean(), edges="*")


def test_models_that_do_not_add_up_are_refused(hooked):
    with pytest.raises(ModelError, match="not the sum of its parts"):
        patch_paths(hooked("bert"), CLEAN, CORRUPT, metric=metric, edges="*")


def test_heads_behind_a_norm_are_whole_layers(hooked):
    with pytest.raises(UnknownNameError, match="senders are whole layers"):
        patch_paths(hooked("olmo2"), CLEAN, CORRUPT, metric=metric, edges="head.0.0->logits")


def test_edges_that_the_metric_cannot_see_are_zero_and_warned(hooked):
    given = {"metric": "logit_diff", "answers": 9, "wrong": 10, "positions": 0}
    with pytest.warns(
        UserWarning, match=r"cannot depend on mlp.2->logits, embed->mlp.2:in .*reads other positions"
    ):
        found = patch_paths(
            hooked("llama"), [[5, 9, 17]], [[6, 9, 17]],
            edges=["mlp.2->logits", "embed->mlp.2", "embed->head.2.0:k"], **given,
        )  # fmt: skip
    assert (found.effects[:2] == 0).all()
    assert (found.effects[2] != 0).all()


def test_nothing_changed_is_warned(hooked):
    with pytest.warns(UserWarning, match="no patch changed the metric, to the last bit"):
        patch_paths(hooked("llama"), [[5, 9, 17]], [[5, 9, 17]], metric=metric, edges="*", together=True)


def test_the_model_is_left_as_it_was(hooked):
    model = hooked("gpt2")
    inputs = model.batch(CLEAN)
    before = model.run(inputs).logits
    there = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.model.modules()]
    patch_paths(model, CLEAN, CORRUPT, metric=metric, edges="*")

    def fails(logits):
        raise RuntimeError("from the metric")

    with pytest.raises(RuntimeError, match="from the metric"):
        patch_paths(model, CLEAN, CORRUPT, metric=fails, edges="*")
    assert there == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.model.modules()]
    assert torch.equal(model.run(inputs).logits, before)


def test_blocks_below_the_receiver_are_not_run(hooked):
    model = hooked("llama")
    patch_paths(model, CLEAN, CORRUPT, metric=metric, edges="mlp.0->logits")  # examines the model, once
    calls = []
    own = [type(block).forward for block in model.architecture.blocks]
    for layer, block in enumerate(model.architecture.blocks):
        block.forward = lambda *args, layer=layer, block=block, **kwargs: (
            calls.append(layer) or own[layer](block, *args, **kwargs)
        )
    try:
        found = patch_paths(model, CLEAN, CORRUPT, metric=metric, edges="mlp.0->head.1.1:k")
    finally:
        for block in model.architecture.blocks:
            del block.forward
    # Two plain runs, and one from block 1 with its keys made once more.
    assert calls == [0, 1, 2] * 2 + [1, 1, 2]
    assert (found.effects != 0).all()


def test_a_users_hooks_count(hooked):
    """A hook that treats the rows of a batch differently sees the batch as it was given."""
    model, seen = hooked("llama"), set()

    def hook(module, args, output):
        seen.add(len(output))
        ramp = torch.linspace(1, 2, len(output))[:, None, None]
        return output * ramp

    names = ["mlp.0->head.1.1:k", "embed->logits", "head.0.0->mlp.1:in"]
    handle = model.model.model.layers[0].mlp.register_forward_hook(hook)
    try:
        found = patch_paths(model, CLEAN, CORRUPT, metric=metric, edges=names)
        base, other = (model.batch(side, padding_side="left") for side in (CORRUPT, CLEAN))
        with torch.no_grad():
            slow = Slow(model, base, other, base["attention_mask"].bool())
            expected = [metric(slow.edges({name})).numpy() for name in names]
    finally:
        handle.remove()
    assert seen == {2}
    np.testing.assert_allclose(found.values, expected, rtol=2e-5)


# The result


def test_frame_figure_and_report(hooked):
    rows = torch.randint(3, 299, (6, 5), generator=torch.Generator().manual_seed(0))
    other = rows.flip(1)
    few = patch_paths(hooked("llama"), rows, other, metric=metric, senders="embed", receivers="mlp.*")
    frame = few.to_frame()
    assert frame["receiver"].tolist() == ["mlp.0:in", "mlp.1:in", "mlp.2:in"]
    np.testing.assert_allclose(frame["share"], few.effects.mean(1) / (few.clean - few.corrupt).mean())
    assert (frame["effect_low"] <= frame["effect"]).all()
    assert (frame["effect"] <= frame["effect_high"]).all()
    every = patch_paths(hooked("llama"), rows, other, metric=metric, edges="*")
    assert few.figure().data[0].type == "bar"
    assert every.figure().data[0].type == "heatmap"
    section = every.report_section()
    assert section.figures
    assert "190 edges" in section.text
    assert "<table" in few._repr_html_()
    assert "3 edges" in repr(few)


def test_one_row_has_no_interval(hooked):
    found = patch_paths(hooked("llama"), [[5, 9, 17]], [[6, 9, 17]], metric=metric, edges="mlp.0->logits")
    assert np.isnan(found.to_frame()["effect_low"]).all()
    assert "one row, so there are no intervals" in " ".join(found.findings())


def test_these_modules_leave_the_packages_functions_in_place():
    """A module with the name of a function, once imported, stands in the function's place."""
    code = (
        "import veridical.interventions as x, veridical.interventions.circuit\n"
        "import veridical.interventions.paths\n"
        "assert all(callable(getattr(x, name)) for name in ('patch', 'ablate', 'attribute'))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_saved_and_loaded(hooked, tmp_path):
    found = patch_paths(hooked("llama"), CLEAN, CORRUPT, metric=metric, edges="*")
    again = type(found).load(found.save(tmp_path / "edges"))
    np.testing.assert_array_equal(again.values, found.values)
    assert again.to_frame().equals(found.to_frame())
    assert again.facts == found.facts
