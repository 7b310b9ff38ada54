"""Activations that lie on a GPU are solved there, with the numbers of the CPU."""

import numpy as np
import pytest
import torch

import veridical as vd
from veridical.probes.base import Problems
from veridical.probes.kinds import kind
from veridical.probes.solver import Design

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", ["ridge", "mass_mean", "lda", "lat", "ccs", "ttpd"])
def test_every_estimator_gives_the_cpus_numbers_on_the_gpu(planted, name):
    data = planted(pairs=100, width=32)
    probe = kind(name)()
    labels = torch.from_numpy(np.stack([data.labels, data.labels[::-1].copy()], 1).astype(float))
    weights, strengths = torch.ones_like(labels), torch.ones(2, dtype=torch.float64)
    weights[:40, 1] = 0
    columns = {"polarity": data.pairs % 2} if name == "ttpd" else {}
    pairs, x = torch.from_numpy(data.pairs), torch.from_numpy(data.acts["signal"])
    found = []
    for device in ("cpu", "cuda"):
        design = Design.of(x.to(device), probe.standardise)
        posed = (each.to(device) for each in (labels, weights, strengths, pairs))
        solved = probe.solve(design, Problems(*posed, columns=columns))
        found.append(design.raw(solved.weights)[0].cpu().numpy())
    # The starts of CCS lie in the basis, whose axes may be mirrored on another device: it ends as near.
    np.testing.assert_allclose(*found, rtol=1e-3 if name == "ccs" else 1e-6, atol=1e-8)


def test_a_sweep_on_the_gpu_equals_the_cpus(planted, quick):
    data = planted(pairs=300, width=128)
    on_gpu = {site: torch.from_numpy(x).cuda() for site, x in data.acts.items()}
    ours = vd.fit_probes(on_gpu, target=data.labels, groups=data.pairs, **quick)
    cpu = vd.fit_probes(data.acts, target=data.labels, groups=data.pairs, **quick)
    for a, b in zip(ours.results, cpu.results):
        assert a.probe.C == b.probe.C
        np.testing.assert_allclose(a.probe.coef_, b.probe.coef_, rtol=1e-6, atol=1e-9)
        assert a.metrics["auroc"].value == pytest.approx(b.metrics["auroc"].value, abs=1e-6)
    assert all(x.is_cuda for x in on_gpu.values())
