"""Erasers: what they take away, what they leave, and that inside a model they act where they should."""

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression, LogisticRegression

import veridical as vd
from veridical.errors import DataError, InputError, NonFiniteError, UnknownNameError
from veridical.probes.erasure import LeaceEraser, ProjectionEraser
from veridical.probes.erasure_check import BEFORE, HELD_AFTER, HELD_BEFORE, NEW, RANDOM, SAME, check_erasure

torch.set_num_threads(1)
SITE = "blocks.1.hook_resid_post"


def labelled(rows=400, width=12, classes=2, seed=0):
    """Correlated features, shifted by class along a direction of small variance."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, rows)
    mix = random.normal(size=(width, width)) * np.geomspace(5, 0.2, width)
    shifts = random.normal(size=(classes, width))
    return random.normal(size=(rows, width)) @ mix + shifts[labels] + 3, labels


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("shrinkage", [False, True])
def test_after_leace_class_means_are_equal_and_no_linear_probe_beats_a_constant(classes, shrinkage):
    x, y = labelled(classes=classes)
    eraser = LeaceEraser(shrinkage=shrinkage).fit(x, y)
    erased = eraser.transform(x)
    means = np.stack([erased[y == label].mean(0) for label in range(classes)])
    np.testing.assert_allclose(means, np.broadcast_to(x.mean(0), means.shape), atol=1e-9)
    assert eraser.rank == classes - 1
    assert LogisticRegression(C=1e3, max_iter=5000).fit(x, y).score(x, y) > 0.8
    probe = LogisticRegression(C=1e3, max_iter=5000, tol=1e-10).fit(erased, y)
    assert np.abs(erased @ probe.coef_.T - erased.mean(0) @ probe.coef_.T).max() < 1e-3
    assert probe.score(erased, y) == pytest.approx(np.bincount(y).max() / len(y), abs=0.005)


def closed_form(x, y):
    """Two classes by the paper's equation 1, written out in numpy."""
    centred, label = x - x.mean(0), y - y.mean()
    sigma, cross = centred.T @ centred / (len(x) - 1), centred.T @ label / (len(x) - 1)
    pulled = np.linalg.pinv(sigma) @ cross
    return x - np.outer(centred @ pulled, cross) / (cross @ pulled)


@pytest.mark.parametrize("rows", [400, 9])
def test_without_shrinkage_it_is_the_papers_closed_form(rows):
    x, y = labelled(rows=rows)
    erased = LeaceEraser(shrinkage=False).fit(x, y).transform(x)
    np.testing.assert_allclose(erased, closed_form(x, y), atol=1e-7)


def test_it_is_the_packages_own_eraser():
    from concept_erasure import LeaceEraser as Theirs

    x, y = (torch.from_numpy(a) for a in labelled())
    for shrinkage in (False, True):
        theirs = Theirs.fit(x, y, shrinkage=shrinkage)
        np.testing.assert_allclose(
            LeaceEraser(shrinkage=shrinkage).fit(x, y).transform(x.numpy()), theirs(x).numpy(), atol=1e-9
        )


def test_no_other_affine_eraser_changes_the_rows_less():
    x, y = labelled()
    erased = LeaceEraser(shrinkage=False).fit(x, y).transform(x)
    least = np.square(erased - x).sum()
    random = np.random.default_rng(1)
    shift = x[y == 1].mean(0) - x[y == 0].mean(0)
    projected = ProjectionEraser(shift, centre=x.mean(0)).transform(x)
    np.testing.assert_allclose(projected[y == 1].mean(0), projected[y == 0].mean(0), atol=1e-9)
    assert np.square(projected - x).sum() > 1.5 * least
    for _ in range(20):
        # Oblique projections along the shift erase it too, whatever they read it off by.
        reader = random.normal(size=x.shape[1])
        other = x - np.outer((x - x.mean(0)) @ reader, shift) / (reader @ shift)
        np.testing.assert_allclose(other[y == 1].mean(0), other[y == 0].mean(0), atol=1e-7)
        assert np.square(other - x).sum() > least
    # What is taken away is what the label explains: the fitted values of a regression on the reader.
    assert LinearRegression().fit(erased, y).score(erased, y) < 1e-9


def test_batches_give_what_one_fit_gives():
    x, y = labelled()
    order = np.argsort(y, kind="stable")  # the first batches hold one class only
    streamed = LeaceEraser()
    for part in np.array_split(order, 7):
        streamed.update(x[part], y[part], classes=[0, 1])
    assert streamed.rows_ == len(x)
    np.testing.assert_allclose(streamed.transform(x), LeaceEraser().fit(x, y).transform(x), atol=1e-8)


def test_erasing_twice_changes_nothing_more_and_a_second_fit_forgets_the_first():
    x, y = labelled()
    eraser = LeaceEraser().fit(x, y)
    once = eraser.transform(x)
    np.testing.assert_allclose(eraser.transform(once), once, atol=1e-9)
    assert np.abs(once - x).max() > 0.5
    z, w = labelled(seed=5)
    np.testing.assert_array_equal(eraser.fit(z, w).transform(z), LeaceEraser().fit(z, w).transform(z))


