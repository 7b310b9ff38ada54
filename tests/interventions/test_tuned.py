"""The tuned lens: its training, on a model with a planted rotation; what it keeps; how it is saved."""

import copy

import numpy as np
import pytest
import torch

import veridical as vd
from tiny_models import make
from veridical.errors import DamagedFileError, DataError, InputError, StoreMismatchError, UnknownNameError
from veridical.interventions import TunedLens, logit_lens, tuned, tuned_lens
from veridical.probes.fits import MismatchError


def rotated():
    """A llama whose last block only turns the stream by a random rotation; and that rotation.

    What is known before is all there is, but not in the basis that the head reads.
    """
    module = make("llama", num_hidden_layers=2)
    rotation = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(3)))[0]
    last = module.model.layers[1]
    with torch.no_grad():
        last.self_attn.o_proj.weight.zero_()
        last.mlp.down_proj.weight.zero_()
        # Clean enough logits for the end to be worth knowing.
        module.lm_head.weight.mul_(3)
    last.register_forward_hook(lambda block, args, output: output @ rotation.T)
    return module, rotation


@pytest.fixture(scope="module")
def trained():
    module, rotation = rotated()
    model = vd.load(module, check=False)
    ids = torch.randint(3, 300, (200, 16), generator=torch.Generator().manual_seed(0))
    return model, rotation, ids, tuned_lens(model, ids, steps=400, batch=256, lr=1e-2, seed=1)


def test_a_planted_rotation_is_recovered(trained):
    model, rotation, _, lens = trained
    assert lens.sites == ("resid_post.0",)
    assert lens.plain_kl[0] > 1
    assert lens.held_out_kl[0] < 0.05 * lens.plain_kl[0]
    fresh = torch.randint(3, 300, (20, 16), generator=torch.Generator().manual_seed(9))
    plain, tuned = logit_lens(model, fresh), lens.read(model, fresh)
    assert tuned.sites == ("resid_post.0", "resid_post.1")
    assert tuned.kl[0].mean() < 0.1 * plain.kl[0].mean()
    assert np.abs(tuned.kl[1]).max() < 1e-6
    assert tuned.by_site()["agreement"][0] > plain.by_site()["agreement"][0] + 0.3
    # Up to the length of a row, which the norm takes out, the map is the rotation.
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(4))
    turned, found = x @ rotation.T, lens.translate("resid_post.0", x * float(plain_scale(model, fresh)))
    assert torch.nn.functional.cosine_similarity(turned, found, dim=-1).mean() > 0.9


def plain_scale(model, ids):
    with torch.no_grad():
        return model.run(model.batch(ids.tolist()), read=["resid_post.0"])["resid_post.0"].std()


def test_held_out_kl_is_the_mean_over_held_out_texts(trained):
    """The figure that is given is what reading those texts with the lens gives."""
    model, _, ids, lens = trained
    held = np.random.default_rng(1).permutation(np.unique(np.arange(200).astype(str)))[:20].astype(int)
    texts = ids[np.sort(held)]
    assert lens.facts["held_out_tokens"] == texts.numel()
    assert lens.read(model, texts).kl[0].mean() == pytest.approx(lens.held_out_kl[0], rel=1e-3)
    assert logit_lens(model, texts).kl[0].mean() == pytest.approx(lens.plain_kl[0], rel=1e-3)


def test_never_worse_than_the_logit_lens(hooked):
    """Also when training only spoils: the identity is kept."""
    model = hooked("gpt2")
    ids = torch.randint(3, 300, (12, 8), generator=torch.Generator().manual_seed(0))
    lens = tuned_lens(model, ids, steps=10, batch=16, lr=5.0, holdout=0.5)
    assert (lens.held_out_kl <= lens.plain_kl).all()
    assert (lens.best_step == 0).any()
    spoilt = int(np.flatnonzero(lens.best_step == 0)[0])
    assert not lens.matrices[spoilt].any()
    assert not lens.offsets[spoilt].any()
    assert "No map was better" in " ".join(lens.findings())


def test_gradients_are_those_of_the_loss(hooked):
    """Against finite differences of the held-out KL, in float64."""
    from veridical.interventions.tuned import _halves, _Training

    model = vd.load(copy.deepcopy(hooked("gpt2").model).double(), check=False)
    ids = torch.randint(3, 300, (8, 6), generator=torch.Generator().manual_seed(0))
    names = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    last = "blocks.2.hook_resid_post"
    acts = vd.collect(model, ids, sites=[*names, last], tokens="all")
    job = _Training(model, names, last, *_halves(acts, 0.25, 0), seed=0)
    random = torch.Generator().manual_seed(1)
    for part in (job.matrices, job.offsets):
        part.copy_(0.05 * torch.randn(part.shape, generator=random, dtype=torch.float64))
        part.requires_grad_()
    vectors = job.held[0]
    analytic = job._gradients(vectors, 1)
    direction = [torch.randn(part.shape, generator=random, dtype=torch.float64) for part in analytic]

    def loss(step):
        moved = copy.copy(job)
        moved.matrices, moved.offsets = (
            part.detach() + step * way for part, way in zip((job.matrices, job.offsets), direction)
        )
        with torch.no_grad():
            return float(sum(found.mean(1).sum() for _, found in moved._losses(vectors)))

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert sum(float((a * d).sum()) for a, d in zip(analytic, direction)) == pytest.approx(slope, rel=1e-6)


