"""`sweep_saes` as it is called: what is cancelled, what goes on, and that a killed sweep ends the same."""

import itertools
import json
import logging
import random
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from killing import latest, members, start, wait_for
from planted_features import activations

import veridical as vd
from veridical.config import build, load_recipe
from veridical.errors import ConfigError, DataError, InputError, StoreMismatchError, UnknownNameError
from veridical.saes import SAESweep, SweepConfig, checkpoint
from veridical.saes.sweep import _Sweep

HERE = Path(__file__).parent
SMALL = {"width": 32, "batch": 128, "k": 3}
RATES = [1e-5, 1e-2, 1e-6, 3e-3, 1e-4, 1e-3]
RECIPE = {
    "common": {**SMALL, "tokens": 128 * 48, "dead_after": 1024},
    "grid": {"lr": RATES},
    "configs": [{"lr": 1e30, "name": "wild"}, {"k": 2, "lr": 1e-2, "seed": 1}],
}


def swept(store=None, **options):
    return vd.sweep_saes(
        activations(128 * 60), RECIPE, slots=3, store=store, checkpoint_minutes=0.0, **options
    )


@pytest.fixture(scope="module")
def vectors():
    return activations(128 * 60)


@pytest.fixture(scope="module")
def sweep():
    return swept()


def planted(seed):
    """The members of one planted sweep, and its data: sixteen learning rates, most of them bad."""
    rates = np.random.default_rng(seed).permutation(np.geomspace(1e-6, 1.0, 16))
    shared = {"width": 32, "k": 3, "batch": 128, "tokens": 128 * 160, "seed": seed}
    return activations(128 * 200, seed=seed), [vd.SAEConfig(lr=float(rate), **shared) for rate in rates]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_halving_keeps_the_best_of_sixteen_for_less_than_half(seed):
    data, members = planted(seed)
    whole = vd.train_saes(data, members)
    found = vd.sweep_saes(data, members)
    assert found.share <= 0.45
    assert found.best().config == whole.best().config
    assert found.spent == sum(found.to_frame()["tokens"])
    finished = found.to_frame()["cancelled"].isna()
    assert 2 <= finished.sum() <= 3
    assert finished.iloc[0]  # the control


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_few_slots_decide_as_many_do(seed):
    data, members = planted(seed)
    together, found = vd.sweep_saes(data, members), vd.sweep_saes(data, members, slots=4)
    assert found.share == together.share <= 0.45
    assert [(one.name, one.rung, one.rank, one.kept) for one in found.judgements] == [
        (one.name, one.rung, one.rank, one.kept) for one in together.judgements
    ]
    assert found.best().config == together.best().config
    for one, other in zip(found.runs, together.runs):
        assert (one.tokens, one.cancelled is None) == (other.tokens, other.cancelled is None)
        if one.sae is not None and other.sae is not None:
            torch.testing.assert_close(one.sae.W_dec, other.sae.W_dec, rtol=1e-3, atol=1e-4)


