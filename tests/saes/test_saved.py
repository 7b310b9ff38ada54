"""Saved SAEs: the same numbers in a fresh process, damage named, what SAELens cannot hold kept whole."""

import json
import subprocess
import sys

import pytest
import torch
from sae_makers import EVERY, random_sae, vectors

from veridical.errors import DamagedFileError, InputError, ModelError, NonFiniteError
from veridical.saes.origin import SAEOrigin
from veridical.saes.saved import load_sae, save_sae

ORIGIN = SAEOrigin(
    model="tiny | model",
    model_fingerprint="abc",
    tokens="all",
    trained_on=12345,
    metrics={"fvu": 0.25, "fvu_low": 0.2, "fvu_high": 0.3, "dead": 0.0},
    notes=("Trained for a test.",),
)


@pytest.mark.parametrize("architecture", EVERY)
def test_every_architecture_comes_back_bit_for_bit(tmp_path, architecture):
    options = {"skip": True, "d_out": 7} if "transcoder" in architecture else {}
    sae = random_sae(architecture, scale=3.0, scale_out=2.0 if options else None, seed=4, **options)
    sae.origin = ORIGIN
    sae.save(tmp_path / "sae")
    back, x = load_sae(tmp_path / "sae"), vectors(40, 12)
    assert back.config == sae.config
    assert back.origin == ORIGIN
    folded = sae.folded()
    if "jumprelu" in architecture:
        # A threshold is written as such and kept as its logarithm.
        torch.testing.assert_close(back(x), folded(x), rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(back(x), folded(x))
        assert torch.equal(back.encode(x), folded.encode(x))
    torch.testing.assert_close(back(x), sae(x), rtol=1e-5, atol=1e-5)
    again = load_sae(back.save(tmp_path / "again"))
    assert torch.equal(again(x), back(x))


def test_training_can_go_on_from_the_threshold(tmp_path):
    sae = random_sae("batch_topk", scale=2.0)
    sae.updates.fill_(70)
    sae.variance.fill_(8.0)
    back = load_sae(save_sae(sae, tmp_path / "sae"))
    assert float(back.threshold) == pytest.approx(0.2)
    assert int(back.updates) == 70
    assert back.updates.dtype == torch.int64
    assert float(back.variance) == pytest.approx(2.0)


def test_a_fresh_process_gives_the_same(tmp_path):
    sae, x = random_sae("topk", scale=3.0), vectors(16, 12)
    sae.save(tmp_path / "sae")
    code = (
        "import torch, veridical.saes.saved as s; torch.set_num_threads(1); "
        f"sae = s.load_sae({str(tmp_path / 'sae')!r}); g = torch.Generator().manual_seed(1); "
        "x = (torch.randn(16, 12, generator=g, dtype=torch.float64) + 0.3).float(); "
        "print(sae(x).sum(1).tolist())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == load_sae(tmp_path / "sae")(x).sum(1).tolist()


def test_card_and_files(tmp_path):
    sae = random_sae("topk", site="resid_post.3")
    sae.origin = ORIGIN
    sae.save(tmp_path / "sae")
    card = (tmp_path / "sae" / "README.md").read_text()
    assert "tiny \\| model" in card
    assert "0.250 [0.200, 0.300]" in card
    assert "12,345 tokens" in card
    assert "load_from_disk" in card
    assert {path.name for path in (tmp_path / "sae").iterdir()} == {
        "README.md", "cfg.json", "config.json", "metrics.json", "provenance.json", "sae_weights.safetensors",
    }  # fmt: skip
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text())["metadata"]["model_name"] == "tiny | model"
    random_sae("crosscoder").save(tmp_path / "crosscoder")
    assert not (tmp_path / "crosscoder" / "cfg.json").exists()
    assert "SAELens has no class" in (tmp_path / "crosscoder" / "README.md").read_text()


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors", "metrics.json", "config.json"])
def test_a_flipped_byte_is_named(tmp_path, name):
    folder = random_sae("topk").save(tmp_path / "sae")
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(bytes(content))
    with pytest.raises(DamagedFileError, match=name):
        load_sae(folder)


def test_a_missing_file_or_folder_is_named(tmp_path):
    folder = random_sae("topk").save(tmp_path / "sae")
    (folder / "sae_weights.safetensors").unlink()
    with pytest.raises(DamagedFileError, match=r"sae_weights\.safetensors is missing"):
        load_sae(folder)
    with pytest.raises(InputError, match=r"no SAE in .*expected one of sae_weights\.safetensors, sae"):
        load_sae(tmp_path)
    with pytest.raises(InputError, match="no folder"):
        load_sae(tmp_path / "nowhere")


def test_an_output_that_would_change_is_not_saved(tmp_path, monkeypatch):
    """A writer that folds decoder norms twice, or turns the decoder, is found before anything is written."""
    from veridical.saes.formats import saelens

    real = saelens._theirs

    def twice(sae):
        name, extra, tensors = real(sae)
        return name, extra, {**tensors, "W_dec": sae.W_dec * sae.W_dec.norm(dim=1, keepdim=True)}

    def turned(sae):
        name, extra, tensors = real(sae)
        return name, extra, {**tensors, "W_dec": sae.W_dec.T.contiguous()}

    for broken in (twice, turned):
        monkeypatch.setattr(saelens, "_theirs", broken)
        with pytest.raises(ModelError, match="give another output than the SAE itself"):
            random_sae("relu", d_in=12, width=12).save(tmp_path / "sae")
        assert not (tmp_path / "sae").exists()


def test_a_diverged_sae_is_not_saved(tmp_path):
    sae = random_sae("topk")
    sae.W_dec[3, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        sae.save(tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


@pytest.mark.parametrize("architecture", EVERY)
def test_bfloat16_is_kept(tmp_path, architecture):
    sae = random_sae(architecture).bfloat16()
    back = load_sae(sae.save(tmp_path / "sae"))
    assert back.W_dec.dtype == torch.bfloat16
    x = vectors(20, 12)
    torch.testing.assert_close(back(x), sae(x), rtol=0.05, atol=0.05)


def test_a_stack_is_refused(tmp_path):
    one = random_sae("relu")
    with pytest.raises(InputError, match=r"stack\.member"):
        type(one).stack([one, one]).save(tmp_path / "sae")


# The hub, without one


def test_push_uploads_a_whole_sae(tmp_path, monkeypatch):
    import huggingface_hub

    seen = {}

    def upload(self, **options):
        seen.update(options, files={path.name for path in options["folder_path"].iterdir()})
        return "https://hub/commit/1"

    def create(self, repo, **options):
        seen.update(options)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    from veridical.saes.formats import push_sae

    sae = random_sae("topk")
    assert push_sae(sae, "someone/saes", folder="layer_3", revision="main") == "https://hub/commit/1"
    assert seen["private"] is True
    assert seen["path_in_repo"] == "layer_3"
    assert seen["revision"] == "main"
    assert {"cfg.json", "config.json", "README.md", "sae_weights.safetensors"} <= seen["files"]
    folder = sae.save(tmp_path / "sae")
    push_sae(folder, "someone/saes", private=False)
    assert seen["private"] is False
    assert seen["folder_path"] == folder
    with pytest.raises(InputError, match="no SAE in"):
        push_sae(tmp_path, "someone/saes")
    with pytest.raises(InputError, match="no name of a repository"):
        push_sae(sae, "a/b/c")


def test_pull_reads_what_the_hub_gave(tmp_path, monkeypatch):
    import huggingface_hub

    from veridical.saes.formats import pull_sae

    sae, seen = random_sae("topk"), {}
    sae.save(tmp_path / "snapshot" / "layer_3")

    def snapshot(repo, **options):
        seen.update(options, repo=repo)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    x = vectors(10, 12)
    assert torch.equal(pull_sae("someone/saes", "layer_3", revision="v1")(x), sae(x))
    assert seen["revision"] == "v1"
    assert "layer_3/*.safetensors" in seen["allow_patterns"]
    with pytest.raises(InputError, match="no folder 'layer_4'"):
        pull_sae("someone/saes", "layer_4")


def test_no_hub_is_one_line():
    from veridical.saes.formats import pull_sae

    with pytest.raises(InputError, match="cannot use someone/saes on the hub"):
        pull_sae("someone/saes")


def test_a_trained_sae_says_where_it_came_from(hooked, tmp_path):
    """What is trained on a store is saved, loaded and judged in the model without being told anything."""
    import veridical as vd

    model = hooked("llama")
    texts = [
        f"the capital of {name} is Paris; answer yes or no {number}" for number in range(40) for name in "ab"
    ]
    acts = vd.collect(model, texts, sites="resid_post.1", tokens="all", progress=False)
    runs = vd.train_saes(acts, vd.SAEConfig(width=64, k=4, batch=64, lr=1e-2), progress=False)
    sae = runs[0]
    assert sae.config.site == "blocks.1.hook_resid_post"
    assert sae.origin.model_fingerprint == model.fingerprint()
    assert sae.origin.tokens == "all"
    assert sae.origin.trained_on == runs.runs[0].tokens
    assert sae.origin.metrics["fvu"] == runs.runs[0].figures.fvu
    back = load_sae(sae.save(tmp_path / "sae"))
    assert back.origin == sae.origin
    assert back.evaluate(model, texts[:5], bootstrap=10).metrics["fvu"].value < 1
    assert "| explained variance |" in (tmp_path / "sae" / "README.md").read_text()
