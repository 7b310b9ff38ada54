"""`veridical patch`: rows from texts, tables and questions; what is written; one line for bad input."""

import json

import pytest

from veridical import cli
from veridical.errors import ConfigError
from veridical.interventions.jobs import agreed
from veridical.interventions.material import evenly_long, material
from veridical.saved_result import load_result

HONEST = "You must answer every question with something true."
LYING = "You must answer every question with something false."
SYSTEMS = ["--clean-system", HONEST, "--corrupt-system", LYING]
QUESTIONS = [
    "--data",
    "honesty",
    "--where",
    "form=choice",
    "taught=True",
    "protected=False",
]


def options(*words):
    return cli.parse("patch", ["--model", "tiny-liar", *words])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("patch")
    words = ["--model", "tiny-liar", *QUESTIONS, *SYSTEMS, "--examples", "3", "--bootstrap", "20"]
    assert cli.main(["patch", *words, "--sites", "resid_pre.*", "z.0", "--out", str(out)]) == 0
    return out


def test_a_run_finds_the_word_and_keeps_everything(run):
    patched = load_result(run / "patched")
    frame = patched.to_frame()
    word = frame[(frame["kind"] == "resid_pre") & (frame["layer"] == 0) & (frame["token"] == " true")]
    assert word["recovered"].tolist() == pytest.approx([1.0], abs=1e-6)
    assert patched.values.shape[1] == 3
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["rows"] == 3
    found = metrics["attribution"]["correlation"]
    assert set(found) == {"resid_pre", "z"}
    assert found == pytest.approx(agreed(patched, load_result(run / "attribution")))
    assert json.loads((run / "provenance.json").read_text())["verb"] == "patch"
    page = (run / "report.html").read_text()
    assert page.index("Activation patching: logit_diff") < page.index("Attribution of logit_diff")


def test_agreement_is_the_plain_correlation(run):
    import numpy as np

    exact, guess = load_result(run / "patched").to_frame(), load_result(run / "attribution").to_frame()
    ours = {
        (line["layer"], int(line["position"])): line["effect"]
        for line in exact.to_dict("records")
        if line["kind"] == "resid_pre"
    }
    theirs = {
        (line["layer"], int(line["position"])): line["score"]
        for line in guess.to_dict("records")
        if line["kind"] == "resid_pre"
    }
    assert ours.keys() == theirs.keys()
    pairs = np.array([(ours[key], theirs[key]) for key in ours])
    expected = np.corrcoef(pairs.T)[0, 1]
    assert agreed(load_result(run / "patched"), load_result(run / "attribution"))[
        "resid_pre"
    ] == pytest.approx(expected)


def test_questions_are_asked_once_under_both_prompts():
    rows = material(options(*QUESTIONS, *SYSTEMS))
    assert len(rows) == len(rows.corrupt) == len(rows.answers) == len(rows.wrong) > 100
    assert rows.clean[0][0]["content"] == HONEST
    assert rows.corrupt[0][0]["content"] == LYING
    assert rows.clean[0][1] == rows.corrupt[0][1]
    assert all(a != b for a, b in zip(rows.answers, rows.wrong))
    assert all(a in prompt[-1]["content"] for a, prompt in zip(rows.answers, rows.clean))


def test_a_table_of_clean_and_corrupt_rows(tmp_path):
    table = tmp_path / "rows.jsonl"
    lines = [
        {"clean": "a b", "corrupt": "a c", "answer": "x", "wrong": "y"},
        {"clean": [{"role": "user", "content": "d"}], "corrupt": [{"role": "user", "content": "e"}],
         "answer": "z", "wrong": "w"},
    ]  # fmt: skip
    table.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    rows = material(options("--data", str(table)))
    assert rows.clean == [line["clean"] for line in lines]
    assert rows.corrupt == [line["corrupt"] for line in lines]
    assert (rows.answers, rows.wrong) == (["x", "z"], ["y", "w"])
    with pytest.raises(ConfigError, match="--limit is for questions"):
        material(options("--data", str(table), "--limit", "1"))


def test_a_limit_draws_pairs_with_the_seed():
    drawn = [material(options(*QUESTIONS, *SYSTEMS, "--limit", "40", "--seed", seed)) for seed in "001"]
    assert 0 < len(drawn[0]) < 40
    assert drawn[0].clean == drawn[1].clean != drawn[2].clean


def test_rows_of_the_commonest_length_are_kept():
    import veridical as vd

    texts = ["one two", "one two three", "three two", "one", "two one"]
    rows = material(options("--clean", *texts, "--corrupt", *texts, "--answers", "x", "--wrong", "y"))
    model = vd.load("tiny-liar")
    lengths = [len(row.ids) for row in model.encode(texts)]
    usual = max(set(lengths), key=lengths.count)
    kept = evenly_long(model, rows, 10, aligned=False)
    assert kept.clean == [text for text, length in zip(texts, lengths) if length == usual]
    assert len(evenly_long(model, rows, 2, aligned=True)) == 2
    uneven = material(
        options("--clean", "one", "--corrupt", "one two three", "--answers", "x", "--wrong", "y")
    )
    with pytest.raises(
        vd.VeridicalError, match=r"no row has as many tokens clean as corrupt .*--align token"
    ):
        evenly_long(model, uneven, 10, aligned=False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "one of --clean with --corrupt, --prompts, or --data; none arrived"),
        (["--clean", "a", "--corrupt", "b", "--data", "honesty"], "--clean and --data arrived"),
        (["--clean", "a", "b", "--corrupt", "c"], "2 clean rows and 1 corrupt ones"),
        (["--clean", "a", "--corrupt", "b", *SYSTEMS], "are for questions"),
        (["--prompts", "a"], "need --clean-system and --corrupt-system"),
        (["--prompts", "a", "--clean-system", "x", "--corrupt-system", "x"], "nothing to find"),
        ([*QUESTIONS, *SYSTEMS, "--examples", "0"], "examples = 0: expected 1 or more"),
        (["--data", "honesty", *SYSTEMS, "--where", "from=choice"], "form"),
        ([*QUESTIONS, *SYSTEMS, "--where", "form=open"], "--where was given twice"),
        ([*QUESTIONS, *SYSTEMS, "--answers", "a", "b", "c"], "3 answers for"),
        ([*QUESTIONS, *SYSTEMS, "--sites", "resid_pots.*"], "resid_pots"),
        ([*QUESTIONS, *SYSTEMS, "--metric", "logit_dif"], "logit_dif"),
        (["--clean", "one two", "--corrupt", "one two"], "needs answers="),
        (["--prompts", "a", *SYSTEMS, "--limit", "3"], "--limit draws pairs of --data"),
        ([*QUESTIONS, *SYSTEMS, "--limit", "0"], "limit = 0: expected at least one pair"),
    ],
)
def test_what_cannot_be_used_ends_in_one_line(words, said, tmp_path, capsys):
    assert cli.main(["patch", "--model", "tiny-liar", *words, "--out", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in line, line
    assert not (tmp_path / "out" / "report.html").exists()
