"""Absorption, calibrated on dictionaries whose absorption was planted, and against a slow reference."""

import numpy as np
import pytest
import torch
from sae_makers import random_sae

from veridical.errors import DataError
from veridical.saes.absorption import measure_absorption

D, CHILDREN = 64, 40
QUICK = {"bootstrap": 50}


def rows(seed=0, n=1600, noise=0.03):
    """Rows with an unrelated feature each, and half of them with a parent feature and one of its children.

    Each child is a small share of the parent's rows: one that were more than 0.03 of F1 would count as a part
    of the parent that was split off. Returns vectors, whether the parent is there, and the directions.
    """
    random = np.random.default_rng(seed)
    directions = np.linalg.qr(random.normal(size=(D, D)))[0].T
    parent, children, others = directions[0], directions[1 : 1 + CHILDREN], directions[1 + CHILDREN :]
    present = random.random(n) < 0.5
    child = np.where(present, random.integers(CHILDREN, size=n), -1)
    other = random.integers(len(others), size=n)
    x = noise * random.normal(size=(n, D)) + others[other] * random.uniform(0.8, 1.2, n)[:, None]
    x[present] += parent + children[child[present]]
    return torch.from_numpy(x).float(), present.astype(int), (parent, children, others)


def dictionary(directions, absorbed, share=1.0):
    """A JumpReLU dictionary of parent (latent 0), children (1 to 40) and the rest.

    On the `absorbed` children the parent latent is silent: their latents push it under its threshold, and
    write `share` of the parent's direction themselves.
    """
    parent, children, others = directions
    sae = random_sae("jumprelu", d_in=D, width=1 + CHILDREN + len(others))
    W_enc = np.concatenate([parent[None], children, others])
    W_dec = W_enc.copy()
    for number in absorbed:
        W_enc[0] = W_enc[0] - 2 * children[number]
        W_dec[1 + number] = children[number] + share * parent
    for name, value in (("W_enc", W_enc), ("W_dec", W_dec)):
        getattr(sae, name).copy_(torch.from_numpy(value))
    sae.b_enc.zero_()
    sae.b_dec.zero_()
    sae.log_threshold.fill_(float(np.log(0.5)))
    return sae


def test_a_clean_dictionary_absorbs_nothing():
    x, present, directions = rows()
    found = measure_absorption(dictionary(directions, []), {"site": x}, target=present, **QUICK)
    assert found.main == (0,)
    assert found.full.value == 0
    assert found.fraction.value == 0
    assert found.silent.value == 0
    assert found.main_f1 == 1
    assert not len(found.absorbers)


@pytest.mark.parametrize("absorbed", [range(4), range(10, 22)])
def test_planted_absorption_is_measured_at_its_rate(absorbed):
    x, present, directions = rows()
    found = measure_absorption(dictionary(directions, absorbed), {"site": x}, target=present, **QUICK)
    assert found.main[0] == 0
    assert set(found.absorbers["latent"]) == {1 + number for number in absorbed}
    expected = len(absorbed) / CHILDREN
    assert found.full.low <= expected <= found.full.high
    assert found.full.value == pytest.approx(found.silent.value, abs=0.01)
    assert found.fraction.value == pytest.approx(found.full.value, abs=0.01)
    assert (found.absorbers["cosine"] - 0.5**0.5).abs().max() < 0.05
    assert found.probe_f1 > 0.99


def test_a_latent_that_is_silent_for_another_reason_is_not_absorbed():
    """The parent latent is silent on a child, and nobody writes its direction: a hole, no absorption."""
    x, present, directions = rows()
    found = measure_absorption(
        dictionary(directions, range(8), share=0.0), {"site": x}, target=present, **QUICK
    )
    assert found.silent.low <= 8 / CHILDREN <= found.silent.high
    assert found.full.value == 0
    assert found.fraction.value == 0