def test_a_survivor_equals_one_trained_alone(vectors):
    configs = [vd.SAEConfig(**SMALL, lr=rate) for rate in (1e-6, 1e-2, 1e-5, 3e-3)]
    found = vd.sweep_saes(vectors, configs)
    assert 0 < found.to_frame()["cancelled"].notna().sum() < 4
    best = found.best()
    alone = vd.train_saes(vectors, best.config)
    torch.testing.assert_close(best.W_dec, alone[0].W_dec, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(best.W_enc, alone[0].W_enc, rtol=1e-4, atol=1e-5)


def test_slots_are_taken_at_once_by_the_next_on_the_list(vectors, monkeypatch):
    """Also where one is cancelled before the rung; and each sees the vectors that it would see alone."""
    plain, training = _Sweep._settle, []

    def watched(self):
        moved = plain(self)
        training.append(list(self._training_now()))
        assert len(training[-1]) == 2 or not self.ahead or "wild" in self.runs
        return moved

    monkeypatch.setattr(_Sweep, "_settle", watched)
    rates = {"slow": 1e-6, "fair": 1e-4, "wild": 1e30, "wilder": 1e30, "good": 1e-2}
    configs = [vd.SAEConfig(**SMALL, lr=rate, tokens=128 * 40, name=name) for name, rate in rates.items()]
    found = vd.sweep_saes(vectors, configs, slots=2)
    assert max(map(len, training)) == 2
    waves = [training[0], *(now for before, now in itertools.pairwise(training) if now != before)]
    assert waves[:3] == [["slow", "fair"], ["wild", "wilder"], ["good"]]
    late = found.runs.runs[4]
    assert late.cancelled is None
    assert late.tokens == 128 * 40
    alone = vd.train_saes(vectors, configs[4])
    torch.testing.assert_close(late.sae.W_dec, alone[0].W_dec, rtol=1e-4, atol=1e-5)
    assert late.figures.fvu == pytest.approx(alone.runs[0].figures.fvu, rel=1e-4)


@pytest.mark.parametrize("source", ["list", "function", "mapping"])
def test_few_slots_go_back_in_every_stream(vectors, source):
    pieces = list(vectors.split(500))
    data = {"list": pieces, "function": lambda: iter(pieces), "mapping": {"x": vectors}}[source]
    configs = [vd.SAEConfig(**SMALL, lr=rate, tokens=128 * 40) for rate in (1e-6, 1e-2, 1e-5)]
    together, found = vd.sweep_saes(data, configs), vd.sweep_saes(data, configs, slots=2)
    assert found.to_frame()["tokens"].tolist() == together.to_frame()["tokens"].tolist()
    torch.testing.assert_close(found.best().W_dec, together.best().W_dec, rtol=1e-4, atol=1e-5)


def test_an_iterator_that_is_read_once_has_no_slots(vectors):
    configs = [vd.SAEConfig(**SMALL, lr=rate, tokens=1280) for rate in (1e-3, 1e-2)]
    with pytest.raises(InputError, match=r"1 slots for 2 members: .* can be read once"):
        vd.sweep_saes(iter(vectors.split(500)), configs, slots=1)
    assert len(vd.sweep_saes(iter(vectors.split(500)), configs)) == 2


def test_members_are_cancelled_with_their_reason(sweep, caplog):
    with caplog.at_level(logging.INFO):
        again = swept()
    frame = sweep.to_frame().set_index("name")
    pd.testing.assert_frame_equal(frame, again.to_frame().set_index("name"))
    gone = frame[frame["cancelled"].notna()]
    assert len(gone) >= 4
    for name, reason in gone["cancelled"].items():
        assert f"{name} is cancelled: {reason}" in caplog.text
    assert "its loss became" in frame["cancelled"]["wild"]
    assert (gone["tokens"] < gone["planned"]).all()
    assert gone.drop(index="wild")[["explained_variance", "l0", "dead"]].notna().all(axis=None)
    control = frame[frame["control"]]
    assert list(control.index) == ["topk-f32-k3-lr1e-05"]
    assert control["cancelled"].isna().all()
    assert frame["cancelled"].isna()["topk-f32-k2-lr0.01-s1"]  # the only one with k 2: it has no peers
    assert frame["rungs"]["topk-f32-k2-lr0.01-s1"] == 0
    rungs = sweep.rungs()
    assert len(rungs) == len(sweep.judgements)
    assert set(rungs["name"]) == set(frame.index) - {"wild", "topk-f32-k2-lr0.01-s1"}
    assert rungs["tokens"].isin({768, 1536, 3072}).all()
    with pytest.raises(InputError, match="wild was cancelled"):
        sweep["wild"]


def test_what_a_sweep_shows(sweep):
    assert repr(sweep) == (
        f"SAESweep(8 SAEs, {sweep.to_frame()['cancelled'].isna().sum()} trained to the end, "
        f"{sweep.share:.1%} of the tokens spent)"
    )
    assert "<table" in sweep._repr_html_()
    assert sweep.best(l0=2.5).config.k == 2
    assert sweep.best().config.k == 3
    with pytest.raises(DataError, match=r"with L0 of at most 0\.5"):
        sweep.best(l0=0.5)
    figure = sweep.figure()
    crosses = [trace for trace in figure.data if "x" in trace.marker.symbol]
    cancelled = sweep.to_frame()
    cancelled = cancelled[cancelled["cancelled"].notna() & (cancelled["rungs"] > 0)]
    assert len(crosses) == len(cancelled)
    section = sweep.report_section()
    assert len(section.figures) == 2
    assert [len(table) for _, table in section.tables] == [8, len(sweep.judgements)]
    assert "it would have been cancelled rightly" in section.text
    assert section.headline[0][0] == "tokens spent"


def test_a_control_that_wins_says_so(vectors):
    configs = [vd.SAEConfig(**SMALL, lr=rate) for rate in (1e-2, 1e-6, 1e-5, 1e-4)]
    assert "kept on its own merit" in vd.sweep_saes(vectors, configs).verdict()
    chosen = vd.sweep_saes(vectors, configs, control="topk-f32-k3-lr1e-06")
    assert chosen.control == "topk-f32-k3-lr1e-06"
    assert chosen.to_frame()["cancelled"].isna().tolist()[:2] == [True, True]


def test_members_of_another_penalty_are_no_peers(vectors):
    grid = {"sparsity": [0.3, 3.0], "lr": [1e-5, 1e-2]}
    common = {"architecture": "relu", "width": 32, "batch": 128}
    found = vd.sweep_saes(vectors, {"common": common, "grid": grid}, control="relu-f32-l3-lr0.01")
    frame = found.to_frame().set_index("name")
    assert frame["cancelled"].isna().tolist() == [False, True, False, True]
    assert frame["cancelled"].str.contains("rank 2 of 2").tolist()[::2] == [True, True]
    assert frame["l0"]["relu-f32-l3-lr0.01"] < frame["l0"]["relu-f32-l0.3-lr0.01"]


# Recipes


def test_a_recipe_is_a_grid_and_a_list(tmp_path, vectors):
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "common: {architecture: topk, width: 32, batch: 128, tokens: 1280}\n"
        "grid:\n  lr: [1e-4, 1e-2]\n  aux: [0, 0.03125]\n"
        "configs:\n  - {k: 2, name: sparse}\n"
        "slots: 2\neta: 3\n"
    )
    found = vd.sweep_saes(vectors, path, rungs=1)
    assert isinstance(found, SAESweep)
    assert [run.name for run in found.runs] == [
        "topk-f32-k32-lr0.0001-aux0",
        "topk-f32-k32-lr0.0001-aux0.03125",
        "topk-f32-k32-lr0.01-aux0",
        "topk-f32-k32-lr0.01-aux0.03125",
        "sparse",
    ]
    assert [run.config.k for run in found.runs] == [32, 32, 32, 32, 2]
    assert [run.config.lr for run in found.runs][:4] == [1e-4, 1e-4, 1e-2, 1e-2]
    config = SweepConfig(grid={"prefixes": [[8, 32], [16, 32]]}, common={"architecture": "matryoshka"})
    assert [one.prefixes for one in config.members()] == [(8, 32), (16, 32)]
    assert config.members()[0].name == "matryoshka-x8-k32-prefixes8_32"


