"""Every site of every family holds what its name says, and an edit there does what it should."""

import pytest
import torch

import veridical as vd
from tiny_models import CAUSAL, TEXT, TINY, make
from veridical.errors import InputError, ModelError, UnknownNameError
from veridical.sites import HEAD_KINDS, KINDS, Site

ROWS = [[5, 9, 17, 40, 77, 120, 33, 8], [6, 61, 18, 44, 250, 3, 90, 12]]
ABSENT = {
    "gpt_neox": {"resid_mid"},
    "opt_post_norm": {"ln_final"},
    "mixtral": {"mlp_post"},
    "bert": {"ln_final"},
}


def inputs_of(model):
    return model.dummy_inputs() if model.kind == "vision" else model.batch(ROWS)


@pytest.mark.parametrize("spelling", ["blocks.5.hook_resid_post", "resid_post.5", Site("resid_post", 5)])
def test_spellings_of_one_site(spelling):
    site = Site.parse(spelling)
    assert (site.name, site.short) == ("blocks.5.hook_resid_post", "resid_post.5")


def test_every_kind_round_trips():
    for kind in KINDS:
        site = Site(kind, None if kind in ("embed", "ln_final") else 2)
        assert Site.parse(site.name) == Site.parse(site.short) == site
    assert Site.parse("model.layers.5.mlp:out").path == "model.layers.5.mlp:out"


