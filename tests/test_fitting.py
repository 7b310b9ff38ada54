"""`veridical probe fit`, `probe transfer --to-model`: curves, several estimators, kept probes, the list."""

import json

import numpy as np
import pytest

import veridical as vd
from verb_data import QUICK, believe_as_planted, fails, planted_pairs, run, save_llama
from veridical import cli
from veridical.probes import ProjectionEraser
from veridical.probes.honesty_report import HonestyReport
from veridical.probes.learning import LearningCurve
from veridical.reporting import Section
from veridical.saved_result import load_result

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_learning_curve_of_the_chosen_site_is_in_the_report(capsys, llama, statements, tmp_path):
    out = tmp_path / "run"
    words = ("probe", "fit", "--model", llama, "--data", statements, "--out", out, *QUICK)
    run(capsys, *words)
    curve, sweep = LearningCurve.load(out / "learning"), vd.ProbeSweep.load(out / "sweep")
    assert curve.site == sweep.best_site
    assert curve.to_frame()["pairs"].tolist() == [10, 20, 28]
    auroc = sweep[sweep.best_site].metrics["auroc"]
    assert curve.whole.value == pytest.approx(auroc.value, abs=1e-9)
    assert curve.text.value == sweep.text["auroc"].value
    page = (out / "report.html").read_text()
    assert "Learning curve of the probe for label" in page
    assert page.index("Probes for label") < page.index("Learning curve of the probe")
    none = tmp_path / "none"
    run(capsys, *words[: -len(QUICK) - 1], none, *QUICK, "--no-learning-curve")
    assert not (none / "learning").exists()
    assert "Learning curve" not in (none / "report.html").read_text()


def test_several_estimators_are_fitted_compared_and_kept(capsys, llama, statements, tmp_path):
    out, kept = tmp_path / "run", tmp_path / "kept" / "truth"
    words = ("--model", llama, "--data", statements, "--out", out, "--keep", kept, *QUICK)
    run(capsys, "probe", *words, "--estimator", "logistic,lda,lat:standardise=true", "--no-learning-curve")
    for name, folder in (("logistic", "sweep"), ("lda", "sweep-lda"), ("lat", "sweep-lat")):
        sweep = vd.ProbeSweep.load(out / folder)
        probe = vd.load_probe(kept if name == "logistic" else kept.with_name(f"truth-{name}"))
        assert probe.name == sweep.best().name == name
        np.testing.assert_array_equal(probe.coef_, sweep.best().coef_)
    assert probe.standardise is True
    assert "Estimators compared on label" in (out / "report.html").read_text()
    assert not list((tmp_path / "kept").glob("*monitor*"))


def test_a_run_for_lies_keeps_the_monitor_and_the_whole_protocol(capsys, monkeypatch, llama, tmp_path):
    from veridical import pairs

    planted_pairs(tmp_path)
    monkeypatch.setattr(pairs, "check_beliefs", believe_as_planted)
    words = ("--model", llama, "--data", tmp_path / "honesty.parquet", "--target", "lied")
    words += (
        "--where",
        "instructed_to_lie=True",
        "--tokens",
        "prompt_last",
        "--keep",
        tmp_path / "kept" / "lied",
    )
    run(capsys, "probe", *words, "--out", tmp_path / "r", *QUICK, "--no-learning-curve")
    report = HonestyReport.load(tmp_path / "r" / "honesty")
    monitor = vd.load_probe(tmp_path / "kept" / "lied-monitor")
    np.testing.assert_array_equal(monitor.coef_, report.monitor.coef_)
    assert monitor.origin_.where == ()
    card = (tmp_path / "kept" / "lied-monitor" / "README.md").read_text()
    figures = card.split("## Figures")[1].split("## Limits")[0]
    for said in ("| auroc |", "| recall fpr1 |", "| confused fpr1 |", "| honest fpr1 |", "text alone"):
        assert said in figures
    for line in figures.strip().splitlines()[4:]:
        if line.startswith("|"):
            assert "[" in line, f"without an interval: {line}"


