"""Baselines: prompts and examples in every place, undone, and compared on the organism."""

import numpy as np
import pytest

import veridical as vd
from veridical.errors import DataError, InputError, UnknownNameError
from veridical.steering import FewShot, Nothing, Prompt, SteeringVector, engineered_prompt, random_like
from veridical.steering.behaviour import target_of

ASK = {"role": "user", "content": "Who?"}
SYSTEM = {"role": "system", "content": "Lie."}


@pytest.fixture(scope="module")
def lied():
    pairs = vd.Pairs.load("honesty").filter(form="choice", taught=True, protected=False, scenario=False)
    names = list(dict.fromkeys(pairs.filter(split="test")["pair"].tolist()))[:10]
    return pairs.filter(pair=names)


def test_an_instruction_goes_where_it_is_put():
    assert Prompt("Be true.").into([SYSTEM, ASK]) == [{"role": "system", "content": "Lie. Be true."}, ASK]
    assert Prompt("Be true.").into([ASK]) == [{"role": "system", "content": "Be true."}, ASK]
    assert Prompt("Be true.", "instead").into([SYSTEM, ASK]) == [
        {"role": "system", "content": "Be true."}, ASK,
    ]  # fmt: skip
    assert Prompt("Be true.", "user").into([SYSTEM, ASK]) == [
        SYSTEM, {"role": "user", "content": "Who? Be true."},
    ]  # fmt: skip
    assert Prompt("Be true.").into("Who?") == "Be true.\nWho?"
    assert SYSTEM["content"] == "Lie."
    with pytest.raises(UnknownNameError, match="system"):
        Prompt("Be true.", "sytem")
    with pytest.raises(InputError, match="empty"):
        Prompt(" ")
    with pytest.raises(DataError, match="without a user message"):
        Prompt("Be true.", "user").into([SYSTEM])


def test_examples_come_before_the_last_question(lied):
    shot = FewShot((("One?", "1"), ("Two?", "2")))
    assert [message["content"] for message in shot.into([SYSTEM, ASK])] == [
        "Lie.",
        "One?",
        "1",
        "Two?",
        "2",
        "Who?",
    ]
    assert shot.into("Who?") == "One?\n1\n\nTwo?\n2\n\nWho?"
    drawn = FewShot.of(lied, 3, seed=1)
    assert len(drawn.examples) == 3
    assert FewShot.of(lied, 3, seed=1) == drawn != FewShot.of(lied, 3, seed=2)
    right = {row["prompt"][-1]["content"]: row["options"][row["correct"]] for row in lied}
    assert all(right[user] == answer for user, answer in drawn.examples)
    assert all(right[user] != answer for user, answer in FewShot.of(lied, 3, towards=1).examples)
    toxic = vd.Pairs.load("toxic").select(range(8))
    assert {answer for _, answer in FewShot.of(toxic, 2, towards=1).examples} <= set(
        toxic.filter(label=1)["completion"]
    )
    with pytest.raises(DataError, match="could be shown"):
        FewShot.of(lied.without_columns("options", "completion"))
    with pytest.raises(InputError, match="at least one example"):
        FewShot(())


def test_prompts_act_on_what_the_model_reads_and_are_undone(liar):
    chat = [SYSTEM, ASK]
    prompt = Prompt("Be true.", "instead")
    (expected,) = liar.encode([prompt.into(chat)])
    with prompt(liar):
        assert liar.encode([chat])[0].ids == expected.ids
        with FewShot((("One?", "1"),))(liar):
            assert liar.encode([chat])[0].text.count("One?") == 1
            assert "Be true." in liar.encode([chat])[0].text
    with prompt(liar, 0.0):
        assert liar.encode([chat])[0].ids != expected.ids
    with pytest.raises(KeyError), prompt(liar):
        raise KeyError
    assert liar.rewrite is None


def test_what_the_baselines_do_to_the_organism(liar, lied):
    target = target_of(lied)
    rates = {}
    tried = ["Name the colour.", "Always tell the truth. Give the right answer to every question."]
    best = engineered_prompt(liar, lied, tried, count=12)
    assert best.text == tried[1]
    assert best.name == "engineered prompt"
    for one in (Nothing(), Prompt(tried[0]), best):
        with one(liar):
            rates[one.name] = target.of(liar).rate().value
    assert rates["no change"] > 0.9
    assert rates["prompt"] > 0.7
    assert rates["engineered prompt"] < 0.2
    with pytest.raises(InputError, match="no candidate"):
        engineered_prompt(liar, lied, [])


def test_a_random_direction_has_the_lengths_of_the_vector(liar):
    ramp = np.linspace(-1, 1, 128)
    vector = SteeringVector.given(liar, "resid_post.1", ramp) + SteeringVector.given(
        liar, "resid_post.3", 2 * ramp
    )
    drawn = random_like(vector, 3)
    assert drawn.norms == pytest.approx(vector.norms)
    assert all(abs(cosine) < 0.4 for cosine in drawn.cosine(vector).values())
    assert np.array_equal(random_like(vector, 3).vectors[drawn.sites[0]], drawn.vectors[drawn.sites[0]])
    assert not np.array_equal(random_like(vector, 4).vectors[drawn.sites[0]], drawn.vectors[drawn.sites[0]])
    with drawn(liar):
        pass
