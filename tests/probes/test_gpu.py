"""Activations that lie on a GPU are solved there, with the numbers of the CPU."""

import numpy as np
import pytest
import torch

import veridical as vd

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


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
