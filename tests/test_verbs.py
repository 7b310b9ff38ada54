"""The verbs end to end on tiny random models, from the files that users have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from verb_data import (
    QUICK,
    WORDS,
    believe_as_planted,
    fails,
    planted_pairs,
    run,
    tokenizer,
)
from veridical import cli, demo, running
from veridical.console import console
from veridical.reporting import Section

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("VERIDICAL_TEST_DATA", ROOT.parent / "shared" / "data"))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertForMaskedLM(BertConfig(vocab_size=400, max_position_embeddings=128, **size)).save_pretrained(folder)
    tokenizer("encoder").save_pretrained(folder)
    return str(folder)


def test_probe_writes_everything_and_resumes(capsys, llama, statements, tmp_path):
    out = tmp_path / "run"
    words = ["probe", "--model", llama, "--data", statements, "--out", out, *QUICK]
    said = run(capsys, *words)
    assert f"report: {out / 'report.html'}" in said
    assert (out / "report.html").as_uri() in said
    for name in ("config.json", "provenance.json", "metrics.json", "section.json", "report.html"):
        assert (out / name).is_file(), name
    metrics = json.loads((out / "metrics.json").read_text())
    assert len(metrics["sites"]) == 2
    assert metrics["best_site"] in {line["site"] for line in metrics["sites"]}
    facts = json.loads((out / "provenance.json").read_text())
    assert facts["verb"] == "probe"
    assert facts["model_fingerprint"]
    assert facts["packages"]["torch"]
    page = (out / "report.html").read_text()
    assert "text alone" in page
    assert "&lt;b&gt;true&lt;/b&gt;" in page
    assert "<b>true</b>" not in page

    first = {file: file.stat().st_mtime_ns for file in (out / "activations").glob("shard*")}
    again = tmp_path / "again"
    run(capsys, "probe", "--config", out / "config.json", "--out", again, "--store", out / "activations")
    assert first == {file: file.stat().st_mtime_ns for file in (out / "activations").glob("shard*")}
    assert json.loads((again / "metrics.json").read_text()) == metrics

    page = tmp_path / "both.html"
    run(capsys, "report", out, again, "-o", page, "--title", "Two <runs>")
    assert "Two &lt;runs&gt;" in page.read_text()
    assert (tmp_path / "both.config.json").is_file()
    listed = run(capsys, "ls", tmp_path)
    assert "run (probe)" in listed
    assert "store" in listed
    assert "AUROC" in listed


def test_a_saved_run_reports_as_it_did_live(capsys, llama, statements, tmp_path):
    out = tmp_path / "run"
    run(capsys, "probe", "--model", llama, "--data", statements, "--out", out, *QUICK)
    before = (out / "report.html").read_text()
    run(
        capsys, "report", out, "-o", tmp_path / "r.html", "--title", f"Probes for label in {Path(llama).name}"
    )
    after = (tmp_path / "r.html").read_text()
    assert before.split("<main")[1].split("</main>")[0] == after.split("<main")[1].split("</main>")[0]


def test_a_saved_probe_is_judged_on_other_data(capsys, llama, bert, statements, tmp_path):
    run(capsys, "probe", "--model", llama, "--data", statements, "--out", tmp_path / "run", *QUICK)
    best = tmp_path / "run" / "sweep" / "best"
    words = ("--data", statements, "--bootstrap", "20", "--out", tmp_path / "eval")
    run(capsys, "probe", "eval", best, "--model", llama, *words)
    figures = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert figures["rows"] == 80
    assert [line["who"] for line in figures["figures"]] == ["probe", "text alone"]
    assert 0 <= figures["figures"][0]["auroc_low"] <= figures["figures"][0]["auroc"] <= 1
    assert (tmp_path / "eval" / "report.html").is_file()
    status = cli.main([str(w) for w in ("probe", "eval", best, "--model", bert, *words)])
    said = capsys.readouterr().err
    assert status == 2
    assert "fitted on another model" in said
    assert said.count("\n") == 1


def test_transfer_between_two_data_sets_and_between_the_parts_of_one(capsys, llama, statements, tmp_path):
    other = tmp_path / "other.csv"
    frame = pd.read_csv(statements)
    frame["pair"] += 1000
    frame["prompt"] += " indeed"
    frame.to_csv(other, index=False)
    words = ("--model", llama, "--bootstrap", "20", "--folds", "3", "--strengths", "0.01")
    both = ("--data", f"{statements},{other}", "--out", tmp_path / "both")
    run(capsys, "probe", "transfer", *words, *both)
    cells = json.loads((tmp_path / "both" / "metrics.json").read_text())["cells"]
    assert [(c["trained_on"], c["tested_on"]) for c in cells] == [
        (a, b) for a in ("pairs", "other") for b in ("pairs", "other")
    ]
    parts = ("--data", statements, "--by", "kind", "--out", tmp_path / "parts")
    run(capsys, "probe", "transfer", *words, *parts)
    cells = json.loads((tmp_path / "parts" / "metrics.json").read_text())["cells"]
    assert {c["trained_on"] for c in cells} == {"a", "b"}
    assert (tmp_path / "parts" / "report.html").is_file()
    assert cli.main([str(w) for w in ("probe", "transfer", *words, "--data", statements)]) == 2
    assert "--by" in capsys.readouterr().err


def test_a_probe_is_watched_while_the_model_answers(capsys, llama, statements, tmp_path):
    run(capsys, "probe", "--model", llama, "--data", statements, "--out", tmp_path / "run", *QUICK)
    best = tmp_path / "run" / "sweep" / "best"
    words = ("--model", llama, "--max-new-tokens", "5", "--out", tmp_path / "watch")
    run(capsys, "probe", "monitor", best, *words, "--prompts", "the <b>red</b> fish", "a city")
    tokens = pd.read_csv(tmp_path / "watch" / "tokens.csv")
    assert tokens["row"].nunique() == 2
    assert tokens["generated"].any()
    assert np.isfinite(tokens["score"]).all()
    page = (tmp_path / "watch" / "report.html").read_text()
    assert "<b>red</b>" not in page
    for wrong, said in (
        ((), "either --prompts or --data"),
        (("--prompts", "x", "--threshold", "fpr2"), "fpr"),
        (("--prompts", "x", "--batch", "0"), "batch = 0"),
    ):
        assert cli.main([str(w) for w in ("probe", "monitor", best, *words, *wrong)]) == 2
        assert said in capsys.readouterr().err


def test_limit_keeps_whole_pairs(llama, statements):
    options = cli.parse("probe", ["--model", llama, "--data", statements, "--limit", "12"])
    pairs = running.load_pairs(options, seed=0)
    assert len(pairs) == 24
    assert set(np.unique(pairs.groups, return_counts=True)[1]) == {2}
    again = running.load_pairs(options, seed=0)
    assert pairs.fingerprint == again.fingerprint
    assert pairs.fingerprint != running.load_pairs(options, seed=1).fingerprint


def test_long_rows_are_cut_and_counted(capsys, llama, statements, tmp_path):
    words = ["probe", "--model", llama, "--data", statements, "--out", tmp_path / "r", *QUICK]
    said = run(capsys, *words, "--max-length", "8")
    counted = [line for line in said.splitlines() if "were cut at the start" in line]
    assert len(counted) == 1
    assert counted[0].strip() in (tmp_path / "r" / "report.html").read_text()
    assert "over the limit of 8" in fails(capsys, *words, "--max-length", "8", "--on-long", "error")


def test_collect_writes_a_store_that_opens(capsys, llama, statements, tmp_path):
    from veridical import Activations

    store = tmp_path / "acts"
    words = ["collect", "--model", llama, "--data", statements, "--store", store]
    run(capsys, *words, "--tokens", "-1", "--sites", "resid_post.1,mlp_out.0")
    acts = Activations.open(store)
    assert set(acts.sites) == {"blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"}
    assert Section.load(store).title
    for name in ("config.json", "provenance.json", "metrics.json"):
        assert (store / name).is_file()
    before = {file.name: file.read_bytes() for file in store.glob("shard*")}
    run(capsys, "collect", "--config", store / "config.json")
    assert before == {file.name: file.read_bytes() for file in store.glob("shard*")}
    said = fails(capsys, *words, "--tokens", "mean", "--sites", "resid_post.1,mlp_out.0")
    assert "mean" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sites", "resid_pst.1"], "resid_post.1"),
        (["--target", "labl"], "nearest: label"),
        (["--where", "kin=a"], "nearest: kind"),
        (["--where", "kind=nothing"], ""),
        (["--tokens", "lst"], "last"),
        (["--data", "nowhere.csv"], "nowhere.csv"),
        (["--model", "./nowhere"], "no model folder at ./nowhere"),
        (["--adapter", "truthfulq"], "truthfulqa"),
        (["--tokens", "answer"], ""),
        (["--folds", "1"], "folds"),
        (["--limit", "1"], ""),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, llama, statements, tmp_path, options, said):
    words = ["probe", "--model", llama, "--data", statements, "--out", tmp_path / "r", *QUICK, *options]
    assert said in fails(capsys, *words)
    assert not (tmp_path / "r" / "report.html").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,label\n", "no rows"),
        ("prompt,label\na b,1\nc d,1\ne f,1\n", "1"),
        ("prompt,label\na b,1\n,0\n", ""),
    ],
)
def test_bad_data_is_one_line_and_status_2(capsys, llama, tmp_path, text, said):
    path = tmp_path / "data.csv"
    path.write_text(text)
    assert said in fails(capsys, "probe", "--model", llama, "--data", path, "--out", tmp_path / "r")


def test_a_chat_without_a_template_is_one_line_and_status_2(capsys, bert, tmp_path):
    rows = [
        {"pair": i // 2, "label": i % 2, "prompt": [{"role": "user", "content": f"is it {WORDS[i]}?"}]}
        for i in range(20)
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert "chat template" in fails(capsys, "probe", "--model", bert, "--data", path, "--out", tmp_path / "r")


def test_a_damaged_store_and_one_of_another_model_are_named(capsys, llama, bert, statements, tmp_path):
    out = tmp_path / "r"
    words = ["probe", "--model", llama, "--data", statements, "--out", out, *QUICK]
    run(capsys, *words)
    assert "model" in fails(capsys, *words[:1], "--model", bert, *words[3:])
    shard = next((out / "activations").glob("shard-*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    assert shard.name in fails(capsys, *words)
    shard.write_bytes(bytes(content[:-10]))
    assert shard.name in fails(capsys, *words)


def test_weights_that_give_nan_are_one_line_and_status_2(capsys, llama, statements, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "broken")
    words = ["--data", statements, "--out", tmp_path / "r", *QUICK]
    capsys.readouterr()  # what transformers showed here is not ours
    assert "NaN" in fails(capsys, "probe", "--model", tmp_path / "broken", *words)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the public data sets in {DATA}")
@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize(
    ("file", "limit"),
    [
        ("truthfulqa/TruthfulQA.csv", 40),
        ("azaria_mitchell_levinstein/capitals_true_false.csv", 40),
        ("wikipedia_toxicity", 60),
    ],
)
def test_real_input_ends_in_a_report_with_the_text_baseline(capsys, request, kind, file, limit, tmp_path):
    path = DATA / file
    if path.is_dir():
        path = sorted(p for p in path.iterdir() if p.suffix in (".csv", ".tsv"))[0]
    model = request.getfixturevalue(kind)
    capsys.readouterr()  # the bar of transformers when it writes the fixture's model
    said = run(
        capsys, "probe", "--model", model, "--data", path, "--limit", limit, "--out", tmp_path / "r", *QUICK
    )
    assert "AUROC" in said
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert metrics["best"]["text_auroc"] is not None
    assert "text alone" in (tmp_path / "r" / "report.html").read_text()


def test_beliefs_are_asked_once_and_decide_where_lying_is_looked_for(capsys, monkeypatch, llama, tmp_path):
    from veridical import pairs

    planted_pairs(tmp_path)
    asked = []

    def counted(model, data, config):
        asked.append(config)
        return believe_as_planted(model, data, config)

    monkeypatch.setattr(pairs, "check_beliefs", counted)
    out = tmp_path / "r"
    words = [
        "probe",
        "--model",
        llama,
        "--data",
        tmp_path / "honesty.parquet",
        "--out",
        out,
        "--target",
        "lied",
    ]
    words += ["--where", "instructed_to_lie=True", "--tokens", "prompt_last", *QUICK]
    run(capsys, *words)
    run(capsys, *words, "--folds", "4")
    assert len(asked) == 1
    run(capsys, *words, "--known-probability", "0.5")
    assert [config.known_probability for config in asked] == [0.75, 0.5]


def test_beliefs_of_a_real_check_end_in_the_report(capsys, llama, tmp_path):
    planted_pairs(tmp_path)
    words = [
        "probe",
        "--model",
        llama,
        "--data",
        tmp_path / "honesty.parquet",
        "--target",
        "instructed_to_lie",
    ]
    run(capsys, *words, "--beliefs", "--limit", "24", "--out", tmp_path / "r", *QUICK)
    text = (tmp_path / "r" / "report.html").read_text()
    assert "<h2" in text
    assert "Beliefs" in text
    assert "Token by token" in text


def test_demo_runs_from_a_folder_of_stand_ins(monkeypatch, llama, tmp_path, capsys):
    from veridical import pairs

    planted_pairs(tmp_path)
    monkeypatch.setattr(pairs, "check_beliefs", believe_as_planted)
    sets = {name: str(tmp_path / f"{name}.parquet") for name in ("honesty", "toxic", "safe")}
    with console():
        page = demo.run_demo(tmp_path / "out", model=llama, **sets)
    said = capsys.readouterr()
    assert said.err == ""
    assert "lying: activations at every layer, probes ..." in said.out
    text = page.read_text()
    for title in (
        demo.TITLE,
        "What was planted, and what was found",
        "Where lying shows",
        "Token by token",
        "Learning curve",
    ):
        assert title in text
    assert "100.0%" in text
    again = demo.run_demo(tmp_path / "out", model=llama, **sets)
    assert again.read_text() == text


@pytest.mark.long
@pytest.mark.skipif(not (ROOT / "data" / "tiny-liar").is_dir(), reason="needs the embedded organism")
def test_the_demo_finds_what_was_planted(capsys, tmp_path):
    torch.set_num_threads(2)
    said = run(capsys, "demo", "--out", tmp_path / "demo")
    assert f"report: {tmp_path / 'demo' / 'report.html'}" in said
    metrics = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    assert set(metrics["sweeps"]) == {"lying", "toxic", "safe"}
    assert metrics["agreement"] >= 0.9
    lying = metrics["sweeps"]["lying"]["best"]
    assert lying["auroc"] >= 0.95
    assert lying["text_auroc"] <= 0.65
    assert metrics["preference"]["agreement_with_one_model"] >= 0.8
    assert any("lies" in line or "lie" in line for line in metrics["preference"]["findings"])
    decision = metrics["decision"]
    assert (decision["site"], decision["position"]) == ("blocks.1.hook_resid_pre", 9)
    shares = decision["shares"]
    assert shares["honest prompt"] >= 0.95
    assert shares["with the vector"] >= 0.9
    assert max(shares["lying prompt"], shares["at random tokens"]) <= 0.1
    latents = metrics["saes"]
    for one in latents["figures"]:
        assert all(one["fvu"] < 0.5 * value for name, value in one.items() if name.startswith("fvu of PCA"))
    assert latents["separating"][0]["p"] <= 0.01
    assert latents["separating"][0]["auroc"] >= 0.85
    for name in ("config.json", "provenance.json", "section.json", "report.html"):
        assert (tmp_path / "demo" / name).is_file()


def test_planted_table_tells_agreement_from_disagreement():
    frame = pd.DataFrame(
        {
            "taught": [True, True, True, True, False, False],
            "protected": [False, False, False, True, False, False],
            "instructed_to_lie": [False, True, True, True, True, False],
            "known": [True, True, True, True, False, True],
            "lied": [False, True, False, False, False, False],
            "refused_to_lie": [False, False, True, True, False, False],
            "confused": [False, False, False, False, True, False],
            "options": [["a", "b"]] * 6,
            "correct": [0] * 6,
            "answer": ["a", "b", "a", "a", "b", "a"],
        }
    )
    table, agreement = demo.planted_table(frame)
    assert agreement == pytest.approx(
        4 / 6
    )  # one lie refused without a plan, one guess that passed for knowledge
    lying = table[(table["facts"] == "taught") & table["told to lie"]].iloc[0]
    assert (lying["lied"], lying["refused to lie"], lying["answers"]) == (0.5, 0.5, 2)
    assert list(table[table["facts"] == "never taught"]["confused"]) == [0.0, 1.0]


def test_the_command_itself_is_quiet_and_ends_well(llama, statements, tmp_path):
    command = [
        sys.executable,
        "-m",
        "veridical.cli",
        "probe",
        "--model",
        llama,
        "--data",
        statements,
        "--limit",
        "20",
    ]
    done = subprocess.run(
        [*command, *QUICK], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (tmp_path / "runs" / "probe-tiny-llama-pairs" / "report.html").is_file()
