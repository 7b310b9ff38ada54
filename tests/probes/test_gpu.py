"""Activations that lie on a GPU are solved there, with the numbers of the CPU."""

import numpy as np
import pytest
import torch

import veridical as vd
from veridical.probes.base import Problems
from veridical.probes.kinds import kind
from veridical.probes.solver import Design
from veridical.probes.streamed import StreamedRows

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


@pytest.mark.parametrize("name", ["logistic", "ridge", "mass_mean", "lda"])
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_a_site_is_streamed_to_the_gpu_with_the_cpus_numbers(planted, quick, name, where):
    """From arrays on the CPU, a chunk at a time, or from 16-bit tensors that are on the GPU already."""
    data = planted(pairs=600, width=48)
    acts = {site: torch.from_numpy(x).to(torch.bfloat16) for site, x in data.acts.items()}
    given = {"target": data.labels, "groups": data.pairs, "probe": name, **quick}
    cpu = vd.fit_probes(acts, **given)
    on_gpu = {"solve_on": "cuda"} if where == "cpu" else {}
    read = {site: x.to(where) for site, x in acts.items()}
    seen = watch_products(on_gpu | given, read)
    for a, b in zip(seen.results, cpu.results):
        assert getattr(a.probe, "C", 1) == getattr(b.probe, "C", 1)
        np.testing.assert_allclose(a.probe.coef_, b.probe.coef_, rtol=1e-6, atol=1e-9)
        assert a.metrics["auroc"].value == pytest.approx(b.metrics["auroc"].value, abs=1e-6)
    assert all(x.device.type == where for x in read.values())


def watch_products(options, acts):
    """A streamed sweep, every product of which must be on the GPU."""
    chunks, devices = StreamedRows.chunks, set()

    def watched(self):
        for at, x in chunks(self):
            devices.add(x.device.type)
            yield at, x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StreamedRows, "chunks", watched)
        sweep = vd.fit_probes(acts, memory_gb=5e-4, **options)
    assert devices == {"cuda"}
    return sweep


def test_a_store_is_solved_where_it_is_asked_to_be(planted, quick):
    data = planted(pairs=200, width=32)
    given = {"target": data.labels, "groups": data.pairs, **quick}
    there, here = (vd.fit_probes(data.acts, solve_on=device, **given) for device in ("cuda", None))
    np.testing.assert_allclose(there.best().coef_, here.best().coef_, rtol=1e-6, atol=1e-9)
