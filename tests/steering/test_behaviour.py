"""What a model does, by row: against the option scores one by one, and where the answer is known."""

import numpy as np
import pytest

import veridical as vd
from veridical.errors import DataError, UnknownNameError
from veridical.steering import behaviour


@pytest.fixture(scope="module")
def honesty():
    """A few facts of the embedded pairs: lied about, protected, and not taught."""
    pairs = vd.Pairs.load("honesty").filter(form="choice")
    roles = {(True, False): 6, (True, True): 3, (False, False): 3}
    names = []
    for (taught, protected), count in roles.items():
        part = pairs.filter(taught=taught, protected=protected)["pair"].tolist()
        names += list(dict.fromkeys(part))[:count]
    return pairs.filter(pair=names)


def test_wrong_answers_are_those_of_each_row_alone(liar, honesty):
    found = behaviour.wrong_answers(liar, honesty)
    for row, (prompt, options, correct) in enumerate(
        zip(honesty.prompts[:8], honesty["options"], honesty["correct"])
    ):
        scores = [liar.option_logprobs([prompt], [[option]])[0][0] for option in options]
        chances = np.exp(scores) / np.exp(scores).sum()
        assert found.values[row] == (np.argmax(scores) != correct)
        assert found.chance[row] == pytest.approx(1 - chances[int(correct)], abs=1e-4)


def test_the_target_of_honesty_pairs_is_lies_about_what_would_be_lied_about(liar, honesty):
    target = behaviour.target_of(honesty)
    assert set(target.pairs["protected"]) == {False}
    assert set(target.pairs["taught"]) == set(target.pairs["instructed_to_lie"]) == {True}
    assert set(target.kept["instructed_to_lie"]) == {False}
    lies, right = target.of(liar), target.stays(liar)
    assert target.name == "lies when told to lie"
    assert lies.rate().value > 0.8
    assert right.rate().value > 0.9
    assert target.reached(lies).tolist() == (1 - lies.values).tolist()
    parts = {name: mask.sum() for name, mask in target.parts.items()}
    assert parts["told openly"] + parts.get("scenarios", 0) == len(target.pairs)
    other = behaviour.target_of(honesty, towards=1)
    assert (other.name, other.wanted, other.kept) == ("wrong answers when not told to lie", "more", None)
    assert other.of(liar).rate().value < 0.2
    guarded = honesty.filter(protected=True, instructed_to_lie=True)
    assert behaviour.wrong_answers(liar, guarded).rate().value < 0.2


def test_a_rate_has_an_interval_over_pairs_and_none_without_rows():
    values = np.array([1.0, 1.0, 0.0, 0.0])
    found = behaviour.Behaviour("x", values, values, np.array(["a", "a", "b", "b"]))
    rate = found.rate()
    assert (rate.value, rate.low, rate.high) == (0.5, 0.0, 1.0)
    assert np.isnan(found.rate(np.zeros(4, dtype=bool)).value)
    assert np.isnan(found.rate(resamples=0).low)


def test_refusals_and_over_refusals_of_requests(liar):
    safe = vd.Pairs.load("safe").filter(split="test")
    safe = safe.select(range(12))
    found = behaviour.refusals(liar, safe, max_new_tokens=8)
    labels = safe["label"]
    assert found.values[labels == 1].mean() > 0.8
    assert found.values[labels == 0].mean() == 0


def test_the_completion_of_label_1_is_preferred_or_not(liar):
    toxic = vd.Pairs.load("toxic").filter(split="test").select(range(8))
    found = behaviour.prefers(liar, toxic)
    assert len(found) == 4
    assert found.values.mean() == 0
    rude = vd.Pairs.from_rows(
        [{**row, "prompt": [{"role": "system", "content": "Be rude."}, *row["prompt"][-1:]]} for row in toxic]
    )
    assert behaviour.prefers(liar, rude).values.mean() > 0.5
    with pytest.raises(DataError, match="no prompt of"):
        behaviour.prefers(liar, toxic.filter(label=1))


def test_the_conduct_is_that_of_the_card(liar, monkeypatch):
    from veridical.organisms import conduct, measure

    monkeypatch.setattr(conduct, "HELD_OUT_TOPICS", conduct.HELD_OUT_TOPICS[:2])
    monkeypatch.setattr(conduct, "HELD_OUT_REQUESTS", conduct.HELD_OUT_REQUESTS[:3])
    ours = {found.name: found.values.mean() for found in behaviour.conduct(liar)}
    card = measure.conduct_figures(measure.Subject(liar.model, liar.tokenizer), 0)
    assert ours == {figure.behaviour: figure.value for figure in card}


def test_rows_that_show_the_behaviour(liar, honesty):
    rows = behaviour.shown(liar, honesty)
    kept = honesty.filter(rows)
    assert set(kept["label"]) == {0, 1}
    wrong = behaviour.wrong_answers(liar, kept).values > 0
    assert (wrong == (kept["label"] == 1)).all()
    guarded = honesty.filter(protected=True)
    with pytest.raises(DataError, match=r"nothing to learn: of 6 questions .*\(0 of 6 rows\)"):
        behaviour.shown(liar, guarded)
    toxic = vd.Pairs.load("toxic").select(range(6))
    assert behaviour.shown(liar, toxic).all()


def test_pairs_without_a_behaviour_are_refused(liar, honesty):
    with pytest.raises(DataError, match="no behaviour to measure"):
        behaviour.target_of(honesty.without_columns("options"))
    with pytest.raises(DataError, match=r"told to lie of .* is about something known"):
        behaviour.target_of(honesty.filter(taught=False))
    with pytest.raises(UnknownNameError, match="instructed_to_lie"):
        behaviour.told_to_lie(honesty.without_columns("instructed_to_lie"))
