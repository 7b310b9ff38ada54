"""The logit lens equals norm and head applied by hand, and the model itself at the end."""

import numpy as np
import pytest
import torch

import veridical as vd
from tiny_models import CAUSAL, make
from veridical.errors import InputError, UnknownNameError
from veridical.interventions import LensReading, logit_lens
from veridical.interventions.readout import Readout

TEXTS = ["the capital of France is Paris", "gold?", "what is the symbol of silver? it is Ag"]


@pytest.mark.parametrize("family", [*CAUSAL, "bert"])
def test_the_last_layer_is_the_model_itself(hooked, family):
    """Through the readout too, bit for bit: norms, projections, softcaps and heads are the model's own."""
    model = hooked(family)
    inputs = model.batch(model.encode(TEXTS), padding_side="left")
    last = f"resid_post.{model.n_layers - 1}"
    with torch.no_grad():
        run = model.run(inputs, read=[last])
        again = Readout(model)(run[last], inputs)
        flat = Readout(model)(run[last][inputs["attention_mask"].bool()])
        assert torch.equal(model.run(inputs).logits, run.logits)
    assert torch.equal(again, run.logits)
    torch.testing.assert_close(flat, run.logits[inputs["attention_mask"].bool()], rtol=1e-4, atol=1e-4)
    reading = logit_lens(model, TEXTS)
    assert np.abs(reading.kl[-1]).max() < 1e-6
    assert (reading.rank[-1] == 0).all()
    assert (reading.kl[0] > 1e-3).any()


@pytest.mark.parametrize(
    ("family", "parts"), [("gpt2", ("transformer.ln_f", "lm_head")), ("llama", ("model.norm", "lm_head"))]
)
def test_every_figure_against_a_loop(hooked, family, parts):
    """One text at a time, norm and head by hand, float64, token by token."""
    model = hooked(family)
    reading = logit_lens(
        model, TEXTS, sites=["resid_pre.1", "resid_mid.1", "resid_post.1"], top=3, batch_tokens=20
    )
    assert reading.sites == ("resid_pre.1", "resid_mid.1", "resid_post.1")
    norm, head = (model.model.get_submodule(part) for part in parts)
    column = 0
    for row, one in enumerate(model.encode(TEXTS)):
        with torch.no_grad():
            run = model.run(model.batch([one]), read=list(reading.sites))
        for position, token in enumerate(one.ids):
            final = run.logits[0, position].double().log_softmax(-1)
            assert (reading.rows[column], reading.positions[column]) == (row, position)
            assert reading.tokens[column] == model.tokenizer.decode([token])
            target = int(final.argmax())
            assert reading.targets[column] == target
            for at, site in enumerate(reading.sites):
                with torch.no_grad():
                    lens = head(norm(run[site][0, position])).double().log_softmax(-1)
                expected = {
                    "probability": float(lens[target].exp()),
                    "rank": int((lens > lens[target]).sum()),
                    "kl": float((final.exp() * (final - lens)).sum()),
                    "entropy": float(-(lens.exp() * lens).sum()),
                }
                for name, value in expected.items():
                    assert getattr(reading, name)[at, column] == pytest.approx(value, rel=1e-3, abs=1e-4), (
                        name
                    )
                order = lens.argsort(descending=True)[:3]
                assert reading.top_ids[at, column].tolist() == order.tolist()
                np.testing.assert_allclose(
                    reading.top_probabilities[at, column], lens[order].exp(), rtol=1e-3
                )
            column += 1
    assert column == len(reading.rows)


def test_answers_are_followed(hooked):
    model = hooked("llama")
    reading = logit_lens(model, TEXTS, answers=[7, 8, 9])
    assert [set(reading.targets[reading.rows == row]) for row in range(3)] == [{7}, {8}, {9}]
    with torch.no_grad():
        run = model.run(model.batch(model.encode(TEXTS[:1])))
    expected = run.logits[0].softmax(-1)[:, 7].numpy()
    np.testing.assert_allclose(reading.probability[-1][reading.rows == 0], expected, rtol=1e-4)
    one = logit_lens(model, torch.tensor([[5, 6, 7], [8, 9, 10]]), answers=3)
    assert set(one.targets) == {3}
    with pytest.raises(InputError, match="2 answers"):
        logit_lens(model, TEXTS, answers=[7, 8])
    with pytest.raises(InputError, match="follows one token"):
        logit_lens(model, TEXTS, answers=[[7, 8], [8, 1], [9, 2]])


