"""Folders of sparsify and of dictionary_learning, written by hand in their layout, against their formulas."""

import json

import pytest
import torch
from sae_makers import vectors
from safetensors.torch import save_file
from torch.nn.functional import linear

from veridical.errors import DamagedFileError, DataError, InputError, UnknownNameError
from veridical.saes.formats import from_dictionary_learning, from_sparsify
from veridical.saes.formats.sparsify import site_of
from veridical.saes.saved import load_sae

D, F, K = 12, 40, 5


def drawn(*shape, seed=0, size=1.0):
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def top(values, k):
    """All but the k largest of each row set to 0, by sorting."""
    order = values.argsort(dim=-1, descending=True)[:, :k]
    kept = torch.zeros_like(values)
    for row, columns in enumerate(order):
        kept[row, columns] = values[row, columns]
    return kept


# Sparsify


def sparsify_folder(folder, **options):
    """As `SparseCoder.save_to_disk` lays it out."""
    tensors = {
        "encoder.weight": drawn(F, D, seed=1, size=D**-0.5),
        "encoder.bias": drawn(F, seed=2, size=0.3),
        "W_dec": drawn(F, D, seed=3),
        "b_dec": drawn(D, seed=4, size=0.3),
    }
    if options.get("skip_connection"):
        tensors["W_skip"] = drawn(D, D, seed=5, size=0.3)
    cfg = {
        "activation": "topk",
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": F,
        "k": K,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        **options,
        "d_in": D,
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return tensors, cfg


def sparsify_forward(x, tensors, cfg):
    read = x if cfg["transcode"] else x - tensors["b_dec"]
    latents = top(linear(read, tensors["encoder.weight"], tensors["encoder.bias"]).relu(), cfg["k"])
    out = latents @ tensors["W_dec"] + tensors["b_dec"]
    return latents, out + x @ tensors["W_skip"].T if cfg["skip_connection"] else out


@pytest.mark.parametrize(
    "options",
    [{}, {"normalize_decoder": False}, {"transcode": True}, {"transcode": True, "skip_connection": True}],
)
def test_sparsify(tmp_path, options):
    tensors, cfg = sparsify_folder(tmp_path / "layers.4", **options)
    sae, x = from_sparsify(tmp_path / "layers.4"), vectors(50, D)
    latents, out = sparsify_forward(x, tensors, cfg)
    torch.testing.assert_close(sae.encode(x), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x), out, rtol=1e-5, atol=1e-5)
    assert (sae.encode(x) > 0).sum(1).max() == K
    if not options.get("transcode"):
        assert sae.config.site == "resid_post.4"
        assert load_sae(tmp_path / "layers.4").origin.source == "layers.4 (sparsify)"
    # The trap: a transposed decoder does not even have this shape, and a square one gives something else.
    assert (latents @ tensors["W_dec"] - out).abs().max() > 0.1


def test_sparsify_transcoder_takes_both_sites(tmp_path):
    sparsify_folder(tmp_path / "layers.4.mlp", transcode=True)
    folder = tmp_path / "layers.4.mlp"
    sae = from_sparsify(folder, site="model.layers.4.mlp:in", target_site="mlp_out.4")
    assert sae.config.reads == ("model.layers.4.mlp:in", "mlp_out.4")
    assert from_sparsify(folder).config.reads == ()


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("layers.4", "resid_post.4"),
        ("h.11", "resid_post.11"),
        ("layers.4.mlp", "mlp_out.4"),
        ("h.2.attn", "attn_out.2"),
        ("embed_tokens", "embed"),
        ("layers.4.norm", None),
        ("some_folder", None),
    ],
)
def test_hookpoints(name, site):
    assert site_of(name) == site


