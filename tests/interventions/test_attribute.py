"""Attribution of nodes against finite differences in float64, and on models whose scores are known."""

import warnings

import numpy as np
import pytest
import torch
from float64 import Float64, exact

import veridical as vd
from lens_models import bridge, hooked_transformer
from tiny_models import TINY, make
from veridical.errors import InputError, ModelError, NonFiniteError, UnknownNameError
from veridical.hooks import standing_hooks
from veridical.interventions import attribute
from veridical.interventions.attribution import Attribution
from veridical.interventions.inputs import Inputs
from veridical.interventions.integrated import legendre
from veridical.sites import HEAD_KINDS, Site

CLEAN = [[5, 9, 17, 40, 77, 120], [6, 61, 18, 44]]
CORRUPT = [[5, 88, 17, 41, 77, 120], [6, 3, 210, 44]]
STEP = 1e-5


def difference(logits):
    last = logits if logits.dim() == 2 else logits[:, -1]
    return (last[:, 1] - last[:, 2]).tanh() + last[:, 0] ** 2


def runs_of(model):
    if model.kind != "vision":
        return CLEAN, CORRUPT
    images = torch.randn(2, 2, 3, 24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return images[0], images[1]


def sites_of(model):
    named = [site for site in model.resolve("*") if site.layer in (None, 1)]
    return [site.short for site in named]


def judged(model, inputs, write):
    with torch.no_grad():
        return difference(model.run(inputs, write=write).logits).numpy()


def slope(model, inputs, site, base, direction):
    """Central difference of the metric along a direction at a site, `[batch]`."""
    ends = [
        judged(model, inputs, {site: lambda value, sign=sign: base + sign * STEP * direction})
        for sign in (1, -1)
    ]
    return (ends[0] - ends[1]) / (2 * STEP)


@pytest.mark.parametrize("name", TINY)
def test_attribution_patching_is_the_finite_difference_at_every_kind_of_site(name):
    with Float64():
        model = exact(name)
        clean, corrupt = runs_of(model)
        sites = sites_of(model)
        found = attribute(model, clean, corrupt, metric=difference, method="atp", sites=sites)
        inputs = Inputs.of(model, clean, corrupt)
        with torch.no_grad():
            base = model.run(inputs.corrupt, read=sites).values
            source = model.run(inputs.clean, read=sites).values
        for short in sites:
            site = Site.parse(short)
            change = source[site.name] - base[site.name]
            if site.kind != "pattern":
                change = change.masked_fill(
                    ~inputs.mask.view(*inputs.mask.shape, *[1] * (change.dim() - 2)), 0
                )
            else:
                change = change.masked_fill(~inputs.mask[:, None, :, None], 0)
            expected = slope(model, inputs.corrupt, site, base[site.name], change)
            scores = np.nansum(found[short].reshape(2, -1), axis=1)
            np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-8, err_msg=short)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "vit", "bert"])
def test_gradient_times_value_of_single_positions_heads_and_neurons(name):
    with Float64():
        model = exact(name)
        clean, _ = runs_of(model)
        sites = ["embed", "resid_post.0", "z.1", "v.1", "mlp_post.1", "pattern.1"]
        found = attribute(model, clean, metric=difference, sites=sites, neurons=True)
        inputs = Inputs.of(model, clean, clean)
        with torch.no_grad():
            values = model.run(inputs.clean, read=sites).values
        at, unit = inputs.width - 2, 1
        for short in sites:
            site = Site.parse(short)
            base = values[site.name]
            direction = torch.zeros_like(base)
            part = {"pattern": (slice(None), unit, at), "mlp_post": (slice(None), at, unit)}
            whole = (slice(None), at, unit) if site.kind in HEAD_KINDS else (slice(None), at)
            part = part.get(site.kind, whole)
            direction[part] = base[part]
            expected = slope(model, inputs.clean, site, base, direction)
            scores = found[short][:, at]
            scores = scores if scores.ndim == 1 else scores[:, unit]
            np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-8, err_msg=short)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "bert", "vit"])
