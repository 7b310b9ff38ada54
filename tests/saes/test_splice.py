"""Splicing, steering, clamping and ablating: each does what it says, to the size it says, and is undone."""

import pytest
import torch
from sae_makers import exact_sae, random_sae

from veridical.errors import InputError, UnknownNameError
from veridical.saes.splice import ablate, clamp, spliced, steer

TEXTS = ["the capital of France is Paris", "what is the symbol of gold?"]
SITE = "resid_post.1"


@pytest.fixture
def sae():
    return random_sae("topk", d_in=32, width=64, site=SITE, scale=2.0)


def values(model, site=SITE):
    """The site's values in a run, padding left out, and the logits."""
    inputs = model.batch(model.encode(TEXTS))
    with torch.no_grad():
        run = model.run(inputs, read=[site])
    return run.values[model.resolve(site)[0].name][inputs["attention_mask"].bool()], run.logits


def active_feature(model, sae):
    """The feature that fires most, and one that never does."""
    x, _ = values(model)
    fires = (sae.encode(x) > 0).float().mean(0)
    return int(fires.argmax()), int(fires.argmin())


def test_splicing_puts_the_reconstruction_in_place(hooked, sae):
    model = hooked("llama")
    plain, logits = values(model)
    with spliced(model, sae):
        made, changed = values(model)
    torch.testing.assert_close(made, sae(plain), rtol=1e-5, atol=1e-5)
    assert (changed - logits).abs().max() > 0.1
    with spliced(model, exact_sae(32, SITE)):
        assert torch.equal(values(model)[1], logits)
    assert torch.equal(values(model)[1], logits)


def test_steering_adds_the_decoder_row(hooked, sae):
    model, (feature, _) = hooked("llama"), (5, 0)
    plain, logits = values(model)
    with steer(model, sae, {feature: 3.0}):
        steered, changed = values(model)
    row = sae.folded().W_dec[feature]
    torch.testing.assert_close(steered - plain, (3 * row).expand_as(plain), rtol=1e-4, atol=1e-4)
    assert (changed - logits).abs().max() > 0.1
    with steer(model, sae, {feature: 3.0, 7: -1.0}):
        both, _ = values(model)
    change = (3 * row - sae.folded().W_dec[7]).expand_as(plain)
    torch.testing.assert_close(both - plain, change, rtol=1e-4, atol=1e-4)
    assert torch.equal(values(model)[1], logits)


def test_steering_raises_what_the_feature_writes(hooked):
    """At the last site the direct path is all there is: the token that a row points at gets likelier."""
    model = hooked("llama")
    last = f"resid_post.{model.n_layers - 1}"
    sae = random_sae("topk", d_in=32, width=64, site=last)
    sae.W_dec[3] = model.model.get_output_embeddings().weight[77].detach()
    with torch.no_grad():
        before = model.logits(TEXTS)[..., 77]
        rises = []
        for strength in (0.0, 20.0, 200.0):
            with steer(model, sae, {3: strength}):
                rises.append(float((model.logits(TEXTS).log_softmax(-1)[..., 77]).mean()))
    with torch.no_grad():
        assert rises[0] == float(model.logits(TEXTS).log_softmax(-1)[..., 77].mean())
    assert rises[0] < rises[1] < rises[2]
    assert rises[2] - rises[0] > 1
    assert before.shape == model.logits(TEXTS)[..., 77].shape


def test_ablating_takes_out_one_contribution(hooked, sae):
    model = hooked("llama")
    feature, silent = active_feature(model, sae)
    plain, logits = values(model)
    with ablate(model, sae, feature):
        ablated, changed = values(model)
    raw = sae.folded()
    latents = raw.encode(plain)
    assert (latents[:, feature] > 0).any()
    torch.testing.assert_close(
        plain - ablated, latents[:, [feature]] * raw.W_dec[feature], rtol=1e-4, atol=1e-4
    )
    assert (changed - logits).abs().max() > 1e-3
    assert not (latents[:, silent] > 0).any()
    with ablate(model, sae, silent):
        assert torch.equal(values(model)[1], logits)
    with ablate(model, sae, [feature, silent]):
        torch.testing.assert_close(values(model)[0], ablated)


def test_clamping_holds_a_value(hooked, sae):
    model = hooked("llama")
    feature, silent = active_feature(model, sae)
    plain, _ = values(model)
    raw = sae.folded()
    latents = raw.encode(plain)
    with clamp(model, sae, {feature: 1.5, silent: 2.0}):
        clamped, _ = values(model)
    change = (1.5 - latents[:, [feature]]) * raw.W_dec[feature] + 2.0 * raw.W_dec[silent]
    torch.testing.assert_close(clamped - plain, change, rtol=1e-4, atol=1e-4)


