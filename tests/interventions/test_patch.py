"""The fast sweep against one hooked forward for each patch, for every family and on either side of padding."""

import warnings

import numpy as np
import pytest
import torch

import naive
import veridical as vd
from tiny_models import CAUSAL, make
from veridical.interventions import Patched, patch

CLEAN = [[5, 8, 13, 40, 77, 21, 6, 90], [9, 33, 60, 7, 150]]
CORRUPT = [[5, 8, 99, 40, 12, 21, 6, 55], [9, 44, 60, 8, 151]]
ANSWERS, WRONG = [10, 20], [30, 40]
KINDS = "resid_pre.*, q.*, k.*, v.*, pattern.*, z.*, attn_out.*, mlp_out.*, resid_post.*"


# Grouped products of experts are for less than float64.
EAGER = dict.fromkeys(("mixtral", "qwen3_moe"), {"experts_implementation": "eager"})


def quiet(*args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return patch(*args, **options)


def expected(model, sites, heads=None, side="left", direction="denoising", rows=slice(0, 2)):
    base, source = (CORRUPT, CLEAN) if direction == "denoising" else (CLEAN, CORRUPT)
    base, source, right, wrong = base[rows], source[rows], ANSWERS[rows], WRONG[rows]
    found, unpatched = naive.sweep(model, base, source, sites, heads, side)
    each = torch.arange(len(base))

    def score(logits):
        return (logits[each, torch.tensor(right)] - logits[each, torch.tensor(wrong)]).numpy()

    return {key: score(value) for key, value in found.items()}, score(unpatched)


def check(model, result, wanted, unpatched, tolerance):
    table, lengths = result.table, [len(row) for row in CLEAN][: len(unpatched)]
    assert np.allclose(result.base_values, unpatched, rtol=tolerance, atol=tolerance)
    scale = max(1.0, float(np.abs(unpatched).max()))
    assert len(table) == len(wanted)
    for item, line in enumerate(table.to_dict("records")):
        position = int(line["position"])
        position -= lengths[0] if position >= 0 else 0
        theirs = wanted[line["site"], line["head"], position]
        for row, length in enumerate(lengths):
            ours = result.values[item, row]
            if -position > length:
                assert np.isnan(ours)
            else:
                assert abs(ours - theirs[row]) <= tolerance * scale, (line, row, ours, theirs[row])


def sites_of(model):
    optional = [kind for kind in ("resid_mid", "mlp_post") if f"{kind}.0" in shorts(model)]
    return ", ".join([KINDS, "embed", "ln_final", *(f"{kind}.*" for kind in optional)])


def shorts(model):
    return {site.short for site in model.architecture.places}


@pytest.mark.parametrize("name", CAUSAL)
def test_float64_is_the_naive_loop_to_1e_12(name):
    model = vd.load(make(name, **EAGER.get(name, {})).double(), check=False)
    sites = [part.strip() for part in sites_of(model).split(",")]
    sites = [site for site in sites if site in shorts(model) or site.endswith("*")]
    # In float64 gemma2 itself gives NaN for rows with padding.
    rows = slice(0, 1 if name == "gemma2" else 2)
    clean, corrupt, answers, wrong = CLEAN[rows], CORRUPT[rows], ANSWERS[rows], WRONG[rows]
    result = quiet(model, clean, corrupt, sites=sites, answers=answers, wrong=wrong)
    wanted, unpatched = expected(model, sites, rows=rows)
    check(model, result, wanted, unpatched, 1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CAUSAL)
def test_float32_is_the_naive_loop_to_1e_5(name, side, hooked):
    model = hooked(name)
    sites = ["resid_pre.*", "z.*", "k.1"]
    given = [model.batch(rows, padding_side=side) for rows in (CLEAN, CORRUPT)]
    for direction in ("denoising", "noising"):
        result = quiet(
            model, *given, sites=sites, heads="all", answers=ANSWERS, wrong=WRONG, direction=direction
        )
        wanted, unpatched = expected(model, sites, "all", side, direction)
        check(model, result, wanted, unpatched, 1e-5)