def test_integrated_gradients_are_the_mean_slope_and_complete(name):
    """Against a midpoint rule of many steps, and the sum against the metric's difference."""
    with Float64():
        model = exact(name)
        clean, corrupt = runs_of(model)
        found = attribute(
            model, clean, corrupt, metric=difference, method="ig", sites=["embed", "z.1"], steps=40
        )
        inputs = Inputs.of(model, clean, corrupt)
        with torch.no_grad():
            base = model.run(inputs.corrupt, read=["z.1"])["z.1"]
            source = model.run(inputs.clean, read=["z.1"])["z.1"]
        change = torch.zeros_like(base)
        change[:, -1, 2] = (source - base)[:, -1, 2]
        whole = (source - base).masked_fill(~inputs.mask[..., None, None], 0)
        steps = (np.arange(200) + 0.5) / 200
        slopes = [slope(model, inputs.corrupt, Site("z", 1), base + a * whole, change) for a in steps]
        np.testing.assert_allclose(found["z.1"][:, -1, 2], np.mean(slopes, 0), rtol=2e-3, atol=1e-6)
        for site in ("embed", "z.1"):
            total = np.nansum(found[site].reshape(2, -1), 1)
            np.testing.assert_allclose(found.totals[site], total, rtol=1e-12)
            ends = [
                judged(model, inputs.corrupt, {site: lambda v, x=x: x})
                for x in (_at(model, inputs.clean, inputs, site), _at(model, inputs.corrupt, inputs, site))
            ]
            np.testing.assert_allclose(found.gaps[site], total - (ends[0] - ends[1]), rtol=1e-9, atol=1e-12)
            assert np.abs(found.gaps[site]).max() < 1e-3 * np.abs(total).max() + 1e-6


def _at(model, batch, inputs, site):
    """A run's value at a site, with the corrupt run's at padding."""
    with torch.no_grad():
        value = model.run(batch, read=[site])[site]
        own = model.run(inputs.corrupt, read=[site])[site]
    mask = inputs.mask.view(*inputs.mask.shape, *[1] * (value.dim() - 2))
    return torch.where(mask, value, own)


def test_more_nodes_leave_a_smaller_gap_and_embeddings_explain_the_whole_difference():
    with Float64():
        model = exact("llama")
        gaps = []
        for steps in (4, 32, 256):
            found = attribute(model, CLEAN, CORRUPT, metric=difference, method="ig", steps=steps)
            gaps.append(np.abs(found.gaps["embed"]).max())
        assert gaps[0] > 100 * gaps[1] > 100 * gaps[2]
        np.testing.assert_allclose(found.totals["embed"], found.source_metric - found.base_metric, atol=1e-8)


@pytest.mark.parametrize("steps", [1, 2, 5, 16])
def test_the_rule_is_exact_for_polynomials(steps):
    places, weights = legendre(steps)
    for power in range(2 * steps):
        assert weights @ places**power == pytest.approx(1 / (power + 1), rel=1e-12)


def test_a_baseline_stands_in_for_a_corrupt_run():
    with Float64():
        model = exact("gpt2")
        zero = attribute(model, CLEAN, metric=difference, method="ig", steps=64)
        own = _at(model, Inputs.of(model, CLEAN, CLEAN).clean, Inputs.of(model, CLEAN, CLEAN), "embed")
        mean = own.reshape(-1, 32).mean(0)
        moved = attribute(model, CLEAN, metric=difference, method="ig", steps=64, baseline=mean)
        inputs = Inputs.of(model, CLEAN, CLEAN)
        for found, start in ((zero, torch.zeros_like(mean)), (moved, mean)):
            low = torch.where(inputs.mask[..., None], start, own)
            expected = judged(model, inputs.clean, {}) - judged(
                model, inputs.clean, {"embed": lambda _, x=low: x}
            )
            np.testing.assert_allclose(found.totals["embed"], expected, atol=1e-3)
            np.testing.assert_allclose(found.gaps["embed"], found.totals["embed"] - expected, atol=1e-12)


