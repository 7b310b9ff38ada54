"""Encoding and decoding: the definitions, stacks, scales folded away, and what a batch does not change."""

import pytest
import torch
from sae_makers import CONFIGS, D, made

from veridical.errors import ConfigError, DataError
from veridical.saes import SAEConfig
from veridical.saes.kinds import kind


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_folding_scales_changes_no_output(architecture, vectors):
    sae, (x, y) = made(architecture), vectors
    if architecture == "crosscoder":
        with torch.no_grad():
            sae.scale.copy_(torch.tensor([0.5, 2.0, 1.5]).repeat_interleave(4))
            sae.scale_out.copy_(sae.scale)
    if hasattr(sae, "updates"):
        sae.loss(x, y if "transcoder" in architecture else None)  # sets the threshold
        assert sae.threshold > 0
        sae.threshold *= 0.999  # it is the least latent kept, which rounding would decide on
    folded = sae.folded()
    assert (folded.scale == 1).all()
    assert (folded.scale_out == 1).all()
    torch.testing.assert_close(folded(x), sae(x), rtol=1e-10, atol=1e-12)
    factor = 1.0 if architecture == "crosscoder" else float(sae.scale_out)
    torch.testing.assert_close(folded.encode(x), sae.encode(x) / factor, rtol=1e-10, atol=1e-12)
    assert (sae.encode(x) > 0).any()


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_a_row_alone_equals_the_row_in_a_batch(architecture, vectors):
    sae, (x, y) = made(architecture), vectors
    if hasattr(sae, "updates"):
        sae.loss(x, y if "transcoder" in architecture else None)
    torch.testing.assert_close(sae(x[7]), sae(x)[7], rtol=1e-12, atol=1e-12)
    nested = x.view(4, 16, D)
    torch.testing.assert_close(sae.encode(nested), sae.encode(x).view(4, 16, 40), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_stack_encodes_as_its_members(architecture, vectors):
    saes, (x, _) = [made(architecture, seed=seed) for seed in (1, 2)], vectors
    stack = type(saes[0]).stack(saes)
    assert stack.encode(x).shape == (2, 64, 40)
    for number, sae in enumerate(saes):
        torch.testing.assert_close(stack.encode(x)[number], sae.encode(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(stack(x)[number], sae(x), rtol=1e-12, atol=1e-12)
        back = stack.member(number)
        assert back.config == sae.config
        torch.testing.assert_close(back(x), sae(x), rtol=0, atol=0)


def test_topk_keeps_the_largest_of_each_row(vectors):
    sae, (x, _) = made("topk"), vectors
    pre = sae.pre_activations(x)
    values, indices = sae.encode_sparse(x)
    assert values.shape == indices.shape == (64, 5)
    for row in range(64):
        order = pre[row].argsort(descending=True)[:5]
        assert order.tolist() == indices[row].tolist()
        torch.testing.assert_close(values[row], pre[row, order].relu())
    assert ((sae.encode(x) > 0).sum(1) <= 5).all()


def test_topk_stack_of_unlike_k_zeroes_what_is_beyond_a_members_own(vectors):
    saes = [made("topk", k=2), made("topk", k=6)]
    values, _ = type(saes[0]).stack(saes).encode_sparse(vectors[0])
    assert values.shape == (2, 64, 6)
    assert (values[0, :, 2:] == 0).all()
    torch.testing.assert_close(values[0, :, :2], saes[0].encode_sparse(vectors[0])[0])


def test_batch_topk_threshold_keeps_about_k(vectors):
    sae, (x, _) = made("batch_topk"), vectors
    for _ in range(5):
        sae.loss(x)
    assert sae.updates == 5
    kept = (sae.encode(x) > 0).sum(1).double().mean()
    assert 4.9 <= kept <= 5  # the least that was kept does not exceed itself
    pre = (x * 0.7 - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    least = pre.relu().flatten().topk(5 * 64).values[-1]
    torch.testing.assert_close(sae.threshold, least)


def test_batch_topk_choice_does_not_depend_on_the_threshold_so_far(vectors):
    """The running threshold only says where to look first."""
    x, _ = vectors
    totals = []
    for threshold in (0.0, 0.4, 1000.0):
        sae = made("batch_topk")
        sae.threshold.fill_(threshold)
        totals.append(sae.loss(x).total)
    assert totals[0] == totals[1] == totals[2]


def test_matryoshka_prefixes(vectors):
    sae, (x, _) = made("matryoshka"), vectors
    sae.loss(x)
    latents = sae.encode(x)
    parts = sae.decode_prefixes(latents)
    assert len(parts) == 3
    torch.testing.assert_close(parts[-1], sae(x))
    alone = latents.clone()
    alone[:, 7:] = 0
    torch.testing.assert_close(parts[0], sae.decode(alone))


def test_crosscoder_takes_sites_side_by_side_or_stacked(vectors):
    sae, (x, _) = made("crosscoder"), vectors
    torch.testing.assert_close(sae(x.view(64, 3, 4)), sae(x))
    assert sae.decoders.shape == sae.encoders.shape == (3, 40, 4)
    by_site = torch.einsum("bf,mfd->bmd", sae.encode(x), sae.decoders).flatten(1)
    torch.testing.assert_close((by_site + sae.b_dec) / sae.scale_out, sae(x))


def test_calibration_scales_and_centres(vectors):
    x = vectors[0].float() * 37 + 5
    sae = kind("topk")(SAEConfig(width=40, k=4, bias_init="mean"), D)
    sae.calibrate(x)
    scaled = x * sae.scale
    assert scaled.norm(dim=1).mean() == pytest.approx(D**0.5, rel=1e-5)
    torch.testing.assert_close(sae.b_dec, scaled.mean(0))
    assert float(sae.variance) == pytest.approx(float(scaled.var(0, correction=0).sum()), rel=1e-5)
    plain = kind("topk")(SAEConfig(width=40, k=4, normalise="none", bias_init="zero"), D)
    plain.calibrate(x)
    assert plain.scale == 1
    assert (plain.b_dec == 0).all()


def test_crosscoder_scales_each_site_by_itself(vectors):
    x = vectors[0].view(64, 3, 4) * torch.tensor([1.0, 10.0, 100.0])[:, None]
    sae = made("crosscoder")
    sae.calibrate(x)
    norms = (x.flatten(1) * sae.scale).view(64, 3, 4).norm(dim=-1).mean(0)
    torch.testing.assert_close(norms, torch.full((3,), 2.0, dtype=torch.float64), rtol=1e-5, atol=0)
    folded = sae.folded()
    torch.testing.assert_close(folded.norms(), sae.norms(), rtol=1e-6, atol=1e-9)


def test_geometric_median_minimises_the_sum_of_distances(vectors):
    from veridical.saes.median import geometric_median

    x = vectors[0].clone()
    x[:3] *= 1000
    middle = geometric_median(x).requires_grad_()
    (slope,) = torch.autograd.grad((x - middle).norm(dim=1).sum(), middle)
    assert slope.norm() < 1e-3  # of 64 unit vectors
    assert middle.detach().norm() < 3
    assert x.mean(0).norm() > 30
    same = torch.ones(5, 2, dtype=torch.float64)
    torch.testing.assert_close(geometric_median(same), same[0])


def test_parallel_gradient_is_removed_and_norms_are_held(vectors):
    sae = made("topk")
    sae.normalise_decoder()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40, dtype=torch.float64))
    sae.loss(vectors[0]).total.backward()
    assert ((sae.W_dec.grad * sae.W_dec).sum(1).abs() > 1e-6).any()
    sae.remove_parallel_gradient()
    torch.testing.assert_close((sae.W_dec.grad * sae.W_dec).sum(1), torch.zeros(40, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"k": 41, "width": 40}, "k is 41, but there are only 40 latents"),
        ({"width": 0}, "width is 0"),
        ({"warmup": 2.0}, "warmup is 2.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"architecture": "matryoshka", "width": 40, "prefixes": (10, 50)}, "prefixes are"),
        ({"architecture": "topk", "skip": True}, "belong to a transcoder"),
        ({"architecture": "crosscoder"}, "two or more `sites`"),
        ({"architecture": "transcoder", "site": "resid_pre.0"}, "both site and target_site"),
        ({"sites": ("resid_pre.0", "resid_pre.1")}, "belongs to a crosscoder"),
    ],
)
def test_configs_that_make_no_sae_are_refused(options, said):
    config = SAEConfig(**options)
    with pytest.raises(ConfigError, match=said):
        kind(config.architecture)(config, D)


def test_unlike_members_make_no_stack():
    with pytest.raises(ConfigError, match="one width"):
        kind("topk")([SAEConfig(width=40, k=4), SAEConfig(width=41, k=4)], D)
    with pytest.raises(ConfigError, match="expected a topk"):
        kind("topk")([SAEConfig(width=40, k=4), SAEConfig(architecture="relu", width=40)], D)


def test_vectors_without_scale_or_variance_are_refused():
    sae = kind("topk")(SAEConfig(width=40, k=4), D)
    with pytest.raises(DataError, match="all zero"):
        sae.calibrate(torch.zeros(8, D))
    with pytest.raises(DataError, match="all the same"):
        sae.calibrate(torch.ones(8, D))