@pytest.mark.parametrize("text", ["resid_pst.3", "blocks.1.hook_resid", "resid_post", "embed.0", "", ":out"])
def test_what_is_no_site(text):
    with pytest.raises(UnknownNameError, match="unknown site") as raised:
        Site.parse(text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", TINY)
def test_which_kinds_a_family_has(hooked, name):
    kinds = {Site.parse(site).kind for site in hooked(name).sites()}
    assert kinds == set(KINDS) - ABSENT.get(name, set())


@pytest.mark.parametrize("name", TINY)
def test_shapes_and_widths(hooked, name):
    model = hooked(name)
    run = model.run(inputs_of(model), read="*")
    rows, positions = run["resid_pre.0"].shape[:2]
    for site in model.resolve("*"):
        if site.kind == "pattern":
            assert run[site].shape == (rows, model.n_heads, positions, positions)
        else:
            assert run[site].shape == (rows, positions, *model.width(site))
            assert (len(model.width(site)) == 2) == (site.kind in HEAD_KINDS)


@pytest.mark.parametrize("name", TINY)
def test_reading_changes_no_bit_and_leaves_nothing(hooked, tiny, name):
    model, module = hooked(name), tiny(name)
    inputs = inputs_of(model)

    def hooks():
        # transformers leaves hooks of its own on a model whose hidden states another test has asked for
        return [(list(part._forward_hooks), list(part._forward_pre_hooks)) for part in module.modules()]

    there = hooks()
    with torch.no_grad():
        before = module(**inputs).logits
        run = model.run(inputs, read="*")
        assert torch.equal(run.logits, before)
        assert torch.equal(module(**inputs).logits, before)
    assert hooks() == there
    assert not any(hasattr(getattr(part, "config", None), "veridical_taps") for part in module.modules())


@pytest.mark.parametrize("name", TINY)
def test_stream_equals_hidden_states(hooked, tiny, name):
    model = hooked(name)
    inputs = inputs_of(model)
    hidden = tiny(name)(**inputs, output_hidden_states=True).hidden_states
    run = model.run(inputs, read="*")
    for layer in range(model.n_layers):
        assert torch.equal(run[f"resid_pre.{layer}"], hidden[layer])
        if layer + 1 < model.n_layers:
            assert torch.equal(run[f"resid_post.{layer}"], hidden[layer + 1])
    last = run[f"resid_post.{model.n_layers - 1}"]
    if "ln_final.hook_normalized" in run.values and name != "vit":  # HF's last one is after the final norm
        assert torch.equal(run["ln_final"], hidden[-1])
        assert not torch.allclose(last, hidden[-1])
    elif name != "opt_post_norm":  # which projects to another width at the end
        assert torch.equal(last, hidden[-1])


@pytest.mark.parametrize("name", TINY)
def test_stream_is_the_sum_of_its_parts(hooked, name):
    model = hooked(name)
    run = model.run(inputs_of(model), read="*")
    if not model.architecture.adds_up:
        pytest.skip("normalises after adding")
    for layer in range(model.n_layers):
        middle = run[f"resid_pre.{layer}"] + run[f"attn_out.{layer}"]
        if name != "gpt_neox":
            torch.testing.assert_close(run[f"resid_mid.{layer}"], middle)
        torch.testing.assert_close(run[f"resid_post.{layer}"], middle + run[f"mlp_out.{layer}"])


def test_parts_of_bert(hooked, tiny):
    model, layers = hooked("bert"), tiny("bert").bert.encoder.layer
    run = model.run(inputs_of(model), read="*")
    for index, layer in enumerate(layers):
        middle = layer.attention.output.LayerNorm(run[f"resid_pre.{index}"] + run[f"attn_out.{index}"])
        torch.testing.assert_close(run[f"resid_mid.{index}"], middle)
        post = layer.output.LayerNorm(middle + run[f"mlp_out.{index}"])
        torch.testing.assert_close(run[f"resid_post.{index}"], post)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_pattern_equals_the_attention_of_eager(name, implementation, padding):
    if name == "gemma2" and implementation == "sdpa":
        pytest.skip("transformers refuses softcapped attention with sdpa")
    model = vd.load(make(name, attn_implementation=implementation), check=False)
    eager = make(name, attn_implementation="eager")
    if name == "vit":
        inputs, real = model.dummy_inputs(), None
    else:
        rows = ROWS if padding == "none" else [ROWS[0], ROWS[1][:5]]
        inputs = model.batch(rows, "left" if padding == "left" else "right")
        real = inputs["attention_mask"].bool()
    run = model.run(inputs, read="pattern.*")
    attentions = eager(**inputs, output_attentions=True).attentions
    for layer, expected in enumerate(attentions):
        found = run[f"pattern.{layer}"]
        for row in range(len(found)):
            seen = slice(None) if real is None else real[row]
            torch.testing.assert_close(found[row][:, seen], expected[row][:, seen])
            torch.testing.assert_close(
                found[row][:, seen].sum(-1), torch.ones_like(found[row][:, seen][..., 0])
            )


@pytest.mark.parametrize("name", TINY)
def test_every_edit_has_an_effect_and_is_undone(hooked, name):
    model = hooked(name)
    inputs = inputs_of(model)
    before = model.run(inputs).logits
    for site in model.resolve("*"):
        clean = model.run(inputs, write={site: lambda value: value.clone()}).logits
        assert torch.equal(clean, before), f"clean into clean at {site}"
        noise = torch.Generator().manual_seed(0)
        edited = model.run(
            inputs, write={site: lambda value, noise=noise: value + torch.randn(value.shape, generator=noise)}
        )
        change = (edited.logits - before).abs().max()
        assert change > 1e-4, f"an edit at {site} changed the logits by {change}"
        assert torch.equal(model.run(inputs).logits, before)


@pytest.mark.parametrize("name", TINY)
def test_patching_the_whole_stream_gives_the_other_run(hooked, name):
    model = hooked(name)
    here = inputs_of(model)
    there = {
        key: value.flip(-1) if key in ("input_ids", "pixel_values") else value for key, value in here.items()
    }
    other = model.run(there, read="*")
    for kind in ("resid_pre", "resid_mid", "resid_post"):
        site = f"{kind}.1"
        if name == "gpt_neox" and kind == "resid_mid":
            continue
        patched = model.run(here, write={site: lambda value, site=site: other[site]})
        assert torch.equal(patched.logits, other.logits), site


@pytest.mark.parametrize("name", TINY)
def test_an_edited_site_reads_as_edited(hooked, name):
    model = hooked(name)
    inputs = inputs_of(model)
    for site in model.resolve("*"):
        target = {}

        def edit(value, target=target):
            target["is"] = value * 1.5 + 0.25
            return target["is"]

        run = model.run(inputs, read=[site], write={site: edit}, stop=True)
        torch.testing.assert_close(run[site], target["is"], msg=str(site))


@pytest.mark.parametrize("name", TINY)
def test_z_is_read_before_the_output_projection(hooked, name):
    """Silencing a head equals silencing its rows of the output projection."""
    model = hooked(name)
    inputs = inputs_of(model)
    layer, head = 1, 2

    def without_head(value):
        value[:, :, head] = 0
        return value

    found = model.run(inputs, write={f"z.{layer}": without_head}).logits
    other = make(name)
    projection = vd.load(other, check=False).place(Site("z", layer)).module
    rows = slice(head * model.d_head, (head + 1) * model.d_head)
    with torch.no_grad():
        if hasattr(projection, "nx"):  # gpt2's Conv1D is [in, out]
            projection.weight[rows] = 0
        else:
            projection.weight[:, rows] = 0
    torch.testing.assert_close(found, other(**inputs).logits)
    assert not torch.allclose(found, model.run(inputs).logits, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("kind", ["q", "k", "v"])
def test_heads_are_those_of_the_projections(hooked, tiny, name, kind):
    """Against the weights themselves, sliced by hand."""
    model = hooked(name)
    attention = model.architecture.blocks[1]
    inputs = inputs_of(model)
    heads = model.n_heads if kind == "q" else model.n_kv_heads
    d_head = model.d_head
    found = model.run(inputs, read=[f"{kind}.1"])[f"{kind}.1"]
    place = model.place(Site(kind, 1))
    entered = {}
    handle = place.module.register_forward_pre_hook(lambda module, args: entered.update(x=args[0]))
    model.run(inputs)
    handle.remove()
    weight, bias = place.module.weight, getattr(place.module, "bias", None)
    out = entered["x"] @ (weight if hasattr(place.module, "nx") else weight.T)
    out = out if bias is None else out + bias
    if name.startswith("gpt_neox"):
        index = "qkv".index(kind)
        expected = [
            out[..., (3 * head + index) * d_head : (3 * head + index + 1) * d_head] for head in range(heads)
        ]
    else:
        before = {"q": 0, "k": model.n_heads, "v": model.n_heads + model.n_kv_heads}[kind]
        start = before * d_head if out.shape[-1] > heads * d_head else 0
        expected = [out[..., start + head * d_head : start + (head + 1) * d_head] for head in range(heads)]
    torch.testing.assert_close(found, torch.stack(expected, -2))
    assert attention is not None


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("kind", ["q", "k", "v"])
def test_a_head_edit_stays_in_its_head(hooked, name, kind):
    """Editing one head of q, k or v must leave the mixes of all other heads as they are."""
    model = hooked(name)
    if model.architecture.model_type == "olmo2" and kind != "v":
        pytest.skip("olmo2 normalises queries and keys over all heads together")
    inputs = inputs_of(model)
    head, group = 1, model.n_heads // model.n_kv_heads

    def stretch(value):  # a shift of all keys alike would change nothing
        value[:, :, head] *= torch.linspace(-2, 3, value.shape[-1])
        return value

    before = model.run(inputs, read=["z.0"])["z.0"]
    after = model.run(inputs, read=["z.0"], write={f"{kind}.0": stretch})["z.0"]
    changed = (after - before).abs().amax(dim=(0, 1, 3)) > 1e-6
    expected = {head} if kind == "q" else set(range(head * group, (head + 1) * group))
    assert set(changed.nonzero().flatten().tolist()) == expected


def test_pattern_edit_is_exact_elsewhere(hooked):
    model = hooked("llama")
    inputs = inputs_of(model)

    def uniform_first_head(value):
        value[:, 0] = 1 / value.shape[-1]
        return value

    before = model.run(inputs, read=["z.1", "v.1"])
    after = model.run(inputs, read=["z.1"], write={"pattern.1": uniform_first_head})
    assert torch.equal(after["z.1"][:, :, 1:], before["z.1"][:, :, 1:])
    mean = before["v.1"][:, :, 0].mean(1, keepdim=True).expand_as(after["z.1"][:, :, 0])
    torch.testing.assert_close(after["z.1"][:, :, 0], mean)


def test_gpt2_upcast_attention_keeps_its_bits():
    module = make("gpt2", reorder_and_upcast_attn=True, attn_implementation="eager")
    model = vd.load(module)
    inputs = inputs_of(model)
    before = module(**inputs, use_cache=False).logits
    assert torch.equal(model.run(inputs, read="pattern.*").logits, before)


def test_globs_and_order(hooked):
    model = hooked("llama")
    assert model.sites("resid_post.*") == [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
    assert model.sites("blocks.1.*")[0] == "blocks.1.hook_resid_pre"
    assert model.sites("resid_post.[01]") == model.sites("resid_post.0, resid_post.1")
    assert model.sites("resid_post.-1") == ["blocks.2.hook_resid_post"]
    mixed = model.sites(["ln_final", "z.1", "resid_post.0", "embed", "z.1", "pattern.1"])
    assert mixed == [
        "hook_embed",
        "blocks.0.hook_resid_post",
        "blocks.1.attn.hook_pattern",
        "blocks.1.attn.hook_z",
        "ln_final.hook_normalized",
    ]
    assert model.sites("model.layers.*.mlp:out") == [f"model.layers.{layer}.mlp:out" for layer in range(3)]
    assert model.sites("lm_head:out, model.layers.0:out, resid_post.1") == [
        "model.layers.0:out",
        "blocks.1.hook_resid_post",
        "lm_head:out",
    ]


@pytest.mark.parametrize("name", CAUSAL)
def test_all_sites_come_in_the_order_of_the_forward(hooked, name):
    model = hooked(name)
    order = []
    read = {
        site: lambda value, site=site: order.append(site)
        for site in model.sites("resid_*.*, embed, q.*, z.*, attn_out.*, mlp_out.*")
    }
    model.run(model.batch(ROWS), read=read)
    assert order == list(read)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("resid_pst.1", "resid_post.1"),
        ("blocks.1.hook_resid_pots", "blocks.1.hook_resid_post"),
        ("resid_post.7", "resid_post"),
        ("nothing.*", "unknown site"),
        ("model.layrs.1:out", "model.layers.1:out"),
        ("model.layers.1.nothing*:out", "model.layers.1"),
    ],
)
def test_unknown_sites_name_the_nearest(hooked, spec, said):
    with pytest.raises(UnknownNameError, match=said) as raised:
        hooked("llama").resolve(spec)
    assert "\n" not in str(raised.value)


def test_absent_kinds_are_unknown(hooked):
    with pytest.raises(UnknownNameError, match=r"mlp_post\.0"):
        hooked("mixtral").resolve("mlp_post.0")
    assert hooked("qwen3_moe").sites("mlp_post.*") == ["blocks.1.mlp.hook_post"]  # its one dense layer
    with pytest.raises(InputError, match="no site was named"):
        hooked("llama").resolve(" , ")


def test_raw_paths_equal_named_sites(hooked):
    model = hooked("llama")
    pairs = {
        "model.layers.1:in": "resid_pre.1",
        "model.layers.1:out": "resid_post.1",
        "model.layers.1.self_attn:out": "attn_out.1",
        "model.layers.1.mlp.down_proj:in": "mlp_post.1",
        "model.norm:out": "ln_final",
    }
    run = model.run(model.batch(ROWS), read=[*pairs, *pairs.values()])
    for raw, named in pairs.items():
        assert torch.equal(run[raw], run[named])
        assert model.width(raw) == model.width(named)
    assert model.width("model.layers.0.self_attn.q_proj:out") == (32,)


def test_a_family_that_is_not_in_the_table(tokenizer):
    import transformers

    config = transformers.StableLmConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    model = vd.load(transformers.StableLmForCausalLM(config).eval(), tokenizer=tokenizer)
    assert model.sites() == []
    assert (model.kind, model.n_layers, model.d_model) == ("causal", 2, 32)
    run = model.run(
        model.batch(ROWS), read=["model.layers.1:out"], write={"model.layers.0:out": lambda v: v * 2}
    )
    assert run["model.layers.1:out"].shape == (2, 8, 32)
    assert model.width("model.layers.0.mlp:out") == (32,)
    with pytest.raises(UnknownNameError, match=r"stablelm is not in the table .* raw module paths"):
        model.resolve("resid_post.0")
    with pytest.raises(UnknownNameError, match=r"nearest: model\.layers\.1:out"):
        model.resolve("model.layer.1:out")


def test_pattern_has_no_width(hooked):
    with pytest.raises(InputError, match="no fixed width"):
        hooked("llama").width("pattern.0")


def test_multimodal_gemma3_reads_its_text_model():
    import transformers

    text = TINY["gemma3"][2]
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    model = vd.load(transformers.Gemma3ForConditionalGeneration(config).eval())
    assert (model.kind, model.n_layers) == ("causal", 3)
    assert len(model.sites()) == len(KINDS) - 2 + 11 * 2 + 2


def test_flash_and_window_masks():
    """Masks of flash attention come as real tokens per row, against the mask written out."""
    from veridical.attention import pattern_of

    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    real = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    module = torch.nn.Module()
    module.is_causal = True
    for window in (None, 3):
        at = torch.arange(6)
        seen = (at[None, :] <= at[:, None]) & ((at[:, None] - at[None, :] < window) if window else True)
        full = seen[None, None] & real.bool()[:, None, None, :]
        found = pattern_of(module, query, key, real, "flash_attention_2", sliding_window=window)
        torch.testing.assert_close(found, pattern_of(module, query, key, full, "sdpa"))
    with pytest.raises(ModelError, match="cannot be read with flex_attention"):
        pattern_of(module, query, key, object(), "flex_attention")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TEXT)
def test_a_batch_equals_each_prompt_alone(hooked, name):
    """Right or left padding, mixed lengths: each real token has the values and logits of its prompt alone."""
    model = hooked(name)
    rows = [ROWS[0], ROWS[1][:3], ROWS[0][2:7], ROWS[1][:1]]
    alone = [model.run(model.batch([row]), read="*") for row in rows]
    for side in ("right", "left"):
        inputs = model.batch(rows, side)
        run = model.run(inputs, read="*")
        for index, (row, single) in enumerate(zip(rows, alone)):
            real = inputs["attention_mask"][index].bool()
            assert real.sum() == len(row)
            torch.testing.assert_close(run.logits[index, real], single.logits[0], rtol=1e-4, atol=2e-5)
            for site in model.resolve("*"):
                found = run[site][index]
                found = found[:, real][..., real] if site.kind == "pattern" else found[real]
                torch.testing.assert_close(found, single[site][0], rtol=1e-4, atol=2e-5, msg=f"{site} {side}")
