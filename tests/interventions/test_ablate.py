"""Ablation equals what editing weights, slicing tensors or running each text alone gives, and is undone."""

import copy
import warnings

import numpy as np
import pytest
import torch

import veridical as vd
from tiny_models import CAUSAL, TINY
from veridical.errors import InputError, UnknownNameError
from veridical.interventions import ablate, mean_activations

TEXTS = ["the capital of France is Paris", "gold?", "what is the symbol of silver? it is Ag"]
SITES = (
    "z",
    "attn_out",
    "mlp_out",
    "resid_pre",
    "resid_mid",
    "resid_post",
    "q",
    "k",
    "v",
    "mlp_post",
    "pattern",
)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def batches(model, side="left", texts=TEXTS):
    return model.batch(model.encode(texts), padding_side=side)


def alone(model, edits=None, texts=TEXTS):
    """Logits of each text by itself; `edits(site value)` by site."""
    return [model.run(model.batch([one]), write=edits or {}).logits[0] for one in model.encode(texts)]


def rows_of(logits, inputs):
    """The real tokens of each row."""
    return [row[mask.bool()] for row, mask in zip(logits, inputs["attention_mask"])]


def close(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize("family", TINY)
def test_zero_at_every_kind_of_site_is_a_naive_hook(hooked, family):
    model = hooked(family)
    inputs = model.dummy_inputs() if family == "vit" else batches(model)
    for kind in SITES:
        sites = [site for site in model.sites() if vd.sites.Site.parse(site).kind == kind][:1]
        for site in sites:
            expected = model.run(inputs, write={site: torch.zeros_like}).logits
            with ablate(model, site) as found:
                got = model.run(inputs).logits
            assert torch.equal(got, expected), site
            assert found.changed == {site: True}


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma2", "phi3", "gpt_neox", "bert"])
def test_a_head_at_z_is_columns_of_the_output_projection(hooked, family):
    """The slow way: a copy of the model whose output projection doesn't read the head."""
    model, layer, heads = hooked(family), 1, [1, 3]
    name = {"gpt2": "attn.c_proj", "gpt_neox": "attention.dense", "bert": "attention.output.dense"}
    changed = copy.deepcopy(model.model)
    blocks = vd.load(changed, check=False).architecture.blocks
    projection = blocks[layer].get_submodule(name.get(family, "self_attn.o_proj"))
    weight = projection.weight.T if family != "gpt2" else projection.weight
    for head in heads:
        weight[head * model.d_head : (head + 1) * model.d_head] = 0
    inputs = batches(model)
    expected = rows_of(changed(**inputs).logits, inputs)
    with ablate(model, f"z.{layer}", heads=heads):
        close(rows_of(model.run(inputs).logits, inputs), expected)
    with pytest.raises(AssertionError), ablate(model, f"z.{layer}", heads=[0, 3]):
        close(rows_of(model.run(inputs).logits, inputs), expected)


def test_heads_at_q_k_v_are_rows_of_their_projections(hooked):
    model, inputs = hooked("llama"), batches(hooked("llama"))
    for kind, head in (("q", 2), ("k", 1), ("v", 0)):
        changed = copy.deepcopy(model.model)
        projection = getattr(changed.model.layers[1].self_attn, f"{kind}_proj")
        projection.weight[head * model.d_head : (head + 1) * model.d_head] = 0
        with ablate(model, f"{kind}.1", heads=head):
            close(rows_of(model.run(inputs).logits, inputs), rows_of(changed(**inputs).logits, inputs))


def test_heads_of_a_pattern_are_heads_of_z(hooked):
    model, inputs = hooked("gpt2"), batches(hooked("gpt2"))
    with ablate(model, "z.1", heads=[0, 2]):
        expected = rows_of(model.run(inputs).logits, inputs)
    with ablate(model, "pattern.1", heads=[0, 2]):
        close(rows_of(model.run(inputs).logits, inputs), expected)


def test_neurons_are_columns_of_the_down_projection(hooked):
    model, inputs = hooked("llama"), batches(hooked("llama"))
    changed = copy.deepcopy(model.model)
    changed.model.layers[0].mlp.down_proj.weight[:, [3, 4, 40]] = 0
    with ablate(model, "mlp_post.0", neurons=[40, 3, 4]):
        close(rows_of(model.run(inputs).logits, inputs), rows_of(changed(**inputs).logits, inputs))


def test_heads_differ_by_site(hooked):
    model, inputs = hooked("llama"), batches(hooked("llama"))
    with ablate(model, "z.0", heads=1), ablate(model, "z.2", heads=[0, 3]):
        expected = model.run(inputs).logits
    with ablate(model, ["z.0", "z.2"], heads={"z.0": 1, "z.2": [0, 3]}):
        assert torch.equal(model.run(inputs).logits, expected)
    with (
        pytest.raises(InputError, match=r"says nothing of z\.2"),
        ablate(model, ["z.0", "z.2"], heads={"z.0": 1}),
    ):
        pass


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt", "mixtral"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_on_either_side_of_padding(hooked, family, side):
    """Each text by itself, with the rows of the tensor set to zero by hand."""
    model, inputs = hooked(family), batches(hooked(family), side)
    for positions, rows in (
        (0, [0]),
        (-1, [-1]),
        ([1, -2], [1, -2]),
        (slice(1, 3), [1, 2]),
        (slice(-2, None), [-2, -1]),
        (slice(None, None, 2), slice(None, None, 2)),
        (slice(None, -1), slice(None, -1)),
    ):

        def edit(value, rows=rows):
            value[:, rows] = 0
            return value

        expected = alone(model, {"resid_pre.1": edit})
        with ablate(model, "resid_pre.1", positions=positions):
            close(rows_of(model.run(inputs).logits, inputs), expected)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "bert", "vit"])
