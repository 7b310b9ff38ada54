"""Figures of an SAE against slow float64 references; the splice against exact and empty SAEs."""

import numpy as np
import pytest
import torch
from sae_makers import EVERY, empty_sae, exact_sae, random_sae, vectors

import veridical as vd
from veridical.errors import DataError, InputError, NonFiniteError
from veridical.saes.evaluate import evaluate_sae
from veridical.saes.evaluation import frontier

TEXTS = [
    "the capital of France is Paris",
    "what is the symbol of gold? it is Au",
    "tell a lie; answer yes or no",
    "silver is Ag!",
    "the truth",
    "the capital of Italy is Rome, and that of France is Paris.",
]


def by_hand(sae, x, y, groups, resamples=100, seed=0):
    """Every figure row by row in float64, and the interval of FVU by drawing texts one resample at a time."""
    with torch.no_grad():
        latents, made = sae.folded().encode(x).double(), sae(x).double()
    mean = y.double().mean(0)
    error = np.array([float((a - b).square().sum()) for a, b in zip(y.double(), made)])
    total = np.array([float((a - mean).square().sum()) for a in y.double()])
    names = np.unique(groups)
    random = np.random.default_rng([seed, 1])
    draws = random.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    fvus = []
    for drawn in draws:
        chosen = [np.repeat(np.flatnonzero(groups == name), n) for name, n in zip(names, drawn)]
        rows = np.concatenate(chosen)
        fvus.append(error[rows].sum() / total[rows].sum())
    bias = sae.folded().b_dec.detach().double()
    return {
        "fvu": error.sum() / total.sum(),
        "low": np.percentile(fvus, 2.5),
        "high": np.percentile(fvus, 97.5),
        "l0": np.mean([int((row > 0).sum()) for row in latents]),
        "dead": np.mean([float(latents[:, i].max()) <= 1e-3 for i in range(latents.shape[1])]),
        "dense": np.mean([int((latents[:, i] > 1e-3).sum()) / len(x) > 0.1 for i in range(latents.shape[1])]),
        "norm": (made - bias).norm(dim=1).sum() / (y.double() - bias).norm(dim=1).sum(),
    }


@pytest.mark.parametrize("architecture", [name for name in EVERY if name != "crosscoder"])
def test_figures_equal_the_slow_reference(architecture):
    wide = {"d_out": 7} if "transcoder" in architecture else {}
    sae = random_sae(architecture, scale=2.0, scale_out=3.0 if wide else None, **wide)
    x, y = vectors(90, 12), vectors(90, 7, seed=5) if wide else vectors(90, 12)
    groups = np.repeat(np.arange(30)[::-1], 3)
    found = evaluate_sae(sae, x, target=y if wide else None, groups=groups, baselines=False, bootstrap=100)
    slow = by_hand(sae, x, y, groups)
    assert found.metrics["fvu"].value == pytest.approx(slow["fvu"], rel=1e-5)
    assert found.metrics["fvu"].low == pytest.approx(slow["low"], rel=1e-5)
    assert found.metrics["fvu"].high == pytest.approx(slow["high"], rel=1e-5)
    assert found.metrics["explained_variance"].value == pytest.approx(1 - slow["fvu"], rel=1e-5)
    assert found.metrics["explained_variance"].low == pytest.approx(1 - slow["high"], rel=1e-5)
    assert found.metrics["l0"].value == pytest.approx(slow["l0"])
    assert found.metrics["norm_ratio"].value == pytest.approx(float(slow["norm"]), rel=1e-5)
    assert found.dead == pytest.approx(slow["dead"])
    assert found.dense == pytest.approx(slow["dense"])


def test_a_crosscoder_is_judged_on_its_sites_together():
    sae = random_sae("crosscoder", d_in=12)
    parts = {"resid_post.1": vectors(40, 6, seed=2), "resid_post.0": vectors(40, 6, seed=1)}
    x = torch.cat([parts["resid_post.0"], parts["resid_post.1"]], 1)
    found = evaluate_sae(sae, parts, baselines=False)
    slow = by_hand(sae, x, x, np.arange(40))
    assert found.metrics["fvu"].value == pytest.approx(slow["fvu"], rel=1e-5)


def test_blocks_do_not_change_the_figures(monkeypatch):
    import veridical.saes.held_out as held_out

    sae, x = random_sae("topk"), vectors(90, 12)
    groups = np.arange(90) // 4
    whole = evaluate_sae(sae, x, groups=groups, bootstrap=50)
    monkeypatch.setattr(held_out, "BLOCK_BYTES", 4 * sae.width * 7)
    parts = evaluate_sae(sae, x, groups=groups, bootstrap=50)
    for name, value in {**whole.metrics, **whole.baselines}.items():
        other = {**parts.metrics, **parts.baselines}[name]
        assert vars(value) == pytest.approx(vars(other), rel=1e-6)
    assert (whole.frequency == parts.frequency).all()


