"""Rankings to preferences with ties and fails, and agreement between labellers against known values."""

import numpy as np
import pytest

from veridical.errors import DataError, InputError
from veridical.preference.guidelines import (
    HHH,
    Ranking,
    agreement,
    cohen,
    fleiss,
    load_criteria,
    preferences_from,
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
    assert cohen(np.ones((4, 2), int)) == 1


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
    with pytest.raises(DataError, match="no pair was judged by all"):
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