def test_patterns_are_averaged_and_resampled_by_query_and_key(hooked, family):
    """Against the patterns of each text, averaged or exchanged by hand."""
    model = hooked(family)
    random = torch.Generator().manual_seed(0)
    if family == "vit":
        given = {"pixel_values": torch.randn(4, 3, 24, 24, generator=random)}
        data, few = given, {"pixel_values": given["pixel_values"][:2]}
    else:
        ids = torch.randint(5, 200, (4, 6), generator=random)
        given, data = model.batch(ids.tolist()), ids
        few = {name: value[:2] for name, value in given.items()}
    with torch.no_grad():
        patterns = model.run(given, read=["pattern.1"])["pattern.1"]
        mean = patterns.double().mean(0).to(patterns)
    torch.testing.assert_close(mean.sum(-1), torch.ones_like(mean[..., 0]))
    means = mean_activations(model, data, "pattern.1", by_position=True, batch_tokens=13)
    torch.testing.assert_close(means["pattern.1"].transpose(0, 1).to(mean), mean)

    def put(value):
        value[:, [0, 2]] = mean[[0, 2]]
        return value

    with torch.no_grad():
        expected = model.run(few, write={"pattern.1": put}).logits
        for over in (data, means, {"pattern.1": means["pattern.1"]}):
            with ablate(model, "pattern.1", mode="mean", by_position=True, over=over, heads=[0, 2]):
                torch.testing.assert_close(model.run(few).logits, expected, rtol=1e-4, atol=1e-5)
        expected = model.run(given, write={"pattern.1": lambda value: mean.expand_as(value)}).logits
        with ablate(model, "pattern.1", mode="mean", by_position=True, over="batch"):
            torch.testing.assert_close(model.run(given).logits, expected, rtol=1e-4, atol=1e-5)
        expected = model.run(few, write={"pattern.1": lambda value: value.flip(0)}).logits
        with ablate(model, "pattern.1", mode="resample", by_position=True):
            torch.testing.assert_close(model.run(few).logits, expected, rtol=1e-4, atol=1e-5)
    if family != "vit":
        refused = pytest.raises(InputError, match="is of texts of 6 tokens; these have 3")
        with refused, ablate(model, "pattern.1", mode="mean", by_position=True, over=means):
            model.logits(ids[:, :3])


def test_pattern_positions_are_queries(hooked):
    model, inputs = hooked("llama"), batches(hooked("llama"))

    def edit(value):
        value[:, [2], -1] = 0
        return value

    expected = alone(model, {"pattern.1": edit})
    with ablate(model, "pattern.1", heads=2, positions=-1):
        close(rows_of(model.run(inputs).logits, inputs), expected)


