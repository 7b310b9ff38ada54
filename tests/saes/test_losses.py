"""Every training loss and its gradients against the formula written out densely, in float64."""

import pytest
import torch
from oracles import dense_loss, gradients
from sae_makers import CONFIGS, made

from veridical.saes.kinds import KINDS

SPARSE = ("topk", "batch_topk", "matryoshka", "transcoder", "crosscoder")


def batch_for(architecture, vectors):
    x, y = vectors
    return (x, y) if "transcoder" in architecture else (x, None)


def test_every_architecture_is_tried():
    assert set(CONFIGS) == set(KINDS)


@pytest.mark.parametrize("architecture", [name for name in CONFIGS if "jumprelu" not in name])
@pytest.mark.parametrize("ramp", [1.0, 0.25])
def test_loss_and_gradients_equal_the_dense_formula(architecture, ramp, vectors):
    sae = made(architecture)
    x, y = batch_for(architecture, vectors)
    ours = sae.loss(x, y, ramp=ramp).total
    plain = dense_loss(sae, x, y, ramp=ramp)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    expected = gradients(sae, plain)
    for name, grad in gradients(sae, ours).items():
        assert expected[name].abs().max() > 1e-6, name
        torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("architecture", SPARSE)
@pytest.mark.parametrize("variant", ["relu", "straight_through"])
@pytest.mark.parametrize("k_aux", [3, 1000])
def test_auxiliary_loss_and_gradients_equal_the_dense_formula(architecture, variant, k_aux, vectors):
    sae = made(architecture, aux_variant=variant, k_aux=k_aux, aux=0.5)
    dead = torch.zeros(40, dtype=torch.bool)
    dead[[1, 2, 5, 8, 13, 21, 34, 39]] = True
    x, y = batch_for(architecture, vectors)
    with torch.no_grad():
        sae.b_enc[dead] -= 1.0
    ours, plain = sae.loss(x, y, dead=dead).total, dense_loss(sae, x, y, dead=dead)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    assert (ours - sae.loss(x, y).total).abs() > 1e-3
    expected = gradients(sae, plain)
    for name, grad in gradients(sae, ours).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("architecture", ["jumprelu", "jumprelu_transcoder"])
def test_jumprelu_value_and_plain_gradients(architecture, vectors):
    """Everything but the threshold has an ordinary gradient."""
    sae, (x, y) = made(architecture), batch_for(architecture, vectors)
    ours, plain = sae.loss(x, y).total, dense_loss(sae, x, y)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    expected = gradients(sae, plain)
    for name, grad in gradients(sae, ours).items():
        if name != "log_threshold":
            torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-12, msg=name)


