"""The trained SAEs of the repository give what their cards say, and the same in SAELens."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import veridical as vd

ROOT = Path(__file__).parents[2] / "saes" / "tiny-liar"
FOLDERS = sorted(path.parent for path in ROOT.glob("*/config.json"))


@pytest.fixture(scope="module")
def model():
    return vd.load("tiny-liar")


@pytest.fixture(scope="module")
def questions():
    """Test questions, without the belief check's answers: prompts alone."""
    pairs = vd.Pairs.load("honesty").filter(split="test")
    return pairs.filter(np.arange(len(pairs)) % 4 == 0)


def test_there_are_some():
    assert {folder.name for folder in FOLDERS} >= {"layer1-k16"}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_it_fits_the_embedded_model_and_is_small(folder, model):
    sae = vd.load_sae(folder)
    assert sae.origin.model_fingerprint == model.fingerprint()
    assert sae.config.name == folder.name
    assert model.width(model.resolve(sae.config.site)[0].name) == (sae.d_in,)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 3e6
    assert json.loads((folder / "metrics.json").read_text()) == dict(sae.origin.metrics)
    card = (folder / "README.md").read_text()
    figures = sae.origin.metrics
    for name in ("fvu", "l0", "recovered", *(name for name in figures if name.startswith("fvu of"))):
        if not name.endswith(("_low", "_high")):
            assert f"{figures[name]:.3f}" in card


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_it_explains_what_its_card_says_and_more_than_pca_or_chance(folder, model, questions):
    """On other prompts than its figures are of (no answers), within what that may change."""
    sae = vd.load_sae(folder)
    acts = vd.collect(model, questions, sites=sae.config.site, tokens="all", progress=False)
    found = sae.evaluate(acts, bootstrap=50)
    figures = sae.origin.metrics
    assert found.metrics["explained_variance"].value == pytest.approx(figures["explained_variance"], abs=0.01)
    assert found.metrics["l0"].value == pytest.approx(figures["l0"], rel=0.02)
    assert len(found.lead) == 2
    assert all(lead.low > 0.1 for lead in found.lead.values())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_saelens_gives_the_same_output(folder, model, questions):
    lens = pytest.importorskip("sae_lens")
    sae, theirs = vd.load_sae(folder), lens.SAE.load_from_disk(folder)
    acts = vd.collect(model, questions, sites=sae.config.site, tokens="last", progress=False)
    x = acts[sae.config.site]
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x), sae.encode(x), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(theirs(x), sae(x), rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_its_figures_are_found_again_with_the_models_own_answers(model, tmp_path):
    """Exactly the figures of the card, on the held-out questions with the answers that the model gives."""
    from veridical import cli

    folder = ROOT / "layer1-k16"
    words = ["sae", "eval", str(folder), "--model", "tiny-liar", "--data", "honesty", "--split", "test"]
    assert cli.main([*words, "--beliefs", "--out", str(tmp_path)]) == 0
    (found,) = json.loads((tmp_path / "metrics.json").read_text())["saes"]
    for name, value in vd.load_sae(folder).origin.metrics.items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
