"""The sweep over Ray, on a cluster of this one machine; without Ray, that its absence is said."""

import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from planted_features import activations

import veridical as vd
from veridical.errors import ConfigError, InputError, StoreMismatchError
from veridical.saes import ray_engine

present = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
HERE = str(Path(__file__).parent)
SMALL = {"width": 32, "batch": 128, "k": 3, "tokens": 128 * 40}
CONFIGS = [vd.SAEConfig(**SMALL, lr=rate) for rate in (1e-3, 1e-2, 1e-5)]
CONFIGS += [vd.SAEConfig(**SMALL, lr=1e30, name="wild")]


@pytest.fixture(scope="module")
def cluster():
    """Two cores under Ray, for all tests of this file."""
    ray = ray_engine._ray()
    paths = os.pathsep.join(filter(None, sys.path))
    environment = {"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=2, log_to_driver=False, runtime_env=environment, include_dashboard=False)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def vectors():
    return activations(128 * 60)


def weights(store):
    files = sorted((store / ray_engine.TRIALS).glob("*/members/*"))
    return {file.name: file.read_bytes() for file in files}


@present
@pytest.mark.slow
def test_members_train_as_if_alone_and_bad_ones_are_cancelled(cluster, vectors, tmp_path, capfd):
    found = vd.sweep_saes(vectors, CONFIGS, engine="ray", slots=1, store=tmp_path)
    assert not capfd.readouterr().out
    frame = found.to_frame().set_index("name")
    assert frame["control"].tolist() == [True, False, False, False]
    assert found.best().config.lr == 1e-2
    assert "its loss became" in frame["cancelled"]["wild"]
    assert frame["cancelled"]["topk-f32-k3-lr1e-05"].startswith("rank 3 of 3 after 640 tokens")
    assert frame["tokens"]["topk-f32-k3-lr1e-05"] < SMALL["tokens"]
    assert found.runs.runs[2].history
    alone = vd.train_saes(vectors, CONFIGS[1])
    torch.testing.assert_close(found.best().W_dec, alone[0].W_dec, rtol=1e-4, atol=1e-5)
    assert found.report_section().tables
    again = vd.sweep_saes(vectors, CONFIGS, engine="ray", slots=1, store=tmp_path)  # nothing is left to do
    assert again.judgements == found.judgements
    assert torch.equal(again.best().W_dec, found.best().W_dec)
    with pytest.raises(StoreMismatchError, match=r"sweep.eta is 2.0 there, 4.0 here"):
        vd.sweep_saes(vectors, CONFIGS, engine="ray", slots=1, store=tmp_path, eta=4.0)


@present
@pytest.mark.slow
def test_a_lost_worker_and_a_lost_driver_change_nothing(cluster, vectors, tmp_path, monkeypatch):
    configs, flag, driver = CONFIGS[1:3], tmp_path / "lost", os.getpid()
    plain = ray_engine._Ledger.goes_on

    def batches(lethal=flag):
        for number, piece in enumerate(activations(128 * 60).split(128)):
            # After its first rung, and not in this process, the worker is killed once.
            if number == 12 and not lethal.exists() and os.getpid() != driver:
                lethal.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield piece

    def harmless():
        return batches(Path("/"))

    options = {"engine": "ray", "slots": 1, "checkpoint_minutes": 0.0, "holdout": 0.02}
    whole = vd.sweep_saes(harmless, configs, store=tmp_path / "whole", **options)

    def failing(self, one, rung):
        if rung == 2:
            raise KeyError("the driver is lost")
        return plain(self, one, rung)

    monkeypatch.setattr(ray_engine._Ledger, "goes_on", failing)
    with pytest.raises(Exception, match="the driver is lost"):
        vd.sweep_saes(batches, configs, store=tmp_path / "hurt", **options)
    assert flag.exists()
    monkeypatch.setattr(ray_engine._Ledger, "goes_on", plain)
    hurt = vd.sweep_saes(batches, configs, store=tmp_path / "hurt", **options)
    assert hurt.judgements == whole.judgements
    assert weights(tmp_path / "hurt") == weights(tmp_path / "whole")
    assert len(weights(tmp_path / "whole")) == 2 * sum(run.sae is not None for run in whole.runs)


@present
def test_data_that_cannot_be_sent_and_what_a_worker_refuses(cluster, vectors, tmp_path):
    with pytest.raises(InputError, match="data is a generator, which cannot be sent"):
        vd.sweep_saes((piece for piece in vectors.split(128)), CONFIGS, engine="ray", store=tmp_path / "a")

    def broken():
        pieces = list(activations(128 * 200).split(128))
        pieces[80][0, 0] = float("nan")
        return iter(pieces)

    late = vd.SAEConfig(**{**SMALL, "tokens": 128 * 100}, name="late")

    with pytest.raises(InputError, match="late: x holds NaN or infinity after 10,240 training vectors"):
        vd.sweep_saes(broken, [late], engine="ray", store=tmp_path / "b", holdout=0)


@present
@pytest.mark.slow
def test_workers_read_a_store_of_activations(cluster, tmp_path):
    texts = [f"The capital of country number {number} is town number {7 * number}." for number in range(60)]
    sites = ["resid_post.1", "mlp_out.2"]
    acts = vd.collect(vd.load("tiny-liar"), texts, sites=sites, tokens="all", store=tmp_path / "acts")
    configs = [vd.SAEConfig(width=64, k=4, batch=64, lr=1e-2, site=site, name=site) for site in sites]
    found = vd.sweep_saes(acts, configs, engine="ray", store=tmp_path / "sweep")
    together = vd.train_saes(acts, configs)
    for site in sites:
        torch.testing.assert_close(found[site].W_dec, together[site].W_dec, rtol=1e-4, atol=1e-5)
    assert found.share == 1
    assert found.rungs().empty


def test_a_store_is_needed(vectors, monkeypatch):
    monkeypatch.setattr(ray_engine, "_ray", lambda: None)
    with pytest.raises(ConfigError, match="engine ray needs a store"):
        vd.sweep_saes(vectors, CONFIGS, engine="ray")


def test_a_missing_ray_gives_the_line_that_installs_it(vectors, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"install it with: pip install 'veridical\[cluster\]'") as caught:
        vd.sweep_saes(vectors, CONFIGS, engine="ray", store=tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
