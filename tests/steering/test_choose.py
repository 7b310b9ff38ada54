"""What is proposed: on the organism, and where there is nothing to steer."""

import numpy as np
import pandas as pd
import pytest

import veridical as vd
from veridical.errors import DataError, InputError
from veridical.steering import Proposal, neutral_kl, neutral_texts, propose, target_of

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def honesty():
    pairs = vd.Pairs.load("honesty").filter(form="choice", taught=True, protected=False, scenario=False)
    kept = []
    for split, count in {"train": 12, "val": 6, "test": 6}.items():
        names = pairs.filter(split=split)["pair"].tolist()
        kept += list(dict.fromkeys(names))[:count]
    return pairs.filter(pair=kept)


@pytest.fixture(scope="module")
def found(liar, honesty):
    return propose(
        liar, honesty, sites=["resid_post.0", "resid_post.1", "resid_post.5"], methods=["mean_diff", "probe"],
        candidates=2, rows=12, target_kl=0.05, progress=False,
    )  # fmt: skip


def test_it_proposes_what_steers_held_out_pairs(liar, honesty, found):
    best = found.best
    assert best["site"] == "blocks.1.hook_resid_post"
    assert best["reached"] > 0.8 > found.facts["plain"] + 0.5
    assert best["reached"] > best["random"] + 0.3
    test = target_of(honesty.filter(split="test"))
    with found.vector(liar):
        assert test.of(liar).rate().value < 0.3
        assert test.stays(liar).rate().value > 0.9
    cost = neutral_kl(liar, lambda: found.vector.on(liar), neutral_texts(liar, count=24))
    assert 0.01 < cost.kl.value < 0.2


def test_it_says_why(found):
    said = " ".join(found.findings())
    assert said.startswith("Edit blocks.1.hook_resid_post by ")
    assert "AUROC" in said
    assert "Causal check at" in said
    assert "Patches there recover" in said
    assert "The best of the other methods" in said
    sites = found.sites.set_index("site")
    assert sites.loc["blocks.1.hook_resid_post", "auroc"] > 0.9
    assert sites.loc["blocks.0.hook_resid_post", "carried by the last token"] < 0.2
    assert len(found.tried) == 2 * 2 * 2
    assert found.report_section().figures
    assert found.report_section().text == "\n\n".join(found.findings())


def test_it_is_saved_with_its_vector(liar, found, tmp_path):
    back = Proposal.load(found.save(tmp_path / "p"))
    pd.testing.assert_frame_equal(back.tried, found.tried)
    assert back.findings() == found.findings()
    assert all(np.array_equal(back.vector.vectors[site], v) for site, v in found.vector.vectors.items())


def test_a_proposal_from_nothing_is_refused(liar, honesty):
    guarded = vd.Pairs.load("honesty").filter(form="choice", protected=True)
    with pytest.raises(DataError, match="nothing to learn"):
        propose(liar, guarded, sites="resid_post.1", progress=False)
    with pytest.raises(InputError, match="at least one method"):
        propose(liar, honesty, methods=[])
    with pytest.raises(DataError, match="no validation rows"):
        propose(liar, honesty.filter(split="train"))