def test_the_share_that_is_written_decides():
    x, present, directions = rows()
    little, much = (
        measure_absorption(dictionary(directions, range(8), share), {"site": x}, target=present, **QUICK)
        for share in (0.2, 0.8)
    )
    assert little.full.value == 0
    assert much.full.value > 0.1


def test_a_split_feature_is_not_absorbed():
    """Two latents that share the parent's rows between them are both its own."""
    x, present, directions = rows()
    parent, children, _ = directions
    sae = dictionary(directions, [])
    first = children[: CHILDREN // 2].sum(0)
    second = children[CHILDREN // 2 :].sum(0)
    for latent, own, other in ((0, first, second), (1, second, first)):
        sae.W_enc[latent] = torch.from_numpy(parent + own - 2 * other).float()
        sae.W_dec[latent] = torch.from_numpy(parent).float()
    found = measure_absorption(sae, {"site": x}, target=present, **QUICK)
    assert set(found.main) == {0, 1}
    assert found.full.value == 0


def slow(latents, W_dec, bias, x, direction, main):
    """Full absorption and fraction of one row at a time, as the definition reads."""
    full, fraction = [], []
    cosines = W_dec @ direction / np.linalg.norm(W_dec, axis=1)
    for f, row in zip(latents, x):
        length = (row - bias) @ direction
        adds = {i: f[i] * (W_dec[i] @ direction) for i in range(len(f))}
        others = {i: add for i, add in adds.items() if i not in main}
        best = max(others, key=others.get)
        silent = all(f[i] < 1e-8 for i in main)
        full.append(silent and length > 0 and cosines[best] >= 0.025 and others[best] / length >= 0.4)
        absorbers = sorted((a for i, a in others.items() if cosines[i] >= 0.1 and a > 0), reverse=True)[:3]
        mine, taken = sum(adds[i] for i in main), sum(absorbers)
        if length <= 0 or mine >= length or taken / length < 0.4:
            fraction.append(0.0)
        elif mine <= 0:
            fraction.append(1.0)
        else:
            taken = min(taken, length - mine)
            fraction.append(float(np.clip(taken / (taken + mine), 0, 1)))
    return np.array(full), np.array(fraction)


def test_judging_equals_the_definition_row_by_row():
    from veridical.config import ProbeConfig
    from veridical.saes.absorption import _judged

    random = np.random.default_rng(3)
    for seed in range(5):
        sae = random_sae("relu", d_in=D, width=40, seed=seed)
        x = random.normal(size=(80, D)).astype(np.float32)
        direction = random.normal(size=D)
        direction /= np.linalg.norm(direction)
        x += 2 * direction.astype(np.float32)
        latents = sae.encode(torch.from_numpy(x)).numpy() * (random.random((80, 40)) < 0.3)
        main = (3, 8)
        scores = {"probe_f1": 1.0, "main_f1": 1.0}
        found = _judged(sae, latents, x, direction, main, np.arange(80), ProbeConfig(bootstrap=5), scores)
        W_dec, bias = sae.W_dec.double().numpy(), sae.b_dec.double().numpy()
        full, fraction = slow(latents, W_dec, bias, x, direction, main)
        assert found.full.value == pytest.approx(full.mean())
        assert found.fraction.value == pytest.approx(fraction.mean(), rel=1e-5)
        assert 0 < fraction.mean() < 1


@pytest.mark.filterwarnings("ignore:the probe did not converge")
def test_shown_and_refused():
    x, present, directions = rows()
    sae = dictionary(directions, range(8))
    found = measure_absorption(sae, {"site": x}, target=present, **QUICK)
    section = found.report_section()
    assert len(section.tables) == 2
    assert "Absorption(target" in repr(found)
    assert found.to_frame()["full"].iloc[0] == found.full.value
    rare = (np.arange(600) % 10 == 0).astype(int)
    with pytest.raises(DataError, match="finds target on no held-out row"):
        measure_absorption(sae, {"site": torch.zeros(600, D)}, target=rare, **QUICK)
