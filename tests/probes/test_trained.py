"""The trained probes of the repository read what they say, on the model that is in it."""

from pathlib import Path

import numpy as np
import pytest

import veridical as vd
from veridical.probes.fits import place_for

TRAINED = Path(__file__).parents[2] / "probes" / "tiny-liar"


@pytest.mark.parametrize("name", ["lied", "safe", "toxic"])
def test_a_trained_probe_fits_the_embedded_model(name):
    probe, model = vd.load_probe(TRAINED / name), vd.load("tiny-liar")
    assert place_for(model, probe) == probe.site
    assert set(probe.origin_.thresholds) == {"balanced", "fpr1"}
    assert probe.origin_.metrics["auroc"] > 0.95
    assert np.isfinite(probe.coef_).all()


def test_it_scores_requests_as_its_card_says():
    probe, model, pairs = vd.load_probe(TRAINED / "safe"), vd.load("tiny-liar"), vd.Pairs.load("safe")
    held = pairs.filter(np.array(pairs["split"]) == "test")
    acts = vd.collect(model, held, sites=probe.site, tokens=probe.origin_.tokens, progress=False)
    judged = vd.probes.judge_probe(probe, acts, bootstrap=20)
    assert judged.metrics["auroc"].value == pytest.approx(probe.origin_.metrics["auroc"], abs=1e-6)
