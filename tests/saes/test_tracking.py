"""Figures sent to a tracker: one run for each member, off unless asked for, and no harm when it fails."""

import logging
import sys
import types

import pytest
import torch
from planted_features import activations

import veridical as vd
from veridical.errors import InputError, UnknownNameError

CONFIGS = [
    vd.SAEConfig(width=32, k=3, batch=128, lr=rate, name=f"lr-{rate:g}") for rate in (1e-2, 1e-6, 1e-3)
]


class Run:
    def __init__(self, options):
        self.options, self.lines, self.finished = options, [], False

    def log(self, figures, step):
        assert not self.finished
        self.lines.append((step, figures))

    def finish(self):
        assert not self.finished
        self.finished = True


def fake(monkeypatch, name):
    """A module that stands in for a tracker, and the runs that were made of it."""
    module, runs = types.ModuleType(name), []

    def init(**options):
        runs.append(Run(options))
        return runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, name, module)
    return runs


@pytest.fixture(scope="module")
def vectors():
    return activations(128 * 60)


def test_every_member_is_a_run_of_its_own(monkeypatch, vectors):
    runs = fake(monkeypatch, "trackio")
    found = vd.train_saes(vectors, CONFIGS, tracker="trackio", project="mine")
    assert [run.options["name"] for run in runs] == ["lr-0.01", "lr-1e-06", "lr-0.001"]
    for run, member in zip(runs, found):
        assert run.options["project"] == "mine"
        assert run.options["resume"] == "never"
        assert run.options["config"]["lr"] == member.config.lr
        assert run.finished
        steps = [step for step, _ in run.lines]
        assert steps == sorted(steps)
        assert steps[-1] == member.tokens
        assert len(run.lines) == len(member.history) + 1
        first, last = run.lines[0][1], run.lines[-1][1]
        assert first == {name: pytest.approx(value) for name, value in member.history[0].items()}
        assert last["held_out/fvu"] == member.figures.fvu
        assert last["cancelled"] == 0


def test_nothing_is_sent_unless_asked_for(monkeypatch, vectors):
    made = [fake(monkeypatch, name) for name in ("trackio", "wandb")]
    vd.train_saes(vectors, CONFIGS[0])
    vd.sweep_saes(vectors, CONFIGS)
    assert made == [[], []]


def test_a_sweep_tells_its_rungs_and_who_was_cancelled(monkeypatch, vectors):
    runs = fake(monkeypatch, "wandb")
    found = vd.sweep_saes(vectors, CONFIGS, tracker="wandb")
    frame = found.to_frame().set_index("name")
    assert frame["cancelled"].notna().any()
    for run in runs:
        assert run.options["reinit"] == "create_new"
        assert "id" not in run.options
        name = run.options["name"]
        told = [(step, line) for step, line in run.lines if "held_out/explained_variance" in line]
        judged = [one for one in found.judgements if one.name == name]
        assert [step for step, _ in told][: len(judged)] == [one.tokens for one in judged]
        assert told[0][1]["held_out/explained_variance"] == judged[0].explained_variance
        assert run.lines[-1][1]["cancelled"] == float(frame["cancelled"].notna()[name])


def test_a_resumed_training_goes_on_in_the_same_runs(monkeypatch, vectors, tmp_path):
    from veridical.saes.trainer import _Training

    runs = fake(monkeypatch, "wandb")
    plain = _Training._settle

    def stopping(self):
        if self.steps == 20:
            self._checkpoint()
            raise KeyboardInterrupt
        plain(self)

    monkeypatch.setattr(_Training, "_settle", stopping)
    with pytest.raises(KeyboardInterrupt):
        vd.train_saes(vectors, CONFIGS, tracker="wandb", store=tmp_path)
    monkeypatch.setattr(_Training, "_settle", plain)
    vd.train_saes(vectors, CONFIGS, tracker="wandb", store=tmp_path)
    assert len(runs) == 6
    assert [run.options["id"] for run in runs[:3]] == [run.options["id"] for run in runs[3:]]
    assert len({run.options["id"] for run in runs}) == 3
    assert {run.options["resume"] for run in runs} == {"allow"}
    assert " " not in runs[0].options["id"]


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_said_once_and_harms_nothing(monkeypatch, vectors, caplog, broken):
    runs = fake(monkeypatch, "trackio")

    def fail(*given, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(sys.modules["trackio"] if broken == "init" else Run, broken, fail)
    with caplog.at_level(logging.WARNING):
        found = vd.train_saes(vectors, CONFIGS[:1], tracker="trackio")
    said = [record.message for record in caplog.records]
    assert said == ["trackio failed (ConnectionError: no route to host); training goes on without it"]
    assert torch.equal(found[0].W_dec, vd.train_saes(vectors, CONFIGS[:1])[0].W_dec)
    assert len(runs) == (broken != "init")


def test_what_is_not_finite_is_left_out(monkeypatch, vectors):
    runs = fake(monkeypatch, "trackio")
    wild = vd.SAEConfig(width=32, k=3, batch=128, lr=1e30, name="wild")
    vd.train_saes(vectors, wild, tracker="trackio")
    assert runs[0].lines[-1][1] == {"tokens": runs[0].lines[-1][0], "cancelled": 1.0}
    assert runs[0].finished


def test_a_tracker_that_is_missing_gives_the_line_that_installs_it(monkeypatch, vectors):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(InputError, match=r"pip install 'veridical\[trackio\]'"):
        vd.train_saes(vectors, CONFIGS[0], tracker="trackio")
    with pytest.raises(UnknownNameError, match="unknown tracker 'wand'; nearest: wandb"):
        vd.train_saes(vectors, CONFIGS[0], tracker="wand")