@pytest.mark.parametrize(
    ("configs", "options", "error", "said"),
    [
        (
            {"grids": {"lr": [1]}},
            {},
            UnknownNameError,
            "unknown option of SweepConfig 'grids'; nearest: grid",
        ),
        ({"grid": {"lrr": [1]}}, {}, UnknownNameError, "field of SAEConfig in grid: 'lrr'; nearest: lr"),
        ({"common": {"kk": 1}}, {}, UnknownNameError, "field of SAEConfig in common: 'kk'"),
        ({"configs": [{"kk": 1}]}, {}, UnknownNameError, r"field of SAEConfig in configs\[0\]: 'kk'"),
        ({"grid": {"lr": []}}, {}, ConfigError, "grid.lr is an empty list"),
        ({"grid": {"lr": 3}}, {}, ConfigError, "grid.lr = 3"),
        ({"grid": {"name": ["a", "b"]}}, {}, ConfigError, "a name belongs to one member"),
        ({"grid": {"k": ["many"]}}, {}, ConfigError, "k = 'many'"),
        ({"grid": {"k": [4, 33]}}, {}, ConfigError, "k is 33, but there are only 32 latents"),
        (None, {}, ConfigError, "the sweep has no members"),
        ([], {}, ConfigError, "configs is a list; expected"),
        ([3], {}, ConfigError, "configs is a list of int; expected"),
        (3, {}, ConfigError, "configs is a int; expected"),
        ("nowhere.yaml", {}, ConfigError, "no recipe at nowhere.yaml"),
        ({"grid": {"k": [4]}}, {"eta": 1}, ConfigError, "eta is 1; expected more than 1"),
        ({"grid": {"k": [4]}}, {"rungs": 0}, ConfigError, "rungs is 0; expected 1 or more"),
        ({"grid": {"k": [4]}}, {"slots": 0}, ConfigError, "slots is 0; expected 1 or more"),
        ({"grid": {"k": [4]}}, {"first": 0}, ConfigError, "first is 0; expected 1 or more"),
        ({"grid": {"k": [4]}}, {"grace": 2}, ConfigError, "grace is 2"),
        ({"grid": {"k": [4]}}, {"max_dead": -1}, ConfigError, "max_dead is -1"),
        ({"grid": {"k": [4]}}, {"control": "other"}, UnknownNameError, "unknown control 'other'"),
        ({"grid": {"k": [4]}}, {"engine": "slurm"}, ConfigError, "engine = 'slurm'"),
        ({"grid": {"k": [4]}}, {"slot": 2}, UnknownNameError, "nearest: slots"),
        ({"grid": {"k": [4]}}, {"resources": {"cpu": 1}}, ConfigError, "they need engine ray"),
        ({"grid": {"lr": [1e-3, 1e-2]}}, {"grace": 1}, ConfigError, "nothing could be judged"),
    ],
)
def test_bad_input_is_one_clear_line(vectors, configs, options, error, said):
    if isinstance(configs, dict) and "common" not in configs:
        configs = {"common": {"width": 32, "batch": 128, "k": 3}, **configs}
    with pytest.raises(error, match=said) as caught:
        vd.sweep_saes(vectors, configs, **options)
    assert "\n" not in str(caught.value)


