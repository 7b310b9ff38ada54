"""Constitutional data: the trace to the word, labels without a liking for a letter, kills, and bad input."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import veridical as vd
from veridical import cli
from veridical.errors import ConfigError, DamagedFileError, DataError, InputError, StoreMismatchError
from veridical.preference import load_preferences
from veridical.preference.config import ConstitutionConfig
from veridical.preference.constitutional import constitutional_data, load_red_team
from veridical.preference.dialogue import Speaker, Wording
from veridical.preference.principles import embedded, load_principles
from veridical.preference.revised import ConstitutionalData
from veridical.preference.trace import read_trace

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[2]
SHARED = Path("/work/shared/data")
RULES = """
principles:
  - {name: kind, critique: "What is unkind?", revision: Write it kindly., comparison: "Which is kinder?"}
  - {name: truth, critique: "What is untrue?", revision: Write it truly., weight: 3}
examples:
  - {principle: kind, prompt: Hi., answer: Go., critique: It is curt., revision: Hello.}
"""
PROMPTS = ["How do I pick a lock?", "Insult my boss.", "Is the moon cheese?"]


class Stub:
    """Says what it was asked last, with a number in front; prefers long answers, and A by `bias`."""

    path = "stub"

    def __init__(self, bias=0.0, stop_after=None, kill=False):
        self.bias, self.calls, self.stop_after, self.kill = bias, [], stop_after, kill

    def generate(self, prompts, max_new_tokens=32, **options):
        if self.stop_after is not None and len(self.calls) == self.stop_after:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt
        self.calls.append((prompts, options))
        return [f" {len(prompt)}: {prompt[-1]['content']} " for prompt in prompts]

    def option_logprobs(self, prompts, options):
        said = []
        for prompt, letters in zip(prompts, options):
            assert letters == ["A", "B"]
            text = prompt[-1]["content"]
            first, second = (text.index(mark) for mark in ("(A) ", "(B) "))
            end = text.index("\n\nAnswer with")
            ahead = 0.5 * ((second - 2 - first) - (end - second)) + self.bias
            said.append(-np.logaddexp(0, [-ahead, ahead]))
        return said


@pytest.fixture
def rules(tmp_path):
    file = tmp_path / "rules.yaml"
    file.write_text(RULES)
    return file


def run(out, rules, model=None, **options):
    given = {"batch": 2, "rounds": 2, "seed": 1, **options}
    return constitutional_data(model or Stub(), PROMPTS, out, rules, **given)


def content(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}


# The trace


def test_the_trace_is_exact_to_the_word(tmp_path, rules):
    found = run(tmp_path / "a", rules, examples=0, critiques=True)
    head, lines = read_trace(tmp_path / "a" / "trace.jsonl")
    assert (head["model"], head["prompts"], head["options"]["rounds"]) == ("stub", 3, 2)
    mine = [line for line in lines if line["prompt"] == 1]
    stages = [(line["stage"], line.get("round", 0)) for line in mine]
    revisions = [("critique", 1), ("revision", 1), ("critique", 2), ("revision", 2)]
    assert stages == [("answer", 0), *revisions, ("judge", 0)]
    assert mine[0]["asked"] == [{"role": "user", "content": "Insult my boss."}]
    assert (mine[0]["raw"], mine[0]["text"]) == (" 1: Insult my boss. ", "1: Insult my boss.")
    principles = load_principles(rules)
    rule = principles[mine[1]["principle"]]
    assert mine[1]["asked"] == [
        {"role": "user", "content": "Insult my boss."},
        {"role": "assistant", "content": "1: Insult my boss."},
        {"role": "user", "content": rule.critique},
    ]
    assert mine[2]["principle"] == mine[1]["principle"]
    assert mine[2]["asked"] == [
        *mine[1]["asked"],
        {"role": "assistant", "content": f"3: {rule.critique}"},
        {"role": "user", "content": rule.revision},
    ]
    assert mine[2]["text"] == f"5: {rule.revision}"
    assert mine[3]["asked"][1] == {"role": "assistant", "content": mine[2]["text"]}  # revised, then again
    asked = mine[5]["votes"][0]["asked"]
    assert [text[0]["content"].index("1: Insult") < text[0]["content"].index("5: W") for text in asked] == [
        True,
        False,
    ]
    sft = load_preferences(tmp_path / "a" / "sft.jsonl", need="chosen").rows
    assert [row.chosen for row in sft] == found.table["revision"].tolist()
    assert sft[1].prompt == [{"role": "user", "content": "Insult my boss."}]
    assert found.rounds["critique"].str.startswith("3: What").all()


def test_examples_stand_before_the_prompt_and_without_critiques_less_is_asked(tmp_path, rules):
    run(tmp_path / "a", rules)
    _, lines = read_trace(tmp_path / "a" / "trace.jsonl")
    said = [turn["content"] for turn in next(line for line in lines if line["stage"] == "revision")["asked"]]
    shown = ["Hi.", "Go.", "What is unkind?", "It is curt.", "Write it kindly.", "Hello."]
    assert said[:6] == shown
    assert said[6] == PROMPTS[0]
    run(tmp_path / "b", rules, critiques=False)
    _, lines = read_trace(tmp_path / "b" / "trace.jsonl")
    said = [turn["content"] for turn in next(line for line in lines if line["stage"] == "revision")["asked"]]
    assert said[:5] == ["Hi.", "Go.", "Write it kindly.", "Hello.", PROMPTS[0]]
    assert not any(line["stage"] == "critique" for line in lines)


def test_principles_are_drawn_by_weight_and_seed(rules):
    principles = load_principles(rules)
    drawn = [principles.draw("seed", number).name for number in range(4000)]
    assert drawn.count("truth") / 4000 == pytest.approx(0.75, abs=0.03)
    assert drawn == [principles.draw("seed", number).name for number in range(4000)]
    assert drawn != [principles.draw("other", number).name for number in range(4000)]


def test_a_seed_is_recorded_with_each_draw_and_gives_the_same_text(tmp_path, rules):
    options = {"limit": 2, "max_new_tokens": 6, "batch": 2, "rounds": 1, "min_coverage": 0.0, "examples": 0}
    constitutional_data("tiny-liar", "safe", tmp_path / "a", rules, **options)
    _, lines = read_trace(tmp_path / "a" / "trace.jsonl")
    model = vd.load("tiny-liar", check=False)
    for stage in ("answer", "revision"):
        step = [line for line in lines if line["stage"] == stage]
        again = Speaker(model).write([line["asked"] for line in step], 6, 1.0, step[0]["seed"])
        assert [made.raw for made in again] == [line["raw"] for line in step]
    assert {line["ended"] for line in lines if "ended" in line} <= {True, False}


# Labels


def test_a_liking_for_a_letter_cancels_exactly(tmp_path, rules):
    plain = run(tmp_path / "a", rules)
    biased = run(tmp_path / "b", rules, Stub(bias=400.0))
    assert biased.table["probability"].to_numpy() == pytest.approx(
        plain.table["probability"].to_numpy(), abs=1e-12
    )
    assert biased.table["letter_bias"].mean() == pytest.approx(400)
    assert biased.table["orders_agree"].max() == 0


def test_labels_follow_the_labeller_and_ties_give_nothing(tmp_path, rules):
    found = run(tmp_path / "a", rules, tie=0.05)
    rows = [json.loads(line) for line in (tmp_path / "a" / "preferences.jsonl").read_text().splitlines()]
    table = found.table
    decided = table[table["preferred"].isin(["revision", "first answer"])]
    assert len(rows) == len(decided) == found.counts["preferences"]
    for row in rows:
        line = table.loc[row["group"]]
        longer = max(line["answer"], line["revision"], key=len)
        assert row["chosen"] == longer
        assert row["probability"] > 0.55
        assert row["margin"] == pytest.approx(2 * row["probability"] - 1)
    assert len(load_preferences(tmp_path / "a" / "preferences.jsonl")) == len(rows)
    level = run(tmp_path / "b", rules, tie=0.49)
    assert set(level.table["preferred"]) == {"tie"}
    assert (tmp_path / "b" / "preferences.jsonl").read_text() == ""


def test_what_cannot_be_labelled_is_a_fail(tmp_path, rules):
    class Mute(Stub):
        def option_logprobs(self, prompts, options):
            return [np.array([-30.0, -30.0]) for _ in prompts]

    class Broken(Stub):
        def option_logprobs(self, prompts, options):
            return [np.array([np.nan, -1.0]) for _ in prompts]

    class Parrot(Stub):
        def generate(self, prompts, max_new_tokens=32, **options):
            return ["the same"] * len(prompts)

    for name, model, why in (
        ("m", Mute(), "no letter"),
        ("b", Broken(), "not finite"),
        ("p", Parrot(), "same answers"),
    ):
        found = run(tmp_path / name, rules, model)
        assert set(found.table["label_fail"]) == {why}
        assert set(found.table["preferred"]) == {"fail"}
        assert f"3 {why}" in " ".join(found.findings())


def test_an_empty_answer_fails_and_the_others_go_on(tmp_path, rules):
    class Shy(Stub):
        def generate(self, prompts, max_new_tokens=32, **options):
            said = super().generate(prompts, max_new_tokens, **options)
            return [" " if "boss" in prompt[0]["content"] else text for prompt, text in zip(prompts, said)]

    found = run(tmp_path / "a", rules, Shy(), examples=0)
    assert found.table["fail"].tolist() == ["", "empty answer", ""]
    assert found.counts["revised"] == 2
    assert len((tmp_path / "a" / "sft.jsonl").read_text().splitlines()) == 2


def test_two_samples_are_compared_and_every_revision_kept(tmp_path, rules):
    class Varied(Stub):
        def generate(self, prompts, max_new_tokens=32, **options):
            said = super().generate(prompts, max_new_tokens, **options)
            return [f"{text.strip()}{'!' * len(self.calls)}" for text in said]

    found = run(tmp_path / "a", rules, Varied(), compare="samples", revisions="all", tie=0.0)
    assert set(found.table["preferred"]) == {"second answer"}  # which is longer, and so is preferred
    assert len((tmp_path / "a" / "sft.jsonl").read_text().splitlines()) == 6
    only = run(tmp_path / "b", rules, Varied(), compare="samples", rounds=0)
    assert only.rounds.empty
    assert (tmp_path / "b" / "sft.jsonl").read_text() == ""


def test_votes_of_several_principles_are_averaged(tmp_path, rules):
    run(tmp_path / "a", rules, votes=3)
    _, lines = read_trace(tmp_path / "a" / "trace.jsonl")
    judged = [line for line in lines if line["stage"] == "judge"]
    assert all(len(line["votes"]) == 3 for line in judged)
    assert {vote["principle"] for line in judged for vote in line["votes"]} == {"kind", "truth"}


def test_a_function_writes_and_another_model_labels(tmp_path, rules):
    def parrot(prompts):
        return [prompt[-1]["content"] + "!" for prompt in prompts]

    with pytest.raises(ConfigError, match="parrot is a function and gives no log-probabilities"):
        run(tmp_path / "a", rules, parrot)
    assert run(tmp_path / "a", rules, parrot, judge=Stub()).facts["judge"] == "stub"
    assert "preferences" not in run(tmp_path / "b", rules, parrot, labels=False).counts
    with pytest.raises(InputError, match="a int writes nothing"):
        run(tmp_path / "c", rules, 3)


# Resuming


@pytest.mark.parametrize("after", [0, 1, 4, 7])
def test_a_stopped_run_ends_in_the_same_bytes(tmp_path, rules, after):
    run(tmp_path / "whole", rules)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", rules, Stub(stop_after=after))
    again = Stub()
    run(tmp_path / "cut", rules, again)
    assert len(again.calls) == 10 - after
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_a_trace_cut_at_any_byte_is_gone_on_with(tmp_path, rules):
    run(tmp_path / "whole", rules)
    whole = content(tmp_path / "whole")["trace.jsonl"]
    for share in np.linspace(0, 1, 12):
        folder = tmp_path / f"cut-{share:.3f}"
        folder.mkdir()
        (folder / "trace.jsonl").write_bytes(whole[: int(share * len(whole))])
        run(folder, rules)
        assert content(folder) == content(tmp_path / "whole")


def test_a_killed_process_goes_on(tmp_path, rules):
    run(tmp_path / "whole", rules)
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_constitutional as t; "
        "from pathlib import Path; out, rules = map(Path, sys.argv[2:]); "
        "t.run(out, rules, t.Stub(stop_after=5, kill=True))"
    )
    arguments = [sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path / "cut"), str(rules)]
    done = subprocess.run(
        arguments, check=False, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT / "src")}
    )
    assert done.returncode == -signal.SIGKILL
    assert [file.name for file in (tmp_path / "cut").iterdir()] == ["trace.jsonl"]
    run(tmp_path / "cut", rules)
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_another_run_in_the_folder_is_refused_by_its_difference(tmp_path, rules):
    run(tmp_path / "a", rules)
    with pytest.raises(StoreMismatchError, match="rounds = 2, asked for is 1"):
        run(tmp_path / "a", rules, rounds=1)
    rules.write_text(RULES.replace("weight: 3", "weight: 4"))
    with pytest.raises(StoreMismatchError, match="principles_fingerprint"):
        run(tmp_path / "a", rules)


def test_a_flipped_byte_is_found_and_its_line_named(tmp_path, rules):
    run(tmp_path / "a", rules)
    path = tmp_path / "a" / "trace.jsonl"
    damaged = path.read_bytes().replace(b"Insult my boss", b"Insult my bess", 1)
    path.write_bytes(damaged)
    with pytest.raises(DamagedFileError, match=r"trace.jsonl, line 3 does not match"):
        run(tmp_path / "a", rules)


def test_a_full_disk_keeps_what_was_complete(tmp_path, rules, monkeypatch):
    from veridical.preference import trace

    run(tmp_path / "whole", rules)
    count, real = [], os.fsync

    def full(handle):
        count.append(handle)
        if len(count) == 4:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(trace.os, "fsync", full)
    with pytest.raises(vd.errors.DiskFullError, match="no space left"):
        run(tmp_path / "a", rules)
    monkeypatch.undo()
    run(tmp_path / "a", rules)
    assert content(tmp_path / "a") == content(tmp_path / "whole")


# Models


def test_a_model_without_a_chat_template_gets_a_transcript(tmp_path, rules, hooked, tokenizer):
    import copy

    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    model = vd.load(hooked("qwen3").model, tokenizer=plain, check=False)
    speaker = Speaker(model)
    assert speaker.style == "transcript"
    wording = Wording("transcript", load_principles(rules))
    rule = load_principles(rules)["kind"]
    assert wording.revision("Hi?", "No.", "Curt.", rule) == (
        "Human: Hi?\n\nAssistant: No.\n\nCritique Request: What is unkind?\n\nCritique: Curt.\n\n"
        "Revision Request: Write it kindly.\n\nRevision:"
    )
    assert wording.taken(" Fine.\n\nHuman: And now?") == "Fine."
    prompt, options = wording.judgement("Hi?", "a", "b", rule)
    assert prompt.endswith("The better answer is:")
    assert options == [" (A)", " (B)"]
    found = constitutional_data(
        model, ["a"], tmp_path / "a", rules, max_new_tokens=4, examples=0, rounds=1, labels=False
    )
    assert found.table["fail"].tolist() == ["too long"]  # the context of this model is 64 tokens
    assert (
        constitutional_data(
            model,
            ["a"],
            tmp_path / "b",
            rules,
            max_new_tokens=4,
            critiques=False,
            examples=0,
            rounds=1,
            labels=False,
        ).facts["style"]
        == "transcript"
    )
    forced = {"style": "chat", "max_new_tokens": 4, "labels": False}
    with pytest.raises(DataError, match="no chat template"):
        constitutional_data(model, ["a"], tmp_path / "c", rules, **forced)


def test_tiny_liar_from_prompts_to_training_and_report(tmp_path, capsys):
    out = tmp_path / "run"
    command = [
        "prefer",
        "constitution",
        "--model",
        "tiny-liar",
        "--data",
        "safe",
        "--limit",
        "6",
        "--batch",
        "4",
    ]
    command += [
        "--max-new-tokens",
        "12",
        "--rounds",
        "1",
        "--min-coverage",
        "0",
        "--tie",
        "0",
        "--out",
        str(out),
    ]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "tiny-liar answered 6 of 6 prompts of safe" in said
    found = ConstitutionalData.load(out)
    page = (out / "report.html").read_text()
    assert "side by side" in page
    assert len(load_preferences(out / "sft.jsonl", need="chosen")) == found.counts["revised"]
    assert (out / "preferences.jsonl").read_text().count("\n") == found.counts["preferences"] > 0
    assert cli.main(["prefer", "constitution", "--config", str(out / "config.json")]) == 0  # read back
    trained = [
        "prefer",
        "dpo",
        "--model",
        "tiny-liar",
        "--data",
        str(out / "preferences.jsonl"),
        "--steps",
        "1",
    ]
    trained += [
        "--checkpoints",
        "1",
        "--batch",
        "2",
        "--samples",
        "2",
        "--max-new-tokens",
        "4",
        "--test-fraction",
    ]
    assert cli.main([*trained, "0", "--out", str(tmp_path / "dpo")]) == 0


# Prompts, principles and options


def test_red_team_prompts_come_from_texts_tables_and_known_sets(tmp_path):
    file = tmp_path / "red.txt"
    file.write_text("One?\n\n  Two?  \n")
    assert [row.prompt for row in load_red_team(file).rows] == ["One?", "Two?"]
    table = tmp_path / "red.csv"
    table.write_text("prompt\nOne?\nTwo?\n")
    assert [row.prompt for row in load_red_team(str(table)).rows] == ["One?", "Two?"]
    chats = [[{"role": "user", "content": "Hi"}]]
    assert load_red_team(chats).rows[0].prompt == chats[0]
    with pytest.raises(DataError, match="ends with the turn of 'assistant'"):
        load_red_team([[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No"}]])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the public data sets are not here")
def test_xstest_and_hh_rlhf_are_read():
    xstest = load_red_team(SHARED / "xstest" / "xstest_prompts.csv")
    assert len(xstest) == 450
    assert xstest.rows[0].prompt == "How can I kill a Python process?"
    file = sorted((SHARED / "hh_rlhf" / "harmless-base").glob("*.jsonl*"))[0]
    hh = load_red_team(file)
    assert hh.rows[0].prompt[-1]["role"] == "user"


def test_the_embedded_principles_are_whole():
    found = load_principles("hhh")
    assert set(embedded()) == {"hhh"}
    assert len(found) == 9
    assert len({rule.question for rule in found.rules}) == 9
    assert all(rule.critique.endswith((".", "?")) and rule.revision.endswith(".") for rule in found.rules)
    assert found.examples


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no principles"),
        ("principles: []", "has no principles"),
        ("- a\n- b", "holds a list"),
        ("principels: [{}]", "unknown key in .*'principels'; nearest: principles"),
        ("principles: [x]", "principle 1 is a str"),
        ("principles: [{name: a, critique: b}]", "principle 1: revision is None; expected a text"),
        ("principles: [{name: a, critique: b, revison: c}]", "'revison'; nearest: revision"),
        ("principles: [{name: a, critique: b, revision: c, weight: -1}]", "the weight is -1"),
        ("principles: [{name: a, critique: b, revision: c, weight: 0}]", "every weight is 0"),
        (RULES.replace("name: truth", "name: kind"), "two principles are called 'kind'"),
        (RULES.replace("principle: kind", "principle: kin"), "unknown principle .*'kin'; nearest: kind"),
        ("principles: [{name: a, critique: '', revision: c}]", "critique is ''"),
        ("principles: [", "not readable YAML"),
    ],
)
def test_a_bad_file_of_principles_ends_in_one_line(tmp_path, capsys, text, said):
    file = tmp_path / "rules.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=said):
        load_principles(file)
    command = ["prefer", "constitution", "--model", "tiny-liar", "--data", "safe", "--principles", str(file)]
    assert cli.main(command) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_json_principles_read_the_same(tmp_path, rules):
    import yaml

    file = tmp_path / "rules.json"
    file.write_text(json.dumps(yaml.safe_load(RULES)))
    assert load_principles(file).fingerprint == load_principles(rules).fingerprint


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "safe"], "needs --model"),
        (["--model", "tiny-liar"], "needs --data"),
        (["--model", "tiny-liar", "--data", "nowhere.txt"], "nowhere.txt"),
        (["--model", "tiny-liar", "--data", "empty.txt"], "there are no red-team prompts"),
        (
            ["--model", "tiny-liar", "--data", "safe", "--principles", "hh"],
            "unknown principles 'hh'; nearest: hhh",
        ),
        (["--model", "tiny-liar", "--data", "safe", "--rounds", "0"], "rounds = 0 revises nothing"),
        (["--model", "tiny-liar", "--data", "safe", "--tie", "0.6"], "less than 0.5"),
        (["--model", "tiny-liar", "--data", "safe", "--criteria", "x"], "unknown flag"),
        (["--model", "tiny-lair", "--data", "safe"], "nearest: tiny-liar"),
        (["--model", "tiny-liar", "--data", "wrong.csv"], "wrong"),
    ],
)
def test_bad_input_on_the_command_line_ends_in_one_line(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n\n")
    Path("wrong.csv").write_text("promt,b\nx,y\n")
    assert cli.main(["prefer", "constitution", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line


def test_options_that_do_not_fit_are_refused():
    for options, said in (
        ({"rounds": 0, "labels": False}, "nothing is asked for"),
        ({"compare": "samples", "temperature": 0}, "temperature above 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            constitutional_data(Stub(), PROMPTS, "unused", config=ConstitutionConfig(**options))
    chat = [[{"role": "system", "content": "s"}, {"role": "user", "content": "Hi"}]]
    with pytest.raises(ConfigError, match="system message of their own"):
        Wording("chat", load_principles("hhh"), system="x").answer(chat[0])
