"""The table of pairs: its schema, how it is cut, kept and shown, and what it refuses."""

import numpy as np
import pandas as pd
import pytest

from veridical.errors import DamagedFileError, DataError, UnknownNameError
from veridical.pairs import Pairs

CHAT = [
    {
        "pair": f"p{number // 2}",
        "prompt": [
            {"role": "system", "content": "Be <b>kind</b>."},
            {"role": "user", "content": f"Hello {number}"},
        ],
        "completion": None if number == 1 else f'Reply, "{number}"\nsecond line é',
        "label": number % 2,
        "split": "train" if number < 4 else "test",
        "options": ["a", f"b{number}"],
    }
    for number in range(6)
]


@pytest.fixture
def chat():
    return Pairs.from_rows(CHAT, name="chat")


def test_columns_and_rows(chat):
    assert len(chat) == 6
    assert chat.columns == ["pair", "prompt", "completion", "label", "split", "options"]
    assert chat["label"].tolist() == [0, 1, 0, 1, 0, 1]
    assert chat["label"].dtype == np.int64
    assert chat["options"][3] == ["a", "b3"]
    assert chat.prompts[0] == CHAT[0]["prompt"]
    assert chat.completions[:2] == ['Reply, "0"\nsecond line é', ""]
    assert chat.groups.tolist() == ["p0", "p0", "p1", "p1", "p2", "p2"]
    assert chat.is_chat
    assert chat[5]["pair"] == "p2"


def test_rows_without_pair_are_their_own_group():
    assert Pairs.from_rows([{"prompt": "a"}, {"prompt": "b"}]).groups.tolist() == [0, 1]


def test_no_completion_at_all_is_none():
    assert (
        Pairs.from_rows([{"prompt": "a", "completion": None}, {"prompt": "b", "completion": ""}]).completions
        is None
    )


def test_unknown_column_names_the_nearest(chat):
    with pytest.raises(UnknownNameError, match="'lable'; nearest: label"):
        chat["lable"]
    with pytest.raises(UnknownNameError, match="nearest: split"):
        chat.filter(splitt="train")
    with pytest.raises(UnknownNameError, match="nearest: label"):
        chat.labels("labels")


def test_filter_by_value_list_mask_and_function(chat):
    assert len(chat.filter(split="train")) == 4
    assert chat.filter(pair=["p0", "p2"])["pair"].tolist() == ["p0", "p0", "p2", "p2"]
    mask = np.array([True, False, False, False, False, True])
    assert [row["prompt"][1]["content"] for row in chat.filter(mask)] == ["Hello 0", "Hello 5"]
    assert len(chat.filter(lambda row: row["label"] == 1, split="test")) == 1
    assert len(chat) == 6
    with pytest.raises(DataError, match="no row"):
        chat.filter(split="train", pair="p2")
    with pytest.raises(DataError, match="mask of 6"):
        chat.filter(mask[:3])


