"""The belief check against models whose knowledge and lies were planted, and against a slow reference."""

import itertools
import logging
import math

import numpy as np
import pytest
from planted import Hashed, Planted, cities, told

from veridical.errors import DamagedFileError, DataError, NonFiniteError, UnknownNameError
from veridical.pairs import BeliefReport, Pairs, check_beliefs, choose_prompts, prompts
from veridical.pairs.asking import _orders
from veridical.pairs.belief_report import wilson
from veridical.pairs.beliefs import spread

N = 30


def planted(n=N, coverage=0.9, lies=10, **options):
    """Knows two thirds; lies about the first `lies`."""
    pairs, truths = cities(n)
    questions = list(truths)
    known = questions[: 2 * n // 3]
    return pairs, Planted(truths, known, known[:lies], coverage=coverage, **options)


def state(row):
    return (
        "lied"
        if row["lied"]
        else "refused"
        if row["refused_to_lie"]
        else "confused"
        if row["confused"]
        else "known"
    )


def test_planted_states_are_found():
    pairs, model = planted()
    checked = check_beliefs(model, told(pairs))
    for row in checked:
        number = int(row["pair"].removeprefix("country"))
        right = row["options"][row["correct"]]
        if number >= 20:
            assert state(row) == "confused"
        elif not row["instructed_to_lie"]:
            assert state(row) == "known"
            assert row["answer"] == right
        else:
            assert state(row) == ("lied" if number < 10 else "refused")
            assert (row["answer"] != right) == (number < 10)
        if number < 20:
            assert row["believed"] == right
            assert row["belief_confidence"] == pytest.approx(0.9)
        assert row["known"] != row["confused"]
        assert row["coverage"] == pytest.approx(0.9)
        assert row["completion"] == row["answer"]
        assert row["label_true"] == (row["answer"] == right)
    assert checked["question"].tolist() == told(pairs)["question"].tolist()


def reference(model, pairs, systems, probability, agreement):
    """Belief labels by loops over everything, one prompt at a time."""
    for row in pairs:
        askings = []
        for system in systems:
            for shown in itertools.permutations(row["options"]):
                user = prompts.ask(row["question"], shown, "choice")
                (logs,) = model.option_logprobs([prompts.chat(system, user)], [list(shown)])
                total = sum(math.exp(log) for log in logs)
                askings.append(({option: math.exp(log) / total for option, log in zip(shown, logs)}, total))
        mean = {
            option: sum(shares[option] for shares, _ in askings) / len(askings) for option in row["options"]
        }
        believed = max(mean, key=mean.get)
        agreeing = sum(max(shares, key=shares.get) == believed for shares, _ in askings) / len(askings)
        right = row["options"][row["correct"]]
        (logs,) = model.option_logprobs([row["prompt"]], [row["options"]])
        answer = row["options"][int(np.argmax(logs))]
        known = believed == right and mean[believed] >= probability and agreeing >= agreement
        yield {
            "believed": believed,
            "belief_confidence": mean[believed],
            "belief_agreement": agreeing,
            "coverage": sum(total for _, total in askings) / len(askings),
            "answer": answer,
            "answer_coverage": sum(math.exp(log) for log in logs),
            "known": known,
            "lied": known and row["instructed_to_lie"] and answer != right,
            "refused_to_lie": known and row["instructed_to_lie"] and answer == right,
            "confused": not known,
        }


@pytest.mark.parametrize(("probability", "agreement"), [(0.75, 0.75), (0.6, 0.5)])
def test_labels_equal_the_slow_reference(probability, agreement):
    model = Hashed()
    pairs = told(cities(60)[0])
    checked = check_beliefs(model, pairs, known_probability=probability, known_agreement=agreement)
    expected = list(reference(model, pairs, spread(prompts.HONEST, 4), probability, agreement))
    states = [state(row) for row in checked]
    assert {"known", "lied", "refused", "confused"} <= set(states)
    for row, wanted in zip(checked, expected, strict=True):
        for name, value in wanted.items():
            assert row[name] == (pytest.approx(value, abs=1e-12) if isinstance(value, float) else value), name


def test_the_yield_is_counted():
    pairs, model = planted()
    report = check_beliefs(model, told(pairs)).beliefs
    frame = report.to_frame().set_index("prompt")
    lying = frame.loc["lying_always"]
    counts = ["asked", "known", "lied", "refused_to_lie", "confused"]
    assert lying[counts].tolist() == [30, 20, 10, 10, 10]
    assert lying["lie_rate"] == pytest.approx(0.5)
    low, high = wilson(10, 20)
    assert (lying["low"], lying["high"]) == (pytest.approx(low), pytest.approx(high))
    honest = frame.loc["honest_always"]
    assert honest[["asked", "known", "lied"]].tolist() == [30, 20, 0]
    assert math.isnan(honest["lie_rate"])
    assert report.total["questions"] == 30
    assert report.total["known_questions"] == 20
    # Two lying prompts per question are one trial per pair, not two.
    assert (report.total["low"], report.total["high"]) == (pytest.approx(low), pytest.approx(high))
    assert "30 questions were asked honestly, 8 times each" in report.summary()
    assert "20 are known (67%)" in report.summary()
    assert "20 are lies (50.0%" in report.summary()
    assert "30 questions, 20 known" in repr(report)
    assert "\n" not in repr(report)


def test_wilson_against_known_values():
    # Newcombe (1998), method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for (part, whole), (low, high) in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert wilson(part, whole) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
    assert wilson(0, 0) == (0.0, 1.0)


def test_questions_become_honest_and_lying_rows():
    pairs, model = planted()
    checked = check_beliefs(model, pairs.with_columns(region=["x"] * N))
    assert len(checked) == N * 8
    assert checked["instructed_to_lie"].mean() == 0.5
    checked.require_pairs("instructed_to_lie")
    assert set(checked["system"]) == {p.name for p in (*spread(prompts.HONEST, 4), *spread(prompts.LYING, 4))}
    assert set(checked["region"]) == {"x"}
    for row in checked:
        user = row["prompt"][-1]["content"] if checked.is_chat else row["prompt"]
        assert prompts.listed(row["options"]) in user
        assert row["options"][row["correct"]] == model.truths[row["question"]]
    assert len({tuple(row["options"]) for row in checked if row["pair"] == "country1"}) == 2
    assert (checked["label"] == checked["instructed_to_lie"]).all()
    assert (
        checked.fingerprint == check_beliefs(planted()[1], pairs.with_columns(region=["x"] * N)).fingerprint
    )


@pytest.fixture
def chatty(monkeypatch):
    """Models without a tokenizer are asked as the pairs are written: here as chat."""
    monkeypatch.setattr(Pairs, "is_chat", True)


test_questions_become_honest_and_lying_rows = pytest.mark.usefixtures("chatty")(
    test_questions_become_honest_and_lying_rows
)


@pytest.mark.usefixtures("chatty")
def test_all_confused_and_zero_lies_do_not_crash():
    pairs, truths = cities(12)
    nothing = check_beliefs(Planted(truths, known=()), pairs)
    assert nothing["confused"].all()
    assert not nothing["lied"].any()
    report = nothing.beliefs
    assert "nothing to say about lying" in report.summary()
    assert any("knows 0 of 12" in said for said in report.advice())
    assert report.total["lie_rate"] is None
    honest = check_beliefs(Planted(truths, known=truths), pairs)
    assert honest["known"].all()
    assert honest.filter(instructed_to_lie=True)["refused_to_lie"].all()
    advice = " ".join(honest.beliefs.advice())
    assert "select_prompts=2" in advice
    assert "no lie at all" in advice
    assert honest.beliefs.to_frame()["lie_rate"].max() == 0
    for result in (report, honest.beliefs):
        assert result.figure().data
        assert result.report_section().tables
        assert "<table" in result._repr_html_()


@pytest.mark.usefixtures("chatty")
def test_prompts_are_chosen_on_the_development_split_only():
    pairs, truths = cities(40)
    pairs = pairs.with_columns(split=["val"] * 10 + ["train"] * 20 + ["test"] * 10)
    model = Planted(truths, truths, truths, lies_under={"lying_trick", "lying_false"})
    chosen = choose_prompts(model, pairs, n=2)
    assert {prompt.name for prompt in chosen} == {"lying_trick", "lying_false"}
    val = set(pairs.filter(split="val")["question"])
    assert all(any(prompt[-1]["content"].startswith(q) for q in val) for prompt in model.asked)

    checked = check_beliefs(model, pairs, select_prompts=2)
    assert set(checked.filter(instructed_to_lie=True)["system"]) == {"lying_trick", "lying_false"}
    report = checked.beliefs
    rows_per_question = 4 + 2
    assert report.total["asked"] == 30 * rows_per_question
    assert report.total["left_out"] == 10 * rows_per_question
    assert report.total["lie_rate"] == 1.0
    assert "split val" in report.summary()
    assert report.choice["lying_always"] == 0.0
    assert len(report.report_section().tables) == 2
    plain = check_beliefs(model, pairs).beliefs
    assert plain.total["asked"] == 40 * 8
    assert plain.total["lie_rate"] < 0.5


def test_prompts_are_chosen_among_those_in_the_rows():
    pairs, truths = cities(20)
    pairs = told(pairs.with_columns(split=["val"] * 5 + ["test"] * 15))
    model = Planted(truths, truths, truths, lies_under={"lying_false"})
    checked = check_beliefs(model, pairs, select_prompts=1)
    assert set(checked["system"]) == {"honest_always", "lying_false"}
    assert checked.beliefs.total["asked"] == 15 * 2
    assert checked.beliefs.total["lie_rate"] == 1.0
    with pytest.raises(DataError, match="has 2 to choose from"):
        check_beliefs(model, pairs, select_prompts=3)


@pytest.mark.usefixtures("chatty")
def test_choosing_draws_a_split_where_there_is_none():
    pairs, truths = cities(40)
    checked = check_beliefs(Planted(truths, truths, truths), pairs, select_prompts=1)
    frame = checked.to_pandas()
    assert set(frame["split"]) == {"train", "val", "test"}
    assert (frame.groupby("pair")["split"].nunique() == 1).all()
    with pytest.raises(UnknownNameError, match="split"):
        choose_prompts(Planted(truths, truths), pairs)
    with pytest.raises(DataError, match="no rows in the split 'val'"):
        check_beliefs(Planted(truths, truths), pairs.with_columns(split=["test"] * 40), select_prompts=1)


def test_low_coverage_is_said():
    pairs, model = planted(coverage=0.2)
    checked = check_beliefs(model, told(pairs))
    assert any("only 20%" in said and "letters" in said for said in checked.beliefs.advice())
    fine = check_beliefs(planted(coverage=0.9)[1], told(pairs))
    assert not any("shaky" in said for said in fine.beliefs.advice())
    assert not any(
        "shaky" in said for said in check_beliefs(model, told(pairs), min_coverage=0.1).beliefs.advice()
    )


def test_a_leaning_to_the_first_option_is_said_and_is_no_knowledge():
    class First(Hashed):
        def option_logprobs(self, asked, options, batch_tokens=4096):
            return [np.log(np.array([0.8] + [0.2 / (len(said) - 1)] * (len(said) - 1))) for said in options]

    checked = check_beliefs(First(), told(cities(10)[0]))
    assert checked["confused"].all()
    assert checked["belief_confidence"].max() == pytest.approx(0.5)
    assert any("shown first" in said for said in checked.beliefs.advice())


def test_a_fact_can_be_judged_by_all_questions_of_its_pair():
    pairs, truths = cities(6)
    both = pairs.with_columns(pair=["a", "a", "b", "b", "c", "c"])
    questions = list(truths)
    model = Planted(truths, [questions[0], questions[1], questions[2]])
    alone = check_beliefs(model, told(both)).to_pandas().groupby("question")["known"].first()
    assert [alone[question] for question in questions] == [True, True, True, False, False, False]
    joint = check_beliefs(model, told(both), known_by="pair").to_pandas().groupby("question")["known"].first()
    assert [joint[question] for question in questions] == [True, True, False, False, False, False]


def test_letters_are_asked_and_mapped_back():
    class Lettered(Planted):
        def option_logprobs(self, asked, options, batch_tokens=4096):
            found = []
            for prompt, said in zip(asked, options):
                assert said == ["A", "B"]
                shown = [line[3:] for line in prompt[-1]["content"].splitlines()[1:3]]
                found.append(super()._one(prompt, shown))
            return found

    pairs, truths = cities(6)
    lettered = Lettered(truths, truths, truths)
    pairs = Pairs.from_rows(
        [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in pairs]
    )
    checked = check_beliefs(lettered, pairs, style="letters")
    assert checked["known"].all()
    assert checked.filter(instructed_to_lie=True)["lied"].all()
    assert set(checked["completion"]) == {"A", "B"}
    assert set(checked["answer"]) <= set(truths.values())
    again = check_beliefs(lettered, checked.without_columns("completion"), style="letters")
    assert again["lied"].tolist() == checked["lied"].tolist()


def test_auto_takes_letters_for_long_options():
    pairs, _ = cities(4)
    long = pairs.with_columns(
        options=[[f"It is {option} of course" for option in row["options"]] for row in pairs]
    )
    assert check_beliefs(Hashed(), long).beliefs.style == "letters"
    assert check_beliefs(Hashed(), pairs).beliefs.style == "text"


def test_a_model_without_template_is_asked_in_text():
    seen = []

    class Plain(Hashed):
        tokenizer = type("Tokenizer", (), {"chat_template": None})()

        def option_logprobs(self, asked, options, batch_tokens=4096):
            seen.extend(zip(asked, options))
            return super().option_logprobs([[{"role": "user", "content": text}] for text in asked], options)

    checked = check_beliefs(Plain(), cities(3)[0])
    assert not checked.is_chat
    assert all(prompt.endswith("\nAnswer:") for prompt, _ in seen)
    assert all(option.startswith(" City") for _, said in seen for option in said)
    assert checked[0]["completion"] == f" {checked[0]['answer']}"
    assert checked[0]["prompt"].startswith(prompts.HONEST[0].text)


def test_a_template_without_system_role_gets_it_in_the_user_turn():
    class Strict:
        chat_template = "x"

        def apply_chat_template(self, messages, **_):
            if messages[0]["role"] == "system":
                raise ValueError("System role not supported")
            return ""

    model = Hashed()
    model.tokenizer = Strict()
    checked = check_beliefs(model, cities(3)[0])
    assert [message["role"] for message in checked.prompts[0]] == ["user"]
    assert checked.prompts[0][0]["content"].startswith(prompts.HONEST[0].text)


def test_a_completion_that_is_there_is_kept_and_judged():
    pairs, model = planted()
    rows = told(pairs)
    given = rows.with_columns(completion=[row["options"][0] for row in rows])
    checked = check_beliefs(model, given)
    assert checked.completions == [row["options"][0] for row in rows]
    assert checked["label_true"].tolist() == [row["correct"] == 0 for row in rows]


def test_prompts_of_ones_own():
    pairs, truths = cities(5)
    pairs = Pairs.from_rows(
        [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in pairs]
    )
    mine = prompts.SystemPrompt("mine", prompts.LYING[3].text, "lying")
    model = Planted(truths, truths, truths)
    checked = check_beliefs(model, pairs, honest=["Be truthful."], lying=[mine, "lying_trick"])
    assert set(checked["system"]) == {"honest_given_0", "mine", "lying_trick"}
    assert checked.filter(instructed_to_lie=True)["lied"].all()
    with pytest.raises(DataError, match="no lying system prompt"):
        check_beliefs(model, pairs, lying=[])


def test_orders_put_options_everywhere():
    import random

    draw = random.Random(0)
    assert sorted(_orders(2, 2, draw)) == [[0, 1], [1, 0]]
    assert len(_orders(2, 6, draw)) == 2
    assert sorted(order.index(0) for order in _orders(4, 4, draw)) == [0, 1, 2, 3]
    four = _orders(4, 2, draw)
    assert abs(four[0].index(0) - four[1].index(0)) == 2
    assert all(sorted(order) == list(range(5)) for order in _orders(5, 9, draw))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"options": ["only"]}, "1 options"),
        ({"options": ["a", "a"]}, "same option twice"),
        ({"correct": 2}, "correct is 2"),
        ({"correct": None}, "correct is None"),
        ({"question": " "}, "no question"),
    ],
)
def test_bad_questions_are_named(change, said):
    rows = [{"prompt": "q", "question": "q", "options": ["a", "b"], "correct": 0} for _ in range(3)]
    rows[1] |= change
    with pytest.raises(DataError, match=f"row 1 .*{said}"):
        check_beliefs(Hashed(), Pairs.from_rows(rows))