def test_generation_is_steered_and_left_alone_after(hooked):
    model = hooked("llama")
    last = f"resid_post.{model.n_layers - 1}"
    sae = random_sae("topk", d_in=32, width=64, site=last)
    weight = model.model.get_output_embeddings().weight.detach()
    sae.W_dec[3] = weight[77] - weight.mean(0)
    plain = model.generate(TEXTS[0], max_new_tokens=4)
    with steer(model, sae, {3: 1e4}):
        steered = model.generate(TEXTS[0], max_new_tokens=4)
    assert steered == model.tokenizer.decode([77] * 4)
    assert model.generate(TEXTS[0], max_new_tokens=4) == plain


def test_a_transcoder_writes_at_its_target(hooked):
    model = hooked("gpt2")
    source, target = "transformer.h.1.ln_2:out", "mlp_out.1"
    sae = random_sae("transcoder", d_in=32, width=64, site=source, target_site=target)
    x, _ = values(model, source)
    plain, logits = values(model, target)
    with spliced(model, sae):
        torch.testing.assert_close(values(model, target)[0], sae(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(values(model, source)[0], x)
    feature = int((sae.encode(x) > 0).float().mean(0).argmax())
    with ablate(model, sae, feature):
        change = plain - values(model, target)[0]
    wanted = sae.encode(x)[:, [feature]] * sae.W_dec[feature]
    torch.testing.assert_close(change, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(values(model, target)[1], logits)


def test_heads_are_spliced_side_by_side(hooked):
    model = hooked("llama")
    sae = random_sae("topk", d_in=32, width=64, site="z.1")
    plain, _ = values(model, "z.1")
    with spliced(model, sae):
        made, _ = values(model, "z.1")
    torch.testing.assert_close(made.flatten(1), sae(plain.flatten(1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["layer_norm", "constant_norm_rescale"])
def test_normalised_rows_are_edited_in_their_own_units(hooked, how):
    """Ablating a feature is what running the SAE without its latent would take out of the reconstruction."""
    from veridical.saes.row_norm import RowNormalised

    model, inner = hooked("llama"), random_sae("topk", d_in=32, width=64, site=SITE)
    sae = RowNormalised(inner, how)
    plain, logits = values(model)
    feature, _ = active_feature(model, sae)
    with ablate(model, sae, feature):
        ablated, changed = values(model)
    without = random_sae("topk", d_in=32, width=64, site=SITE)
    without.W_dec[feature] = 0
    wanted = sae(plain) - RowNormalised(without, how)(plain)
    torch.testing.assert_close(plain - ablated, wanted, rtol=1e-4, atol=1e-4)
    assert (changed - logits).abs().max() > 1e-3
    with spliced(model, sae):
        torch.testing.assert_close(values(model)[0], sae(plain), rtol=1e-5, atol=1e-5)


def test_undone_after_an_error(hooked, sae):
    model = hooked("llama")
    _, logits = values(model)
    with pytest.raises(RuntimeError, match="stop"), steer(model, sae, {1: 5.0}):
        raise RuntimeError("stop")
    assert torch.equal(values(model)[1], logits)


def test_gradients_flow_through_the_splice(hooked, sae):
    model = hooked("llama")
    inputs = model.batch(model.encode(TEXTS))
    embed = model.model.get_input_embeddings().weight
    with spliced(model, sae):
        loss = model.run(inputs).logits.square().mean()
    (grad,) = torch.autograd.grad(loss, embed)
    assert torch.isfinite(grad).all()
    assert grad.abs().max() > 0


def test_bad_input_is_named(hooked, sae):
    model = hooked("llama")
    with pytest.raises(InputError, match="feature 64: this SAE has features 0 to 63"):
        steer(model, sae, {64: 1.0})
    with pytest.raises(InputError, match="feature True"):
        ablate(model, sae, [True])
    with pytest.raises(InputError, match="expected a mapping"):
        steer(model, sae, 3)
    with pytest.raises(InputError, match="expected finite values"):
        clamp(model, sae, {3: float("nan")})
    with pytest.raises(UnknownNameError, match="nearest"):
        spliced(model, sae, site="resid_pots.1")
    with pytest.raises(InputError, match="names 3"):
        spliced(model, sae, site="resid_post.*")
    with pytest.raises(InputError, match="does not say which site"):
        spliced(model, random_sae("topk", d_in=32))