def test_a_probe_is_moved_to_another_model(capsys, llama, statements, tmp_path):
    other = save_llama(tmp_path / "other-llama", seed=1)
    capsys.readouterr()  # what transformers showed here is not ours
    out = tmp_path / "moved"
    words = ("--data", statements, "--out", out, "--bootstrap", "20", "--folds", "3", "--shuffles", "3")
    words += ("--strengths", "0.01", "--sites", "resid_post.1")
    run(capsys, "probe", "transfer", "--model", llama, "--to-model", other, *words)
    lines = {line["probe"]: line for line in json.loads((out / "metrics.json").read_text())["figures"]}
    own = {"A's probe on A", "A's probe moved to B", "B's own probe"}
    assert set(lines) == {*own, "moved by shuffled pairs", "text alone on B"}
    assert all(line["auroc_low"] <= line["auroc"] <= line["auroc_high"] for line in lines.values())
    facts = json.loads((out / "provenance.json").read_text())
    assert facts["model_fingerprint"] != facts["to_model_fingerprint"]
    moved = load_result(out / "transfer")
    assert moved.probe.origin_.model_fingerprint == facts["to_model_fingerprint"]
    run(capsys, "probe", "eval", out / "transfer" / "probe", "--model", other, "--data", statements,
        "--bootstrap", "10", "--out", tmp_path / "eval")  # fmt: skip
    judged = load_result(tmp_path / "eval" / "judged")
    assert judged.counts["rows"] == 80
    assert judged.facts["model_fingerprint"] == facts["to_model_fingerprint"]
    assert repr(judged.report_section().text) == repr(Section.load(tmp_path / "eval" / "judged").text)
    assert "moved to another model" in (out / "report.html").read_text()
    again = tmp_path / "again"
    run(capsys, "probe", "transfer", "--config", out / "config.json", "--out", again)
    assert json.loads((again / "metrics.json").read_text()) == json.loads((out / "metrics.json").read_text())
    listed = run(capsys, "ls", tmp_path)
    assert "model transfer" in listed
    assert "run (probe transfer)" in listed


def test_the_list_names_probes_erasers_and_results(capsys, llama, statements, tmp_path):
    run(capsys, "probe", "--model", llama, "--data", statements, "--out", tmp_path / "run", *QUICK)
    ProjectionEraser(np.eye(5)[:2]).save(tmp_path / "gone")
    lines = run(capsys, "ls", tmp_path).split("In ")[1].splitlines()
    kinds = {line.split()[0].removeprefix(f"{tmp_path}/"): " ".join(line.split()[1:]) for line in lines[2:]}
    assert kinds["gone"].startswith("eraser")
    assert kinds["gone"].endswith("projection, 2 of 5 dimensions")
    assert kinds["run"].startswith("run (probe)")
    assert kinds["run/sweep"].startswith("sweep ")
    assert kinds["run/sweep/best"].startswith("probe")
    assert "logistic, AUROC" in kinds["run/sweep/best"]
    assert kinds["run/learning"].startswith("learning curve")
    assert kinds["run/calibration"].startswith("calibration")
    assert kinds["run/activations"].startswith("store")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--estimator", "logistc"), "nearest: logistic"),
        (("--estimator", "lda,lda"), "several different ones"),
        (("--estimator", "logistic:Z=1"), "unknown parameter of logistic"),
        (("--estimator", "logistic:C"), "expected PARAMETER=VALUE"),
        (("--estimator", "ttpd"), "give the data such a column named polarity"),
        (("--estimator", "ttpd:polarity=knd"), "unknown column 'knd'; nearest: kind"),
        (("--estimator", "stacked"), "StackedProbe.from_sweep(sweep)"),
    ],
)
def test_an_estimator_that_cannot_be_is_one_line_and_status_2(
    capsys, llama, statements, tmp_path, options, said
):
    words = ("--model", llama, "--data", statements, "--out", tmp_path / "r", *QUICK)
    assert said in fails(capsys, "probe", *words, *options)
    assert not (tmp_path / "r" / "report.html").exists()


def test_ttpd_takes_its_column_by_name(capsys, llama, statements, tmp_path):
    words = ("--model", llama, "--data", statements, "--out", tmp_path / "r", *QUICK)
    run(capsys, "probe", *words, "--estimator", "ttpd:polarity=kind")
    assert vd.load_probe(tmp_path / "r" / "sweep" / "best").polarity == "kind"


@pytest.mark.parametrize(
    "options", [(), ("--by", "kind", "--to-model", "x"), ("--to-model", "x", "--data", "a.csv,b.csv")]
)
def test_transfer_takes_one_question_at_a_time(capsys, llama, statements, options):
    words = ("probe", "transfer", "--model", llama, "--data", statements, *options)
    assert "needs one of these" in fails(capsys, *words)


def test_help_says_why_the_curve_is_on(capsys):
    assert cli.main(["probe", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--learning-curve" in shown
    assert "--keep" in shown
