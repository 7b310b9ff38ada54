"""K-sparse probes: the latent that carries a planted label is chosen, and noise reads nothing."""

import numpy as np
import pytest
import torch
from sae_makers import exact_sae, random_sae

from veridical.errors import DataError, InputError
from veridical.saes.sparse_probing import rank_latents, sparse_probes

QUICK = {"bootstrap": 50, "shuffles": 6, "progress": False}


def planted(pairs=120, d=16, seed=0, distance=3.0):
    """Pairs whose label is in a direction that no single dimension shows, but one latent does."""
    random = np.random.default_rng(seed)
    labels, groups = np.tile([0, 1], pairs), np.repeat(np.arange(pairs), 2)
    direction = np.ones(d) / d**0.5
    x = random.normal(size=(2 * pairs, d)) + distance * labels[:, None] * direction
    return torch.from_numpy(x).float(), labels, groups, direction


def dictionary(direction, d=16, width=48, seed=1):
    """Random latents, and the planted direction as latent 7."""
    sae = random_sae("relu", d_in=d, width=width, seed=seed)
    sae.W_enc[7] = torch.from_numpy(direction).float()
    sae.b_enc[7] = -1.0
    sae.b_dec.zero_()
    return sae


@pytest.fixture(scope="module")
def found():
    x, labels, groups, direction = planted()
    return sparse_probes(dictionary(direction), {"site": x}, target=labels, groups=groups, ks=(1, 3), **QUICK)


def test_the_planted_latent_is_chosen(found):
    assert found.chosen[1] == (7,)
    assert found.chosen[3][0] == 7
    best, plain = found.metric(1), found.metric(1, "dimensions")
    assert best.low > plain.value
    assert best.value > 0.9
    frame = found.to_frame().set_index("who")
    assert frame.loc["all dimensions", "auroc"] >= best.value - 0.03
    assert frame.loc["shuffled labels, k=1", "auroc"] == pytest.approx(0.5, abs=0.12)


def test_the_figure_is_that_of_a_plain_fit_on_the_same_rows(found):
    """The sweep's figure for k=1 equals a probe fitted by hand on the chosen latent."""
    from veridical.config import ProbeConfig, build
    from veridical.probes import LogisticProbe
    from veridical.probes.data import choose_rows, read_source
    from veridical.probes.evaluate import auroc

    x, labels, groups, direction = planted()
    config = build(ProbeConfig, None, target="target", **QUICK)
    source = read_source({"site": x}, labels, groups, None, None)
    task = choose_rows(source, config, ())
    latent = dictionary(direction).encode(x)[:, [7]].numpy()
    probe = LogisticProbe().fit(latent[task.fit], labels[task.fit])
    scores = probe.decision_function(latent[task.test])
    assert found.metric(1).value == pytest.approx(auroc(scores[:, None], task.positive[task.test])[0])
    assert set(groups[task.fit]).isdisjoint(groups[task.test])


def test_noise_reads_nothing():
    x, labels, groups, direction = planted(distance=0.0)
    sae = dictionary(direction)
    found = sparse_probes(sae, {"site": x}, target=labels, groups=groups, ks=(1, 5), **QUICK)
    for k in (1, 5):
        assert found.metric(k).low < 0.5 < found.metric(k).high


def test_ranking_equals_the_formula():
    random = np.random.default_rng(0)
    latents, positive = random.normal(size=(50, 9)).astype(np.float32), random.random(50) > 0.5
    latents[:, 4] = 3.0
    scores = [
        0.0 if column.std() == 0 else abs(column[positive].mean() - column[~positive].mean()) / column.std()
        for column in latents.T.astype(np.float64)
    ]
    assert list(rank_latents(latents, positive, 9)) == list(np.argsort(-np.array(scores), kind="stable"))
    assert rank_latents(latents, positive, 9)[-1] == 4


def test_pairs_of_a_model_come_with_their_text(hooked):
    import pandas as pd

    import veridical as vd

    lines = [
        {"pair": number, "prompt": f"tell the {word} {number}", "label": label}
        for number in range(40)
        for label, word in ((0, "truth"), (1, "lie"))
    ]
    pairs = vd.Pairs.from_pandas(pd.DataFrame(lines))
    acts = vd.collect(hooked("llama"), pairs, sites="resid_post.1", progress=False)
    found = sparse_probes(exact_sae(32, "resid_post.1"), acts, ks=(1, 2), **QUICK)
    assert found.sweep.text["auroc"].value == 1
    assert any("text alone" in line for line in found.findings())
    last = ["text alone", "shuffled labels, k=1", "shuffled labels, k=2"]
    assert list(found.to_frame()["who"])[-3:] == last
    section = found.report_section()
    assert section.figures
    assert section.tables[1][1]["k"].tolist() == [1, 2]
    assert "SparseProbing(label" in repr(found)


def test_bad_input_is_named():
    x, labels, groups, direction = planted(20)
    sae = dictionary(direction)
    with pytest.raises(InputError, match="expected numbers from 1 to 48"):
        sparse_probes(sae, {"site": x}, target=labels, groups=groups, ks=(49,))
    with pytest.raises(DataError, match="one class"):
        sparse_probes(sae, {"site": x}, target=np.zeros(40), groups=groups)
    with pytest.raises(InputError, match="the data have 15"):
        sparse_probes(sae, {"site": x[:, :15]}, target=labels, groups=groups)