def test_the_exact_sae_explains_all_and_the_mean_none():
    x = vectors(60, 10)
    exact = evaluate_sae(exact_sae(10), x, baselines=False)
    assert exact.metrics["fvu"].value == 0
    assert exact.metrics["norm_ratio"].value == 1
    mean = empty_sae(10)
    mean.b_dec.copy_(x.mean(0))
    assert evaluate_sae(mean, x, baselines=False).metrics["fvu"].value == pytest.approx(1, rel=1e-6)
    assert evaluate_sae(mean, x, baselines=False).dead == 1
    # A mean that is not the rows' own is worse than 1: zero is no baseline.
    assert evaluate_sae(empty_sae(10), x, baselines=False).metrics["fvu"].value > 1.05


def test_pca_is_that_of_the_other_half():
    from sklearn.decomposition import PCA

    from veridical.saes.baselines import _halves, pca_errors
    from veridical.saes.held_out import held_out

    mix = torch.randn(10, 10, generator=torch.Generator().manual_seed(0)) * torch.linspace(3, 0.1, 10)
    x = vectors(200, 10) @ mix + 50
    sae, groups = random_sae("topk", d_in=10), np.arange(200) // 2
    rows = held_out(sae, x, groups=groups)
    found, half = pca_errors(sae, rows, 3), _halves(rows)
    assert sorted(np.bincount(half)) == [50, 50]
    slow = np.zeros(100)
    for number in range(2):
        own = half[groups] == number
        fitted = PCA(3).fit(x[~own].double().numpy())
        left = x[own].double().numpy()
        left = left - fitted.inverse_transform(fitted.transform(left))
        np.add.at(slow, groups[own], (left**2).sum(1))
    np.testing.assert_allclose(found, slow, rtol=1e-6)


def test_the_random_dictionary_is_solved_by_least_squares():
    from veridical.saes.baselines import random_atoms, random_errors
    from veridical.saes.held_out import held_out

    sae, x = random_sae("topk", d_in=10, width=30), vectors(50, 10)
    rows, mean = held_out(sae, x), x.double().mean(0)
    found = random_errors(sae, rows, mean, 4, seed=3)
    atoms = random_atoms(30, 10, 3)
    for row, error in zip(x.double() - mean, found):
        chosen = (atoms.double() @ row).abs().argsort(descending=True)[:4]
        basis = atoms[chosen].double().T.numpy()
        fitted, *_ = np.linalg.lstsq(basis, row.numpy(), rcond=None)
        assert error == pytest.approx(float(((row.numpy() - basis @ fitted) ** 2).sum()), rel=1e-6)


def test_the_random_dictionary_is_not_the_one_an_sae_starts_from():
    from veridical.saes.baselines import random_atoms
    from veridical.saes.config import SAEConfig
    from veridical.saes.topk import TopK

    atoms = random_atoms(30, 10, 0)
    torch.testing.assert_close(atoms.norm(dim=1), torch.ones(30))
    assert (atoms @ TopK(SAEConfig(width=30, k=4, seed=0), 10).W_dec.T).diagonal().abs().max() < 0.95


def test_a_planted_dictionary_beats_both_and_noise_does_not():
    """Sparse features of a known dictionary: the true one reconstructs what PCA and random vectors cannot."""
    random = torch.Generator().manual_seed(0)
    planted = torch.randn(96, 48, generator=random)
    planted = planted / planted.norm(dim=1, keepdim=True)
    active = (torch.rand(600, 96, generator=random) < 0.02).float()
    x = active * (1 + torch.rand(600, 96, generator=random)) @ planted
    true = random_sae("jumprelu", d_in=48, width=96)
    true.W_enc.copy_(planted)
    true.W_dec.copy_(planted)
    true.b_enc.zero_()
    true.b_dec.zero_()
    true.log_threshold.fill_(float(np.log(0.8)))
    found = evaluate_sae(true, x, bootstrap=100)
    assert all(lead.low > 0 for lead in found.lead.values())
    assert any("better than PCA" in line for line in found.findings())
    noise = evaluate_sae(random_sae("topk", d_in=48, width=96), x, bootstrap=100)
    assert all(lead.high < 0 for lead in noise.lead.values())


# In the model


