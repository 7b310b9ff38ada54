"""TransformerLens's models, and its own patching functions beside ours."""

import warnings

import numpy as np
import pytest
import torch
from test_patch import ANSWERS, CLEAN, CORRUPT, WRONG, check, expected, quiet

import veridical as vd
from test_hooks import bridge, hooked_transformer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("build", [bridge, hooked_transformer])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_their_models_give_the_naive_loop(build, name, tokenizer, tmp_path):
    model = vd.load(build(name, tokenizer, tmp_path))
    sites = ["resid_pre.*", "z.*", "v.*", "mlp_out.*", "resid_post.1", "resid_mid.1"]
    if build is hooked_transformer:  # it places left padding by itself
        clean, corrupt = CLEAN[:1], CORRUPT[:1]
        rows = slice(0, 1)
    else:
        clean, corrupt, rows = CLEAN, CORRUPT, slice(0, 2)
    given = {"answers": ANSWERS[rows], "wrong": WRONG[rows]}
    result = quiet(model, clean, corrupt, sites=sites, heads="all", **given)
    wanted, unpatched = expected(model, sites, "all", rows=rows)
    check(model, result, wanted, unpatched, 1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_parity_with_their_patching_functions(name, tokenizer, tmp_path):
    from transformer_lens import patching

    lens = hooked_transformer(name, tokenizer, tmp_path)
    model = vd.load(lens)
    clean, corrupt = torch.tensor(CLEAN[:1]), torch.tensor(CORRUPT[:1])
    with torch.no_grad():
        _, cache = lens.run_with_cache(clean)

    def theirs(function):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = function(lens, corrupt, cache, lambda x: x[0, -1, 10] - x[0, -1, 30])
        return found.numpy()

    def ours(sites, **options):
        return quiet(model, clean, corrupt, sites=sites, answers=10, wrong=30, **options).values[:, 0]

    for function, sites in [
        (patching.get_act_patch_resid_pre, "resid_pre.*"),
        (patching.get_act_patch_resid_mid, "resid_mid.*"),
        (patching.get_act_patch_attn_out, "attn_out.*"),
        (patching.get_act_patch_mlp_out, "mlp_out.*"),
    ]:
        assert np.allclose(ours(sites), theirs(function).reshape(-1), atol=1e-5)
    by_position = theirs(patching.get_act_patch_attn_head_out_by_pos)  # [layer, pos, head]
    mine = ours("z.*", heads="all").reshape(3, 4, 8)
    assert np.allclose(mine.transpose(0, 2, 1), by_position, atol=1e-5)
    whole = theirs(patching.get_act_patch_attn_head_out_all_pos)
    assert np.allclose(ours("z.*", heads="all", positions="all").reshape(3, 4), whole, atol=1e-5)
    if name == "gpt2":
        for function, sites in [
            (patching.get_act_patch_attn_head_q_all_pos, "q.*"),
            (patching.get_act_patch_attn_head_k_all_pos, "k.*"),
            (patching.get_act_patch_attn_head_v_all_pos, "v.*"),
            (patching.get_act_patch_attn_head_pattern_all_pos, "pattern.*"),
        ]:
            mine = ours(sites, heads="all", positions="all").reshape(3, 4)
            assert np.allclose(mine, theirs(function), atol=1e-5)
