"""KL on neutral text: against one row at a time in float64, and as a loss against loops."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

import veridical as vd
from veridical.errors import DataError, InputError, NonFiniteError, UnknownNameError
from veridical.organisms.neutral import neutral_pairs
from veridical.steering import NeutralMeter, kl_loss, neutral_kl, neutral_texts
from veridical.steering.neutral import plainly


def pushed(model, by=3.0):
    shift = by * torch.linspace(-1, 1, model.d_model)
    return lambda: model.hooks(write={"resid_post.2": lambda x: x + shift})


def one_by_one(model, context, neutral):
    """KL sums, log-likelihoods and counts of each row alone, in float64 loops over tokens."""
    found = []
    for item in neutral.encoded:
        ids = torch.tensor([item.ids])
        with torch.no_grad():
            plain = model.model(input_ids=ids).logits[0].double()
            with context():
                steered = model.model(input_ids=ids).logits[0].double()
        kl, ours, theirs, count = 0.0, 0.0, 0.0, 0
        for at in range(max(item.prompt_tokens, 1) - 1, len(item.ids) - 1):
            p, q = steered[at].softmax(-1).tolist(), plain[at].softmax(-1).tolist()
            kl += sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q))
            ours, theirs, count = (
                ours + np.log(p[item.ids[at + 1]]),
                theirs + np.log(q[item.ids[at + 1]]),
                count + 1,
            )
        found.append((kl, ours, theirs, count))
    return np.array(found)


@pytest.mark.parametrize("batch_tokens", [60, 4096])
def test_kl_and_perplexity_are_those_of_each_row_alone(liar, batch_tokens):
    neutral = neutral_texts(liar, count=9)
    found = neutral_kl(liar, pushed(liar), neutral, batch_tokens=batch_tokens)
    kl, ours, theirs, counts = one_by_one(liar, pushed(liar), neutral).T
    assert found.counts.tolist() == counts.tolist()
    np.testing.assert_allclose(found.rows, kl / counts, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(found.kl.value, kl.sum() / counts.sum(), rtol=1e-4)
    np.testing.assert_allclose(found.perplexity, np.exp(-ours.sum() / counts.sum()), rtol=1e-4)
    np.testing.assert_allclose(found.plain_perplexity, np.exp(-theirs.sum() / counts.sum()), rtol=1e-4)
    assert found.kl.value > 0.01
    assert found.kl.low < found.kl.value < found.kl.high


def test_no_intervention_has_no_kl_at_all(liar):
    found = neutral_kl(liar, plainly, neutral_texts(liar, count=12))
    assert found.kl.value == 0
    assert not found.rows.any()
    assert found.perplexity == found.plain_perplexity


def test_a_meter_measures_again_what_it_measured_before(liar):
    meter = NeutralMeter(liar, neutral_texts(liar, count=24))
    first, _, again = meter(pushed(liar)), meter(pushed(liar, 6.0)), meter(pushed(liar))
    assert first.rows.tolist() == again.rows.tolist()
    frame = first.to_frame()
    assert frame["kind"].tolist() == ["all", "tone", "request", "question"]
    np.testing.assert_allclose(np.average(frame["kl"][1:], weights=frame["tokens"][1:]), frame["kl"][0])


def test_rows_of_the_organism_are_answers_with_the_end_of_their_turn(liar):
    neutral = neutral_texts(liar, split="train", count=12)
    for item, mask in zip(neutral.encoded, neutral.mask(range(12))):
        assert item.ids[-1] == liar.tokenizer.eos_token_id
        said = liar.tokenizer.decode([item.ids[at + 1] for at in torch.nonzero(mask).flatten().tolist()])
        assert said.endswith("<|end|>")
        assert item.text.endswith(f"<|assistant|>{said}")
    assert neutral.mask(range(12)).sum(1).tolist() == neutral.counts.tolist()


def test_splits_share_neither_subjects_nor_held_out_wordings():
    parts = {split: neutral_pairs(split) for split in ("train", "val", "test")}
    subjects = {split: set(pairs["pair"].tolist()) for split, pairs in parts.items()}
    assert all(len(found) > 60 for found in subjects.values())
    assert not subjects["train"] & subjects["val"]
    assert not subjects["test"] & (subjects["train"] | subjects["val"])
    assert all(
        len(pairs) == 192 and set(pairs["kind"]) == {"tone", "request", "question"}
        for pairs in parts.values()
    )
    assert neutral_pairs("test").fingerprint == neutral_pairs("test").fingerprint
    with pytest.raises(UnknownNameError, match="test"):
        neutral_pairs("tset")


def test_the_organism_says_neutral_rows_as_it_stands(liar):
    found = neutral_kl(liar, plainly, neutral_texts(liar))
    assert found.plain_perplexity < 3


def test_texts_chats_and_pairs_are_taken(liar):
    chat = [{"role": "user", "content": "Tell me about tea."}, {"role": "assistant", "content": "Gladly."}]
    pairs = vd.Pairs.from_rows([{"prompt": chat[:1], "completion": "Gladly."}])
    by_chat, by_pairs = neutral_texts(liar, [chat]), neutral_texts(liar, pairs)
    assert by_chat.encoded == by_pairs.encoded
    assert by_chat.counts.tolist() == by_pairs.counts.tolist()
    text = neutral_texts(liar, ["The capital of Peru is Lima."])
    assert text.counts[0] == len(text.encoded[0].ids) - 1
    with pytest.raises(DataError, match=r"row 0 .*without an answer"):
        neutral_texts(liar, [chat[:1]])
    with pytest.raises(DataError, match="one token only"):
        neutral_texts(liar, ["a"])


def test_another_model_has_to_be_given_texts(hooked):
    with pytest.raises(InputError, match="has to be given"):
        neutral_texts(hooked("llama"))
    assert len(neutral_texts(hooked("llama"), ["the capital of France", "yes or no"])) == 2


def test_an_intervention_on_the_prompt_is_compared_at_the_reply(liar):
    neutral = neutral_texts(liar, count=6)

    @contextmanager
    def told():
        liar.rewrite = lambda prompt: [{"role": "system", "content": "Be rude."}, *prompt[-1:]]
        try:
            yield
        finally:
            liar.rewrite = None

    found = neutral_kl(liar, told, neutral)
    row = next(at for at in range(6) if neutral.kinds[at] == "tone")
    with told():
        (other,) = liar.encode([neutral.prompts[row]], [neutral.replies[row]])
    count = int(neutral.counts[row])
    with torch.no_grad():
        p, q = (
            liar.model(input_ids=torch.tensor([item.ids])).logits[0, -count - 1 : -1].double().log_softmax(-1)
            for item in (other, neutral.encoded[row])
        )
    np.testing.assert_allclose(found.rows[row], float((p.exp() * (p - q)).sum(-1).mean()), rtol=1e-4)
    assert found.rows[row] > 0.1


def test_nan_is_named(liar):
    broken = lambda: liar.hooks(write={"resid_post.2": lambda x: x * float("nan")})  # noqa: E731
    with pytest.raises(NonFiniteError, match="neutral text"):
        neutral_kl(liar, broken, neutral_texts(liar, count=3))


def test_the_loss_is_the_kl_of_masked_positions_and_its_gradient_is_right():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    plain, mask = torch.randn(2, 3, 5, dtype=torch.float64), torch.tensor([[1, 1, 0], [0, 1, 0]])
    expected, count = 0.0, 0
    for row in range(2):
        for at in range(3):
            if mask[row, at]:
                p, q = logits[row, at].softmax(-1), plain[row, at].softmax(-1)
                expected += sum(float(a * (a.log() - b.log())) for a, b in zip(p.detach(), q))
                count += 1
    assert kl_loss(logits, plain, mask).item() == pytest.approx(expected / count, rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: kl_loss(x, plain, mask), (logits,))
    assert kl_loss(plain, plain, mask).item() == 0
    # What is masked has no part in it, whatever stands there.
    wild = plain.clone()
    wild[mask == 0] = 1e30
    assert kl_loss(logits, wild, mask).item() == pytest.approx(expected / count, rel=1e-12)


def test_the_loss_is_the_measure(liar):
    neutral = neutral_texts(liar, count=5)
    inputs = liar.batch(neutral.encoded)
    with torch.no_grad():
        plain = liar.run(inputs).logits
        with pushed(liar)():
            steered = liar.run(inputs).logits
    loss = kl_loss(steered, plain, neutral.mask(range(5)))
    assert float(loss) == pytest.approx(neutral_kl(liar, pushed(liar), neutral).kl.value, rel=1e-4)