def test_jumprelu_threshold_gradient_is_the_papers(vectors):
    """Equations (11) and (12): only pre-activations within half a bandwidth of the threshold count."""
    sae, (x, _) = made("jumprelu"), vectors
    width, penalty = sae.config.bandwidth, sae.config.penalty
    with torch.no_grad():
        threshold = sae.log_threshold.exp()
        pre = x * sae.scale @ sae.W_enc.T + sae.b_enc
        made_of = (pre * (pre > threshold)) @ sae.W_dec + sae.b_dec
        to_latents = -2 * (x * sae.scale - made_of) @ sae.W_dec.T / len(x)
        near = ((pre - threshold).abs() < width / 2).double()
        by_threshold = -(threshold * to_latents + penalty / len(x)) * near / width
        expected = by_threshold.sum(0) * threshold
    assert 0 < near.mean() < 1
    found = gradients(sae, sae.loss(x).total)["log_threshold"]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_a_stack_computes_what_its_members_do_alone(architecture, vectors):
    """Members that differ in seed, k and penalty, some with dead latents, some with none."""
    own = (
        [{"k": 5}, {"k": 3}, {"k": 8}]
        if architecture in SPARSE
        else [{"sparsity": s} for s in (0.1, 1.0, 3.0)]
    )
    saes = [made(architecture, seed, **options) for seed, options in enumerate(own)]
    dead = torch.zeros(3, 40, dtype=torch.bool)
    dead[0, :6], dead[2, 30:] = True, True
    x, y = batch_for(architecture, vectors)
    stack = type(saes[0]).stack(saes)
    together = stack.loss(x, y, dead=dead)
    together.total.sum().backward()
    for number, sae in enumerate(saes):
        alone = sae.loss(x, y, dead=dead[number])
        torch.testing.assert_close(together.total[number], alone.total, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(together.fired[number], alone.fired)
        for name, value in alone.parts.items():
            torch.testing.assert_close(together.parts[name][number], value, rtol=1e-12, atol=1e-12, msg=name)
        for name, grad in gradients(sae, alone.total).items():
            found = getattr(stack, name).grad[number]
            torch.testing.assert_close(found, grad, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("architecture", SPARSE)
def test_parts_say_what_the_batch_gave(architecture, vectors):
    sae = made(architecture)
    x, y = batch_for(architecture, vectors)
    loss = sae.loss(x, y)
    k = sae.config.k
    assert loss.parts["aux"] == 0
    assert 0 < loss.parts["l0"] <= k
    if architecture in ("batch_topk", "matryoshka", "crosscoder"):
        assert loss.parts["l0"] == k  # there are positive ones enough in these data
    assert 0 < loss.fired.sum() <= 40


def test_no_auxiliary_loss_when_nothing_is_dead_or_nothing_is_left(vectors):
    sae, (x, _) = made("topk"), vectors
    plain = sae.loss(x).total
    assert sae.loss(x, dead=torch.zeros(40, dtype=torch.bool)).total == plain
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.b_dec.zero_()
    nothing = sae.loss(torch.zeros_like(x), dead=torch.ones(40, dtype=torch.bool))
    assert nothing.total == 0
    assert nothing.parts["aux"] == 0
    assert all(grad.isfinite().all() for grad in gradients(sae, nothing.total).values())


def test_auxiliary_target_gets_no_gradient(vectors):
    """The living latents are not moved to leave a residual that dead ones can copy."""
    x, _ = vectors
    dead = torch.zeros(40, dtype=torch.bool)
    dead[:8] = True
    with_aux, without = made("topk", aux=0.5), made("topk", aux=0.0)
    with torch.no_grad():
        for sae in (with_aux, without):
            sae.b_enc[dead] -= 100.0  # dead latents take no part in the reconstruction
            sae.b_enc[dead][:4] += 200.0
    found, plain = (gradients(sae, sae.loss(x, dead=dead).total) for sae in (with_aux, without))
    for name in ("W_enc", "b_enc", "W_dec"):
        torch.testing.assert_close(found[name][~dead], plain[name][~dead], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["b_dec"], plain["b_dec"], rtol=1e-12, atol=1e-12)


def test_a_latent_picked_with_value_zero_did_not_fire(vectors):
    sae, (x, _) = made("topk", k=40), vectors
    with torch.no_grad():
        sae.b_enc[:10] -= 1000.0
    fired = sae.loss(x).fired
    assert not fired[:10].any()
    assert fired[10:].all()


@pytest.mark.parametrize("architecture", ["topk", "batch_topk"])
def test_bfloat16_products_stay_near(architecture, vectors):
    sae, (x, _) = made(architecture).float(), vectors
    half = made(architecture, dtype="bfloat16").float()
    x = x.float()
    full, rough = sae.loss(x), half.loss(x)
    torch.testing.assert_close(rough.total, full.total, rtol=0.02, atol=0)
    expected = gradients(sae, full.total)
    for name, grad in gradients(half, rough.total).items():
        assert grad.dtype == torch.float32
        near = torch.nn.functional.cosine_similarity(grad.flatten(), expected[name].flatten(), 0)
        assert near > 0.98, name


def test_batches_larger_than_one_part_are_scanned_whole(monkeypatch, vectors):
    from veridical.saes import scan

    sae, (x, _) = made("topk"), vectors
    dead = torch.arange(40) < 6
    whole = sae.loss(x.repeat(5, 1)[:301], dead=dead)
    monkeypatch.setattr(scan, "CPU_BYTES", 64 * 40 * 8)
    monkeypatch.setattr(scan, "CORE_BYTES", 0)
    parts = sae.loss(x.repeat(5, 1)[:301], dead=dead)
    torch.testing.assert_close(parts.total, whole.total, rtol=1e-12, atol=1e-12)