def said_by(model, length=12):
    """Token ids that the model itself goes on with, so that it predicts them better than a ruined one."""
    ids = torch.tensor([[7, 90 + row] for row in range(8)])
    with torch.no_grad():
        while ids.shape[1] < length:
            ids = torch.cat([ids, model.logits(ids)[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("site", ["resid_post.1", "mlp_out.0", "z.1"])
def test_an_exact_sae_recovers_exactly_1_and_an_empty_one_exactly_0(hooked, family, site):
    model = hooked(family)
    width, texts = int(np.prod(model.width(site))), said_by(model)
    exact = exact_sae(width, site).evaluate(model, texts, baselines=False, bootstrap=50)
    assert exact.loss["recovered"].value == 1
    assert exact.loss["loss_spliced"].value == exact.loss["loss"].value
    assert exact.loss["loss"].value < exact.loss["loss_zero"].value
    assert exact.loss["kl"].value == 0
    empty = empty_sae(width, site).evaluate(model, texts, baselines=False, bootstrap=50)
    assert empty.loss["recovered"].value == 0
    assert empty.loss["kl"].value > 0
    if exact.loss["loss_mean"].value > exact.loss["loss"].value:
        assert exact.loss["recovered_mean"].value == 1
    some = random_sae("topk", d_in=width, width=2 * width, k=4, site=site)
    assert some.evaluate(model, texts, baselines=False, bootstrap=50).loss["recovered"].value < 1


def test_where_nothing_is_lost_nothing_is_recovered(hooked):
    """On text that a model predicts worse than a ruined one does, both differences are negative."""
    model = hooked("llama")
    with torch.no_grad():
        worst = torch.tensor([[7, 90 + row] for row in range(8)])
        while worst.shape[1] < 12:
            worst = torch.cat([worst, model.logits(worst)[:, -1:].argmin(-1)], 1)
    found = random_sae("topk", d_in=32, width=64, site="resid_post.1").evaluate(model, worst, bootstrap=20)
    assert found.loss["loss"].value > found.loss["loss_zero"].value
    assert np.isnan(found.loss["recovered"].value)
    assert any("nothing to recover" in note for note in found.findings())
    assert not any("it recovers" in line for line in found.findings())
    assert found.to_dict()["recovered"] is None


def test_completions_are_what_is_scored(hooked):
    """With completions the loss is that of their tokens alone, given the prompt."""
    import pandas as pd

    model, site = hooked("llama"), "resid_post.1"
    lines = [{"prompt": text, "completion": f" {text[:4]} yes"} for text in TEXTS]
    pairs = vd.Pairs.from_pandas(pd.DataFrame(lines))
    sae = random_sae("topk", d_in=32, width=64, site=site)
    found = sae.evaluate(model, pairs, baselines=False, bootstrap=20).loss
    total, count = 0.0, 0
    for row in model.encode(pairs.prompts, pairs.completions):
        with torch.no_grad():
            logprobs = model.run(model.batch([row])).logits[0].double().log_softmax(-1)
        for at in range(row.prompt_tokens, len(row.ids)):
            total -= float(logprobs[at - 1, row.ids[at]])
            count += 1
    assert found["loss"].value == pytest.approx(total / count, rel=1e-5)


def test_losses_equal_those_of_each_text_alone(hooked):
    model, site = hooked("llama"), "resid_post.1"
    sae = random_sae("topk", d_in=32, width=64, site=site)
    found = sae.evaluate(model, TEXTS, baselines=False, bootstrap=20).loss
    acts = vd.collect(model, TEXTS, sites=site, tokens="all", progress=False)
    mean = acts[site].double().mean(0).float()
    edits = {
        "loss": None,
        "loss_spliced": lambda v: sae(v),
        "loss_zero": torch.zeros_like,
        "loss_mean": lambda v: mean.expand_as(v).clone(),
    }
    slow = {}
    for name, edit in edits.items():
        total, count = 0.0, 0
        for encoded in model.encode(TEXTS):
            inputs = model.batch([encoded])
            with torch.no_grad():
                logits = model.run(inputs, write={} if edit is None else {site: edit}).logits[0, :-1].double()
            targets = torch.tensor(encoded.ids[1:])
            total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            count += len(targets)
        slow[name] = total / count
        assert found[name].value == pytest.approx(slow[name], rel=1e-5)
    for none, name in (("loss_zero", "recovered"), ("loss_mean", "recovered_mean")):
        lost = slow[none] - slow["loss"]
        wanted = (slow[none] - slow["loss_spliced"]) / lost if lost > 0 else float("nan")
        assert found[name].value == pytest.approx(wanted, rel=1e-2, nan_ok=True)


def test_padding_takes_no_part(hooked):
    """One long text among short ones changes no text's figures."""
    model, site = hooked("gpt2"), "resid_post.0"
    sae = random_sae("topk", d_in=32, width=64, site=site)
    one = sae.evaluate(model, TEXTS, baselines=False, batch_tokens=10_000, bootstrap=20)
    each = sae.evaluate(model, TEXTS, baselines=False, batch_tokens=1, bootstrap=20)
    for name, value in one.loss.items():
        assert value.value == pytest.approx(each.loss[name].value, rel=1e-3, abs=1e-6, nan_ok=True)


def test_a_transcoder_is_spliced_from_one_site_to_another(hooked):
    """The MLP itself, as a transcoder's skip path would have it, recovers all; zeros nothing."""
    model = hooked("gpt2")
    source, target = "transformer.h.1.ln_2:out", "mlp_out.1"
    sae = random_sae("transcoder", d_in=32, width=64, site=source, target_site=target, skip=True)
    acts = vd.collect(model, TEXTS, sites=[source, target], tokens="all", progress=False)
    x, y = acts[source], acts[target]
    sae.W_dec.zero_()
    solved = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y).solution
    sae.W_skip.copy_(solved[:-1].T)
    sae.b_dec.copy_(solved[-1])
    found = sae.evaluate(model, TEXTS, baselines=False, bootstrap=20)
    assert found.loss["recovered"].value > 0.5
    error = (y - sae(x)).square().sum() / (y - y.mean(0)).square().sum()
    assert found.metrics["fvu"].value == pytest.approx(float(error), rel=1e-4)
    sae.W_skip.zero_()
    sae.b_dec.zero_()
    assert sae.evaluate(model, TEXTS, baselines=False, bootstrap=20).loss["recovered"].value == 0


def test_the_model_is_left_as_it_was(hooked):
    model = hooked("llama")
    before = model.logits(TEXTS)
    sae = random_sae("topk", d_in=32, width=64, site="resid_post.1")
    sae.evaluate(model, TEXTS, bootstrap=20)
    assert torch.equal(model.logits(TEXTS), before)


# How it is shown, and bad input


def test_results_are_shown():
    sae, x = random_sae("topk", name="mine"), vectors(60, 12)
    found = evaluate_sae(sae, x, bootstrap=20)
    frame = found.to_frame()
    assert frame["who"].iloc[0] == "mine"
    assert len(frame) == 3
    assert "mine" in found._repr_html_()
    section = found.report_section()
    assert section.headline[0][0] == "explained variance"
    assert found.to_dict()["fvu"] == found.metrics["fvu"].value
    other = evaluate_sae(random_sae("topk", k=9), x, bootstrap=20)
    drawn = frontier({"topk": [other, found]})
    line = next(trace for trace in drawn.data if trace.name == "topk" and trace.mode == "lines+markers")
    assert list(line.x) == sorted([found.metrics["l0"].value, other.metrics["l0"].value])
    assert any("PCA" in (trace.name or "") for trace in drawn.data)
    assert frontier([found, other]).data
    evaluated = evaluate_sae(sae, x, baselines=False)
    assert "FVU" in repr(evaluated)


def test_bad_input_is_named(hooked):
    sae, x = random_sae("topk"), vectors(60, 12)
    with pytest.raises(InputError, match="the SAE reads 12 dimensions; the data have 11"):
        evaluate_sae(sae, vectors(60, 11))
    with pytest.raises(InputError, match="expected one for each of 60 rows"):
        evaluate_sae(sae, x, groups=np.arange(59))
    with pytest.raises(NonFiniteError, match="row 17"):
        evaluate_sae(sae, x.index_fill(0, torch.tensor([17]), float("nan")))
    with pytest.raises(DataError, match="all 20 rows are the same"):
        evaluate_sae(sae, x[:1].expand(20, 12))
    with pytest.raises(DataError, match="too few"):
        evaluate_sae(sae, x[:1])
    with pytest.raises(InputError, match="came without texts"):
        evaluate_sae(sae, hooked("gpt2"))
    with pytest.raises(InputError, match=r"stack\.member"):
        evaluate_sae(type(sae).stack([sae, sae]), x)
    with pytest.raises(InputError, match="does not say which site"):
        evaluate_sae(sae, hooked("gpt2"), TEXTS)
    with pytest.raises(InputError, match=r"the SAE reads 12 dimensions; .* has 32"):
        evaluate_sae(sae, hooked("gpt2"), TEXTS, site="resid_post.0")
    with pytest.raises(InputError, match="a str"):
        evaluate_sae(sae, "texts")
    with pytest.raises(InputError, match="no one place in a model"):
        evaluate_sae(random_sae("crosscoder"), hooked("gpt2"), TEXTS)
    with pytest.raises(InputError, match="predicts no next token"):
        evaluate_sae(random_sae("topk", d_in=32, site="resid_post.0"), hooked("bert"), TEXTS)
