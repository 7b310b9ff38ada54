"""Rankings to preferences with ties and fails, and agreement between labellers against known values."""

import json

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from veridical import cli
from veridical.errors import DataError, InputError
from veridical.preference import load_preferences
from veridical.preference.agreement import Agreement, agreement, cohen, fleiss, krippendorff
from veridical.preference.guidelines import (
    HHH,
    Ranking,
    load_criteria,
    load_rankings,
    preferences_from,
    votes,
)


def ranking(ranks, labeller="a", criterion="honest", prompt="Q", completions=("x", "y", "z")):
    return Ranking(prompt, completions, ranks, labeller, criterion)


def pairs(preferences):
    return {(row.chosen, row.rejected): row.margin for row in preferences.rows}


def test_ties_say_nothing_and_fails_lose():
    assert pairs(preferences_from([ranking((1, 2, 2))])) == {("x", "y"): 1.0, ("x", "z"): 1.0}
    assert pairs(preferences_from([ranking((1, None, 2))])) == {
        ("x", "y"): 1.0,
        ("x", "z"): 1.0,
        ("z", "y"): 1.0,
    }
    assert pairs(preferences_from([ranking((3, None, None))])) == {("x", "y"): 1.0, ("x", "z"): 1.0}
    with pytest.raises(DataError, match="every pair is a tie or a fail"):
        preferences_from([ranking((None, None, None)), ranking((1, 1, 1), "b")])


def test_labellers_vote_and_the_margin_is_their_lead():
    rankings = [ranking((1, 2, 3), "a"), ranking((1, 2, 2), "b"), ranking((2, 1, 3), "c")]
    found = pairs(preferences_from(rankings))
    assert found[("x", "y")] == pytest.approx(1 / 3)
    assert found[("y", "z")] == pytest.approx(2 / 3)
    assert found[("x", "z")] == 1
    level = [ranking((1, 2, 3), "a"), ranking((2, 1, 3), "b")]
    assert ("x", "y") not in pairs(preferences_from(level))


def test_weights_decide_between_criteria(tmp_path):
    file = tmp_path / "criteria.yaml"
    file.write_text('honest: {question: "Which is true?", weight: 3}\nhelpful: Which helps?\n')
    criteria = load_criteria(file)
    assert [criterion.weight for criterion in criteria] == [3, 1]
    split = [ranking((1, 2, 3), criterion="honest"), ranking((3, 2, 1), criterion="helpful")]
    assert pairs(preferences_from(split, criteria)) == dict.fromkeys(
        [("x", "y"), ("x", "z"), ("y", "z")], 0.5
    )
    with pytest.raises(DataError, match="every pair"):
        preferences_from(split)
    with pytest.raises(InputError, match="nearest: harmless"):
        preferences_from([ranking((1, 2, 3), criterion="harmles")])
    assert [criterion.name for criterion in HHH] == ["helpful", "honest", "harmless"]


def test_groups_keep_a_prompt_on_one_side():
    rankings = [ranking((1, 2, 3), prompt=f"Q{n}") for n in range(10)]
    train, test = preferences_from(rankings).parted(0.3, 0)
    assert len(test) == 9
    assert not {row.group for row in train.rows} & {row.group for row in test.rows}


def test_fleiss_equals_the_published_example():
    # Fleiss 1971, the table of ten subjects, fourteen raters and five categories: kappa 0.210.
    counts = [
        (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
        (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
    ]  # fmt: skip
    verdicts = np.array([np.repeat(np.arange(5), row) for row in counts])
    assert fleiss(verdicts) == pytest.approx(0.210, abs=5e-4)


def test_cohen_by_hand():
    verdicts = np.array([(1, 1)] * 20 + [(1, -1)] * 5 + [(-1, 1)] * 10 + [(-1, -1)] * 15)
    assert cohen(verdicts) == pytest.approx(0.4)
    for draw in range(5):
        random = np.random.default_rng(draw).integers(-1, 2, (30, 2))
        assert cohen(random) == pytest.approx(cohen_kappa_score(random[:, 0], random[:, 1]))
    assert cohen(np.ones((4, 2), int)) == 1


def test_krippendorff_equals_the_published_example():
    # Krippendorff 2011, "Computing Krippendorff's alpha-reliability", section C: four observers, twelve
    # units, missing values; nominal alpha 0.743.
    nan = np.nan
    observers = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, nan, nan, nan],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, nan, 3],
        [nan, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, nan],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, nan],
    ]
    assert krippendorff(np.array(observers, dtype=float).T) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff(np.ones((4, 3))) == 1