def test_bad_sparsify_folders(tmp_path):
    sparsify_folder(tmp_path / "run" / "layers.1")
    with pytest.raises(InputError, match=r"holds coders for layers\.1; give the folder of one"):
        from_sparsify(tmp_path / "run")
    refused = {"signed": "may be negative", "gram_lookup": "n-gram", "embed_skip": "embeddings"}
    for option, said in refused.items():
        sparsify_folder(tmp_path / option, **{option: True})
        with pytest.raises(InputError, match=said):
            from_sparsify(tmp_path / option)
    sparsify_folder(tmp_path / "groupmax", activation="groupmax")
    with pytest.raises(InputError, match="activation 'groupmax'; topk coders are read"):
        from_sparsify(tmp_path / "groupmax")
    sparsify_folder(tmp_path / "skip", skip_connection=True)
    with pytest.raises(InputError, match="skip path"):
        from_sparsify(tmp_path / "skip")
    (tmp_path / "skip" / "sae.safetensors").unlink()
    (tmp_path / "skip" / "cfg.json").write_text(json.dumps({"k": K, "d_in": D}))
    with pytest.raises(InputError, match=r"no sae\.safetensors"):
        from_sparsify(tmp_path / "skip")


# dictionary_learning


def linear_tensors(**biases):
    return {
        "encoder.weight": drawn(F, D, seed=1, size=D**-0.5),
        "decoder.weight": drawn(D, F, seed=3),
        **{name: drawn(size, seed=10 + at, size=0.3) for at, (name, size) in enumerate(biases.items())},
    }


def plain_tensors(**extra):
    return {
        "W_enc": drawn(D, F, seed=1, size=D**-0.5),
        "b_enc": drawn(F, seed=2, size=0.3),
        "W_dec": drawn(F, D, seed=3),
        "b_dec": drawn(D, seed=4, size=0.3),
        **extra,
    }


def autoencoder():
    t = linear_tensors(**{"encoder.bias": F, "bias": D})

    def run(x):
        f = linear(x - t["bias"], t["encoder.weight"], t["encoder.bias"]).relu()
        return f, linear(f, t["decoder.weight"]) + t["bias"]

    return t, run


def autoencoder_new():
    t = linear_tensors(**{"encoder.bias": F, "decoder.bias": D})

    def run(x):
        f = linear(x, t["encoder.weight"], t["encoder.bias"]).relu()
        return f, linear(f, t["decoder.weight"], t["decoder.bias"])

    return t, run


def gated():
    t = linear_tensors(decoder_bias=D, r_mag=F, gate_bias=F, mag_bias=F)

    def run(x):
        norms = t["decoder.weight"].norm(dim=0)
        encoded = linear(x - t["decoder_bias"], t["encoder.weight"])
        gate = (encoded + t["gate_bias"] > 0).float()
        f = gate * (t["r_mag"].exp() * encoded + t["mag_bias"]).relu() * norms
        return f, linear(f / norms, t["decoder.weight"]) + t["decoder_bias"]

    return t, run


def jumprelu():
    t = plain_tensors(threshold=drawn(F, seed=6).abs() * 0.3)

    def run(x):
        pre = x @ t["W_enc"] + t["b_enc"]
        f = (pre * (pre > t["threshold"])).relu() * t["W_dec"].norm(dim=1)
        return f, f / t["W_dec"].norm(dim=1) @ t["W_dec"] + t["b_dec"]

    return t, run


def topk():
    t = linear_tensors(**{"encoder.bias": F, "b_dec": D})
    t |= {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(-1.0)}

    def run(x):
        f = top(linear(x - t["b_dec"], t["encoder.weight"], t["encoder.bias"]).relu(), K)
        return f, linear(f, t["decoder.weight"]) + t["b_dec"]

    return t, run


def batch_topk(threshold=0.5):
    t = linear_tensors(**{"encoder.bias": F, "b_dec": D})
    t |= {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(threshold)}

    def run(x):
        f = linear(x - t["b_dec"], t["encoder.weight"], t["encoder.bias"]).relu()
        f = f * (f > threshold)
        return f, linear(f, t["decoder.weight"]) + t["b_dec"]

    return t, run


