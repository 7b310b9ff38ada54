"""Every row of the README's table for TransformerLens users: their call and ours give the same numbers."""

import pytest
import torch

import veridical as vd
from lens_models import bridge, hooked_transformer
from veridical.interventions import ablate

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
