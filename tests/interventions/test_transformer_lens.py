"""Every row of the README's table for TransformerLens users: their call and ours give the same numbers."""

import pytest
import torch

import veridical as vd
from lens_models import bridge, hooked_transformer
from veridical.interventions import ablate, direct_logits, logit_lens, patch

IDS = torch.tensor([[5, 9, 200, 17, 33, 60], [8, 120, 44, 17, 91, 60]])
OTHER = torch.tensor([[5, 9, 77, 17, 33, 60], [8, 121, 44, 17, 91, 60]])
RIGHT, WRONG = 30, 41
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module", params=["gpt2 hooked", "llama hooked", "gpt2 bridge", "llama bridge"])
def both(request, tokenizer, tmp_path_factory):
    """A TransformerLens model, and the handle that `vd.load` makes of it."""
    name, kind = request.param.split()
    build = hooked_transformer if kind == "hooked" else bridge
    theirs = build(name, tokenizer, tmp_path_factory.mktemp("lens"))
    with torch.no_grad():
        yield theirs, vd.load(theirs)


def same(found, expected):
    torch.testing.assert_close(torch.as_tensor(found).to(expected), expected, **CLOSE)


def test_logits(both):
    theirs, m = both
    same(m.logits(IDS), theirs(IDS))


def test_run_with_cache(both):
    theirs, m = both
    _, cache = theirs.run_with_cache(IDS)
    run = m.run(m.batch(IDS.tolist()), read="*")
    for site in m.sites():
        if "ln_final" not in site:  # theirs is before the norm's weight is applied
            same(run[site], cache[site])
    stopped = m.run(m.batch(IDS.tolist()), read=["resid_pre.1"], stop=True)
    same(stopped["blocks.1.hook_resid_pre"], cache["resid_pre", 1])


def test_run_with_cache_over_many_texts_is_collect(both):
    theirs, m = both
    acts = vd.collect(m, IDS, sites="resid_post.1", tokens="all", progress=False)
    _, cache = theirs.run_with_cache(IDS)
    same(acts["resid_post.1"], cache["resid_post", 1].flatten(0, 1))


def test_run_with_hooks_and_hooks(both):
    theirs, m = both
    name = "blocks.1.attn.hook_z"

    def their_hook(z, hook):
        z[:, :, 2] = 0
        return z

    def our_edit(z):
        z[:, :, 2] = 0
        return z

    expected = theirs.run_with_hooks(IDS, fwd_hooks=[(name, their_hook)])
    same(m.run(m.batch(IDS.tolist()), write={name: our_edit}).logits, expected)
    with theirs.hooks(fwd_hooks=[(name, their_hook)]):
        within = theirs(IDS)
    with m.hooks(write={name: our_edit}):
        same(m.logits(IDS), within)
    same(m.logits(IDS), theirs(IDS))


def test_zero_ablation_of_a_head_in_run_with_hooks(both):
    theirs, m = both

    def zero(z, hook):
        z[:, :, 1] = 0
        return z

    expected = theirs.run_with_hooks(IDS, fwd_hooks=[("blocks.0.attn.hook_z", zero)])
    with ablate(m, "z.0", heads=1):
        same(m.logits(IDS), expected)


def test_mean_ablation_in_run_with_hooks(both):
    theirs, m = both
    _, cache = theirs.run_with_cache(OTHER)
    mean = cache["mlp_out", 1].mean((0, 1))
    expected = theirs.run_with_hooks(
        IDS, fwd_hooks=[("blocks.1.hook_mlp_out", lambda value, hook: mean.expand_as(value))]
    )
    with ablate(m, "mlp_out.1", mode="mean", over={"mlp_out.1": mean}):
        same(m.logits(IDS), expected)


# Patching: metrics of theirs are a number, ours one for each row


def difference(logits):
    return logits[:, -1, RIGHT] - logits[:, -1, WRONG]


def mean_difference(logits):
    return difference(logits).mean()


def sweep(m, sites, **more):
    """Mean over the rows of what `vd.patch` gives, `[layer, position, head]` as far as these are swept."""
    found = patch(m, IDS, OTHER, metric=difference, sites=sites, progress=False, **more)
    means, table = torch.tensor(found.values.mean(1)), found.table
    axes = ["layer", *([] if more.get("positions") else ["position"]), *(["head"] if "heads" in more else [])]
    sizes = [int(table[axis].max()) + 1 for axis in axes]
    out = torch.full(sizes, torch.nan, dtype=torch.float64)
    out[tuple(torch.tensor(table[axis].to_numpy(int)) for axis in axes)] = means
    return out


@pytest.mark.parametrize("kind", ["resid_pre", "resid_mid", "attn_out", "mlp_out"])
def test_get_act_patch_by_position(both, kind):
    from transformer_lens import patching

    theirs, m = both
    _, cache = theirs.run_with_cache(IDS)
    expected = getattr(patching, f"get_act_patch_{kind}")(theirs, OTHER, cache, mean_difference)
    same(sweep(m, f"{kind}.*"), expected)


