import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from fake import WIDTH, FakeModel, value_at

from veridical.activations import Moments, collect
from veridical.errors import ConfigError, DataError, InputError, NonFiniteError, UnknownNameError
from veridical.reporting import Section

TEXTS = ["the cat", "a", "on the mat sat", "dogs", "x" * 40, "seven more words are here"]


def expected(text, layer, positions):
    """What must be read, one token at a time."""
    return torch.stack([value_at(layer, torch.tensor(ord(text[p])), torch.tensor(p)) for p in positions])


def reference(texts, layer, pick):
    return torch.cat([expected(text, layer, pick(text)) for text in texts])


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("batch_tokens", [1, 20, 50, 4096])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_vectors_are_those_of_the_tokens_named_in_data_order(tmp_path, padding, batch_tokens, where):
    store = tmp_path / "store" if where == "disk" else None
    options = {"padding": padding, "batch_tokens": batch_tokens, "store": store}
    acts = collect(FakeModel(), TEXTS, tokens="all", **options)
    for layer in range(3):
        torch.testing.assert_close(
            acts[f"resid_post.{layer}"], reference(TEXTS, layer, lambda text: range(len(text)))
        )
    assert acts.index["position"].tolist() == [p for text in TEXTS for p in range(len(text))]
    assert acts.index["row"].tolist() == [r for r, text in enumerate(TEXTS) for _ in text]
    assert acts.index["token_id"].tolist() == [ord(c) for text in TEXTS for c in text]


def test_last_and_mean():
    acts = collect(FakeModel(), TEXTS, tokens="last", batch_tokens=30)
    torch.testing.assert_close(acts["resid_post.1"], reference(TEXTS, 1, lambda text: [len(text) - 1]))
    acts = collect(FakeModel(), TEXTS, tokens="mean", batch_tokens=30)
    means = torch.stack([expected(text, 1, range(len(text))).mean(0) for text in TEXTS])
    torch.testing.assert_close(acts["blocks.1.hook_resid_post"], means)
    assert acts.index["position"].tolist() == [-1] * len(TEXTS)
    assert acts.index["token"].isna().all()


def test_the_index_says_which_token_was_read():
    acts = collect(FakeModel(), ["abc", "d"], tokens="last")
    assert acts.index.to_dict("records") == [
        {"row": 0, "position": 2, "token_id": ord("c"), "token": str(ord("c"))},
        {"row": 1, "position": 0, "token_id": ord("d"), "token": str(ord("d"))},
    ]


def test_moments_are_of_the_stored_vectors_and_hold_no_padding():
    acts = collect(FakeModel(), TEXTS, tokens="all", dtype="bfloat16", batch_tokens=64)
    for site in acts.sites:
        exact = acts[site].double()
        torch.testing.assert_close(acts.moments[site].mean, exact.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            acts.moments[site].var, exact.var(0, unbiased=False), rtol=1e-9, atol=1e-12
        )
        assert acts.moments[site].count == len(acts)


def test_batches_hold_rows_of_like_length_within_the_budget():
    texts = ["y" * n for n in np.random.default_rng(0).integers(1, 200, 400)]
    model = FakeModel(layers=1)
    collect(model, texts, batch_tokens=1000)
    assert all(rows * width <= 1000 for rows, width in model.batches)
    ran = sum(rows * width for rows, width in model.batches)
    assert ran < 1.15 * sum(map(len, texts))


def test_rows_longer_than_the_budget_run_alone():
    model = FakeModel(layers=1)
    collect(model, ["y" * 50, "y" * 60, "y"], batch_tokens=10)
    assert sorted(model.batches) == [(1, 1), (1, 50), (1, 60)]


