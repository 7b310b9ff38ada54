"""Every estimator on a public table of statements and their negations, with its baseline and interval."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import veridical as vd
from veridical.probes.kinds import kind

DATA = Path(os.environ.get("VERIDICAL_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")
TABLE = DATA / "azaria_mitchell_levinstein" / "neg_facts_true_false.csv"

pytestmark = pytest.mark.skipif(not TABLE.exists(), reason="no public data (set VERIDICAL_TEST_DATA)")


@pytest.fixture(scope="module")
def acts(tmp_path_factory):
    rows = pd.read_csv(TABLE).rename(columns={"statement": "prompt"})
    rows["negated"] = rows["prompt"].str.contains(r"n't | not ", regex=True)
    # A statement and its negation follow each other; a few do not, and are left out.
    first = np.flatnonzero(
        ~rows["negated"].to_numpy()[:-1]
        & rows["negated"].to_numpy()[1:]
        & (rows["label"].to_numpy()[:-1] != rows["label"].to_numpy()[1:])
    )[:100]
    rows = rows.iloc[np.stack([first, first + 1], 1).ravel()].assign(pair=np.arange(len(first)).repeat(2))
    assert len(rows) == 200
    store = tmp_path_factory.mktemp("acts")
    pairs = vd.Pairs.from_pandas(rows)
    return vd.collect(
        vd.load("tiny-liar"), pairs, sites="resid_post.3", tokens="last", store=store, progress=False
    )


@pytest.mark.parametrize("name", ["logistic", "ridge", "mass_mean", "lda", "lat", "ccs", "ttpd"])
def test_every_estimator_runs_and_claims_nothing_of_a_model_that_knows_no_such_facts(acts, name):
    options = {"ttpd": {"polarity": "negated"}, "ccs": {"side": "negated"}}.get(name, {})
    sweep = vd.fit_probes(
        acts, probe=kind(name)(**options), target="label", bootstrap=200, shuffles=5, progress=False
    )
    line = sweep.to_frame().iloc[0]
    assert line["auroc_low"] <= line["auroc"] <= line["auroc_high"]
    assert 0.3 < line["auroc"] < 0.7
    assert np.isfinite(line[["text_auroc", "text_auroc_low", "shuffled_auroc"]].to_numpy(float)).all()