@pytest.mark.parametrize(("kind", "site"), [("out", "z"), ("q", "q"), ("k", "k"), ("v", "v")])
def test_get_act_patch_of_heads(both, kind, site):
    from transformer_lens import patching

    theirs, m = both
    _, cache = theirs.run_with_cache(IDS)
    by_pos = getattr(patching, f"get_act_patch_attn_head_{kind}_by_pos")
    same(sweep(m, f"{site}.*", heads="all"), by_pos(theirs, OTHER, cache, mean_difference))
    all_pos = getattr(patching, f"get_act_patch_attn_head_{kind}_all_pos")
    expected = all_pos(theirs, OTHER, cache, mean_difference)
    same(sweep(m, f"{site}.*", heads="all", positions="all"), expected)


def test_get_act_patch_of_patterns(both):
    from transformer_lens import patching

    theirs, m = both
    _, cache = theirs.run_with_cache(IDS)
    expected = patching.get_act_patch_attn_head_pattern_all_pos(theirs, OTHER, cache, mean_difference)
    same(sweep(m, "pattern.*", heads="all", positions="all"), expected)
    by_query = patching.get_act_patch_attn_head_pattern_by_pos(theirs, OTHER, cache, mean_difference)
    same(sweep(m, "pattern.*", heads="all"), by_query.transpose(1, 2))


def test_get_act_patch_block_every(both):
    from transformer_lens import patching

    theirs, m = both
    _, cache = theirs.run_with_cache(IDS)
    expected = patching.get_act_patch_block_every(theirs, OTHER, cache, mean_difference)
    sites = ["resid_pre.*", "attn_out.*", "mlp_out.*"]
    found = patch(m, IDS, OTHER, metric=difference, sites=sites, progress=False)
    means = found.table.assign(value=found.values.mean(1))
    for kind, grid in zip(("resid_pre", "attn_out", "mlp_out"), expected):
        lines = means[means.kind == kind].sort_values(["layer", "position"])
        same(torch.tensor(lines.value.to_numpy()).reshape(grid.shape), grid)


# Lenses and direct contributions


def test_accumulated_resid_is_the_logit_lens(both):
    theirs, m = both
    _, cache = theirs.run_with_cache(IDS)
    stack, labels = cache.accumulated_resid(return_labels=True)
    expected = torch.stack([theirs.unembed(theirs.ln_final(part)).softmax(-1)[..., RIGHT] for part in stack])
    found = logit_lens(m, IDS, sites="resid_pre.*, resid_post.2", answers=RIGHT, progress=False)
    assert len(found.sites) == len(labels)
    p = torch.full(expected.shape, torch.nan)
    p[:, torch.tensor(found.rows), torch.tensor(found.positions)] = torch.tensor(found.probability).float()
    same(p, expected)


@pytest.fixture(scope="module", params=["gpt2 hooked", "llama hooked", "gpt2 bridge", "llama bridge"])
def folded(request, tokenizer, tmp_path_factory):
    """The same with the final norm's weight folded into the unembedding, which `logit_attrs` counts on.

    Value biases are left with their heads; by default TransformerLens folds these too, into `b_O`.
    """
    name, kind = request.param.split()
    build = hooked_transformer if kind == "hooked" else bridge
    m = vd.load(build(name, tokenizer, tmp_path_factory.mktemp("plain")))
    theirs = build(name, tokenizer, tmp_path_factory.mktemp("folded"))
    kept = {"center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
    if kind == "hooked":
        theirs.load_and_process_state_dict(theirs.state_dict(), fold_ln=True, **kept)
    else:
        theirs.enable_compatibility_mode(disable_warnings=True, fold_ln=True, **kept)
    with torch.no_grad():
        yield theirs, m


def test_logit_attrs_are_the_direct_contributions(folded):
    theirs, m = folded
    _, cache = theirs.run_with_cache(IDS)
    stack, labels = cache.get_full_resid_decomposition(
        expand_neurons=False, apply_ln=False, pos_slice=-1, return_labels=True
    )
    expected = dict(zip(labels, cache.logit_attrs(stack, RIGHT, WRONG, pos_slice=-1)))
    found = direct_logits(m, IDS, answers=RIGHT, wrong=WRONG)
    parts = dict(zip(found.table["component"], found.values))
    heads = [name for name in parts if name.startswith("head.")]
    assert len(heads) == 12
    for name in heads:
        _, layer, head = name.split(".")
        same(parts[name], expected[f"L{layer}H{head}"].double())
    for layer in range(3):
        same(parts[f"mlp.{layer}"], expected[f"{layer}_mlp_out"].double())
    same(found.totals, difference(theirs(IDS)).double())