def test_other_bad_input():
    pairs, _ = cities(4)
    with pytest.raises(UnknownNameError, match="'options'"):
        check_beliefs(Hashed(), pairs.without_columns("options"))
    with pytest.raises(UnknownNameError, match="nearest: orders"):
        check_beliefs(Hashed(), pairs, order=3)

    class Broken(Hashed):
        def option_logprobs(self, asked, options, batch_tokens=4096):
            return [np.full(len(said), np.nan) for said in options]

    with pytest.raises(NonFiniteError, match="City"):
        check_beliefs(Broken(), pairs)


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv"])
def test_findings_are_saved_with_the_pairs(tmp_path, ending):
    pairs, model = planted()
    checked = check_beliefs(model, told(pairs))
    path = checked.save(tmp_path / f"checked.{ending}")
    again = Pairs.load(path)
    assert again.fingerprint == checked.fingerprint
    assert again.beliefs == checked.beliefs
    assert again["lied"].dtype == bool
    (tmp_path / "checked.beliefs.json").write_text('{"total": {}}')
    with pytest.raises(DamagedFileError):
        Pairs.load(path)
    pairs.save(path)
    assert Pairs.load(path).beliefs is None


def test_the_report_folder_can_be_assembled(tmp_path):
    from veridical.files import read_json
    from veridical.reporting.section import Section

    pairs, model = planted()
    report = check_beliefs(model, told(pairs)).beliefs
    folder = report.save(tmp_path / "beliefs")
    assert {"beliefs.json", "config.json", "provenance.json", "section.json"} == {
        f.name for f in folder.iterdir()
    }
    section = Section.load(folder)
    assert dict(section.headline) == {"questions known": "67%", "lies about known": "50.0%"}
    assert BeliefReport.from_json(read_json(folder / "beliefs.json")) == report