def test_intervals_hold_the_truth_and_narrow_with_more_prompts():
    # Two labellers who copy one another in 7 of 10 verdicts and else draw: kappa and alpha are 0.7.
    widths, held = {}, 0
    for prompts in (40, 160):
        widths[prompts] = []
        for draw in range(10):
            random = np.random.default_rng(100 * prompts + draw)
            rankings = []
            for number in range(prompts):
                first = int(random.integers(2))
                second = first if random.random() < 0.7 else int(random.integers(2))
                for name, said in (("a", first), ("b", second)):
                    ranks = (1, 2) if said else (2, 1)
                    rankings.append(ranking(ranks, name, prompt=f"Q{number}", completions=("x", "y")))
            line = agreement(rankings, seed=draw, resamples=200).to_frame().iloc[0]
            held += line["low"] <= 0.7 <= line["high"]
            widths[prompts].append(line["high"] - line["low"])
            assert line["alpha"] == pytest.approx(line["kappa"], abs=0.05)
    assert held >= 17
    assert np.mean(widths[160]) < 0.65 * np.mean(widths[40])


def test_alpha_takes_what_kappa_cannot():
    rankings = [
        ranking((1, 2, 3), a, prompt=f"Q{n}") for n, pair in enumerate(("ab", "bc", "ac")) for a in pair
    ]
    line = agreement(rankings).to_frame().iloc[0]
    assert np.isnan(line["kappa"])
    assert (line["alpha"], line["pairs"], line["shared"], line["labellers"]) == (1, 0, 9, 3)
    pairs_of = agreement(rankings).pairwise
    assert pairs_of[["one", "other", "pairs"]].to_numpy().tolist() == [
        ["a", "b", 3],
        ["a", "c", 3],
        ["b", "c", 3],
    ]


def test_agreement_is_saved_and_shown(tmp_path):
    found = agreement([ranking((1, 2, 3), "a"), ranking((1, 3, 2), "b")])
    found.save(tmp_path)
    again = Agreement.load(tmp_path)
    assert again.to_frame().equals(found.to_frame())
    assert "Krippendorff's alpha" in again.report_section().text


def test_votes_say_why_there_is_no_preference():
    rankings = [ranking((1, 1, None), "a"), ranking((1, 1, None), "b"), ranking((1, 2, 1), "c", prompt="R")]
    rankings += [ranking((2, 1, 3), "d", prompt="R"), ranking((1, None, None), "e", prompt="S")]
    outcome = {(line.prompt, line.one, line.other): line.outcome for line in votes(rankings).itertuples()}
    assert outcome["Q", "x", "y"] == "tie"
    assert outcome["Q", "x", "z"] == "preferred"
    assert outcome["R", "x", "y"] == "level"
    assert outcome["S", "y", "z"] == "fail"


def test_rankings_are_read_from_rows_of_either_kind(tmp_path):
    wide = tmp_path / "wide.jsonl"
    rows = [{"prompt": "Q", "completions": ["x", "y", "z"], "ranks": [1, None, 2], "labeller": "a"}]
    wide.write_text("".join(json.dumps(row) + "\n" for row in rows))
    long = tmp_path / "long.csv"
    long.write_text("prompt,completion,rank,labeller\nQ,x,1,a\nQ,y,fail,a\nQ,z,2,a\n")
    empty = tmp_path / "empty.csv"
    empty.write_text("prompt,completion,rank,labeller\nQ,x,1,a\nQ,y,,a\nQ,z,2,a\n")
    listed = tmp_path / "listed.csv"
    listed.write_text('prompt,completions,ranks,labeller\nQ,"[""x"",""y"",""z""]","[1,null,2]",a\n')
    expected = load_rankings(wide)
    assert expected[0].ranks == (1, None, 2)
    for file in (long, empty, listed):
        assert load_rankings(file) == expected


