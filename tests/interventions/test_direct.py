"""Direct logit attribution: parts sum to the logits, and each is what the frozen norm makes of it."""

import copy

import numpy as np
import pytest
import torch

import veridical as vd
from tiny_models import CAUSAL
from veridical.errors import InputError, ModelError
from veridical.interventions import DirectLogits, direct_logits

TEXTS = ["the capital of France is Paris", "gold?", "what is the symbol of silver? it is Ag"]
ADDING = [name for name in CAUSAL if name not in ("opt_post_norm",)]
WHOLE = ("gemma2", "gemma3", "olmo2")
LAYER_NORM = ("gpt2", "gpt_neox", "gpt_neox_sequential", "opt")


def double(model, family):
    made = vd.load(copy.deepcopy(model.model).double(), tokenizer=model.tokenizer, check=False)
    if family in ("mixtral", "qwen3_moe"):
        made.model.set_experts_implementation("eager")
    return made


@pytest.mark.parametrize("family", ADDING)
def test_parts_sum_to_the_logit_difference(hooked, family):
    """In float64; transformers' RMSNorm computes in float32 also there, which is what is left."""
    model = double(hooked(family), family)
    texts = TEXTS[:1] if family == "gemma2" else TEXTS
    found = direct_logits(model, texts, answers=7, wrong=11)
    logits = [model.logits([text])[0, -1].detach() for text in texts]
    expected = np.array([float(row[7] - row[11]) for row in logits])
    if family == "gemma2":  # the cap comes after
        cap = model.architecture.config.final_logit_softcapping
        uncapped = [torch.atanh(row / cap) * cap for row in logits]
        expected = np.array([float(row[7] - row[11]) for row in uncapped])
    tolerance = 1e-12 if family in LAYER_NORM else 1e-5
    scale = np.abs(found.values).sum(0).max()
    np.testing.assert_allclose(found.values.sum(0), expected, atol=tolerance * scale, rtol=0)
    np.testing.assert_allclose(found.totals, expected, atol=tolerance * scale, rtol=0)
    kinds = set(found.table["kind"])
    assert ("attn" in kinds) == (family in WHOLE)
    assert ("head" in kinds) == (family not in WHOLE)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_each_part_against_a_loop(hooked, family):
    """Each head through its own slice, the norm written out with its scale from the whole stream."""
    model = double(hooked(family), family)
    found = direct_logits(model, TEXTS, answers=[3, 4, 5])
    modules = dict(model.model.named_modules())
    norm = modules[
        {"gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm", "llama": "model.norm"}[family]
    ]
    head = model.model.get_output_embeddings().weight.detach()
    for text, answer, row in zip(TEXTS, (3, 4, 5), range(3)):
        with torch.no_grad():
            run = model.run(
                model.batch(model.encode([text])), read="z.*, mlp_out.*, resid_pre.0, resid_post.2, embed"
            )
        x = run["resid_post.2"][0, -1]
        eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
        centre = (lambda v: v - v.mean()) if family != "llama" else (lambda v: v)
        scale = (centre(x).square().mean() + eps).sqrt()

        def direct(vector, centre=centre, scale=scale, answer=answer):
            return float(head[answer] @ (norm.weight.detach() * centre(vector.detach()) / scale))

        expected = {"embed": direct(run["embed"][0, -1])}
        for layer, block in enumerate(model.architecture.blocks):
            projection = {"gpt2": "attn.c_proj", "gpt_neox": "attention.dense", "llama": "self_attn.o_proj"}[
                family
            ]
            weight = block.get_submodule(projection).weight.detach()
            weight = weight if family == "gpt2" else weight.T
            for number in range(model.n_heads):
                part = slice(number * model.d_head, (number + 1) * model.d_head)
                expected[f"head.{layer}.{number}"] = direct(run[f"z.{layer}"][0, -1, number] @ weight[part])
            expected[f"mlp.{layer}"] = direct(run[f"mlp_out.{layer}"][0, -1])
            bias = block.get_submodule(projection).bias
            if bias is not None:
                expected[f"attn_bias.{layer}"] = direct(bias)
        if family == "gpt2":
            expected["positions"] = direct((run["resid_pre.0"] - run["embed"])[0, -1])
        expected["constant"] = float(head[answer] @ norm.bias.detach()) if family != "llama" else 0.0
        assert set(expected) == set(found.table["component"])
        got = dict(zip(found.table["component"], found.values[:, row]))
        for name, value in expected.items():
            assert got[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_without_answers_it_is_the_likeliest_token(hooked):
    model = hooked("llama")
    found = direct_logits(model, TEXTS)
    expected = [float(model.logits([text])[0, -1].detach().max()) for text in TEXTS]
    np.testing.assert_allclose(found.totals, expected, rtol=1e-4)
    several = direct_logits(model, TEXTS, answers=[[3, 4], [5], [6, 7]], wrong=9)
    logits = [model.logits([text])[0, -1].detach() for text in TEXTS]
    means = [float(row[ids].mean() - row[9]) for row, ids in zip(logits, ([3, 4], [5], [6, 7]))]
    np.testing.assert_allclose(several.totals, means, rtol=1e-3, atol=1e-4)


def test_a_planted_head_is_found(hooked):
    """A head that writes the answer's direction, and nothing else, is where the difference comes from."""
    model = double(hooked("llama"), "llama")
    with torch.no_grad():
        projection = model.architecture.blocks[1].self_attn.o_proj.weight
        direction = model.model.lm_head.weight[7] / model.model.model.norm.weight
        projection[:, 2 * model.d_head : 3 * model.d_head] = direction[:, None] * torch.ones(model.d_head) * 5
        inputs = model.batch(model.encode(TEXTS[:1]))
        sign = model.run(inputs, read=["z.1"])["z.1"][0, -1, 2].sum().sign()
    frame = direct_logits(model, TEXTS[:1], answers=7).to_frame()
    heads = frame[frame["kind"] == "head"]
    assert heads.loc[heads["mean"].abs().idxmax(), "component"] == "head.1.2"
    assert np.sign(heads["mean"].abs().max()) * float(sign) == np.sign(
        float(heads.loc[heads["component"] == "head.1.2", "mean"].iloc[0])
    )


def test_what_does_not_add_up_is_refused(hooked):
    for family in ("bert", "opt_post_norm"):
        with pytest.raises(ModelError, match="not the sum of its parts"):
            direct_logits(hooked(family), TEXTS, answers=7)
    with pytest.raises(InputError, match=r"wrong= needs answers"):
        direct_logits(hooked("llama"), TEXTS, wrong=3)
    with pytest.raises(InputError, match="2 answers for 3 rows"):
        direct_logits(hooked("llama"), TEXTS, answers=[3, 4])
    with pytest.raises(InputError, match="same token"):
        direct_logits(hooked("llama"), TEXTS, answers=3, wrong=3)


def test_it_is_drawn_reported_and_kept(hooked, tmp_path):
    model = hooked("llama")
    found = direct_logits(model, TEXTS, answers=7, wrong=8)
    frame = found.to_frame()
    assert (frame["low"] <= frame["mean"]).all()
    assert frame["mean"].sum() == pytest.approx(found.totals.mean(), rel=1e-5)
    assert frame["share"].sum() == pytest.approx(1, rel=1e-5)
    assert len(found.figure().data[0].x) == min(30, len(frame))
    assert len(found.head_figure().data[0].z) == model.n_layers
    assert len(found.report_section().figures) == 2
    found.save(tmp_path / "direct")
    loaded = DirectLogits.load(tmp_path / "direct")
    assert loaded.to_frame().equals(frame)
    one = direct_logits(model, TEXTS[0], answers=7)
    assert one.to_frame()["low"].isna().all()
    assert any("no intervals" in line for line in one.findings())
    with pytest.raises(InputError, match="can't be told apart"):
        direct_logits(hooked("olmo2"), TEXTS, answers=7).head_figure()
