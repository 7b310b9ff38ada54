"""The engine: order, early stop, undoing, errors, gradients, and TransformerLens's own models."""

import pytest
import torch

import veridical as vd
from lens_models import bridge, hooked_transformer
from tiny_models import TINY, make
from veridical.errors import InputError, ModelError, UnknownNameError
from veridical.hooks import standing_hooks
from veridical.interventions.condition import carries_hooks

ROWS = [[5, 9, 17, 40, 77], [6, 61, 18, 44, 250]]


@pytest.fixture
def fresh(tokenizer):
    return vd.load(make("llama"), tokenizer=tokenizer, check=False)


def hooks_of(module):
    """Every hook on every submodule, by identity."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {(name, kind, id(hook)) for name, part in module.named_modules() for kind in kinds
            for hook in getattr(part, kind).values()}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_stop_runs_no_later_layer(name):
    """Counts calls: nothing after the deepest read runs, not the next block, the norm, or the head."""
    model = vd.load(make(name), check=False)
    calls = []
    for index, block in enumerate(model.architecture.blocks):
        block.register_forward_pre_hook(lambda module, args, index=index: calls.append(index))
    heads = [
        part
        for path, part in model.model.named_children()
        if path in ("lm_head", "embed_out", "cls", "classifier")
    ]
    for head in heads:
        head.register_forward_pre_hook(lambda module, args: calls.append("head"))
    assert heads
    inputs = model.dummy_inputs()
    full = model.run(inputs, read=["resid_post.1", "resid_pre.0"])
    assert calls == [0, 1, 2, "head"]
    calls.clear()
    run = model.run(inputs, read=["resid_post.1", "resid_pre.0"], stop=True)
    assert calls == [0, 1]
    assert run.output is None
    assert torch.equal(run["resid_post.1"], full["resid_post.1"])
    calls.clear()
    model.run(inputs, read="embed", stop=True)
    assert calls == []


@pytest.mark.parametrize("site", ["q.1", "pattern.1", "z.1", "resid_mid.1", "ln_final", "embed"])
def test_stop_anywhere_leaves_the_model_as_it_was(fresh, site):
    inputs = fresh.batch(ROWS)
    before, logits = hooks_of(fresh.model), fresh.run(inputs).logits
    closed = []
    handle = fresh.model.register_forward_hook(lambda *_: closed.append(1), always_call=True)
    run = fresh.run(inputs, read=[site], stop=True)
    assert run.output is None
    assert closed == [1]  # a user's always-called hook ran
    handle.remove()
    assert hooks_of(fresh.model) == before
    assert torch.equal(fresh.run(inputs).logits, logits)
    # transformers' own capturing of outputs is not left half open
    assert len(fresh.model(**inputs, output_hidden_states=True).hidden_states) == 4
    assert fresh.model.model.layers[1].self_attn.config is fresh.model.config


def test_stop_needs_a_read(fresh):
    with pytest.raises(InputError, match="needs a site"):
        fresh.run(fresh.batch(ROWS), stop=True)


def test_stop_is_never_seen_outside(fresh):
    with fresh.hooks(read=["resid_post.0"]) as outer:
        fresh.run(fresh.batch(ROWS), read=["resid_post.1"], stop=True)
        assert "blocks.0.hook_resid_post" in outer.values


def test_reads_as_functions(fresh):
    inputs = fresh.batch(ROWS)
    run = fresh.run(
        inputs, read={"resid_post.*": lambda value: value[:, -1].norm(dim=-1), "z.0": torch.Tensor.sum}
    )
    assert run["resid_post.2"].shape == (2,)
    assert run["z.0"].dim() == 0
    assert set(run.values) == {
        "blocks.0.attn.hook_z",
        *(f"blocks.{layer}.hook_resid_post" for layer in range(3)),
    }


def test_edits_run_in_order_and_reads_see_them(fresh):
    inputs = fresh.batch(ROWS)
    doubled = fresh.run(
        inputs, read=["resid_post.0", "resid_pre.1"], write={"resid_post.0": lambda value: value * 2}
    )
    plain = fresh.run(inputs, read=["resid_post.0"])
    torch.testing.assert_close(doubled["resid_post.0"], plain["resid_post.0"] * 2)
    assert torch.equal(doubled["resid_pre.1"], doubled["resid_post.0"])


def test_an_edit_in_place_does_not_reach_what_was_read(fresh):
    """resid_post.0 and resid_pre.1 are one tensor; an edit in place of the second leaves the first."""
    inputs = fresh.batch(ROWS)
    plain = fresh.run(inputs, read=["resid_post.0"])
    run = fresh.run(inputs, read=["resid_post.0"], write={"resid_pre.1": lambda value: value.mul_(0)})
    assert torch.equal(run["resid_post.0"], plain["resid_post.0"])


def test_nested_contexts_compose(fresh):
    inputs = fresh.batch(ROWS)
    with (
        fresh.hooks(write={"pattern.0": lambda value: value * 0}),
        fresh.hooks(read=["pattern.0", "z.0"]) as run,
    ):
        fresh.model(**inputs)
    assert run["pattern.0"].abs().max() == 0
    assert run["z.0"].abs().max().item() == pytest.approx(0, abs=1e-6)
    assert fresh.run(inputs, read=["pattern.0"])["pattern.0"].sum().item() == pytest.approx(
        2 * 4 * 5, rel=1e-5
    )


def test_user_hooks_survive_and_come_first(fresh):
    seen = []
    block = fresh.model.model.layers[1]
    handle = block.register_forward_hook(lambda module, args, output: seen.append(1) or output * 0)
    before = hooks_of(fresh.model)
    run = fresh.run(fresh.batch(ROWS), read=["resid_post.1", "pattern.1"])
    assert run["resid_post.1"].abs().max() == 0
    assert seen == [1]
    with pytest.raises(ZeroDivisionError), fresh.hooks(read="*", write={"z.0": lambda value: value}):
        raise ZeroDivisionError
    assert hooks_of(fresh.model) == before
    handle.remove()


@pytest.mark.parametrize("site", ["resid_pre.1", "resid_mid.1", "q.1", "pattern.1", "z.1", "ln_final"])
def test_exceptions_leave_nothing_behind(fresh, site):
    inputs = fresh.batch(ROWS)
    logits, before = fresh.run(inputs).logits, hooks_of(fresh.model)

    def fail(value):
        raise ZeroDivisionError("in the edit")

    with pytest.raises(ZeroDivisionError, match="in the edit"):
        fresh.run(inputs, read="*", write={site: fail})
    with pytest.raises(ZeroDivisionError):
        fresh.run(inputs, read={site: fail})
    assert hooks_of(fresh.model) == before
    for part in fresh.model.modules():
        if hasattr(part, "config"):
            assert part.config is fresh.model.config
    assert torch.equal(fresh.run(inputs).logits, logits)


@pytest.mark.parametrize("site", ["resid_post.1", "pattern.1", "v.1", "resid_mid.1"])
@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda value: None, "returned None"),
        (lambda value: 3, "returned a int"),
        (lambda value: value[:, :-1], "changed the shape"),
        (lambda value: value.double(), "changed the dtype"),
        (lambda value: value.to("meta"), "changed the device"),
    ],
)
def test_edits_that_do_not_fit(fresh, site, edit, said):
    with pytest.raises(InputError, match=said) as raised:
        fresh.run(fresh.batch(ROWS), write={site: edit})
    assert "\n" not in str(raised.value)
    assert vd.Site.parse(site).name in str(raised.value)


def test_unknown_sites_are_refused_before_anything_runs(fresh):
    for arguments in ({"read": ["resid_pst.1"]}, {"write": {"resid_post.9": torch.clone}}):
        with pytest.raises(UnknownNameError):
            fresh.run(fresh.batch(ROWS), **arguments)
        with pytest.raises(UnknownNameError), fresh.hooks(**arguments):
            pass


def test_a_site_that_is_not_reached_is_an_error(fresh):
    fresh.model.register_module("unused", torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match=r"not reached .*unused:out"):
        fresh.run(fresh.batch(ROWS), read=["unused:out"])
    with pytest.raises(ModelError, match="not edited: unused:out"):
        fresh.run(fresh.batch(ROWS), write={"unused:out": torch.clone})


def test_a_module_that_is_called_twice(fresh):
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.part = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.part(self.part(x))

    model = vd.load(Twice())
    with pytest.raises(ModelError, match="more than once"):
        model.run({"x": torch.ones(1, 2, 4)}, read=["part:out"])
    with model.hooks(read=["part:out"]) as run:
        output = model.model(torch.ones(1, 2, 4))
    assert torch.equal(run["part:out"], output)


def test_modules_that_return_more_than_a_tensor():
    class Pair(torch.nn.Module):
        def forward(self, x):
            return {"name": "a", "x": x + 1}, (x + 2, None)

    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.none = Pair(), torch.nn.Identity()

        def forward(self, x):
            _, second = self.pair(x)
            self.none("text")
            return second[0]

    model = vd.load(Holder())
    with pytest.raises(ModelError, match="holds no tensor"):
        model.run({"x": torch.ones(1)}, read=["pair:out"])
    with pytest.raises(ModelError, match="holds no tensor"):
        model.run({"x": torch.ones(1)}, read=["none:in"])
    run = model.run({"x": torch.ones(1)}, read=["pair:in"], write={"pair:in": lambda x: x + 10})
    assert run["pair:in"].item() == 11
    assert run.output.item() == 13
    with pytest.raises(ModelError, match="no logits"):
        _ = vd.load(Holder()).run({"x": torch.ones(1)}, read=["pair:in"], stop=True).logits


def test_hooks_during_generate(fresh):
    lengths = []
    prompt = "the capital of France is"
    plain = fresh.generate(prompt, max_new_tokens=4)
    with fresh.hooks(read={"resid_post.1": lambda value: lengths.append(value.shape[1])}):
        assert fresh.generate(prompt, max_new_tokens=4) == plain
    assert lengths[0] > 1
    assert lengths[1:] == [1, 1, 1]  # with transformers' cache, one new token at a time
    patterns = []
    with fresh.hooks(read={"pattern.0": lambda value: patterns.append(value.shape)}):
        shorter = fresh.generate(prompt, max_new_tokens=3)
    assert plain.startswith(shorter)
    assert [shape[-1] for shape in patterns] == [lengths[0], lengths[0] + 1, lengths[0] + 2]


@pytest.mark.parametrize("site", ["resid_pre.1", "resid_mid.1", "q.1", "pattern.1", "z.1", "mlp_out.1"])
def test_gradients_pass_through_reads_and_edits(site):
    """Against finite differences in float64, of a sum of logits by a shift at the site."""
    # gpt2, since llama's norms compute in float32 whatever the model's format.
    model = vd.load(make("gpt2").double(), check=False)
    inputs = model.batch(ROWS)
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(
        model.run(inputs, read=[site])[site].shape, generator=generator, dtype=torch.float64
    )
    weights = torch.randn(2, 5, 300, generator=generator, dtype=torch.float64)

    def score(amount):
        return (
            model.run(inputs, write={site: lambda value: value + amount * direction}).logits * weights
        ).sum()

    (gradient,) = torch.autograd.grad(score(shift), shift)
    step = 1e-5
    with torch.no_grad():
        difference = (score(torch.tensor(step)) - score(torch.tensor(-step))) / (2 * step)
    assert gradient.item() == pytest.approx(difference.item(), rel=1e-5)
    assert abs(gradient.item()) > 1e-3
    run = model.run(inputs, read=[site])
    (by_value,) = torch.autograd.grad((run.logits * weights).sum(), run[site])
    assert (by_value * direction).sum().item() == pytest.approx(difference.item(), rel=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_the_output_depends_on_every_value_that_was_read(hooked, name):
    model = hooked(name)
    run = model.run(model.dummy_inputs(), read="*")
    output = run.logits.sum()
    for site, gradient in zip(
        run.values, torch.autograd.grad(output, list(run.values.values()), allow_unused=True)
    ):
        assert gradient is not None, site
        assert gradient.abs().max() > 0, site


def test_no_key_value_cache_is_kept(fresh):
    assert fresh.run(fresh.batch(ROWS)).output.past_key_values is None


def test_writing_half_precision(fresh):
    model = vd.load(make("llama").to(torch.bfloat16))
    run = model.run(model.batch(ROWS), read="*", write={"pattern.1": lambda value: value * 0.5})
    assert {value.dtype for value in run.values.values()} == {torch.bfloat16}


# TransformerLens


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("build", [bridge, hooked_transformer])
def test_values_and_names_are_those_of_run_with_cache(hooked, tokenizer, tmp_path, name, build):
    theirs = build(name, tokenizer, tmp_path)
    ours, wrapped = hooked(name), vd.load(theirs)
    assert wrapped.sites() == ours.sites()
    assert (wrapped.n_layers, wrapped.d_model, wrapped.n_heads, wrapped.n_kv_heads, wrapped.d_head) == (
        ours.n_layers,
        ours.d_model,
        ours.n_heads,
        ours.n_kv_heads,
        ours.d_head,
    )
    tokens = torch.tensor(ROWS)
    _, cache = theirs.run_with_cache(tokens)
    for model in (ours, wrapped):
        run = model.run(model.batch(ROWS), read="*")
        for site in model.resolve("*"):
            if site.kind == "ln_final":  # theirs is before the norm's weight
                continue
            torch.testing.assert_close(run[site], cache[site.name], rtol=1e-4, atol=1e-5, msg=str(site))
            if site.kind != "pattern":
                assert run[site].shape[2:] == model.width(site)
    reference = ours.run(ours.batch(ROWS), read=["ln_final"])
    found = wrapped.run(wrapped.batch(ROWS), read=["ln_final"])
    torch.testing.assert_close(found["ln_final"], reference["ln_final"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.logits, reference.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [bridge, hooked_transformer])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_lens_models_take_edits_padding_and_stops(hooked, tokenizer, tmp_path, name, build):
    ours, wrapped = hooked(name), vd.load(build(name, tokenizer, tmp_path))
    inputs = [model.batch([ROWS[0], ROWS[1][:2]], "left") for model in (ours, wrapped)]
    real = inputs[0]["attention_mask"].bool()
    for site in ours.sites():
        if "ln_final" in site:
            continue

        def edit(value, site=site):  # nothing is added to a pattern, whose padding must stay unseen
            return value * 1.5 + (0 if "pattern" in site else torch.linspace(-0.2, 0.2, value.shape[-1]))

        expected, found = (m.run(i, write={site: edit}).logits for m, i in zip((ours, wrapped), inputs))
        torch.testing.assert_close(found[real], expected[real], rtol=1e-3, atol=1e-4, msg=site)
    stopped = wrapped.run(inputs[1], read=["resid_post.0"], stop=True)
    assert stopped.output is None
    assert wrapped.tokenizer is wrapped.model.tokenizer
    text = "the capital of"
    assert torch.isfinite(wrapped.logits(text)).all()
    assert isinstance(wrapped.generate(text, max_new_tokens=2), str)


def test_a_bridge_drops_hook_points_whose_edits_are_lost(tokenizer, tmp_path, caplog):
    wrapped = vd.load(bridge("opt", tokenizer, tmp_path))
    assert "no effect" in caplog.text
    assert not [site for site in wrapped.sites() if "pattern" in site]
    assert wrapped.run(wrapped.batch(ROWS), read=["resid_mid.0"])["resid_mid.0"].shape == (2, 5, 32)


def test_other_lens_classes_are_refused():
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.HookedEncoder import HookedEncoder

    config = HookedTransformerConfig(
        n_layers=1, d_model=8, n_ctx=8, d_head=4, d_vocab=10, act_fn="gelu", device="cpu"
    )
    with pytest.raises(ModelError, match="HookedEncoder is not supported"):
        vd.load(HookedEncoder(config))


def test_what_transformers_leaves_after_hidden_states_is_no_hook_of_a_users(tokenizer):
    """Asked once for hidden states, a model keeps recorders; they must not be taken for edits."""
    module = make("llama")
    with torch.no_grad():
        module(torch.tensor([[1, 2, 3]]), output_hidden_states=True)
    recorders = [part for part in module.modules() if part._forward_hooks]
    assert recorders
    assert not standing_hooks(module)
    handle = module.model.layers[1].register_forward_hook(lambda *_: None)
    assert standing_hooks(module) == ["model.layers.1"]
    assert carries_hooks(vd.load(module, tokenizer=tokenizer))
    handle.remove()
    assert not carries_hooks(vd.load(module, tokenizer=tokenizer))