def test_the_job_writes_preferences_agreement_and_a_report(tmp_path, capsys):
    file = tmp_path / "ranked.jsonl"
    said = [("a", [1, 2, 3]), ("b", [1, 3, 2])]
    rows = [
        {
            "prompt": f"Q{n}",
            "completions": ["x", "y", "z"],
            "ranks": ranks,
            "labeller": name,
            "criterion": "honest",
        }
        for n in range(4)
        for name, ranks in said
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    assert cli.main(["prefer", "guidelines", "--data", str(file), "--out", str(out)]) == 0
    assert "Krippendorff's alpha" in capsys.readouterr().out
    made = load_preferences(out / "preferences.jsonl")
    assert len(made) == 8
    assert {row.margin for row in made.rows} == {1.0}
    assert json.loads((out / "metrics.json").read_text()) == {"pairs": 12, "preferred": 8, "level": 4}
    assert "Agreement between labellers" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no rows"),
        ('{"promt": "Q", "completions": ["x"], "ranks": [1]}', "'prompt'; nearest: promt"),
        ('{"prompt": "Q", "completion": "x"}', "unknown column 'rank'"),
        ('{"prompt": "Q", "completions": ["x", "y"], "ranks": [1]}', "ranking 0: 2 completions and 1 ranks"),
        ('{"prompt": "Q", "completions": ["x", "y"], "ranks": ["best", 2]}', "a rank is 'best'"),
        ('{"prompt": "Q", "completions": ["x", "x"], "ranks": [1, 2]}', "stands twice"),
        ('{"prompt": "Q", "completions": ["x", "y"], "ranks": [1, 1]}', "every pair is a tie"),
        ('{"prompt": "", "completions": ["x", "y"], "ranks": [1, 2]}', "the prompt is ''"),
        (
            '{"prompt": "Q", "completions": ["x", "y"], "ranks": [1, 2], "criterion": "harmles"}',
            "nearest: harmless",
        ),
    ],
)
def test_bad_files_of_rankings_end_in_one_line(tmp_path, capsys, content, said):
    file = tmp_path / "ranked.jsonl"
    file.write_text(content + "\n")
    assert cli.main(["prefer", "guidelines", "--data", str(file), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line


def test_bad_criteria_end_in_one_line(tmp_path):
    file = tmp_path / "criteria.yaml"
    for text, said in (
        ("honest: {question: a, weight: heavy}", "the weight of honest is 'heavy'"),
        ("honest: {qestion: a}", "honest needs a question"),
        ("honest: {question: a, wight: 2}", "nearest: weight"),
        ("", "holds no criteria"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=said):
            load_criteria(file)


def test_agreement_names_its_statistic():
    two = agreement([ranking((1, 2, 3), "a"), ranking((1, 2, 3), "b")]).to_frame().iloc[0]
    assert (two["kappa"], two["statistic"], two["pairs"]) == (1, "Cohen", 3)
    three = agreement(
        [ranking((1, 2, 3), name) for name in "abc"] + [ranking((3, 2, 1), n, "helpful") for n in "abc"]
    )
    assert three.to_frame()["statistic"].tolist() == ["Fleiss", "Fleiss"]
    random = np.random.default_rng(0)
    chance = [
        ranking(tuple(int(rank) for rank in random.permutation(3) + 1), name, prompt=f"Q{n}")
        for n in range(300)
        for name in "ab"
    ]
    assert abs(agreement(chance).to_frame()["kappa"][0]) < 0.1
    with pytest.raises(DataError, match="agreement needs two"):
        agreement([ranking((1, 2, 3))])
    with pytest.raises(DataError, match="twice"):
        agreement([ranking((1, 2, 3)), ranking((1, 2, 3))])
    with pytest.raises(DataError, match="no pair was judged by two"):
        agreement([ranking((1, 2, 3), "a", prompt="Q"), ranking((1, 2, 3), "b", prompt="R")])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"ranks": (1, 2)}, "3 completions and 2 ranks"),
        ({"ranks": (0, 1, 2)}, "a rank is 0"),
        ({"ranks": (1, 2, "3")}, "a rank is '3'"),
        ({"ranks": (1, 2, 3), "completions": ("x", "x", "y")}, "stands twice"),
    ],
)
def test_bad_rankings_end_in_one_line(arguments, said):
    with pytest.raises(DataError, match=said):
        ranking(**arguments)