def matryoshka():
    t = plain_tensors(
        k=torch.tensor(K, dtype=torch.int), threshold=torch.tensor(0.5), group_sizes=torch.tensor([10, 30])
    )

    def run(x):
        f = ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
        f = f * (f > 0.5)
        return f, f @ t["W_dec"] + t["b_dec"]

    return t, run


CLASSES = {
    "AutoEncoder": autoencoder,
    "AutoEncoderNew": autoencoder_new,
    "GatedAutoEncoder": gated,
    "JumpReluAutoEncoder": jumprelu,
    "AutoEncoderTopK": topk,
    "BatchTopKSAE": batch_topk,
    "MatryoshkaBatchTopKSAE": matryoshka,
}


def trainer_folder(folder, name, tensors, **trainer):
    """As `trainSAE` lays it out: `config.json` with the trainer's config, `ae.pt` with its state dict."""
    folder.mkdir(parents=True)
    torch.save(tensors, folder / "ae.pt")
    said = {"dict_class": name, "activation_dim": D, "dict_size": F, "layer": 3, "lm_name": "a/b", **trainer}
    (folder / "config.json").write_text(json.dumps({"trainer": said, "buffer": {"ctx_len": 128}}))
    return folder


@pytest.mark.parametrize("name", CLASSES)
def test_dictionary_learning(tmp_path, name):
    tensors, run = CLASSES[name]()
    folder = trainer_folder(tmp_path / "trainer_0", name, tensors, submodule_name="resid_post_layer_3")
    sae, x = from_dictionary_learning(folder), vectors(50, D)
    latents, out = run(x)
    torch.testing.assert_close(sae.encode(x), latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae(x), out, rtol=1e-4, atol=1e-4)
    assert 0.01 < (latents > 0).float().mean() < 0.9
    assert sae.config.site == "resid_post.3"
    assert torch.equal(load_sae(folder)(x), sae(x))


def test_a_threshold_that_was_never_set_lets_the_relu_decide(tmp_path):
    tensors, run = batch_topk(-1.0)
    sae = from_dictionary_learning(trainer_folder(tmp_path / "t", "BatchTopKSAE", tensors))
    x = vectors(50, D)
    torch.testing.assert_close(sae(x), run(x)[1], rtol=1e-4, atol=1e-4)


def test_matryoshka_keeps_its_prefixes_and_sites_are_told(tmp_path):
    tensors, _ = matryoshka()
    where = {"submodule_name": "attention_out_layer_2"}
    folder = trainer_folder(tmp_path / "a", "MatryoshkaBatchTopKSAE", tensors, **where)
    sae = from_dictionary_learning(folder)
    assert sae.prefixes == (10, 40)
    assert sae.config.site == "attn_out.2"
    assert from_dictionary_learning(folder, site="resid_mid.1").config.site == "resid_mid.1"


class Payload:
    def __reduce__(self):
        return (print, ("run",))


def test_bad_dictionary_learning_folders(tmp_path, capsys):
    tensors, _ = topk()
    with pytest.raises(UnknownNameError, match="nearest: AutoEncoderTopK"):
        from_dictionary_learning(trainer_folder(tmp_path / "a", "AutoEncoderTopk", tensors))
    folder = trainer_folder(tmp_path / "b", "AutoEncoderTopK", {"payload": Payload()})
    with pytest.raises(DataError, match="something other than tensors"):
        from_dictionary_learning(folder)
    assert "run" not in capsys.readouterr().out
    folder = trainer_folder(tmp_path / "c", "AutoEncoderTopK", tensors)
    whole = (folder / "ae.pt").read_bytes()
    (folder / "ae.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DamagedFileError, match="not readable"):
        from_dictionary_learning(folder)
    del tensors["b_dec"]
    with pytest.raises(DamagedFileError, match="has no b_dec"):
        from_dictionary_learning(trainer_folder(tmp_path / "d", "AutoEncoderTopK", tensors))
    with pytest.raises(InputError, match=r"no config\.json"):
        from_dictionary_learning(tmp_path)
