"""Pairing clean and corrupt rows."""

import pandas as pd
import pytest
import torch

import veridical as vd
from veridical.errors import DataError, InputError
from veridical.interventions import Inputs, as_metric
from veridical.interventions.align import by_token


def test_rows_are_padded_on_the_left_to_one_width(hooked):
    model = hooked("llama")
    given = Inputs.of(model, [[5, 6, 7], [8, 9]], [[5, 1, 7], [8, 3]])
    assert given.clean["input_ids"].tolist() == [[5, 6, 7], [0, 8, 9]]
    assert given.corrupt["input_ids"][1].tolist() == [0, 8, 3]
    assert given.mask.tolist() == [[True] * 3, [False, True, True]]
    assert given.matched.tolist() == [[0, 1, 2], [-1, 1, 2]]
    assert given.tokens[1][0] == ""
    assert len(given) == 2
    assert given.width == 3
    right = {
        "input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]),
        "attention_mask": torch.tensor([[1] * 3, [1, 1, 0]]),
    }
    assert torch.equal(Inputs.of(model, right, right).clean["input_ids"], given.clean["input_ids"])
    assert Inputs.of(model, torch.tensor([5, 6]), torch.tensor([[5, 7]])).width == 2


def test_unequal_lengths_show_both_and_offer_alignment(hooked):
    model = hooked("llama")
    with pytest.raises(InputError) as caught:
        Inputs.of(model, "the capital of France is", "the capital of is")
    said = str(caught.value)
    assert "'he'" in said
    assert "' is'" in said
    assert 'align="token"' in said
    assert 'align="span"' in said
    with pytest.raises(InputError, match="2 rows and corrupt 1"):
        Inputs.of(model, ["a", "b"], ["a"])


def test_alignment_by_token(hooked):
    assert by_token([1, 2, 3, 4, 9], [1, 7, 3, 9]) == [(0, 0), (2, 2), (4, 3)]
    assert by_token([1, 2], [1, 2]) == [(0, 0), (1, 1)]
    assert by_token([1, 1, 1], [1, 1]) == [(0, 0), (1, 1)]
    given = Inputs.of(hooked("llama"), [[1, 2, 3, 4, 9]], [[1, 7, 3, 9]], align="token")
    assert given.corrupt["input_ids"].tolist() == [[0, 1, 7, 3, 9]]
    assert given.matched.tolist() == [[1, -1, 3, -1, 4]]
    back = given.swapped()
    assert back.matched.tolist() == [[-1, 0, -1, 2, 4]]
    assert not back.mask[0, 0]
    assert torch.equal(back.swapped().matched, given.matched)


def test_alignment_by_span(hooked):
    model = hooked("llama")
    clean, corrupt = "the capital of France is", "the capital of Rome is"
    for align in ({"France": "Rome"}, [((15, 21), (15, 19))], [{"France": "Rome"}]):
        given = Inputs.of(model, clean, corrupt, align=align)
        linked = [(a, b) for a, b in enumerate(given.matched[0].tolist()) if b >= 0]
        assert linked
        for a, b in linked:
            assert given.tokens[0][a].strip() in "France"
            assert given.corrupt_tokens[0][b].strip() in "Rome"
        last = max(i for i, t in enumerate(given.tokens[0]) if t.strip() and t.strip() in "France")
        assert linked[-1][0] == last
    for align, said in [
        ("span", "needs the spans"),
        ("tokens", "expected 'token' or spans"),
        ({"Spain": "Rome"}, "'Spain' occurs 0 times in the clean text"),
        ([((15, 99), (15, 19))], "lies outside the clean text"),
        (3, "expected 'token', or spans"),
        ([{"France": "Rome"}] * 2, "spans for 2 rows"),
    ]:
        with pytest.raises(InputError, match=said):
            Inputs.of(model, clean, corrupt, align=align)
    with pytest.raises(InputError, match="tokens arrived"):
        Inputs.of(model, [[1, 2]], [[1, 3]], align={"a": "b"})


def test_pairs_are_matched_by_pair_and_bring_their_answers(hooked):
    model = hooked("llama")

    def pairs(names, country, city):
        rows = {"pair": names, "prompt": [f"the capital of {country} is" for _ in names], "completion": city}
        return vd.Pairs.from_pandas(pd.DataFrame(rows))

    clean = pairs(["a", "b"], "France", [" of", " capital"])
    corrupt = pairs(["b", "a"], "Italy", [" is", " or"])
    given = Inputs.of(model, clean, corrupt, align="token")
    assert given.answers == [" of", " capital"]
    assert given.wrong == [" or", " is"]
    assert given.groups.tolist() == ["a", "b"]
    metric = as_metric("logit_diff", model, inputs=given)
    assert metric.targets["answers"].shape == (2, 1)
    with pytest.raises(DataError, match="'c' is on one side only"):
        Inputs.of(model, pairs(["a", "c"], "France", " of"), corrupt)
    with pytest.raises(InputError, match="both must be Pairs"):
        Inputs.of(model, clean, ["x", "y"])
    with pytest.raises(DataError, match="several rows"):
        Inputs.of(model, pairs(["a", "a"], "France", " of"), corrupt)


def test_images(hooked):
    model = hooked("vit")
    images = torch.randn(2, 3, 24, 24)
    given = Inputs.of(model, images, {"pixel_values": -images})
    assert given.mask.shape == (2, 10)
    assert given.tokens[0][:3] == ["class", "0,0", "0,1"]
    with pytest.raises(InputError, match="expected images"):
        Inputs.of(model, "text", images)


def test_bad_tokens(hooked):
    model = hooked("llama")
    with pytest.raises(InputError, match="token ids go from 0 to 299; 300 arrived"):
        Inputs.of(model, [[300]], [[1]])
    with pytest.raises(InputError, match="expected token ids"):
        Inputs.of(model, torch.randn(2, 3), torch.randn(2, 3))
