"""The hand-written models do what their docstrings say, before any tool is judged by them."""

import micro
import pytest
import torch

from veridical.selftest import check


def logits(model, ids, **hooks):
    with torch.no_grad():
        return micro.handle(model).run({"input_ids": ids}, **hooks).logits


def difference(model, ids, answers, wrong):
    last = logits(model, ids)[:, -1]
    rows = torch.arange(len(ids))
    return last[rows, answers] - last[rows, wrong]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_norms_do_nothing(family, dtype):
    model = micro.induction(family).to(dtype)
    if family != "gpt2":
        stream = (torch.randn(2, 3, 128) * 30).to(dtype)  # Llama's norm computes in float32
        assert torch.equal(model.model.norm(stream), stream)
        return
    stream = torch.randn(2, 3, 128, dtype=dtype)
    stream -= stream.mean(-1, keepdim=True)
    torch.testing.assert_close(
        model.transformer.ln_f(stream), stream, rtol=0, atol=torch.finfo(dtype).eps * 4
    )


@pytest.mark.parametrize(("sharpness", "noise"), [(micro.EXACT, 0.0), (micro.SOFT, 0.0), (micro.EXACT, 0.02)])
def test_repeated_texts_are_completed(family, sharpness, noise):
    ids = micro.repeated(40, 14, seed=1)
    model = micro.induction(family, sharpness=sharpness, noise=noise)
    p = logits(model, ids).softmax(-1)
    # From the second occurrence of the first letter on, everything but the end is known.
    known = p[:, 15:-1].gather(-1, ids[:, 16:, None])
    assert known.min() > 0.99
    first = p[:, 1:14].gather(-1, ids[:, 2:15, None])
    assert first.mean() < 0.06


def test_without_the_previous_token_head_it_is_chance(family):
    ids = micro.repeated(40, 14, seed=1)

    def without(z):
        z[:, :, micro.PREVIOUS] = 0
        return z

    p = logits(micro.induction(family), ids, write={"z.0": without}).softmax(-1)
    torch.testing.assert_close(p, torch.full_like(p, 1 / micro.VOCABULARY), rtol=1e-6, atol=0)


def test_attention_is_where_it_should_be(family):
    ids = micro.repeated(3, 10)
    run = micro.handle(micro.induction(family)).run({"input_ids": ids}, read=["pattern.0", "pattern.1"])
    previous, found = run["pattern.0"][:, micro.PREVIOUS], run["pattern.1"][:, micro.INDUCTION]
    expected = torch.eye(21).roll(-1, 1)
    expected[:, -1] = 0
    expected[0, 0] = 1
    assert torch.equal(previous, expected.expand_as(previous))
    after = torch.zeros(21, 21)
    after[:11, 0] = 1  # nothing was seen before: BOS
    after[torch.arange(11, 21), torch.arange(2, 12)] = 1
    assert torch.equal(found, after.expand_as(found))


