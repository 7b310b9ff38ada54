"""The fast sweep against one hooked forward for each patch, for every family, padded on either side."""

import warnings

import naive
import numpy as np
import pytest
import torch

import veridical as vd
from tiny_models import CAUSAL, make
from veridical.hooks import standing_hooks
from veridical.interventions import patch

CLEAN = [[5, 8, 13, 40, 77, 21, 6, 90], [9, 33, 60, 7, 150]]
CORRUPT = [[5, 8, 99, 40, 12, 21, 6, 55], [9, 44, 60, 8, 151]]
ANSWERS, WRONG = [10, 20], [30, 40]
KINDS = "resid_pre.*, q.*, k.*, v.*, pattern.*, z.*, attn_out.*, mlp_out.*, resid_post.*"


# Grouped products of experts are for less than float64.
EAGER = {name: {"experts_implementation": "eager"} for name in ("mixtral", "qwen3_moe")}


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


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_clean_into_clean_is_exactly_nothing(hooked, direction):
    sites = "resid_pre.*, z.*, k.*, pattern.*, mlp_out.*, embed, ln_final"
    result = quiet(
        hooked("llama"), CLEAN, CLEAN, sites=sites, answers=ANSWERS, wrong=WRONG, direction=direction
    )
    effects = result.effects
    assert (effects[np.isfinite(effects)] == 0).all()
    assert np.isnan(effects).any()  # the shorter row has no eighth position


@pytest.mark.parametrize("site", ["embed", "resid_pre.0", "resid_pre.2", "resid_post.1"])
def test_all_positions_at_once_is_exactly_the_other_run(hooked, site):
    model = hooked("mistral")
    result = quiet(model, CLEAN, CORRUPT, sites=site, positions="all", answers=ANSWERS, wrong=WRONG)
    assert (result.values[0] == result.source_values).all()
    assert (result.values[0] != result.base_values).all()
    assert result.recovered[0] == 1


def test_every_way_around_the_stream_at_once_is_the_other_run(hooked):
    """Local patches of all positions, run through the engine: what both parts add makes the whole."""
    model = hooked("gpt2")
    with_embed = quiet(model, CLEAN[:1], CORRUPT[:1], sites="resid_mid.0", positions="all", metric="kl")
    other = quiet(model, CLEAN[:1], CORRUPT[:1], sites="resid_post.0", positions="all", metric="kl")
    # The MLP has no other input than resid_mid, so its block hands on the other run's stream.
    assert abs(with_embed.values[0, 0] - other.values[0, 0]) < 1e-6
    assert other.values[0, 0] == 0


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "opt"])
def test_a_function_of_all_positions_reads_the_prefix_too(name, hooked):
    model = hooked(name)
    weights = torch.linspace(-1, 1, 8)[:, None] * torch.linspace(0, 2, 300)

    def spread(logits):
        assert logits.shape[:2] == (1, 8)
        return (logits * weights).sum((1, 2))

    result = quiet(model, CLEAN[:1], CORRUPT[:1], sites="resid_pre.*", metric=spread)
    for item, line in enumerate(result.table.to_dict("records")):
        position = int(line["position"])
        seen = model.run(model.batch(CLEAN[:1]), read=line["site"])[line["site"]]

        def edit(value, seen=seen, position=position):
            value[:, position] = seen[:, position]
            return value

        with torch.no_grad():
            logits = model.run(model.batch(CORRUPT[:1]), write={line["site"]: edit}).logits
        assert abs(spread(logits).item() - result.values[item, 0]) < 1e-5 * abs(spread(logits).item()) + 1e-4


def test_a_metric_sees_all_examples_in_order(hooked):
    model, seen = hooked("llama"), []

    def centred(logits):
        seen.append(logits.shape)
        own = logits[:, -1, 7]
        return own - own.mean()

    result = quiet(model, CLEAN, CORRUPT, sites="resid_pre.1", metric=centred, keep=1, positions=[-1, -2])
    assert set(seen) == {(2, 1, 300)}
    wanted, _ = naive.sweep(model, CORRUPT, CLEAN, "resid_pre.1", positions=[-1, -2])
    for item, position in enumerate((-1, -2)):
        logits = wanted["blocks.1.hook_resid_pre", -1, position][:, 7]
        assert np.allclose(result.values[item], (logits - logits.mean()).numpy(), atol=1e-5)