def test_an_independent_label_is_left_alone():
    x = np.array([[1.0, 0], [-1, 0], [1, 0], [-1, 0]])
    eraser = LeaceEraser().fit(x, [0, 0, 1, 1])
    assert eraser.rank == 0
    np.testing.assert_array_equal(eraser.transform(x), x)


def test_projection_takes_out_directions_and_nothing_else():
    random = np.random.default_rng(0)
    x, directions = random.normal(size=(30, 8)) + 5, random.normal(size=(2, 8)) * [[1], [100]]
    basis = np.linalg.svd(directions)[2][:2]
    out = ProjectionEraser(directions).transform(x)
    np.testing.assert_allclose(out, x - x @ basis.T @ basis, atol=1e-12)
    centred = ProjectionEraser(directions, centre=x.mean(0)).transform(x)
    np.testing.assert_allclose(centred.mean(0), x.mean(0), atol=1e-12)
    np.testing.assert_allclose(np.ptp(centred @ basis.T, axis=0), 0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tensors_keep_their_type(dtype):
    x, y = labelled()
    eraser = LeaceEraser().fit(x, y)
    given = torch.from_numpy(x).to(dtype)
    out = eraser.transform(given.reshape(20, 20, -1))
    assert out.dtype == dtype
    expected = eraser.transform(given.double().numpy())
    tolerance = 0.2 if dtype == torch.bfloat16 else 1e-4
    np.testing.assert_allclose(out.double().numpy().reshape(expected.shape), expected, atol=tolerance)


# In a model


@pytest.fixture(scope="module")
def model(tiny, tokenizer):
    return vd.load(tiny("llama"), tokenizer=tokenizer, check=False)


@pytest.fixture(scope="module")
def eraser():
    return ProjectionEraser(np.random.default_rng(0).normal(size=32))


def by_hand(model, eraser, inputs, chosen):
    """A plain torch hook on the block's output."""

    def hook(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        erased = torch.from_numpy(eraser.transform(hidden.double().numpy())).to(hidden.dtype)
        hidden[chosen] = erased[chosen]

    handle = model.model.model.layers[1].register_forward_hook(hook)
    try:
        with torch.no_grad():
            return model.model(**inputs).logits
    finally:
        handle.remove()


@pytest.mark.parametrize("positions", ["all", "prompt", "prompt_last", "generated"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_in_a_forward_pass_it_acts_as_a_plain_hook_does(model, eraser, positions, side):
    inputs = model.batch(model.encode(["the capital of France is Paris", "a lie"]), padding_side=side)
    real = inputs["attention_mask"].bool()
    chosen = {"all": real, "prompt": real, "generated": torch.zeros_like(real)}.get(positions)
    if chosen is None:
        chosen = torch.zeros_like(real)
        for row in range(2):
            chosen[row, torch.nonzero(real[row]).max()] = True
    with torch.no_grad(), eraser.on(model, "resid_post.1", positions):
        found = model.run(inputs).logits
    with torch.no_grad():
        clean = model.run(inputs).logits
    np.testing.assert_allclose(found[real], by_hand(model, eraser, inputs, chosen)[real], atol=1e-5)
    assert torch.equal(found[real], clean[real]) == (positions == "generated")


def test_during_generation_prompt_and_new_tokens_are_told_apart(model, eraser):
    """With a cache as without one: every pass of `generate` against whole passes with a plain hook."""
    ids = model.batch(model.encode(["the capital of France"]))["input_ids"]
    length = ids.shape[1]
    for positions, part in (("prompt", slice(0, length)), ("generated", slice(length, None))):
        with eraser.on(model, "resid_post.1", positions), torch.no_grad():
            made = model.model.generate(ids, max_new_tokens=6, do_sample=False, output_logits=True,
                                        return_dict_in_generate=True, eos_token_id=None)  # fmt: skip
        chosen = torch.zeros_like(made.sequences, dtype=torch.bool)
        chosen[:, part] = True
        whole = by_hand(model, eraser, {"input_ids": made.sequences}, chosen)
        steps = torch.stack(made.logits, 1)
        np.testing.assert_allclose(steps, whole[:, length - 1 : -1], atol=1e-4)


def test_nothing_is_left_behind(model, eraser):
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules())  # noqa: E731
    before = hooks()
    with eraser.on(model, "resid_post.1"):
        assert hooks() > before
    with pytest.raises(RuntimeError, match="mine"), eraser.on(model, "resid_post.1"):
        raise RuntimeError("mine")
    assert hooks() == before


# Bad input


def test_bad_input_is_refused(model, eraser):
    x, y = labelled(rows=20)
    with pytest.raises(NotFittedError, match="not fitted"):
        LeaceEraser().transform(x)
    with pytest.raises(DataError, match="one class only"):
        LeaceEraser().fit(x, np.zeros(20))
    with pytest.raises(DataError, match=r"labels have shape \(19,\)"):
        LeaceEraser().fit(x, y[:-1])
    with pytest.raises(NonFiniteError, match="row 3"):
        LeaceEraser().fit(np.where(np.arange(20)[:, None] == 3, np.inf, x), y)
    with pytest.raises(UnknownNameError, match="unknown label '7'"):
        LeaceEraser().update(x, y).update(x, np.full(20, 7))
    with pytest.raises(DataError, match="takes 12 features"):
        LeaceEraser().fit(x, y).transform(x[:, :5])
    with pytest.raises(DataError, match="dependent, or one is zero"):
        ProjectionEraser(np.zeros(4))
    with pytest.raises(DataError, match="width 4"):
        ProjectionEraser(np.ones(4), centre=np.ones(3))
    with (
        pytest.raises(InputError, match=r"takes 7 features; .* has 32"),
        ProjectionEraser(np.ones(7)).on(model, SITE),
    ):
        pass
    with pytest.raises(InputError, match="names 3"), eraser.on(model, "resid_post.*"):
        pass
    with (
        pytest.raises(UnknownNameError, match=r"positions 'last'.*prompt_last"),
        eraser.on(model, SITE, "last"),
    ):
        pass


# Measured on held-out pairs


def test_before_and_after_erasure_on_held_out_pairs(planted, quick):
    data = planted(pairs=200)
    options = {"target": data.labels, "groups": data.pairs, **quick}
    check = check_erasure(data.acts, site="signal", draws=3, **options)
    frame = check.to_frame().set_index("measured")
    assert frame.loc[BEFORE, "auroc"] > 0.95
    assert frame.loc[NEW, "fit_auroc"] == 0.5
    assert frame.loc[HELD_BEFORE, "auroc"] > 0.9
    assert frame.loc[HELD_AFTER, "auroc"] < 0.65
    assert abs(frame.loc[NEW, "auroc"] - 0.5) < 0.15
    assert abs(frame.loc[SAME, "auroc"] - 0.5) < 0.15
    assert frame.loc[RANDOM, "auroc"] > 0.9
    assert (frame["auroc_low"] <= frame["auroc"]).all()
    assert "can't be read linearly" in check.findings()[0]
    assert 0 < check.facts["moved"] < 0.5


def test_a_projection_along_another_direction_erases_nothing(planted, quick):
    data = planted(pairs=200)
    orthogonal = np.linalg.svd(data.direction[None])[2][1]
    options = {"target": data.labels, "groups": data.pairs, **quick}
    check = check_erasure(data.acts, ProjectionEraser(orthogonal), site="signal", draws=2, **options)
    frame = check.to_frame().set_index("measured")
    assert frame.loc[NEW, "auroc"] > 0.95
    assert "can still be read" in check.findings()[0]
    page = check.report_section()
    assert page.headline[0][1] == f"{frame.loc[HELD_AFTER, 'auroc']:.3f}"
    assert len(check.figure().data[0].x) == 6
    assert "\n" not in repr(check)
    assert "<table" in check._repr_html_()


def test_what_the_eraser_missed_is_found_among_the_held_out_pairs(planted, quick):
    """A label that lies along another direction in the held-out pairs than in the fitted ones."""
    data = planted(pairs=200)
    split = np.where(data.pairs < 100, "train", "test")
    x = data.acts["signal"].copy()
    other = np.linalg.svd(data.direction[None])[2][1]
    x[split == "test"] += 3 * np.outer(data.labels[split == "test"], other)
    options = {"target": data.labels, "groups": data.pairs, **quick, "draws": 1}
    check = check_erasure({"signal": x}, site="signal", rows={"split": split}, **options)
    frame = check.to_frame().set_index("measured")
    assert abs(frame.loc[NEW, "auroc"] - 0.5) < 0.1
    assert frame.loc[HELD_AFTER, "auroc_low"] > 0.8
    assert "can still be read" in check.findings()[0]


def test_held_out_rows_take_no_part_in_the_erasure(planted, quick):
    data = planted(pairs=60)
    options = {"target": data.labels, "groups": data.pairs, **quick, "draws": 1}
    split = np.where(data.pairs < 40, "train", "test")
    moved = {"signal": np.where((split == "test")[:, None], data.acts["signal"] * 50, data.acts["signal"])}
    plain, other = (
        check_erasure(acts, site="signal", rows={"split": split}, **options).to_frame()
        for acts in (data.acts, moved)
    )
    np.testing.assert_array_equal(plain["fit_auroc"], other["fit_auroc"])


def test_a_check_of_what_is_not_there_is_refused(planted, quick):
    data = planted(pairs=30)
    options = {"target": data.labels, "groups": data.pairs, **quick}
    with pytest.raises(UnknownNameError, match=r"site 'signl'; nearest: signal"):
        check_erasure(data.acts, site="signl", **options)
    with pytest.raises(InputError, match="0 random erasures"):
        check_erasure(data.acts, site="signal", draws=0, **options)