class LinearModel(torch.nn.Module):
    """Embeddings, two linear layers over all positions, and logits: everything is linear."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(50, 6, dtype=torch.float64)
        self.first = torch.nn.Linear(6, 7, dtype=torch.float64)
        self.second = torch.nn.Linear(7, 5, dtype=torch.float64)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.second(self.first(self.embed(input_ids)))
        return (hidden * attention_mask[..., None]).cumsum(1)


@pytest.mark.parametrize("method", ["atp", "ig"])
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_scores_of_a_linear_model_add_up_to_the_total(method, direction):
    model = vd.load(LinearModel())
    sites = ["embed:out", "first:out", "second:in"]
    found = attribute(
        model,
        CLEAN2,
        CORRUPT2,
        metric=lambda x: x[:, -1, 1] - 2 * x[:, -1, 3],
        method=method,
        sites=sites,
        direction=direction,
        **({"steps": 1} if method == "ig" else {}),
    )
    total = found.source_metric - found.base_metric
    for site in sites:
        np.testing.assert_allclose(np.nansum(found[site], 1), total, rtol=1e-12, atol=1e-12)
    for gap in found.gaps.values():
        np.testing.assert_allclose(gap, 0, atol=1e-12)


CLEAN2 = [[5, 9, 17, 40], [6, 3]]
CORRUPT2 = [[5, 8, 17, 41], [7, 3]]


def test_an_untaught_model_leaves_parameters_as_they_were(tiny):
    module = make("llama")
    module.model.norm.weight.requires_grad_(False)
    module.lm_head.weight.grad = torch.ones_like(module.lm_head.weight)
    asking = [parameter.requires_grad for parameter in module.parameters()]
    weights = [parameter.detach().clone() for parameter in module.parameters()]
    model = vd.load(module)

    def failing(logits):
        raise KeyError("stop")

    for method in ("atp", "ig", "edges"):
        attribute(model, CLEAN, CORRUPT, metric=difference, method=method)
        with pytest.raises(KeyError):
            attribute(model, CLEAN, CORRUPT, metric=failing, method=method)
    assert [parameter.requires_grad for parameter in module.parameters()] == asking
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), weights))
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert list(grads) == ["lm_head.weight"]
    assert bool((grads["lm_head.weight"] == 1).all())
    assert not standing_hooks(module)


def test_a_callers_no_grad_and_inference_mode_do_not_matter(hooked):
    model = hooked("gpt2")
    plain = attribute(model, CLEAN, CORRUPT, metric=difference, method="atp", sites="z.1")["z.1"]
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            images = torch.randn(2, 3, 24, 24)
            attribute(hooked("vit"), images, images + 1, metric=difference, method="ig", steps=2)
            for method in ("ig", "edges"):
                attribute(model, CLEAN, CORRUPT, metric=difference, method=method)
            again = attribute(model, CLEAN, CORRUPT, metric=difference, method="atp", sites="z.1")["z.1"]
        np.testing.assert_array_equal(again, plain)
    model.model.requires_grad_(False)
    try:
        frozen = attribute(model, CLEAN, CORRUPT, metric=difference, method="atp", sites="z.1")["z.1"]
    finally:
        model.model.requires_grad_(True)
    np.testing.assert_array_equal(frozen, plain)


def test_half_precision_is_scored_in_float32():
    model = vd.load(make("llama").to(torch.bfloat16))
    found = attribute(model, CLEAN, CORRUPT, metric=difference, method="atp", sites="resid_pre.1, z.1")
    assert {scores.dtype for scores in found.scores.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("method", ["grad_x_input", "atp", "ig"])
def test_examples_do_not_depend_on_their_batch_or_padding(method):
    with Float64():
        model = exact("gpt2")
        options = {"metric": "logit_diff", "method": method, "sites": "resid_pre.1"}
        other = () if method == "grad_x_input" else (CORRUPT,)
        both = attribute(model, CLEAN, *other, answers=[7, 9], wrong=[8, 11], **options)["resid_pre.1"]
        split = attribute(model, CLEAN, *other, answers=[7, 9], wrong=[8, 11], batch_tokens=1, **options)[
            "resid_pre.1"
        ]
        one = [side[1:] for side in (CLEAN, *other)]
        alone = attribute(model, *one, answers=9, wrong=11, **options)["resid_pre.1"]
        mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
        right = [
            {"input_ids": torch.tensor([side[0], side[1] + [0, 0]]), "attention_mask": mask}
            for side in (CLEAN, *other)
        ]
        padded = attribute(model, *right, answers=[7, 9], wrong=[8, 11], **options)["resid_pre.1"]
        np.testing.assert_allclose(split, both, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(alone[0], both[1, 2:], rtol=1e-9, atol=1e-12)
        np.testing.assert_array_equal(padded, both)
        assert np.isnan(both[1, :2]).all()


def test_unequal_texts_are_matched_and_the_rest_is_absent():
    with Float64():
        model = exact("llama")
        clean, corrupt = [[5, 9, 17, 40, 77]], [[5, 9, 200, 201, 40, 77]]
        with pytest.raises(InputError, match='align="token"'):
            attribute(model, clean, corrupt, metric=difference, method="atp")
        found = attribute(
            model, clean, corrupt, metric=difference, method="atp", align="token", sites="embed, z.1"
        )
        # Base is corrupt: its two tokens without a partner are absent; equal tokens have equal embeddings.
        np.testing.assert_array_equal(np.isfinite(found["embed"][0]), [True, True, False, False, True, True])
        np.testing.assert_array_equal(found["embed"][0][[0, 1, 4, 5]], 0)
        assert np.abs(found["z.1"][0, 4:]).min() > 0
        a, b = (
            Inputs.of(model, clean, corrupt, "token").clean,
            Inputs.of(model, clean, corrupt, "token").corrupt,
        )
        with torch.no_grad():
            base, source = model.run(b, read=["z.1"])["z.1"], model.run(a, read=["z.1"])["z.1"]
        change = torch.zeros_like(base)
        change[0, 5] = source[0, 5] - base[0, 5]
        expected = slope(model, b, Site("z", 1), base, change)
        np.testing.assert_allclose(found["z.1"][0, 5].sum(), expected[0], rtol=1e-6)
        with pytest.raises(InputError, match="no common keys"):
            attribute(
                model, clean, corrupt, metric=difference, method="atp", align="token", sites="pattern.1"
            )


def test_kl_is_from_the_clean_run():
    with Float64():
        model = exact("llama")
        found = attribute(model, CLEAN, CORRUPT, metric="kl", method="ig", steps=48)
        assert (found.base_metric > 0).all()
        np.testing.assert_allclose(found.source_metric, 0, atol=1e-12)
        np.testing.assert_allclose(found.totals["embed"], -found.base_metric, rtol=1e-4)
        edges = attribute(model, CLEAN, CORRUPT, metric="kl", method="edges", direction="denoising")
        assert np.nanmax(np.abs(edges.edge_scores)) > 0
        with pytest.raises(InputError, match="at its least"):
            attribute(model, CLEAN, metric="kl", method="grad_x_input")
        with pytest.raises(InputError, match="at its least"):
            attribute(model, CLEAN, CORRUPT, metric="kl", method="atp", direction="noising")


def test_a_probe_is_a_metric_and_later_sites_cannot_matter(hooked):
    from veridical.interventions import ProbeMetric
    from veridical.probes import LogisticProbe

    model = hooked("llama")
    weights = np.random.default_rng(0).normal(size=32)
    probe = LogisticProbe().adopt(np.array([0, 1]), weights, np.zeros(1), 1)
    metric = ProbeMetric(probe, "resid_post.1")
    with pytest.warns(UserWarning, match="cannot depend on"):
        found = attribute(
            model, CLEAN, CORRUPT, metric=metric, method="atp", sites="resid_post.1, resid_post.2, z.2"
        )
    last = found["resid_post.1"][:, -1]
    np.testing.assert_allclose(last, found.source_metric - found.base_metric, rtol=1e-4)
    np.testing.assert_array_equal(np.nan_to_num(found["resid_post.1"][:, :-1]), 0)
    np.testing.assert_array_equal(np.nan_to_num(found["z.2"]), 0)
    with pytest.warns(UserWarning, match="cannot depend"):
        attribute(model, CLEAN, CORRUPT, metric=metric, method="ig", sites="z.2", steps=2)
    with pytest.raises(InputError, match="metric of the logits"):
        attribute(model, CLEAN, CORRUPT, metric=metric, method="edges")


def test_a_site_beside_the_way_is_zero_and_says_so(hooked):
    model = hooked("llama")
    with pytest.warns(UserWarning, match=r"exactly zero at resid_mid\.2"):
        attribute(model, CLEAN, metric=lambda logits: logits[:, 0, 3] * 0, sites="resid_mid.2")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("build", [bridge, hooked_transformer])
def test_transformer_lens_models(hooked, tokenizer, tmp_path, name, build):
    model = vd.load(build(name, tokenizer, tmp_path))
    sites = ["resid_pre.1", "z.1", "mlp_out.1", "resid_mid.2"]
    for method in ("atp", "ig"):
        options = {"metric": difference, "method": method, "sites": sites}
        found = attribute(model, CLEAN, CORRUPT, **options)
        expected = attribute(hooked(name), CLEAN, CORRUPT, **options)
        for site in sites:
            np.testing.assert_allclose(found[site], expected[site], rtol=1e-3, atol=2e-4, err_msg=site)


def test_yes_minus_no_of_a_classifier_by_patch(hooked):
    model = hooked("vit")
    images = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    found = attribute(model, images, metric=lambda x: x[:, 1] - x[:, 0])
    assert found["embed"].shape == (3, 10)
    assert list(found.to_frame()["token"])[:3] == ["class", "0,0", "0,1"]


def test_texts_pairs_and_answers(hooked):
    model = hooked("llama")
    clean = ["the capital of France is", "the capital of Italy is"]
    corrupt = ["the capital of Italy is", "the capital of France is"]
    found = attribute(
        model, clean, corrupt, metric="logit_diff", answers="P", wrong="R", method="atp", align="token"
    )
    assert found.unit == "logits"
    assert {"resid_pre.0", "z.0", "mlp_out.2"} <= set(found.scores)


def test_the_result(hooked, tmp_path):
    model = hooked("llama")
    found = attribute(model, CLEAN, CORRUPT, metric=difference, method="atp")
    table = found.to_frame()
    z = table[table["kind"] == "z"]
    assert len(z) == 3 * 6 * 4
    assert set(z["examples"]) == {1, 2}
    assert z["low"].notna().sum() == 3 * 4 * 4
    row = z[(z["layer"] == 1) & (z["position"] == 5) & (z["head"] == 2)].iloc[0]
    assert row["score"] == pytest.approx(found["z.1"][:, 5, 2].mean(), rel=1e-6)
    assert row["low"] <= row["score"] <= row["high"]
    each = found.to_frame(examples=True)
    assert len(each[each["example"] == 1]) == 4 * 3 * (2 + 4)
    assert (each[(each["example"] == 1)]["position"] >= 2).all()
    top = found.top(4)
    assert list(top["score"].abs()) == sorted(table["score"].abs(), reverse=True)[:4]
    assert len(found.figure().data) == 3
    loaded = Attribution.load(found.save(tmp_path / "a"))
    assert loaded.to_frame().equals(table)
    assert loaded.labels == found.labels
    assert found.labels[0][1] == " | ".join(model.tokenizer.decode([token]) for token in (9, 88))
    single = attribute(model, CLEAN[:1], metric=difference)
    assert single.to_frame()["low"].isna().all()
    assert "One example: no intervals." in single.findings()
    assert "data_fingerprint" in found.facts


def test_markup_in_texts_is_shown_and_not_run(hooked):
    model = hooked("llama")
    found = attribute(model, ["<b>is</b> & <script>"], metric=difference)
    shown = found.html() + found._repr_html_() + found.report_section().html[0]
    assert "<script" not in shown
    assert "<b>is" not in shown
    assert "&lt;" in shown


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"method": "atpp"}, UnknownNameError, "unknown method 'atpp'; nearest: atp"),
        ({"sites": "resid_pr.1"}, UnknownNameError, "nearest: resid_pre.1"),
        ({"metric": "logit_dif"}, UnknownNameError, "nearest: logit_diff"),
        ({"direction": "denoise"}, UnknownNameError, "nearest: denoising"),
        ({"metric": "rank", "answers": 3}, InputError, "has no gradient"),
        ({"metric": lambda x: x.sum()}, InputError, "returned a scalar"),
        ({"metric": lambda x: x[:, -1].detach()[:, 0]}, InputError, "has no gradient"),
        ({"metric": lambda x: x[:, -1].argmax(-1).float()}, InputError, "has no gradient"),
        ({"method": "grad_x_input"}, InputError, "reads the clean run only"),
        ({"corrupt": None}, InputError, "give corrupt="),
        ({"corrupt": [[5, 9], [3]]}, InputError, "row 0: clean has 6 tokens"),
        ({"method": "ig", "steps": 0}, InputError, "expected a number of nodes"),
        ({"method": "ig", "baseline": 1.0}, InputError, "one of the two"),
        ({"method": "ig", "sites": "pattern.0"}, InputError, "not offered"),
        ({"edges": "mlp.0->logits"}, InputError, "for methods 'edges'"),
        ({"batch_tokens": 0}, InputError, "at least 1"),
        ({"sites": "model.embed_tokens:in"}, InputError, "floating-point"),
        ({"sites": "lm_head:out", "keep": 1}, InputError, "expected \\[batch, pos"),
    ],
)
def test_what_is_refused(hooked, options, error, said):
    given = {"corrupt": CORRUPT, "metric": difference, "method": "atp", **options}
    with pytest.raises(error, match=said) as raised:
        attribute(hooked("llama"), CLEAN, **given)
    assert "\n" not in str(raised.value)


def test_a_baseline_of_another_width(hooked):
    with pytest.raises(InputError, match=r"baseline has shape \(7,\)"):
        attribute(hooked("llama"), CLEAN, metric=difference, method="ig", baseline=torch.zeros(7))


class WithoutBackward(LinearModel):
    """As a model whose kernels know no backward."""

    def forward(self, input_ids, attention_mask=None):
        with torch.no_grad():
            return super().forward(input_ids, attention_mask)


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("no kernel for int4\nand more")


class BrokenBackward(LinearModel):
    def forward(self, input_ids, attention_mask=None):
        return Failing.apply(super().forward(input_ids, attention_mask))


@pytest.mark.parametrize(
    ("made", "said"),
    [(WithoutBackward, "no gradient reaches the logits"), (BrokenBackward, "no kernel for int4")],
)
@pytest.mark.parametrize("method", ["grad_x_input", "ig"])
def test_a_model_without_a_backward_says_so(made, said, method):
    with pytest.raises(ModelError, match=said) as raised:
        attribute(vd.load(made()), CLEAN2, metric=lambda x: x[:, -1, 1], method=method, sites="first:out")
    assert "\n" not in str(raised.value)


def test_nan_is_an_error():
    module = LinearModel()
    with torch.no_grad():
        module.first.bias[2] = float("nan")
    with pytest.raises(NonFiniteError, match="first:out"):
        attribute(vd.load(module), CLEAN2, metric=lambda x: x[:, -1, 1], sites="first:out")


def test_dropout_is_warned_of():
    model = vd.load(make("gpt2").train())
    with pytest.warns(UserWarning, match="dropout"):
        attribute(model, CLEAN, metric=difference)
    assert model.model.training
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attribute(vd.load(make("gpt2")), CLEAN, metric=difference)