@pytest.mark.parametrize("at", ["resid_post.1", "resid_mid.1", "ln_final"])
def test_a_probe_is_a_metric_at_its_own_site(hooked, at):
    from veridical.interventions import ProbeMetric
    from veridical.probes import LogisticProbe

    model = hooked("llama")
    probe = LogisticProbe().adopt(np.array([0, 1]), np.linspace(-1, 1, 32), np.array([0.25]), 1)
    sites = ["resid_pre.*", "z.*", "v.*", "mlp_out.*"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = patch(model, CLEAN, CORRUPT, sites=sites, metric=ProbeMetric(probe, at))
    assert any("comes before" in str(w.message) for w in caught) == (at != "ln_final")
    clean = model.run(model.batch(CLEAN, "left"), read=sites).values
    for item, line in enumerate(result.table.to_dict("records")):
        position, site = int(line["position"]), line["site"]
        rows = [row for row in range(2) if len(CLEAN[row]) >= -position]

        def edit(value, rows=rows, site=site, position=position):
            value[rows, position] = clean[site][rows, position]
            return value

        with torch.no_grad():
            run = model.run(model.batch(CORRUPT, "left"), read=at, write={site: edit})
        wanted = probe.decision_function(run[at][:, -1].double().numpy())
        assert np.allclose(result.values[item, rows], wanted[rows], atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_models_without_a_direction_of_reading(name, hooked):
    model = hooked(name)
    if name == "vit":
        torch.manual_seed(0)
        clean, corrupt = torch.randn(2, 3, 24, 24), torch.randn(2, 3, 24, 24)
        given = {"clean": {"pixel_values": clean}, "corrupt": {"pixel_values": corrupt}}
    else:
        clean, corrupt = torch.tensor([CLEAN[0]] * 2), torch.tensor([CORRUPT[0]] * 2)
        given = {"clean": model.batch(clean.tolist()), "corrupt": model.batch(corrupt.tolist())}

    def metric(logits):
        return logits.flatten(1)[:, :3].sum(1)

    sites = "resid_pre.*, z.*, k.1, q.1, attn_out.*, mlp_out.*, resid_post.*"
    result = quiet(model, clean, corrupt, sites=sites, metric=metric)
    source = model.run(given["clean"], read=sites).values
    for item, line in enumerate(result.table.to_dict("records")):
        position = int(line["position"])

        def edit(value, line=line, position=position):
            value[:, position] = source[line["site"]][:, position]
            return value

        with torch.no_grad():
            wanted = metric(model.run(given["corrupt"], write={line["site"]: edit}).logits)
        assert np.allclose(result.values[item], wanted.numpy(), atol=2e-5)


def test_hooks_of_the_users_are_heeded_and_kept(hooked):
    """An edit that tells positions apart: patched runs must see the tokens where they stand."""
    model = hooked("gpt2")

    def louder(module, args, output):
        output = output.clone()
        output[:, 2] *= 1.5
        return output

    handle = model.architecture.blocks[1].mlp.register_forward_hook(louder)
    try:
        result = quiet(model, CLEAN, CORRUPT, sites=["resid_pre.*", "z.*"], answers=ANSWERS, wrong=WRONG)
        wanted, unpatched = expected(model, ["resid_pre.*", "z.*"])
        check(model, result, wanted, unpatched, 1e-5)
        assert model.architecture.blocks[1].mlp._forward_hooks
    finally:
        handle.remove()
    plain = quiet(model, CLEAN, CORRUPT, sites="resid_pre.1", answers=ANSWERS, wrong=WRONG)
    assert not np.allclose(plain.base_values, unpatched)


def test_nothing_is_left_on_the_model_after_an_error(hooked):
    model = hooked("llama")
    calls = []

    def failing(logits):
        calls.append(1)
        if len(calls) > 3:
            raise KeyError("in the metric")
        return logits[:, -1, 0]

    with pytest.raises(KeyError):
        quiet(model, CLEAN, CORRUPT, sites="resid_pre.*, z.*", metric=failing, keep=1)
    assert not standing_hooks(model.model)
    for module in model.model.modules():
        assert "forward" not in module.__dict__


def test_only_what_follows_a_patch_is_run(hooked):
    """Tokens through each block: none below the patch, none before it, one in the last block's MLP."""
    model = hooked("qwen2")
    tokens = [0] * 3
    handles = [
        block.mlp.down_proj.register_forward_pre_hook(
            lambda module, args, layer=layer: tokens.__setitem__(
                layer, tokens[layer] + args[0][..., 0].numel()
            )
        )
        for layer, block in enumerate(model.architecture.blocks)
    ]
    from veridical.interventions.puts import Put, Task
    from veridical.interventions.suffix import Engine

    try:
        inputs = model.batch(CLEAN[:1])
        engine = Engine(model, inputs, inputs["attention_mask"].bool(), keep=1)
        assert tokens == [8, 8, 8]
        tokens[:] = [0] * 3
        one = torch.zeros(1, dtype=torch.long)
        task = Task(0, 1, 5, one, (Put(None, one, one + 5, torch.zeros(1, 32)),))
        with_prefix = engine.run([task], 5)
        assert tokens == [0, 3, 1]
        assert torch.allclose(with_prefix, engine.run([task], 0), atol=1e-5)
    finally:
        for handle in handles:
            handle.remove()


def test_small_batches_give_the_same(hooked):
    model = hooked("phi3")
    options = {"sites": "resid_pre.*, z.*", "heads": "all", "answers": ANSWERS, "wrong": WRONG}
    one, many = (quiet(model, CLEAN, CORRUPT, batch_tokens=tokens, **options) for tokens in (1, 8192))
    assert np.allclose(one.values, many.values, atol=1e-5, equal_nan=True)


def test_positions_by_number_set_and_name(hooked):
    model = hooked("llama")
    clean, corrupt = "the capital of France is", "the capital of France or"
    each = quiet(model, clean, corrupt, sites="resid_pre.1", metric="kl", direction="noising")
    count = len(each.table)
    few = quiet(
        model, clean, corrupt, sites="resid_pre.1", metric="kl", direction="noising", positions=[-1, 0]
    )
    assert np.allclose(few.values[:, 0], each.values[[count - 1, 0], 0])
    named = quiet(
        model,
        clean,
        corrupt,
        sites="resid_pre.1",
        metric="kl",
        direction="noising",
        positions={"end": " is", "country": "France", "both": [0, -1]},
    )
    assert named.table["position"].tolist() == ["end", "country", "both"]
    assert named.table["token"].tolist()[:2] == [" is", "France"]
    assert np.allclose(named.values[[0, 2], 0], each.values[-1, 0])
    assert named.values[1, 0] == 0


def test_aligned_texts_patch_matched_positions_only(hooked):
    model = hooked("llama")
    clean, corrupt = [[5, 6, 7, 8, 9]], [[5, 7, 8, 30]]
    result = quiet(model, clean, corrupt, sites="resid_pre.1, z.1", metric="kl", align="token")
    here = result.values[result.table["kind"] == "resid_pre"][:, 0]
    assert np.isnan(here[[1, 4]]).all()  # 6 and 9 are in the clean text only
    inputs = model.batch(corrupt)
    clean_run = model.run(model.batch(clean), read="resid_pre.1")
    reference = clean_run.logits[:, -1].log_softmax(-1)
    for place, there in ((0, 0), (2, 1), (3, 2)):

        def edit(value, place=place, there=there):
            value[:, there] = clean_run["resid_pre.1"][:, place]
            return value

        with torch.no_grad():
            ours = model.run(inputs, write={"resid_pre.1": edit}).logits[:, -1].log_softmax(-1)
        wanted = (reference.exp() * (reference - ours)).sum()
        assert abs(here[place] - wanted.item()) < 1e-5


def test_another_models_activations(hooked):
    model, other = hooked("llama"), vd.load(make("mistral", head_dim=8), check=False)
    options = {"sites": "resid_pre.1", "answers": ANSWERS, "wrong": WRONG}
    result = quiet(model, CLEAN, CLEAN, source=other, **options)
    rows = torch.arange(2)
    theirs = other.run(other.batch(CLEAN, "left"), read="resid_pre.1")["resid_pre.1"]
    for item, line in enumerate(result.table.to_dict("records")):
        position = int(line["position"])
        there = [row for row in range(2) if len(CLEAN[row]) >= -position]

        def edit(value, position=position, there=there):
            value[there, position] = theirs[there, position]
            return value

        with torch.no_grad():
            logits = model.run(model.batch(CLEAN, "left"), write={"resid_pre.1": edit}).logits[:, -1]
        wanted = logits[rows, torch.tensor(ANSWERS)] - logits[rows, torch.tensor(WRONG)]
        assert np.allclose(result.values[item, there], wanted[there].numpy(), atol=1e-5)
    assert result.facts["source"] == "MistralForCausalLM"
    with pytest.raises(vd.VeridicalError, match=r"\(4, 8\) wide in .* and \(4, 16\) in the source"):
        quiet(model, CLEAN, CLEAN, source=hooked("qwen3"), **{**options, "sites": "z.1"})


def test_bad_input_ends_in_one_clear_line(hooked):
    model = hooked("llama")
    given = {"answers": ANSWERS, "wrong": WRONG, "sites": "resid_pre.*"}
    for options, said in [
        ({"corrupt": [[1, 2], [3]]}, 'row 0: clean has 8 tokens .* align="token"'),
        ({"positions": [9]}, "position 9 lies outside the text of row 0, which has 8 tokens"),
        ({"positions": [-6]}, "position -6 lies outside the text of row 1, which has 5 tokens"),
        ({"positions": "last"}, "expected 'each', 'all'"),
        ({"positions": []}, "positions is empty"),
        ({"positions": {"it": "words"}}, "tokens or images arrived"),
        ({"metric": lambda x: x.mean()}, "returned a scalar"),
        ({"sites": "z.*", "heads": [4]}, "head 4 does not exist at z.0; it has heads 0 to 3"),
        (
            {"sites": "k.*", "heads": [2]},
            "shared by groups of 2 query heads, and it has 2 .group 0 for heads 0 to 1, 1 for heads 2 to 3",
        ),
        ({"heads": "all"}, "heads are those of q, k, v, z and pattern"),
        ({"sites": "z.*", "heads": "every"}, "expected 'all' or a list of heads"),
        ({"sites": "residpre.*"}, "unknown site"),
        ({"direction": "denoise"}, "expected 'denoising' or 'noising'"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"answers": [1, 2, 3]}, "3 answers for 2 rows"),
        ({"sites": "pattern.*", "align": "token"}, "without align"),
    ]:
        with pytest.raises(vd.VeridicalError, match=said):
            quiet(model, CLEAN, **{"corrupt": CORRUPT, **given, **options})


def test_a_site_that_cannot_matter_is_exactly_zero_and_said(hooked):
    model = hooked("llama")
    with pytest.warns(UserWarning, match=r"patches at resid_post.2 cannot change .* last position only"):
        result = patch(model, CLEAN, CORRUPT, sites="resid_post.2", answers=ANSWERS, wrong=WRONG)
    effects = result.effects
    assert (effects[:-1][np.isfinite(effects[:-1])] == 0).all()
    assert (effects[-1] != 0).all()


def test_a_patch_of_which_only_a_part_cannot_matter_is_not_warned_of(hooked):
    model = hooked("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = patch(
            model, CLEAN, CORRUPT, sites="z.2", heads="all", positions="all", answers=ANSWERS, wrong=WRONG
        )
    assert (result.effects != 0).all()


def test_dropout_is_warned_of():
    module = make("gpt2").train()
    model = vd.load(module, check=False)
    with pytest.warns(UserWarning, match="training mode with dropout"):
        patch(model, CLEAN, CORRUPT, sites="resid_pre.2", answers=ANSWERS, wrong=WRONG)