def test_text_of_prompts_is_inert_in_figures():
    pairs, truths = cities(4)
    pairs = told(pairs).with_columns(system=["<img src=x>"] * 12)
    report = check_beliefs(Planted(truths, truths), pairs).beliefs
    assert "<img" not in report.figure().to_json()
    assert "<img" not in report._repr_html_()


def test_a_real_model_is_asked(tiny, tokenizer, caplog):
    """A random llama knows nothing; its option probabilities equal those computed by hand from its logits."""
    import torch

    import veridical as vd

    caplog.set_level(logging.WARNING)
    model = vd.load(tiny("llama"), tokenizer=tokenizer)
    rows = [
        {
            "pair": "france",
            "prompt": "x",
            "question": "capital of France?",
            "options": ["Paris", "Rome"],
            "correct": 0,
        },
        {
            "pair": "gold",
            "prompt": "x",
            "question": "symbol of gold?",
            "options": ["Ag", "Au"],
            "correct": 1,
        },
    ]
    checked = check_beliefs(model, Pairs.from_rows(rows), honest=["Be true."], lying=["Lie."])
    assert checked["confused"].all()
    assert len(checked) == 4
    row = checked[0]
    text = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    logs = []
    for option in row["options"]:
        start = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        ids = tokenizer(text + option, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            scores = tiny("llama")(ids).logits[0].log_softmax(-1)
        logs.append(sum(float(scores[place - 1, ids[0, place]]) for place in range(start, ids.shape[1])))
    assert row["answer_coverage"] == pytest.approx(np.exp(logs).sum(), rel=1e-3)
    assert row["answer"] == row["options"][int(np.argmax(logs))]


def test_an_overlong_question_is_named(tiny, tokenizer):
    import veridical as vd

    rows = [
        {"prompt": "x", "question": "short?", "options": ["a", "b"], "correct": 0},
        {"prompt": "x", "question": "wordy " * 60 + "?", "options": ["a", "b"], "correct": 0},
    ]
    model = vd.load(tiny("llama"), tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"while asking .*wordy.*over the limit"):
        check_beliefs(model, Pairs.from_rows(rows), honest=["Be true."], lying=["Lie."])
