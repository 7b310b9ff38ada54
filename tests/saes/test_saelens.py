"""SAELens folders: what SAELens makes of ours, and what we make of its own, for every architecture it has."""

import json

import pytest
import torch
from sae_makers import random_sae, vectors
from safetensors.torch import load_file, save_file

from veridical.errors import ConfigError, DamagedFileError, InputError, NonFiniteError, UnknownNameError
from veridical.saes.formats import from_saelens, to_saelens
from veridical.saes.saved import load_sae, save_sae


@pytest.fixture(scope="module")
def lens():
    return pytest.importorskip("sae_lens")


def same(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs.to(ours), rtol=tolerance, atol=tolerance)


WRITTEN = [
    ("relu", {}),
    ("gated", {}),
    ("jumprelu", {}),
    ("topk", {}),
    ("batch_topk", {}),
    ("matryoshka", {"prefixes": (10, 40)}),
    ("transcoder", {}),
    ("jumprelu_transcoder", {"d_out": 7}),
    ("jumprelu_transcoder", {"d_out": 7, "skip": True}),
]


@pytest.mark.parametrize(("architecture", "options"), WRITTEN)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_saelens_gives_our_output(lens, tmp_path, architecture, options, scale):
    sae = random_sae(architecture, scale=scale, scale_out=scale if "d_out" not in options else 2.0, **options)
    save_sae(sae, tmp_path / "sae")
    theirs = lens.SAE.load_from_disk(tmp_path / "sae")
    x = vectors(50, 12)
    with torch.no_grad():
        same(sae(x), theirs(x))
        same(sae.folded().encode(x), theirs.encode(x))
    active = (sae.encode(x) > 0).float().mean()
    assert 0.02 < active < 0.9
    back = load_sae(tmp_path / "sae")
    assert type(back) is type(sae)
    assert torch.equal(back(x), sae.folded()(x)) or torch.allclose(back(x), sae.folded()(x), atol=1e-6)


