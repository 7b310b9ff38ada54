import pandas as pd
import pytest
from fake import FakeModel

from veridical.activations import collect
from veridical.activations.data import Corpus
from veridical.activations.select import selection
from veridical.errors import DataError, InputError, UnknownNameError


def positions(tokens, prompt="abcdef", completion=None, span=None):
    rows = pd.DataFrame({"prompt": [prompt]})
    if span:
        rows["span_start"], rows["span_end"] = span
    corpus = Corpus("data", rows, [prompt], [completion] if completion else None)
    encoded = FakeModel().encode([prompt], [completion])[0]
    return selection(tokens).positions(encoded, corpus.row(0)).tolist()


def test_each_selection_reads_the_tokens_it_names():
    assert positions("last") == [5]
    assert positions("last", completion="XY") == [7]
    assert positions("prompt_last", completion="XY") == [5]
    assert positions("answer", completion="XY") == [6, 7]
    assert positions("all") == [0, 1, 2, 3, 4, 5]
    assert positions("mean") == [0, 1, 2, 3, 4, 5]
    assert positions(0) == [0]
    assert positions(-2) == [4]
    assert positions("-2") == [4]


def test_a_span_counts_characters_of_the_completion_if_there_is_one():
    assert positions("span", span=(1, 3)) == [1, 2]
    assert positions("span", completion="XYZ", span=(1, 3)) == [7, 8]


def test_a_function_gives_positions():
    assert positions(lambda encoded: [0, -1]) == [0, 5]
    assert positions(lambda encoded: encoded.prompt_tokens - 2) == [4]


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ("answer", "row 0: tokens='answer' needs a completion"),
        (9, "row 0: tokens='9' asks for position 9, but it has 6 tokens"),
        (-7, "asks for position -7"),
        ("span", "row 0: tokens='span' needs the columns span_start and span_end"),
        (lambda encoded: [], "selects none of its 6 tokens"),
        (lambda encoded: [0.5], "expected positions"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_row(tokens, said):
    with pytest.raises(DataError, match=said):
        positions(tokens)


def test_an_empty_span_is_an_error():
    with pytest.raises(DataError, match="selects none"):
        positions("span", span=(3, 3))


def test_an_unknown_selection_names_the_nearest():
    with pytest.raises(UnknownNameError, match="unknown token selection 'lst'; nearest: last"):
        collect(FakeModel(), ["abc"], tokens="lst")
    with pytest.raises(InputError, match="expected a name, an index, or a function"):
        selection(True)


def test_the_row_is_named_by_its_number_in_the_whole_data():
    texts = ["abcd"] * 1500 + ["ab"]
    with pytest.raises(DataError, match="row 1500: tokens='3'"):
        collect(FakeModel(), texts, tokens=3)