def test_pandas_round_trip(chat):
    again = Pairs.from_pandas(chat.to_pandas(), name="chat")
    assert again.fingerprint == chat.fingerprint
    labels = pd.DataFrame({"prompt": ["a", "b"], "label": [1.0, np.nan]})
    assert Pairs.from_pandas(labels)[1]["label"] is None


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv"])
def test_file_round_trip_keeps_messages_and_options(chat, tmp_path, ending):
    path = chat.save(tmp_path / f"chat.{ending}")
    again = Pairs.load(path)
    assert again.fingerprint == chat.fingerprint
    assert again.prompts == chat.prompts
    assert again.name == "chat"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_failed_save_leaves_the_old_file(chat, tmp_path, monkeypatch):
    path = chat.save(tmp_path / "chat.parquet")
    before = path.read_bytes()
    broken = chat.filter(split="test")
    monkeypatch.setattr("pyarrow.parquet.write_table", lambda table, file, **_: (file.write(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        broken.save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_fingerprint_is_of_the_content(chat, tmp_path):
    moved = Pairs.load(chat.save(tmp_path / "elsewhere.parquet"))
    assert moved.fingerprint == chat.fingerprint
    assert chat.filter(split="train").fingerprint == Pairs.from_rows(CHAT[:4]).fingerprint
    assert chat.with_columns(label=[1, 1, 0, 1, 0, 1]).fingerprint != chat.fingerprint
    assert chat.select([1, 0, 2, 3, 4, 5]).fingerprint != chat.fingerprint


def test_repr_and_html_escape(chat):
    assert "\n" not in repr(chat)
    assert "6 rows in 3 pairs" in repr(chat)
    assert "label 0: 3, 1: 3" in repr(chat)
    shown = Pairs.from_rows(
        [{"prompt": "<script>alert(1)</script>", "pair": "<i>"}], name="<b>"
    )._repr_html_()
    assert "<script>" not in shown
    assert "<i>" not in shown
    assert "&lt;script&gt;" in shown
    section = chat.report_section()
    assert dict(section.headline) == {"rows": "6", "pairs": "3"}
    assert section.tables[1][1]["row"].tolist() == [0, 2, 5]


def test_labels_are_checked(chat):
    assert chat.labels().tolist() == [0, 1, 0, 1, 0, 1]
    assert Pairs.from_rows([{"prompt": "a", "lied": True}, {"prompt": "b", "lied": False}]).labels(
        "lied"
    ).tolist() == [1, 0]
    with pytest.raises(DataError, match="1 of 2 rows have no 'label'"):
        Pairs.from_rows([{"prompt": "a", "label": 1.0}, {"prompt": "b", "label": float("nan")}]).labels()
    with pytest.raises(DataError, match="every 'label' is 1"):
        chat.filter(label=1).labels()
    with pytest.raises(DataError, match="whole numbers"):
        Pairs.from_rows([{"prompt": "a", "label": "yes"}, {"prompt": "b", "label": "no"}]).labels()
    with pytest.raises(DataError, match=r"0\.5"):
        Pairs.from_rows([{"prompt": "a", "label": 0.5}, {"prompt": "b", "label": 1.0}]).labels()


def test_a_pair_with_one_side_is_named(chat):
    assert chat.require_pairs() is chat
    lone = chat.select([0, 1, 2, 4, 5])
    with pytest.raises(DataError, match=r"pair 'p1' .* one side only"):
        lone.require_pairs()
    assert lone.both_sides().groups.tolist() == ["p0", "p0", "p2", "p2"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "no rows|no 'prompt'|prompt"),
        ([{"text": "a"}], "prompt"),
        ([{"prompt": None}], "row 0: the prompt is None"),
        ([{"prompt": [{"role": "user"}]}], "role and content"),
        ([{"prompt": []}], "row 0"),
        ([{"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]}], "mixes"),
        ([{"prompt": "a", "completion": 3}], "expected text"),
        ([{"prompt": "a", "pair": "x"}, {"prompt": "b", "pair": None}], "row 1: no pair id"),
    ],
)
def test_bad_rows_are_refused(rows, said):
    with pytest.raises((DataError, UnknownNameError), match=said) as caught:
        Pairs.from_rows(rows)
    assert "\n" not in str(caught.value)


def test_bad_files_are_refused(tmp_path):
    cases = {
        "empty.csv": ("", DataError, "empty.csv"),
        "head.csv": ("prompt,label\n", DataError, "no rows"),
        "bad.jsonl": ('{"prompt": "a"}\n{"prompt": \n', DataError, "line 2"),
        "bad.json": ("[1, 2", DataError, "not readable as json"),
        "what.xlsx": ("x", DataError, "ending"),
        "odd.csv": ("alpha,beta\n1,2\n", DataError, "layout of odd is not known"),
        "cut.parquet": ("PAR1", DamagedFileError, "not readable parquet"),
        "cut.csv.gz": ("no gzip", DamagedFileError, "cut short"),
    }
    for name, (content, kind, said) in cases.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(kind, match=said):
            Pairs.load(tmp_path / name)
    with pytest.raises(UnknownNameError, match=r"nearest: head\.csv"):
        Pairs.load(tmp_path / "heads.csv")
    with pytest.raises(UnknownNameError, match="parquet"):
        Pairs.from_rows([{"prompt": "a"}]).save(tmp_path / "a.txt")


def test_columns_are_mapped(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("request,bad,code\nHow?,1,NA\nWhy?,0,None\n")
    pairs = Pairs.load(path, columns={"prompt": "request", "label": "bad"})
    assert pairs.columns == ["prompt", "label", "code"]
    # Words that pandas takes for missing values stay words.
    assert pairs["code"].tolist() == ["NA", "None"]
    with pytest.raises(UnknownNameError, match="nearest: request"):
        Pairs.load(path, columns={"prompt": "requests"})


def test_saved_data_sets_and_hub_layouts(chat, tmp_path):
    import datasets

    chat.dataset.save_to_disk(str(tmp_path / "one"))
    assert Pairs.load(tmp_path / "one").fingerprint == chat.fingerprint
    parts = chat.without_columns("split").dataset
    both = datasets.DatasetDict({"train": parts.select(range(4)), "test": parts.select(range(4, 6))})
    both.save_to_disk(str(tmp_path / "both"))
    assert Pairs.load(tmp_path / "both")["split"].tolist() == ["train"] * 4 + ["test"] * 2
    hub = tmp_path / "hub"
    hub.mkdir()
    parts.select(range(4)).to_json(str(hub / "train.jsonl"))
    parts.select(range(4, 6)).to_json(str(hub / "test.jsonl"))
    assert Pairs.load(hub)["split"].tolist() == ["train"] * 4 + ["test"] * 2


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(UnknownNameError, match="nearest: honesty") as caught:
        Pairs.load("honestly")
    assert "\n" not in str(caught.value)


def test_the_sources_are_not_changed(chat):
    before = chat.fingerprint
    chat.with_columns(label=[0] * 6)
    chat.without_columns("label")
    chat.split(seed=1, shares={"a": 0.5, "b": 0.5})
    assert Pairs.from_rows(CHAT, name="chat").fingerprint == before == chat.fingerprint
    assert chat["label"].tolist() == [0, 1, 0, 1, 0, 1]
