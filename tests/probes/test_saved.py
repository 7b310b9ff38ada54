"""Saved probes and sweeps: the same numbers in another process, damage found, nothing unpickled."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

import veridical as vd
from veridical import files
from veridical.errors import DamagedFileError, DataError, DiskFullError, InputError
from veridical.probes import LogisticProbe
from veridical.reporting.section import Section


@pytest.fixture(scope="module")
def sweep(planted, quick):
    data = planted()
    texts = [f"{'yes' if y else 'no'} | {i}" for i, y in enumerate(data.labels)]
    rows = {"pair": data.pairs, "lied": data.labels == 1, "confused": np.zeros(300, dtype=bool)}
    rows |= {"refused_to_lie": data.labels == 0}
    return vd.fit_probes(data.acts, target="lied", rows=rows, texts=texts, **{**quick, "text_baseline": True})


@pytest.fixture
def folder(sweep, tmp_path):
    return sweep.best().save(tmp_path / "probe")


def test_a_probe_loads_with_everything(sweep, folder, planted):
    probe, loaded = sweep.best(), vd.load_probe(folder)
    assert isinstance(loaded, LogisticProbe)
    assert np.array_equal(probe.coef_, loaded.coef_)
    assert np.array_equal(probe.intercept_, loaded.intercept_)
    assert loaded.classes_.tolist() == [False, True]
    assert loaded.classes_.dtype == bool
    assert loaded.get_params() == probe.get_params()
    assert loaded.origin_ == probe.origin_
    assert loaded.site == "signal"
    assert repr(loaded) == repr(probe)


def test_a_fresh_process_gives_the_same_numbers(sweep, folder, planted, tmp_path):
    x = planted().acts["signal"]
    np.save(tmp_path / "x.npy", x)
    code = (
        "import sys, numpy as np, veridical as vd\n"
        f"probe = vd.load_probe({str(folder)!r})\n"
        f"out = probe.predict_proba(np.load({str(tmp_path / 'x.npy')!r}))\n"
        f"np.save({str(tmp_path / 'out.npy')!r}, out)\n"
        "assert not {'transformers', 'datasets', 'plotly'} & set(sys.modules), 'loading a probe is light'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert np.array_equal(np.load(tmp_path / "out.npy"), sweep.best().predict_proba(x))


@pytest.mark.parametrize("labels", [["no", "yes"], [0, 1], [0.0, 1.0], [False, True]])
def test_a_probe_fitted_by_hand_keeps_its_kind_of_label(planted, tmp_path, labels):
    data = planted()
    probe = LogisticProbe(C=0.5).fit(data.acts["signal"], np.array(labels)[data.labels])
    loaded = vd.load_probe(probe.save(tmp_path / "p"))
    x = data.acts["signal"][:9]
    assert loaded.predict(x).tolist() == probe.predict(x).tolist()
    assert loaded.classes_.dtype == probe.classes_.dtype
    assert loaded.site is None


def test_the_folder_holds_what_a_reader_needs(folder):
    names = {path.name for path in folder.iterdir()}
    assert names == {"weights.safetensors", "config.json", "metrics.json", "provenance.json", "README.md"}
    card = (folder / "README.md").read_text()
    for said in ("`lied`", "`signal`", "model fingerprint", "not that the model uses it"):
        assert said in card
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["metrics"]["auroc_low"] <= metrics["metrics"]["auroc"]
    assert "torch" in json.loads((folder / "provenance.json").read_text())["packages"]


def test_the_card_puts_interval_chance_and_baselines_beside_each_figure(sweep, folder):
    card, told = (folder / "README.md").read_text(), sweep.best().origin_.metrics

    def shown(name):
        return f"{told[name]:.3f} [{told[f'{name}_low']:.3f}, {told[f'{name}_high']:.3f}]"

    heads = (
        "figure | value (95 % interval by pair) | chance | text alone | shuffled labels | random directions"
    )
    assert f"| {heads} |" in card
    controls = [
        f"{told[f'{name}_auroc']:.3f}, 95 % below {told[f'{name}_auroc_p95']:.3f}"
        for name in ("shuffled", "random_direction")
    ]
    assert f"| auroc | {shown('auroc')} | 0.500 | {shown('text_auroc')} | {' | '.join(controls)} |" in card
    assert f"| accuracy | {shown('accuracy')} | 0.500 | {shown('text_accuracy')} |" in card
    assert f"| fires fpr1 (lied) | {shown('fires_fpr1 (lied)')} | 0.010 |" in card
    assert f"AUROC on folds, by which it was chosen | {told['fold_auroc']:.3f}" in card


@pytest.mark.parametrize("name", ["weights.safetensors", "config.json", "metrics.json", "provenance.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_named_and_refused(folder, name, damage):
    path = folder / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        at = len(content) // 2
        content[at] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-20])
    else:
        path.unlink()
    expected = InputError if (name, damage) == ("config.json", "remove") else DamagedFileError
    with pytest.raises(expected, match=name):
        vd.load_probe(folder)


def test_a_number_changed_by_hand_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["classes"] = [True, False]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DamagedFileError, match="config"):
        vd.load_probe(folder)


def test_the_card_may_be_edited(folder):
    (folder / "README.md").write_text("# mine")
    vd.load_probe(folder)


def test_what_is_no_probe_is_said_so(tmp_path):
    with pytest.raises(InputError, match="no config"):
        vd.load_probe(tmp_path)
    (tmp_path / "config.json").write_text('{"sites": 3}')
    with pytest.raises(InputError, match="not the config of a probe"):
        vd.load_probe(tmp_path)
    (tmp_path / "config.json").write_text('{"kind": "logistic", "format": 99}')
    with pytest.raises(DataError, match="format 99"):
        vd.load_probe(tmp_path)


def test_a_save_that_fails_leaves_nothing_behind(sweep, tmp_path, monkeypatch):
    real = files.write_bytes

    def full(path, content):
        if path.name == "metrics.json":
            raise OSError(28, "No space left on device")
        return real(path, content)

    monkeypatch.setattr(files, "write_bytes", full)
    with pytest.raises(DiskFullError):
        sweep.best().save(tmp_path / "probe")
    assert list(tmp_path.iterdir()) == []


def test_saving_again_replaces_and_a_mix_of_two_saves_is_refused(sweep, folder, planted, tmp_path):
    other = LogisticProbe().fit(planted().acts["noise"], planted().labels)
    (folder / "notes.txt").write_text("mine")
    old = (folder / "config.json").read_bytes()
    other.save(folder)
    assert np.array_equal(vd.load_probe(folder).coef_, other.coef_)
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "config.json").write_bytes(old)
    with pytest.raises(DamagedFileError):
        vd.load_probe(folder)


def test_an_unfitted_probe_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="not fitted"):
        LogisticProbe().save(tmp_path / "p")


# Sweeps


def test_a_sweep_loads_with_everything(sweep, tmp_path):
    loaded = vd.ProbeSweep.load(sweep.save(tmp_path / "sweep"))
    pd.testing.assert_frame_equal(loaded.to_frame(), sweep.to_frame(), check_exact=True)
    pd.testing.assert_frame_equal(loaded.firing_frame(), sweep.firing_frame(), check_exact=True)
    assert loaded.findings() == sweep.findings()
    assert repr(loaded) == repr(sweep)
    assert loaded.config == sweep.config
    assert loaded.report_section().text == sweep.report_section().text
    for ours, theirs in zip(sweep.results, loaded.results):
        assert np.array_equal(ours.probe.coef_, theirs.probe.coef_)
        assert np.array_equal(ours.control, theirs.control)
        assert ours.probe.origin_ == theirs.probe.origin_
        assert theirs.probe.classes_.dtype == ours.probe.classes_.dtype


def test_a_saved_sweep_has_its_section_config_and_best_probe(sweep, tmp_path):
    folder = sweep.save(tmp_path / "sweep")
    assert Section.load(folder).title == sweep.report_section().title
    assert json.loads((folder / "config.json").read_text())["target"] == "lied"
    assert json.loads((folder / "metrics.json").read_text())["best_site"] == "signal"
    assert np.array_equal(vd.load_probe(folder / "best").coef_, sweep.best().coef_)


@pytest.mark.parametrize("name", ["sweep.json", "sweep.safetensors"])
def test_a_damaged_sweep_is_refused(sweep, tmp_path, name):
    folder = sweep.save(tmp_path / "sweep")
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(DamagedFileError, match=name):
        vd.ProbeSweep.load(folder)


def test_no_sweep_in_a_folder(tmp_path):
    with pytest.raises(InputError, match="no sweep"):
        vd.ProbeSweep.load(tmp_path)


def test_folders_can_be_moved(sweep, tmp_path):
    folder = sweep.save(tmp_path / "a")
    shutil.move(folder, tmp_path / "b")
    assert repr(vd.ProbeSweep.load(tmp_path / "b")) == repr(sweep)
