"""Metrics against their formulas, and what they refuse."""

import math

import numpy as np
import pytest
import torch

from veridical.errors import InputError, UnknownNameError
from veridical.interventions import Inputs, Metric, ProbeMetric, as_metric
from veridical.probes import LogisticProbe


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return torch.randn(3, 2, 300, dtype=torch.float64)


def test_named_metrics_are_their_formulas(hooked, logits):
    model, last = hooked("llama"), logits[:, -1]
    p = last.softmax(-1)
    rows = torch.arange(3)
    one, other = torch.tensor([4, 7, 9]), torch.tensor([5, 5, 5])

    def value(name, **options):
        return as_metric(name, model, **options)(logits)

    expected = last[rows, one] - last[rows, other]
    assert torch.equal(value("logit_diff", answers=[4, 7, 9], wrong=5), expected)
    assert torch.allclose(value("prob", answers=one), p[rows, one])
    assert torch.allclose(value("logprob", answers=[4, 7, 9]), p[rows, one].log())
    assert torch.allclose(value("cross_entropy", answers=[4, 7, 9]), -p[rows, one].log())
    above = torch.stack([(last[r] > last[r, one[r]]).sum() for r in rows])
    assert torch.equal(value("rank", answers=[4, 7, 9]), above.double())
    several = value("logit_diff", answers=[[4, 6], [7], [9, 10]], wrong=5)
    means = torch.stack([last[0, [4, 6]].mean(), last[1, 7], last[2, [9, 10]].mean()])
    assert torch.allclose(several, means - last[:, 5])


def test_kl_is_from_the_reference_to_the_run(hooked, logits):
    model, reference = hooked("llama"), torch.randn(3, 1, 300, dtype=torch.float64)
    p, q = reference[:, -1].softmax(-1), logits[:, -1].softmax(-1)
    metric = as_metric("kl", model)
    with pytest.raises(InputError, match="reference"):
        metric(logits)
    found = metric.with_reference(reference)(logits)
    assert torch.allclose(found, (p * (p / q).log()).sum(-1))
    assert torch.equal(as_metric("kl", model, reference=logits)(logits), torch.zeros(3).double())


def test_half_precision_is_computed_in_float32(hooked, logits):
    metric = as_metric("logprob", hooked("llama"), answers=4)
    found = metric(logits.bfloat16())
    assert found.dtype == torch.float32
    assert torch.equal(found, metric(logits.bfloat16().float()))


def test_rows_of_some_examples_get_their_own_answers(hooked, logits):
    metric = as_metric("logit_diff", hooked("llama"), answers=[4, 7, 9], wrong=5)
    index = [2, 2, 0, 1]
    assert torch.equal(metric.take(index, 3)(logits[index]), metric(logits)[index])
    own = as_metric(lambda x: x[:, -1, 0] - x[:, -1, 0].mean(), hooked("llama"))
    twice = torch.cat([logits, logits * 2])
    assert torch.equal(own.take([0, 1, 2] * 2, 3)(twice), torch.cat([own(logits), own(logits * 2)]))
    with pytest.raises(InputError, match="all 3 examples"):
        own.take(index, 3)


def test_a_metric_must_give_one_number_per_row(hooked, logits):
    model = hooked("llama")
    for function, said in [
        (lambda x: x[:, -1, 0].mean(), "returned a scalar; expected one number for each row"),
        (lambda x: x[:2, -1, 0], r"shape \[2\]"),
        (lambda x: 1.0, "returned a float"),
    ]:
        with pytest.raises(InputError, match=said):
            as_metric(function, model)(logits)
    assert as_metric(lambda x: x[:, -1, 0], model).keep is None
    assert as_metric(lambda x: x[:, -1, 0], model, keep=1).keep == 1


def test_what_is_refused(hooked):
    model = hooked("llama")
    with pytest.raises(UnknownNameError, match="nearest: logit_diff"):
        as_metric("logit_dif", model)
    for options, said in [
        ({"answers": 4}, "needs wrong="),
        (
            {"answers": [4, 5], "wrong": 5},
            "row 1: the right and the wrong answer begin with the same token 5",
        ),
        ({"answers": 300, "wrong": 5}, "the vocabulary has 0 to 299"),
        ({"answers": [], "wrong": 5}, "answers is empty"),
        ({"answers": 1.5, "wrong": 5}, "expected a text or a token id"),
        ({"answers": 4, "wrong": 5, "keep": 2}, "last position only"),
        ({"answers": 4, "wrong": 5, "keep": 0}, "keep is 0"),
    ]:
        with pytest.raises(InputError, match=said):
            as_metric("logit_diff", model, **options)
    with pytest.raises(InputError, match="2 answers for 3 rows"):
        as_metric("prob", model, answers=[4, 5])(torch.zeros(3, 1, 300))
    with pytest.raises(InputError, match="expected a name or a function"):
        as_metric(3, model)
    with pytest.raises(InputError, match="ProbeMetric"):
        as_metric("probe", model)


def test_text_answers_are_continuations_of_their_prompts(hooked):
    model = hooked("llama")
    given = Inputs.of(model, ["the capital of France is"] * 2, ["the capital of Italy is"] * 2)
    metric = as_metric("logit_diff", model, answers=" of", wrong=[" is", " capital"], inputs=given)
    ids = model.encode(["the capital of France is"] * 3, [" of", " is", " capital"])
    first = [item.ids[item.prompt_tokens] for item in ids]
    assert metric.targets["answers"].flatten().tolist() == [first[0]] * 2
    assert metric.targets["wrong"].flatten().tolist() == first[1:]
    with pytest.raises(InputError, match="begin with the same token"):
        as_metric("logit_diff", model, answers=" of", wrong=" of", inputs=given)
    alone = as_metric("prob", model, answers=" of")
    assert alone.targets["answers"].item() == model.tokenizer(" of", add_special_tokens=False)["input_ids"][0]


def test_a_probe_reads_its_own_site(hooked):
    model = hooked("llama")
    probe = LogisticProbe().adopt(np.array([0, 1]), np.arange(32.0), np.array([0.5]), 1)
    metric = as_metric(ProbeMetric(probe, "resid_post.1"), model)
    assert metric.site == "blocks.1.hook_resid_post"
    x = torch.randn(4, 32, dtype=torch.float64)
    assert np.allclose(metric(x).numpy(), probe.decision_function(x.numpy()))
    with pytest.raises(InputError, match="which site"):
        ProbeMetric(probe)
    with pytest.raises(InputError, match="reads 32 dimensions"):
        metric(torch.zeros(4, 8))
    assert isinstance(metric, Metric)
    assert math.isclose(float(metric(torch.zeros(1, 32))), 0.5)