def test_chosen_tokens(hooked, tokenizer):
    model, inputs = hooked("llama"), batches(hooked("llama"))
    wanted = tokenizer(" is", add_special_tokens=False)["input_ids"]
    assert len(wanted) == 1
    with ablate(model, "resid_pre.1", tokens=" is") as found:
        got = rows_of(model.run(inputs).logits, inputs)
    encoded = model.encode(TEXTS)
    for row, one in enumerate(encoded):
        at = [place for place, token in enumerate(one.ids) if token == wanted[0]]

        def edit(value, at=at):
            value[:, at] = 0
            return value

        close([got[row]], [model.run(model.batch([one]), write={"resid_pre.1": edit}).logits[0]])
    assert found.changed["blocks.1.hook_resid_pre"]
    with ablate(model, "resid_pre.1", tokens=wanted):
        close(rows_of(model.run(inputs).logits, inputs), got, 0)
    with (
        pytest.raises(InputError, match=r"'Paris is Rome' which is|'Paris is Rome', which is"),
        ablate(model, "resid_pre.1", tokens="Paris is Rome"),
    ):
        pass
    with pytest.raises(InputError, match="token ids 0 to 299"), ablate(model, "z.0", tokens=300):
        pass


def slow_generation(model, text, count, edit_at):
    """Greedy text, every step over the whole text without a cache; `edit_at(value, prompt)` by hand."""
    ids = list(model.encode([text])[0].ids)
    prompt = len(ids)
    for _ in range(count):
        write = {"resid_mid.1": lambda value: edit_at(value, prompt)}
        ids.append(int(model.run(model.batch([ids]), write=write).logits[0, -1].argmax()))
    return ids[prompt:]


@pytest.mark.parametrize(
    "positions", [None, 2, 12, -1, [-2, 4], slice(-1, None), slice(None, -1), slice(3, 13)]
)
def test_generation_with_a_cache_and_left_padding(hooked, positions):
    """Positions count over the whole text: as a text that is read anew at every step has them."""
    model, count = hooked("llama"), 8

    def edit(value, prompt):
        value = value.clone()
        if positions is None:
            value[:] = 0
            return value
        for one in positions if isinstance(positions, list) else [positions]:
            if isinstance(one, slice):
                ends = [end if end is None or end >= 0 else end + prompt for end in (one.start, one.stop)]
                value[:, slice(*ends)] = 0
            else:
                place = one if one >= 0 else one + prompt
                value[:, place : place + 1] = 0
        return value

    texts = TEXTS if positions is None or positions == -1 else TEXTS[::2]
    inputs = model.batch(model.encode(texts), padding_side="left")
    width = inputs["input_ids"].shape[1]
    with ablate(model, "resid_mid.1", positions=positions):
        made = model.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    for row, text in enumerate(texts):
        assert made[row, width:].tolist() == slow_generation(model, text, count, edit)


def test_a_position_that_generation_never_reaches(hooked):
    model = hooked("llama")
    with (
        pytest.raises(InputError, match=r"position 60 is outside every text"),
        ablate(model, "z.0", positions=60),
    ):
        model.generate(TEXTS[0], max_new_tokens=2)


def test_generate_and_logits_of_the_handle(hooked):
    model = hooked("llama")
    plain, said = model.logits(TEXTS), model.generate(TEXTS, max_new_tokens=5)
    with ablate(model, "mlp_out.*"):
        assert (model.logits(TEXTS) - plain).abs().max() > 0.1
        assert model.generate(TEXTS, max_new_tokens=5) != said
    assert torch.equal(model.logits(TEXTS), plain)
    assert model.generate(TEXTS, max_new_tokens=5) == said


def test_gradients_go_through(hooked):
    """What is ablated takes no gradient; what stands beside it does."""
    model, inputs = hooked("llama"), batches(hooked("llama"))
    with torch.enable_grad(), ablate(model, "z.1", heads=2):
        kept = {}

        def keep(value):
            kept["embed"] = value.detach().requires_grad_()
            return kept["embed"]

        logits = model.run(inputs, write={"embed": keep}).logits
        logits[:, -1].sum().backward()
    assert kept["embed"].grad.abs().max() > 0
    model.model.zero_grad()