def randomised(sae, seed=0):
    """A SAELens SAE with no weight at its initial value."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sae.named_parameters():
            drawn = torch.randn(value.shape, generator=random, dtype=torch.float64)
            if name == "threshold":
                drawn = drawn.abs() * 0.3
            elif value.dim() == 1:
                drawn = drawn * 0.3
            elif name == "W_enc":
                drawn = drawn / value.shape[0] ** 0.5
            value.copy_(drawn)
    return sae


def theirs_of(lens, name, dtype="float64", **options):
    classes = {
        "standard": (lens.StandardSAE, lens.StandardSAEConfig),
        "gated": (lens.GatedSAE, lens.GatedSAEConfig),
        "jumprelu": (lens.JumpReLUSAE, lens.JumpReLUSAEConfig),
        "topk": (lens.TopKSAE, lens.TopKSAEConfig),
        "transcoder": (lens.Transcoder, lens.TranscoderConfig),
        "skip_transcoder": (lens.SkipTranscoder, lens.SkipTranscoderConfig),
        "jumprelu_transcoder": (lens.JumpReLUTranscoder, lens.JumpReLUTranscoderConfig),
        "jumprelu_skip_transcoder": (lens.JumpReLUSkipTranscoder, lens.JumpReLUSkipTranscoderConfig),
    }
    made, config = classes[name]
    if "transcoder" in name:
        options |= {"d_out": 7, "apply_b_dec_to_input": False}
    if name == "topk":
        options |= {"k": 5}
    return randomised(made(config(d_in=12, d_sae=40, dtype=dtype, **options)))


READ = [
    ("standard", {}),
    ("standard", {"apply_b_dec_to_input": False}),
    ("gated", {}),
    ("gated", {"apply_b_dec_to_input": False}),
    ("jumprelu", {}),
    ("jumprelu", {"apply_b_dec_to_input": False}),
    ("topk", {}),
    ("topk", {"apply_b_dec_to_input": False}),
    ("topk", {"rescale_acts_by_decoder_norm": True}),
    ("transcoder", {}),
    ("skip_transcoder", {}),
    ("jumprelu_transcoder", {}),
    ("jumprelu_skip_transcoder", {}),
]


@pytest.mark.parametrize(("name", "options"), READ)
def test_we_give_the_output_of_saelens(lens, tmp_path, name, options):
    theirs = theirs_of(lens, name, **options)
    theirs.save_model(tmp_path / "theirs")
    ours = from_saelens(tmp_path / "theirs")
    assert ours.W_dec.dtype == torch.float64
    x = vectors(60, 12, dtype=torch.float64)
    with torch.no_grad():
        same(ours(x), theirs(x), 1e-10)
        same(ours.encode(x), theirs.encode(x), 1e-10)
        to_saelens(ours, tmp_path / "again")
        again = lens.SAE.load_from_disk(tmp_path / "again")
        same(ours(x), again(x), 1e-10)
        same(ours.encode(x), again.encode(x), 1e-10)


@pytest.mark.parametrize("name", ["batchtopk", "matryoshka_batchtopk"])
@pytest.mark.parametrize("rescale", [False, True])
def test_batch_topk_of_saelens(lens, tmp_path, name, rescale):
    """What it saves for inference, and a checkpoint of its training, give the same."""
    options = {"d_in": 12, "d_sae": 40, "k": 5, "dtype": "float64", "rescale_acts_by_decoder_norm": rescale}
    if name == "batchtopk":
        theirs = lens.BatchTopKTrainingSAE(lens.BatchTopKTrainingSAEConfig(**options))
    else:
        config = lens.MatryoshkaBatchTopKTrainingSAEConfig(**options, matryoshka_widths=[10, 40])
        theirs = lens.MatryoshkaBatchTopKTrainingSAE(config)
    randomised(theirs).topk_threshold.fill_(0.4)
    theirs.save_model(tmp_path / "training")
    theirs.save_inference_model(tmp_path / "inference")
    runs = lens.SAE.load_from_disk(tmp_path / "inference")
    x = vectors(60, 12, dtype=torch.float64)
    with torch.no_grad():
        for folder in ("training", "inference"):
            ours = from_saelens(tmp_path / folder)
            same(ours(x), runs(x), 1e-10)
            same(ours.encode(x), runs.encode(x), 1e-10)
    assert from_saelens(tmp_path / "training").config.architecture == "batch_topk"


def test_z_is_given_head_by_head_there(lens, tmp_path):
    sae = random_sae("topk", site="z.3")
    to_saelens(sae, tmp_path)
    theirs = lens.SAE.load_from_disk(tmp_path)
    x = vectors(20, 12)
    same(sae(x), theirs(x.unflatten(-1, (3, 4))).flatten(-2))
    assert theirs.cfg.metadata.hook_name == "blocks.3.attn.hook_z"
    assert from_saelens(tmp_path).config.site == "blocks.3.attn.hook_z"


def test_an_unfolded_input_scale_is_asked_for(lens, tmp_path):
    theirs = theirs_of(lens, "standard", normalize_activations="expected_average_only_in")
    theirs.save_model(tmp_path)
    with pytest.raises(InputError, match="expected_average_only_in, but holds no factor"):
        from_saelens(tmp_path)
    x = vectors(30, 12, dtype=torch.float64)
    same(from_saelens(tmp_path, scale=1.0)(x), theirs(x).detach(), 1e-10)
    theirs.fold_activation_norm_scaling_factor(2.5)
    same(from_saelens(tmp_path, scale=2.5)(x), theirs(x).detach(), 1e-10)
    same(from_saelens(tmp_path, scale=2.5).encode(x), theirs.encode(x).detach(), 1e-10)


@pytest.mark.parametrize("normalise", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("name", ["standard", "topk", "jumprelu"])
def test_rows_that_are_normalised_one_by_one(lens, tmp_path, normalise, name):
    theirs = theirs_of(lens, name, normalize_activations=normalise)
    theirs.save_model(tmp_path / "theirs")
    ours = load_sae(tmp_path / "theirs")
    x = 7 * vectors(60, 12, dtype=torch.float64) + torch.arange(60.0, dtype=torch.float64)[:, None]
    with torch.no_grad():
        same(ours(x), theirs(x), 1e-9)
        same(ours.encode(x), theirs.encode(x), 1e-9)
        save_sae(ours, tmp_path / "ours")
        back, again = load_sae(tmp_path / "ours"), lens.SAE.load_from_disk(tmp_path / "ours")
        same(back(x), ours(x), 1e-12)
        same(ours(x), again(x), 1e-9)
    assert normalise in repr(ours)
    found = ours.evaluate(x, baselines=False)
    error = (x - ours(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert found.metrics["fvu"].value == pytest.approx(float(error), rel=1e-6)
    with pytest.raises(InputError, match="no output without their rows"):
        ours.decode(ours.encode(x))
    with pytest.raises(InputError, match="not trained here"):
        ours.loss(x)


def test_other_normalisations_are_refused(lens, tmp_path):
    theirs_of(lens, "standard").save_model(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**cfg, "normalize_activations": "covariance_whitening"}))
    with pytest.raises(UnknownNameError, match="unknown normalisation 'covariance_whitening'"):
        from_saelens(tmp_path)


def test_configs_older_than_version_6(lens, tmp_path):
    theirs = theirs_of(lens, "topk", dtype="float32")
    theirs.save_model(tmp_path)
    old = {
        "d_in": 12,
        "d_sae": 40,
        "dtype": "torch.float32",
        "hook_point": "blocks.2.hook_resid_pre",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 5},
        "normalize_activations": False,
        "apply_b_dec_to_input": True,
    }
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    ours, again = from_saelens(tmp_path), lens.SAE.load_from_disk(tmp_path)
    assert ours.config.site == "blocks.2.hook_resid_pre"
    x = vectors(30, 12)
    same(ours(x), again(x).detach())
    (tmp_path / "cfg.json").write_text(json.dumps({**old, "activation_fn_str": "tanh-relu"}))
    with pytest.raises(ConfigError, match="activation 'tanh-relu'"):
        from_saelens(tmp_path)


def test_the_wrong_orientation_would_be_noticed(tmp_path):
    """Square shapes hide a transposed decoder; the output does not."""
    sae = random_sae("relu", d_in=12, width=12)
    to_saelens(sae, tmp_path)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    x = vectors(20, 12)
    assert torch.allclose(from_saelens(tmp_path)(x), sae(x), atol=1e-6)
    for name in ("W_enc", "W_dec"):
        turned = {**tensors, name: tensors[name].T.contiguous()}
        save_file(turned, tmp_path / "sae_weights.safetensors")
        assert (from_saelens(tmp_path)(x) - sae(x)).abs().max() > 0.1


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(InputError, match=r"no cfg\.json"):
        from_saelens(tmp_path)
    to_saelens(random_sae("relu"), tmp_path)
    weights, cfg = tmp_path / "sae_weights.safetensors", tmp_path / "cfg.json"
    tensors, saved = load_file(weights), json.loads(cfg.read_text())
    cfg.write_text(json.dumps({**saved, "architecture": "standart"}))
    with pytest.raises(UnknownNameError, match="nearest: standard"):
        from_saelens(tmp_path)
    cfg.write_text(json.dumps({**saved, "d_sae": 41}))
    with pytest.raises(DamagedFileError, match=r"W_enc is \[12, 40\]; the config says d_in 12, d_sae 41"):
        from_saelens(tmp_path)
    cfg.write_text(json.dumps(saved))
    save_file({**tensors, "W_dec": tensors["W_dec"] * float("nan")}, weights)
    with pytest.raises(NonFiniteError, match="W_dec holds NaN"):
        from_saelens(tmp_path)
    save_file({name: value for name, value in tensors.items() if name != "b_enc"}, weights)
    with pytest.raises(DamagedFileError, match="has no b_enc"):
        from_saelens(tmp_path)
    save_file(tensors, weights)
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(DamagedFileError, match="not readable safetensors"):
        from_saelens(tmp_path)


def test_what_saelens_cannot_hold_is_refused(tmp_path):
    for name, options in (("crosscoder", {}), ("transcoder", {"d_out": 7}), ("transcoder", {"skip": True})):
        sae = random_sae(name, **options)
        with pytest.raises(InputError, match="SAELens has no class for a"):
            to_saelens(sae, tmp_path)
    stack = type(random_sae("relu")).stack([random_sae("relu"), random_sae("relu", seed=1)])
    with pytest.raises(InputError, match="stack of SAEs"):
        to_saelens(stack, tmp_path)