def test_padding_on_the_left_changes_nothing(family):
    model = micro.handle(micro.induction(family))
    rows = [row.tolist() for row in micro.contrast("key", length=8).clean] + [[0, 3, 4, 3]]
    with torch.no_grad():
        together = model.run(model.batch(rows, padding_side="left")).logits[:, -1]
        alone = torch.stack([model.logits(torch.tensor([row]))[0, -1] for row in rows])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("what", ["key", "query", "value"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_token_makes_the_whole_difference(family, what, dtype):
    model, texts = micro.induction(family).to(dtype), micro.contrast(what)
    assert torch.equal((texts.clean != texts.corrupt).sum(1), torch.ones(4, dtype=torch.long))
    clean, corrupt = (
        difference(model, ids, texts.answers, texts.wrong) for ids in (texts.clean, texts.corrupt)
    )
    assert (clean - corrupt).tolist() == [texts.truth.effect] * 4
    assert corrupt.tolist() == [0.0] * 4


def restored(model, texts, site, position, head):
    """Naively: what one value of the clean texts brings back in the corrupt ones, as a share."""
    hooked = micro.handle(model)
    with torch.no_grad():
        value = hooked.run({"input_ids": texts.clean}, read=[site])[site]

    def put(x):
        index = (slice(None), position) if head is None else (slice(None), position, head)
        x[index] = value[index]
        return x

    runs = [
        logits(model, ids, write=write)[:, -1]
        for ids, write in ((texts.corrupt, {site: put}), (texts.corrupt, None))
    ]
    rows = torch.arange(len(texts.clean))
    patched, corrupt = (last[rows, texts.answers] - last[rows, texts.wrong] for last in runs)
    return ((patched - corrupt) / texts.truth.effect).tolist()


def every_cell(model, length):
    hooked = micro.handle(model)
    kinds = ("resid_pre", "q", "k", "v", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")
    for layer in range(2):
        for kind in kinds:
            width = hooked.width(f"{kind}.{layer}")
            for position in range(-length, 0):
                for head in range(width[0]) if len(width) == 2 else [None]:
                    yield f"{kind}.{layer}", position, head


@pytest.mark.parametrize("what", ["key", "query", "value"])
def test_the_cells_of_the_truth_are_all_there_are(family, what):
    model, texts = micro.induction(family), micro.contrast(what, rows=2, length=7)
    wanted = micro.cells(texts.truth, family)
    found = {cell: restored(model, texts, *cell) for cell in every_cell(model, 7)}
    assert wanted <= found.keys()
    assert found == {cell: [float(cell in wanted)] * 2 for cell in found}


def test_the_chain_has_one_circuit():
    model, texts = micro.chain(), micro.chain_texts(rows=2)
    clean, corrupt = (
        difference(model, ids, texts.answers, texts.wrong) for ids in (texts.clean, texts.corrupt)
    )
    assert clean.tolist() == [micro.GAIN] * 2
    assert corrupt.tolist() == [-micro.GAIN] * 2
    found = {cell: restored(model, texts, *cell) for cell in every_cell(model, 6)}
    assert found == {cell: [float(cell in texts.truth.cells)] * 2 for cell in found}
    # The parts that write where nothing reads do write something else.
    sites = ["z.0", "mlp_out.0", "z.1", "attn_out.1"]
    with torch.no_grad():
        runs = [
            micro.handle(model).run({"input_ids": ids}, read=sites) for ids in (texts.clean, texts.corrupt)
        ]
    changed = {site: (runs[0][site] != runs[1][site])[:, -1] for site in sites}
    assert changed["z.0"][:, 2].any(-1).all()
    assert changed["z.1"][:, [0, 3]].any(-1).all()
    assert changed["mlp_out.0"].any(-1).all()
    assert changed["attn_out.1"].any(-1).all()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_linear_model_adds_up_by_hand(family):
    ids = micro.repeated(5, 8, seed=2)
    right, wrong = (torch.full((5,), token) for token in (micro.RIGHT, micro.WRONG))
    found = difference(micro.linear(family), ids, right, wrong)
    torch.testing.assert_close(found, micro.by_hand(ids), rtol=1e-6, atol=1e-6)
    # BOS, then x = 1, y = 2 (id 4) and x = 2, y = 1 (id 8): 0.5 * 2 + 2 * (1 + 2) / 3 - (2 + 1) / 3
    one = difference(micro.linear(family), torch.tensor([[0, 4, 8]]), right[:1], wrong[:1])
    assert one.item() == pytest.approx(2.0, rel=1e-6)


def test_texts_and_ids_are_the_same():
    model, ids = micro.handle(micro.induction()), micro.repeated(2, 5)
    encoded = model.encode(micro.text(ids))
    assert [list(row.ids) for row in encoded] == ids.tolist()


def test_a_model_with_noise_passes_the_check_at_load(family):
    check(micro.handle(micro.induction(family, noise=0.02)))