def test_an_image_is_read_by_its_classifier(hooked):
    """Each token by hand through the final norm and the classifier; the class token's end is the model."""
    model = hooked("vit")
    images = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    reading = logit_lens(model, images, answers=[0, 1, 2], top=3, batch_tokens=20)
    assert list(reading.tokens[:3]) == ["class", "0,0", "0,1"]
    assert len(reading.rows) == 30
    assert set(reading.top_tokens.ravel()) == {"LABEL_0", "LABEL_1", "LABEL_2"}
    with torch.no_grad():
        run = model.run({"pixel_values": images}, read="resid_post.*")
        for at, values in enumerate(run.values.values()):
            own = model.model.classifier(model.model.vit.layernorm(values)).softmax(-1)
            expected = own[torch.arange(3), :, torch.arange(3)]
            np.testing.assert_allclose(reading.probability[at], expected.ravel().numpy(), rtol=1e-4)
            np.testing.assert_array_equal(reading.top_ids[at, :, 0], own.argmax(-1).ravel().numpy())
    ends = reading.positions == 0
    assert np.abs(reading.kl[-1][ends]).max() < 1e-6
    assert (reading.kl[-1][~ends] > 1e-4).any()
    np.testing.assert_array_equal(np.asarray(reading.facts["final_top"])[ends], run.logits.argmax(-1).numpy())
    assert "3 images" in reading.findings()[0]
    assert "likeliest label" in reading.figure().layout.title.text
    with pytest.raises(InputError, match="expected images"):
        logit_lens(model, TEXTS)


def test_bad_input(hooked):
    with pytest.raises(InputError, match="not the residual stream"):
        logit_lens(hooked("llama"), TEXTS, sites="mlp_out.*")
    with pytest.raises(UnknownNameError):
        logit_lens(hooked("llama"), TEXTS, sites="resid_pots.1")
    with pytest.raises(InputError, match="top is 0"):
        logit_lens(hooked("llama"), TEXTS, top=0)
    with pytest.raises(UnknownNameError, match="nearest: entropy"):
        logit_lens(hooked("llama"), TEXTS).figure(value="entopy")
    with pytest.raises(InputError, match="row 9"):
        logit_lens(hooked("llama"), TEXTS).figure(9)


def test_the_model_is_left_as_it_was(hooked):
    """Also when the model's own code fails between."""
    model = hooked("gpt2")
    own = model.architecture.blocks[1].forward
    readout = Readout(model)
    with pytest.raises(RuntimeError), torch.no_grad():
        readout(torch.zeros(2, 5))
    assert all("forward" not in block.__dict__ for block in model.architecture.blocks)
    assert model.architecture.blocks[1].forward == own


def test_a_reading_is_drawn_reported_and_kept(hooked, tmp_path):
    model = hooked("llama")
    reading = logit_lens(model, TEXTS)
    frame = reading.to_frame()
    assert len(frame) == len(reading.sites) * len(reading.rows)
    line = frame[(frame.site == "resid_post.1") & (frame.row == 1) & (frame.position == 2)].iloc[0]
    column = np.flatnonzero((reading.rows == 1) & (reading.positions == 2))[0]
    assert line["kl"] == reading.kl[1, column]
    assert line["top"] == reading.top_tokens[1, column, 0]
    figure = reading.figure(2, "kl")
    assert len(figure.data[0].z) == model.n_layers
    assert len(figure.data[0].z[0]) == (reading.rows == 2).sum()
    assert figure.data[0].text[1][0] is not None
    assert "KL" in reading.report_section().text
    reading.save(tmp_path / "reading")
    loaded = LensReading.load(tmp_path / "reading")
    assert loaded.to_frame().equals(frame)
    assert "<" in loaded._repr_html_()
    assert "logit lens" in repr(loaded)


def test_half_precision_is_measured_in_float32():
    model = vd.load(make("llama").to(torch.bfloat16), check=False)
    reading = logit_lens(model, [[5, 6, 7, 8]])
    assert reading.kl.dtype == np.float32
    assert np.abs(reading.kl[-1]).max() < 1e-6