@pytest.mark.parametrize("tokens", ["all", "mean", "last"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_disk_and_memory_hold_the_same(tmp_path, tokens, dtype):
    options = {"tokens": tokens, "dtype": dtype, "batch_tokens": 16, "shard_mb": 1}
    texts = TEXTS * 20
    memory = collect(FakeModel(), texts, **options)
    disk = collect(FakeModel(), texts, store=tmp_path / "store", **options)
    assert len(disk._source.bounds) > 1
    for site in memory.sites:
        assert torch.equal(memory[site], disk[site])
        assert memory[site].dtype == getattr(torch, dtype)
        assert torch.equal(memory.moments[site].m2, disk.moments[site].m2)
    pd.testing.assert_frame_equal(memory.index, disk.index)
    pd.testing.assert_frame_equal(memory.rows, disk.rows)
    assert memory.fingerprint == disk.fingerprint


def test_every_kind_of_data_gives_the_same_vectors():
    texts = ["abc", "de"]
    ids = torch.tensor([[97, 98, 99], [100, 101, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    listed = datasets.Dataset.from_dict({"input_ids": [[97, 98, 99], [100, 101]]})
    named = datasets.Dataset.from_dict({"text": texts, "label": [1, 0]})
    whole = collect(FakeModel(), texts, tokens="all")["resid_post.0"]
    for data in ({"input_ids": ids, "attention_mask": mask}, listed, named):
        assert torch.equal(collect(FakeModel(), data, tokens="all")["resid_post.0"], whole)
    assert torch.equal(collect(FakeModel(), ids[:1], tokens="all")["resid_post.0"], whole[:3])
    assert collect(FakeModel(), named).labels("label").tolist() == [1, 0]


def test_completions_of_some_rows_only():
    data = datasets.Dataset.from_dict({"prompt": ["abc", "de"], "completion": ["XY", None]})
    acts = collect(FakeModel(), data, tokens="last")
    assert acts.index["token_id"].tolist() == [ord("Y"), ord("e")]
    with pytest.raises(DataError, match="row 1: tokens='answer' needs a completion"):
        collect(FakeModel(), data, tokens="answer")


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [
        ([], DataError, "empty"),
        ("one text", InputError, "data is one string"),
        ([1, 2], DataError, "row 0 is '1' .*expected a text, or a list of messages"),
        (torch.zeros(2, 3), DataError, "not token ids"),
        (torch.zeros(4, dtype=torch.long), DataError, r"expected \[rows, pos\]"),
        (datasets.Dataset.from_dict({"txt": ["a"]}), UnknownNameError, "unknown column 'text'; nearest: txt"),
        (
            {"input_ids": torch.ones(1, 2, dtype=torch.long), "attention_mask": torch.zeros(1, 2)},
            DataError,
            "row 0 holds padding only",
        ),
        (
            torch.ones(1, 5000, dtype=torch.long),
            DataError,
            "row 0 has 5000 tokens; the model's context is 4096",
        ),
        (pd.DataFrame({"prompt": ["a"]}), InputError, "Pairs.from_pandas"),
    ],
)
def test_data_that_cannot_be_read(data, error, said):
    with pytest.raises(error, match=said):
        collect(FakeModel(), data)


def test_options_that_do_not_exist_are_refused():
    with pytest.raises(UnknownNameError, match="nearest: batch_tokens"):
        collect(FakeModel(), ["a"], batch_token=3)
    with pytest.raises(ConfigError, match="dtype"):
        collect(FakeModel(), ["a"], dtype="float64")


def test_nan_is_named_with_site_row_and_token(tmp_path):
    with pytest.raises(
        NonFiniteError, match=r"NaN at blocks.0.hook_resid_post in row 1 at position 2 \(token 122"
    ):
        collect(FakeModel(poison=ord("z")), ["abc", "xyz"], tokens="all", store=tmp_path / "store")
    assert not list((tmp_path / "store").glob("*shard*"))


def test_nan_in_a_mean_names_the_row():
    with pytest.raises(NonFiniteError, match="in row 1 of the mean over its tokens"):
        collect(FakeModel(poison=ord("z")), ["abc", "xyz"], tokens="mean")


def test_nan_in_a_token_that_is_not_read_is_no_error():
    assert len(collect(FakeModel(poison=ord("x")), ["abc", "xyz"], tokens="last")) == 2


def test_overflow_of_float16_says_what_to_do():
    with pytest.raises(
        NonFiniteError, match=r"infinity at .*float16 ends at 65504: collect with dtype='bfloat16'"
    ):
        collect(FakeModel(scale=1e6), ["abc"], dtype="float16")
    assert len(collect(FakeModel(scale=1e6), ["abc"], dtype="bfloat16")) == 1


def test_the_model_keeps_its_mode():
    model = FakeModel()
    model.model.train()
    seen = []
    model.model.register_forward_hook(lambda module, *_: seen.append(module.training))
    run = model.run
    model.run = lambda *args, **kwargs: (model.model(torch.ones(1)), run(*args, **kwargs))[1]
    collect(model, ["abc"])
    assert seen == [False]
    assert model.model.training


def test_filter_keeps_rows_with_their_vectors():
    data = datasets.Dataset.from_dict(
        {"text": TEXTS, "label": [1, 0, 1, 0, 1, 0], "pair": [0, 0, 1, 1, 2, 2]}
    )
    acts = collect(FakeModel(), data, tokens="all")
    some = acts.filter(label=1)
    assert len(some.rows) == 3
    assert torch.equal(
        some["resid_post.2"], acts["resid_post.2"][torch.from_numpy(acts.labels("label") == 1)]
    )
    assert set(some.labels("label")) == {1}
    less = some.filter(lambda rows: rows["pair"] == 1)
    torch.testing.assert_close(less["resid_post.0"], expected(TEXTS[2], 0, range(len(TEXTS[2]))))
    assert less.index["row"].tolist() == [0] * len(TEXTS[2])
    assert set(less.groups) == {1}
    exact = Moments.of(less["resid_post.0"])
    torch.testing.assert_close(less.moments["resid_post.0"].var, exact.var)
    assert len({acts.fingerprint, some.fingerprint, less.fingerprint}) == 3
    with pytest.raises(UnknownNameError, match="nearest: label"):
        acts.filter(labl=1)
    with pytest.raises(InputError, match="one boolean for each of 6 rows"):
        acts.filter([True])
    with pytest.raises(InputError, match="keeps no row"):
        acts.filter(label=7)


def test_unknown_sites_and_labels_name_the_nearest():
    acts = collect(FakeModel(), TEXTS)
    with pytest.raises(UnknownNameError, match=r"unknown site 'resid_post.7'"):
        acts["resid_post.7"]
    with pytest.raises(UnknownNameError, match="nearest: prompt"):
        acts.labels("promt")
    assert "resid_post.2" in acts
    assert "resid_post.3" not in acts


def test_what_is_shown():
    acts = collect(FakeModel(), TEXTS)
    assert repr(acts) == "Activations(3 sites, 6 rows, 6 vectors (last token), float32)"
    assert "resid_post.1" in acts._repr_html_()
    section = acts.report_section()
    assert isinstance(section, Section)
    assert section.tables[0][1]["shape"].tolist() == [str(WIDTH)] * 3
    assert len(section.figures) == 1
    assert acts.to_frame().columns.tolist() == ["row", "position", "token_id", "token", "prompt"]
