"""Saved results: the same figures, sentences and probes in another process; damage and mix-ups refused."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

import veridical as vd
from veridical.errors import DamagedFileError, InputError
from veridical.probes import LeaceEraser, ProjectionEraser, load_eraser
from veridical.probes.causal_result import CausalCheck, Edited
from veridical.probes.erasure_check import check_erasure
from veridical.probes.evaluate import resample_weights
from veridical.probes.learning import learning_curve
from veridical.probes.model_transfer import transfer_to
from veridical.reporting.section import Section
from veridical.saved_result import KINDS, load_result

HONEST = {"folds": 3, "strengths": (0.01,), "bootstrap": 20, "progress": False}


def texts(count):
    return [f"question {i // 2}, {'yes' if i % 3 else 'no'}" for i in range(count)]


def labelled(data):
    return pd.DataFrame(
        {
            "pair": data.pairs,
            "label": data.labels,
            "form": np.where(data.pairs % 2, "choice", "open <b>"),
            "confused": data.pairs % 5 == 0,
            "refused_to_lie": data.labels == 0,
        }
    )


def honesty(data):
    told, kind = data.labels == 1, data.pairs % 3
    rows = pd.DataFrame({"pair": data.pairs, "instructed_to_lie": told, "known": kind < 2})
    rows["lied"] = told & (kind == 0)
    rows["refused_to_lie"] = told & (kind == 1)
    rows["confused"], rows["label_true"] = kind == 2, ~rows["lied"]
    return vd.honesty_protocol(data.acts, rows=rows, texts=texts(len(rows)), **HONEST)


def causal():
    random = np.random.default_rng(0)
    runs = [(0.0, -1), *((s, w) for s in (-2.0, 2.0, float("nan")) for w in range(4))]
    edited = tuple(Edited(s, w, random.normal(size=30), random.random(30)) for s, w in runs)
    groups = np.array([f"entity {i // 2}" for i in range(30)], dtype=object)
    kinds = {"all": np.ones(30, dtype=bool), "lied = True": np.arange(30) % 2 == 0}
    facts = {"direction": "lied", "site": "resid_post.1", "at": "prompt_last", "effect_on": "wrong"}
    facts |= {"unit": 0.3, "mean_norm": np.float64(2.5), "random": 3, "seed": 4, "model": "m"}
    return CausalCheck(edited, kinds, groups, resample_weights(groups, 20, 0), facts)


@pytest.fixture(scope="module")
def results(planted, quick):
    data = planted(pairs=90)
    rows, words = labelled(data), texts(180)
    options = {**quick, "bootstrap": 20, "strengths": (0.01, 1.0), "folds": 3}
    sweep = vd.fit_probes(data.acts, rows=rows, texts=words, **{**options, "text_baseline": True})
    curve = {k: v for k, v in options.items() if k != "shuffles"}
    parts = {k: v for k, v in curve.items() if k != "text_baseline"}
    moved = {name: x @ np.random.default_rng(1).normal(size=(24, 20)) for name, x in data.acts.items()}
    return {
        "HonestyReport": honesty(data),
        "LearningCurve": learning_curve(data.acts, rows=rows, sizes=(10, 30), repeats=3, **curve),
        "TransferMatrix": vd.transfer_matrix(data.acts, by="form", rows=rows, **parts),
        "ModelTransfer": transfer_to(data.acts, moved, rows=rows, **options),
        "CausalCheck": causal(),
        "ErasureCheck": check_erasure(data.acts, site="signal", rows=rows, draws=2, **options),
        "Calibration": sweep.calibration(),
    }


def said(result):
    """Everything that a reader sees of a result."""
    figure = result.figure().to_json() if hasattr(result, "figure") else ""
    return [repr(result), *result.findings(), result.to_frame().to_json(double_precision=15), figure]


RESULTS = sorted(name for name, home in KINDS.items() if home.startswith("probes.") and name != "Judged")


@pytest.mark.parametrize("kind", RESULTS)
def test_a_result_comes_back_as_it_was(results, kind, tmp_path):
    result = results[kind]
    assert type(result).__name__ == kind
    loaded = type(result).load(result.save(tmp_path / "r"))
    assert said(loaded) == said(result)
    pd.testing.assert_frame_equal(loaded.to_frame(), result.to_frame(), check_exact=True)
    section = loaded.report_section()
    assert section.text == result.report_section().text == Section.load(tmp_path / "r").text
    assert getattr(loaded, "config", None) == getattr(result, "config", None)
    facts = json.loads((tmp_path / "r" / "provenance.json").read_text())
    assert "torch" in facts["packages"]
    assert facts["seed"] == (4 if kind == "CausalCheck" else 0)
    assert json.loads((tmp_path / "r" / "metrics.json").read_text())["table"]


def test_they_are_the_same_in_a_fresh_process(results, tmp_path):
    for kind in RESULTS:
        results[kind].save(tmp_path / kind)
    code = (
        "import json, sys\nfrom veridical import load_result\n"
        f"root, kinds = {str(tmp_path)!r}, {RESULTS!r}\n"
        "def said(r):\n"
        "    figure = r.figure().to_json() if hasattr(r, 'figure') else ''\n"
        "    return [repr(r), *r.findings(), r.to_frame().to_json(double_precision=15), figure]\n"
        "json.dump({k: said(load_result(f'{root}/{k}')) for k in kinds}, open(f'{root}/said.json', 'w'))\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert json.loads((tmp_path / "said.json").read_text()) == {kind: said(results[kind]) for kind in RESULTS}


def test_what_a_result_holds_comes_back_whole(results, planted, tmp_path):
    x = planted(pairs=90).acts["signal"]
    report = load_result(results["HonestyReport"].save(tmp_path / "h"))
    assert report.chosen == results["HonestyReport"].chosen
    for name, probe in results["HonestyReport"].probes.items():
        np.testing.assert_array_equal(report.probes[name].decision_function(x), probe.decision_function(x))
        assert report.probes[name].origin_ == probe.origin_
    moved = load_result(results["ModelTransfer"].save(tmp_path / "m"))
    assert repr(moved.own) == repr(results["ModelTransfer"].own)
    assert repr(moved.first) == repr(results["ModelTransfer"].first)
    np.testing.assert_array_equal(moved.control, results["ModelTransfer"].control)
    check = load_result(results["CausalCheck"].save(tmp_path / "c"))
    assert check.groups.tolist() == results["CausalCheck"].groups.tolist()
    assert check.weights.dtype == results["CausalCheck"].weights.dtype
    assert np.isnan([run.strength for run in check.edited][-1])
    erased = load_result(results["ErasureCheck"].save(tmp_path / "e")).eraser
    np.testing.assert_array_equal(erased.transform(x), results["ErasureCheck"].eraser.transform(x))


def test_what_is_missing_damaged_or_another_kind_is_said(results, tmp_path):
    folder = results["TransferMatrix"].save(tmp_path / "t")
    with pytest.raises(InputError, match="holds a TransferMatrix; expected a LearningCurve"):
        vd.probes.learning.LearningCurve.load(folder)
    with pytest.raises(InputError, match=r"no result\.json"):
        load_result(tmp_path)
    for name in ("result.json", "arrays.safetensors", "choice/config.json", "choice/weights.safetensors"):
        content = (folder / name).read_bytes()
        middle = len(content) // 2
        (folder / name).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        with pytest.raises(DamagedFileError, match=name.split("/")[-1]):
            load_result(folder)
        (folder / name).write_bytes(content)
    assert repr(load_result(folder)) == repr(results["TransferMatrix"])


def test_a_part_of_another_save_is_refused(results, tmp_path):
    folder = results["HonestyReport"].save(tmp_path / "h")
    results["HonestyReport"].instruction.save(folder / "lying")
    with pytest.raises(DamagedFileError, match=r"lying.config\.json"):
        load_result(folder)


def test_a_value_without_a_saved_form_is_refused_and_nothing_seals_it(tmp_path):
    check = causal()
    wrong = CausalCheck(check.edited, check.kinds, check.groups, check.weights, {**check.facts, "odd": {1}})
    with pytest.raises(TypeError, match=r"facts\.odd is a set"):
        wrong.save(tmp_path / "r")
    assert not (tmp_path / "r" / "result.json").exists()


# Erasers


def erasers():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(200, 12)), np.repeat(["no", "yes"], 100)
    x[:, 3] += 2.0 * (y == "yes")
    several = np.arange(200) % 3
    return x, {
        "leace": LeaceEraser().fit(x, y),
        "leace of three": LeaceEraser(shrinkage=False).fit(x, several),
        "projection": ProjectionEraser(random.normal(size=(2, 12))),
        "centred": ProjectionEraser(random.normal(size=12), centre=x.mean(0)),
    }


@pytest.mark.parametrize("name", list(erasers()[1]))
def test_an_eraser_gives_the_same_numbers_in_a_fresh_process(name, tmp_path):
    x, found = erasers()
    eraser = found[name]
    folder = eraser.save(tmp_path / "e")
    assert {path.name for path in folder.iterdir()} == {
        "weights.safetensors", "config.json", "metrics.json", "provenance.json", "README.md",
    }  # fmt: skip
    loaded = load_eraser(folder)
    assert type(loaded) is type(eraser)
    assert loaded.rank == eraser.rank
    assert loaded.get_params().keys() == eraser.get_params().keys()
    np.save(tmp_path / "x.npy", x)
    code = (
        "import numpy as np\nfrom veridical.probes import load_eraser\n"
        f"eraser, x = load_eraser({str(folder)!r}), np.load({str(tmp_path / 'x.npy')!r})\n"
        f"np.save({str(tmp_path / 'y.npy')!r}, eraser.transform(x))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), eraser.transform(x))
    assert eraser.said().split(",")[0] in (folder / "README.md").read_text()


def test_a_loaded_eraser_says_what_it_cannot_do(tmp_path):
    x, found = erasers()
    loaded = load_eraser(found["leace"].save(tmp_path / "e"))
    assert loaded.classes_.tolist() == ["no", "yes"]
    with pytest.raises(InputError, match="a loaded eraser can't take in more batches"):
        loaded.update(x, np.repeat(["no", "yes"], 100))
    np.testing.assert_allclose(
        loaded.fit(x, np.repeat(["no", "yes"], 100)).transform(x), found["leace"].transform(x)
    )
    with pytest.raises(InputError, match="no config"):
        load_eraser(tmp_path)
    with pytest.raises(InputError, match="not the config of a probe"):
        vd.load_probe(tmp_path / "e")
    (tmp_path / "e" / "weights.safetensors").write_bytes(b"x")
    with pytest.raises(DamagedFileError, match="weights"):
        load_eraser(tmp_path / "e")


def test_the_card_of_a_checked_eraser_has_every_figure_with_its_interval(results, tmp_path):
    check = results["ErasureCheck"]
    card = (check.eraser.save(tmp_path / "e") / "README.md").read_text()
    assert "# Eraser of `label`" in card
    assert "`signal`" in card
    for line in check.to_frame().to_dict("records"):
        shown = f"{line['auroc']:.3f} [{line['auroc_low']:.3f}, {line['auroc_high']:.3f}]"
        assert f"| auroc, {line['measured']} | {shown} | 0.500 |" in card
