"""Input that means nothing ends in one clear line, in every function that compares two runs."""

import copy

import pytest
import torch

import veridical as vd
from veridical.errors import DataError, InputError, NonFiniteError
from veridical.interventions import attribute, find_circuit, patch, patch_paths

CLEAN, CORRUPT = [[5, 9, 17, 40], [6, 61, 18, 44]], [[5, 88, 17, 41], [6, 3, 21, 44]]
JUDGED = {"answers": 7, "wrong": 8}
VERBS = {
    "patch": patch,
    "attribute": lambda *given, **more: attribute(*given, method="edges", **more),
    "patch_paths": lambda *given, **more: patch_paths(*given, edges="mlp.0->logits", **more),
    "find_circuit": find_circuit,
}


@pytest.fixture(params=VERBS)
def act(request):
    return VERBS[request.param]


@pytest.mark.parametrize(
    ("clean", "corrupt", "kind", "said"),
    [
        ([], [], InputError, "clean is empty"),
        ([[]], [[]], DataError, "clean has a row without tokens"),
        (CLEAN, CORRUPT[:1], InputError, "2 rows and corrupt 1"),
        ([[5, 9, 17]], [[5, 9]], InputError, r"clean has 3 tokens .*and corrupt 2 .*align="),
        ([[5, -3]], [[5, 9]], InputError, "from 0 to 299; -3 arrived"),
        ([[5, 300]], [[5, 9]], InputError, "from 0 to 299; 300 arrived"),
        (torch.zeros(2, 4), torch.zeros(2, 4), InputError, "expected token ids"),
    ],
)
def test_runs_that_are_none(hooked, act, clean, corrupt, kind, said):
    with pytest.raises(kind, match=said) as raised:
        act(hooked("qwen2"), clean, corrupt, **JUDGED)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"metric": lambda logits: logits.mean()}, "returned a scalar; expected one number for each row"),
        ({"metric": lambda logits: [1, 2]}, "returned a list; expected a tensor"),
        ({"metric": "logit_dif"}, "nearest: logit_diff"),
        ({"answers": None}, "needs answers="),
        ({"answers": 8}, "begin with the same token 8"),
        ({"answers": [1, 2, 3]}, "3 answers for 2 rows"),
        ({"answers": 300}, "the vocabulary has 0 to 299"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
    ],
)
def test_metrics_and_options_that_do_not_fit(hooked, act, options, said):
    with pytest.raises(InputError, match=said) as raised:
        act(hooked("qwen2"), CLEAN, CORRUPT, **{**JUDGED, **options})
    assert "\n" not in str(raised.value)


def test_nan_in_the_model(hooked, act):
    model = vd.load(copy.deepcopy(hooked("qwen2").model), check=False)
    with torch.no_grad():
        model.model.model.layers[1].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(vd.VeridicalError, match=r"NaN|nan|not the sum of its parts"):
        act(model, CLEAN, CORRUPT, **JUDGED)


def test_a_metric_that_is_nan(hooked):
    with pytest.raises(NonFiniteError, match="is nan in the unpatched run of row 1 of 2"):
        patch(
            hooked("qwen2"), CLEAN, CORRUPT, metric=lambda logits: logits[:, -1, 0] / torch.tensor([1, 0]) * 0
        )


@pytest.mark.parametrize("name", ["patch", "patch_paths"])
def test_runs_that_are_the_same_are_told(hooked, name):
    with pytest.warns(UserWarning, match="same to the last token"):
        found = VERBS[name](hooked("qwen2"), CLEAN, CLEAN, **JUDGED)
    assert not found.effects.any()


def test_a_plain_module_is_loaded(hooked, act):
    model = hooked("qwen2")
    act(model.model, CLEAN[:1], CORRUPT[:1], **JUDGED)


def test_heads_that_are_not_there_name_the_groups(hooked):
    model = hooked("qwen2")
    with pytest.raises(
        InputError, match=r"head 3 does not exist at k.0: .*shared by groups of 2 query heads"
    ):
        patch(model, CLEAN, CORRUPT, sites="k.0", heads=3, **JUDGED)
    for act, more in ((attribute, {"method": "edges"}), (patch_paths, {})):
        with pytest.raises(InputError, match=r"unknown receiver 'head.1.3:k'.*each shared by 2 of the 4"):
            act(model, CLEAN, CORRUPT, edges="embed->head.1.3:k", **more, **JUDGED)


def test_a_source_of_other_depth_is_named(hooked):
    module = hooked("qwen2").model
    config = copy.deepcopy(module.config)
    config.num_hidden_layers, config.layer_types = 1, config.layer_types[:1]
    source = vd.load(type(module)(config).eval(), check=False)
    with pytest.raises(InputError, match=r"the source Qwen2ForCausalLM has no resid_pre.1 \(1 layers\)"):
        patch(hooked("qwen2"), CLEAN, CORRUPT, source=source, **JUDGED)