def test_layers_in_parts_give_the_same(hooked, monkeypatch):
    model = hooked("gpt2")
    ids = torch.randint(3, 300, (12, 8), generator=torch.Generator().manual_seed(0))
    options = {"steps": 6, "batch": 32, "sites": "resid_pre.*"}
    whole = tuned_lens(model, ids, **options)
    monkeypatch.setattr("veridical.interventions.tuned.LOGITS", 1)
    parts = tuned_lens(model, ids, **options)
    np.testing.assert_allclose(whole.matrices, parts.matrices, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(whole.held_out_kl, parts.held_out_kl, rtol=1e-5)
    again = tuned_lens(model, ids, **options)
    np.testing.assert_array_equal(again.matrices, parts.matrices)
    other = tuned_lens(model, ids, **options, seed=1)
    assert not np.array_equal(other.matrices, parts.matrices)


def test_the_model_takes_no_gradient(trained):
    model = trained[0]
    assert all(parameter.grad is None for parameter in model.model.parameters())


def test_saved_and_loaded(trained, tmp_path):
    model, _, ids, lens = trained
    lens.save(tmp_path / "lens")
    loaded = TunedLens.load(tmp_path / "lens")
    assert np.array_equal(loaded.matrices, lens.matrices)
    assert loaded.to_frame().equals(lens.to_frame())
    assert loaded.read(model, ids[:2]).to_frame().equals(lens.read(model, ids[:2]).to_frame())
    assert "Tuned lens" in loaded.report_section().title
    assert len(loaded.figure().data) == 2
    content = (tmp_path / "lens" / "arrays.safetensors").read_bytes()
    (tmp_path / "lens" / "arrays.safetensors").write_bytes(content[:-1] + b"x")
    with pytest.raises(DamagedFileError, match=r"arrays\.safetensors"):
        TunedLens.load(tmp_path / "lens")


def test_from_a_store_of_activations(trained, tmp_path):
    model, _, ids, _ = trained
    options = {"steps": 5, "batch": 64}
    made = tuned_lens(model, ids, store=tmp_path / "acts", **options)
    acts = vd.Activations.open(tmp_path / "acts")
    assert np.array_equal(tuned_lens(model, acts, **options).matrices, made.matrices)
    with pytest.raises(UnknownNameError, match="last resid_post"):
        tuned_lens(model, vd.collect(model, ids[:4], sites=["resid_post.0"], tokens="all"))


class Killed(Exception):
    """Stands for a kill: nothing of ours catches it."""


@pytest.mark.parametrize("after", [1, 7, 12])
def test_a_training_that_was_stopped_ends_the_same_to_the_last_bit(hooked, tmp_path, monkeypatch, after):
    model = hooked("gpt2")
    ids = torch.randint(3, 300, (12, 8), generator=torch.Generator().manual_seed(0))
    options = {"steps": 12, "batch": 32, "seed": 2}
    whole = tuned_lens(model, ids, **options)
    kept = {"checkpoints": tmp_path / "lens", "checkpoint_minutes": 1e-9}
    plain, steps = tuned._Training._gradients, []

    def counted(self, vectors, step):
        steps.append(step)
        if step == after + 1:
            raise Killed
        return plain(self, vectors, step)

    monkeypatch.setattr(tuned._Training, "_gradients", counted)
    if after < 12:
        with pytest.raises(Killed):
            tuned_lens(model, ids, **options, **kept)
        monkeypatch.setattr(tuned._Training, "_gradients", lambda *a: (steps.append(a[2]), plain(*a))[1])
    found = tuned_lens(model, ids, **options, **kept)
    assert steps == [*range(1, after + 2), *range(after + 1, 13)][: 12 if after == 12 else None]
    for name in ("matrices", "offsets", "plain_kl", "held_out_kl", "best_step"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name), err_msg=name)
    assert found.history.equals(whole.history)
    steps.clear()
    again = tuned_lens(model, ids, **options, **kept)
    assert steps == []
    np.testing.assert_array_equal(again.matrices, whole.matrices)


def test_checkpoints_of_another_training_are_refused(hooked, tmp_path):
    model = hooked("gpt2")
    ids = torch.randint(3, 300, (12, 8), generator=torch.Generator().manual_seed(0))
    tuned_lens(model, ids, steps=2, batch=16, checkpoints=tmp_path)
    with pytest.raises(StoreMismatchError, match="steps is 2 there, 3 here"):
        tuned_lens(model, ids, steps=3, batch=16, checkpoints=tmp_path)
    file = sorted((tmp_path / "checkpoints").glob("*.safetensors"))[-1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedFileError, match="damaged"):
        tuned_lens(model, ids, steps=2, batch=16, checkpoints=tmp_path)


def test_bad_input(trained, hooked):
    model, _, ids, lens = trained
    for options, match in (
        ({"steps": 0}, "steps is 0"),
        ({"holdout": 1.0}, "holdout is 1.0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"checkpoint_minutes": 0}, "checkpoint_minutes is 0"),
        ({"sites": "resid_post.1"}, "own output"),
        ({"sites": "mlp_out.0"}, "not the residual stream"),
    ):
        with pytest.raises(InputError, match=match):
            tuned_lens(model, ids, **options)
    with pytest.raises(DataError, match="two texts"):
        tuned_lens(model, ids[:1])
    with pytest.raises(MismatchError, match="tuned lens was fitted on another model"):
        lens.read(hooked("llama"), [[5, 6]])
    with pytest.raises(UnknownNameError, match="trained at these sites"):
        lens.translate("resid_post.5", torch.zeros(2, 32))
    with pytest.raises(InputError, match="read it with logit_lens"):
        tuned_lens(hooked("vit"), torch.zeros(2, 3, 24, 24))