def test_nested_and_undone(hooked):
    model, seen = hooked("llama"), []
    inputs = batches(model)
    block = model.architecture.blocks[0]
    mine = block.register_forward_hook(lambda *_: seen.append(1))
    plain = model.run(inputs).logits
    with ablate(model, "z.0", heads=0), ablate(model, "z.0", heads=1):
        both = model.run(inputs).logits
    with ablate(model, "z.0", heads=[0, 1]):
        assert torch.equal(model.run(inputs).logits, both)
    seen.clear()
    before = {name: len(part._forward_hooks) for name, part in model.model.named_modules()}

    class Stopped(Exception):
        pass

    with pytest.raises(Stopped), ablate(model, "z.*", positions=0), ablate(model, "pattern.0"):
        raise Stopped
    assert before == {name: len(part._forward_hooks) for name, part in model.model.named_modules()}
    assert torch.equal(model.run(inputs).logits, plain)
    assert seen == [1]
    mine.remove()


def test_what_changes_nothing_is_warned_about(hooked):
    model, inputs = hooked("llama"), batches(hooked("llama"))
    with pytest.warns(UserWarning, match="did not run"), ablate(model, "z.0"):
        pass
    with pytest.warns(UserWarning, match="no pass came by"), ablate(model, "z.2"):
        model.run(inputs, read=["z.0"], stop=True)
    with (
        pytest.warns(UserWarning, match="no chosen position or token"),
        ablate(model, "z.2", positions=slice(50, None)),
    ):
        model.run(inputs)
    with pytest.warns(UserWarning, match="already"), ablate(model, "z.0"), ablate(model, "z.0"):
        model.run(inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ablate(model, ["z.0", "mlp_out.2"], positions=-1):
            model.run(inputs)


def test_bad_input_is_one_clear_line(hooked):
    model = hooked("llama")

    def refused(match, error=InputError, sites="z.0", texts=TEXTS, **options):
        with pytest.raises(error, match=match) as caught, ablate(model, sites, **options):
            model.logits(texts)
        assert "\n" not in str(caught.value)

    refused("nearest: z.0", UnknownNameError, sites="zz.0")
    refused("nearest: zero", UnknownNameError, mode="zeros")
    refused("heads 0 to 3", heads=4)
    refused("heads 0 to 3", heads=-1)
    refused(
        r"2 key/value heads, each shared by a group of query heads \(0: 0-1, 1: 2-3\)", sites="v.1", heads=3
    )
    refused("not per head", sites="resid_post.1", heads=0)
    refused("neurons 0 to 47", sites="mlp_post.1", neurons=48)
    refused("is per head", neurons=1)
    refused("one or the other", heads=1, neurons=1)
    refused("outside the text of row 1, which has", positions=5)
    refused("outside the text of row 1, which has", positions=-9)
    refused("expected integers or slices", positions="last")
    refused("positions is empty", positions=[])
    refused("positive step", positions=slice(None, None, -1))
    refused("needs over=", mode="mean")
    refused("takes neither over", over="batch")
    refused("expected a store", mode="mean", over="bacth")
    refused("directions= goes with", directions=np.ones(8))
    refused("directions= goes with", mode="project")
    refused("width 5; the site has 32 .or 8, of one head", mode="project", directions=np.ones(5))
    refused("give by_position=True", sites="pattern.0", mode="mean", over="batch")
    refused("give by_position=True", sites="pattern.0", mode="resample")
    refused("not vectors", sites="pattern.0", mode="project", directions=np.ones(8))
    refused("over='batch'", sites="pattern.0", mode="resample", by_position=True, over=TEXTS)
    refused("must have one length", sites="pattern.0", mode="mean", by_position=True, over="batch")
    refused("these have different ones", sites="pattern.0", mode="mean", by_position=True, over=TEXTS)
    refused("has one row", mode="resample", texts=TEXTS[:1])
    refused("go together", features=[1])


@pytest.mark.parametrize("family", CAUSAL)
def test_every_family_in_float64_and_on_both_sides(hooked, family):
    model = hooked(family)
    double = vd.load(copy.deepcopy(model.model).double(), tokenizer=model.tokenizer, check=False)
    if family in ("mixtral", "qwen3_moe"):  # their grouped kernel knows no float64
        double.model.set_experts_implementation("eager")

    def edit(value):
        value[:, [0, -1], 1] = 0
        return value

    # In float64 the mask of transformers' eager gemma2 overflows where there is padding, also unedited.
    texts = TEXTS[:1] if family == "gemma2" else TEXTS
    expected = alone(double, {"z.1": edit}, texts)
    for side in ("left", "right"):
        inputs = batches(double, side, texts)
        with ablate(double, "z.1", heads=1, positions=[0, -1]):
            close(rows_of(double.run(inputs).logits, inputs), expected, 1e-12)