# Resuming


def judgements(store):
    last = sorted((store / checkpoint.CHECKPOINTS).glob("*.json"))[-1]
    return json.loads(last.read_text())["judgements"]


@pytest.mark.slow
def test_a_sweep_killed_again_and_again_ends_in_the_same_bytes(tmp_path):
    assert start(swept, tmp_path / "whole", False).wait(120) == 0
    chance, folder, standing = random.Random(0), tmp_path / "killed" / checkpoint.CHECKPOINTS, [0]
    for _ in range(4):
        process = start(swept, tmp_path / "killed", True)
        wait_for(lambda: latest(folder) > standing[-1], process)
        time.sleep(chance.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        standing.append(latest(folder))
    whole = latest(tmp_path / "whole" / checkpoint.CHECKPOINTS)
    assert 0 < standing[2] < whole, "it was never killed in the middle"
    assert start(swept, tmp_path / "killed", False).wait(120) == 0
    expected, found = members(tmp_path / "whole"), members(tmp_path / "killed")
    assert expected.keys() == found.keys()
    assert len(expected) == 16
    for name, content in expected.items():
        assert found[name] == content, name
    assert judgements(tmp_path / "killed") == judgements(tmp_path / "whole")
    assert len(judgements(tmp_path / "whole")) > 8


@pytest.mark.parametrize("after", [3, 6, 7, 12, 25, 70])
def test_a_sweep_stopped_at_any_step_returns_what_an_unbroken_one_does(tmp_path, monkeypatch, sweep, after):
    plain, steps = _Sweep._settle, []

    def stopping(self):
        moved = plain(self)
        steps.append(1)
        if len(steps) == after:
            self._checkpoint()
            raise KeyboardInterrupt
        return moved

    monkeypatch.setattr(_Sweep, "_settle", stopping)
    with pytest.raises(KeyboardInterrupt):
        swept(tmp_path)
    monkeypatch.setattr(_Sweep, "_settle", plain)
    resumed = swept(tmp_path)
    assert resumed.judgements == sweep.judgements
    pd.testing.assert_frame_equal(resumed.to_frame(), sweep.to_frame())
    for run in sweep.runs:
        if run.sae is not None:
            for name, value in run.sae.state_dict().items():
                assert torch.equal(resumed[run.name].state_dict()[name], value), (run.name, name)


def test_a_store_of_other_rules_is_refused(tmp_path):
    swept(tmp_path)
    with pytest.raises(StoreMismatchError, match=r"sweep.eta is 2.0 there, 3.0 here"):
        swept(tmp_path, eta=3.0)
    (tmp_path / checkpoint.MEMBERS / ".wild.json.x1y2.tmp").write_text("half")
    before = {name for name in members(tmp_path) if not name.startswith(".")}
    assert len(swept(tmp_path)) == 8  # finished: nothing is trained again
    assert set(members(tmp_path)) == before  # what a killed write left is gone


# Recipes in the repository


def test_the_recipe_for_spot_machines_calls_a_sweep_that_exists():
    recipes = HERE.parents[1] / "saes" / "recipes"
    spot = load_recipe(recipes / "spot.yaml")
    assert spot["resources"]["use_spot"] is True
    assert spot["file_mounts"]["/bucket"]["mode"] == "MOUNT"
    words = spot["run"].split()
    assert words[:3] == ["veridical", "sae", "sweep"]
    assert words[words.index("--out") + 1].startswith("/bucket/")
    recipe = load_recipe(HERE.parents[1] / words[words.index("--config") + 1])
    own = {key: value for key, value in recipe.items() if key in ("common", "grid", "checkpoint_minutes")}
    sweep = build(SweepConfig, **own)
    assert len(sweep.members()) == 10
    assert {config.learning_rate(768) for config in sweep.members()} >= {1.6e-4}
    for config in sweep.members():
        config.check(768)
        assert config.latents(768) == 24_576
