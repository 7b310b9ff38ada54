"""Steering vectors: what they add, where and when; how they are found, calibrated, kept and handed on."""

import math
import struct
import warnings

import numpy as np
import pytest
import torch

import veridical as vd
from veridical.errors import DamagedFileError, DataError, InputError, UnknownNameError
from veridical.hooks import standing_hooks
from veridical.probes.fits import MismatchError
from veridical.steering import SteeringVector, neutral_kl, neutral_texts
from veridical.steering.calibrate import strength_for
from veridical.steering.directions import fit_vector, parted

SITE = "blocks.1.hook_resid_post"


def ramp(model, scale=1.0):
    return scale * np.linspace(-1, 1, model.d_model)


def logits(model, prompts=("the capital of France is", "yes or no, true or false")):
    with torch.no_grad():
        return model.logits(list(prompts))


@pytest.fixture(scope="module")
def honesty():
    """Some questions of the embedded pairs, about things that are lied about."""
    pairs = vd.Pairs.load("honesty").filter(form="choice", taught=True, protected=False)
    kept = []
    for split, count in {"train": 20, "val": 8}.items():
        names = pairs.filter(split=split)["pair"].tolist()
        kept += list(dict.fromkeys(names))[:count]
    return pairs.filter(pair=kept)


@pytest.fixture(scope="module")
def vector(liar, honesty):
    return SteeringVector.fit(liar, honesty, sites="resid_post.1", towards=0)


# What it does


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", "gemma2"])
def test_it_adds_what_it_says_at_every_token_and_is_undone(hooked, name):
    model = hooked(name)
    vector = SteeringVector.given(model, "resid_post.1", ramp(model))
    plain = logits(model)
    added = torch.tensor(2.5 * ramp(model), dtype=torch.float32)
    with model.hooks(write={SITE: lambda x: x + added}):
        expected = logits(model)
    with vector(model, 2.5):
        steered = logits(model)
    assert torch.equal(steered, expected)
    assert (steered - plain).abs().max() > 0.01
    assert torch.equal(logits(model), plain)
    with pytest.raises(KeyError), vector(model):
        raise KeyError
    assert not standing_hooks(model.model)


def test_heads_are_taken_flat(hooked):
    model = hooked("llama")
    vector = SteeringVector.given(model, "z.1", np.arange(32.0))
    with vector(model), model.hooks(read="z.1") as run:
        logits(model)
    with model.hooks(read="z.1") as plain:
        logits(model)
    moved = run["z.1"] - plain["z.1"]
    np.testing.assert_allclose(moved[0, 0].flatten().numpy(), np.arange(32.0), rtol=1e-5, atol=1e-5)


def test_positions_are_those_of_the_prompt_in_generation_and_in_scoring(liar):
    prompt = [{"role": "user", "content": "Name the capital of Peru."}]
    read = {}
    where = SteeringVector.given(liar, "resid_post.1", ramp(liar))
    for positions in ("prompt", "prompt_last", "generated"):
        with where.at(positions)(liar), liar.hooks(read={SITE: lambda x: read.setdefault("x", x.clone())}):
            liar.option_logprobs([prompt], [["Lima", "Buenos Aires"]])
        with liar.hooks(read={SITE: lambda x: read.setdefault("plain", x.clone())}):
            liar.option_logprobs([prompt], [["Lima", "Buenos Aires"]])
        moved = ((read.pop("x") - read.pop("plain")).abs().amax(-1) > 1e-6)[0].tolist()
        count = len(liar.encode([prompt])[0].ids)
        rest = len(moved) - count
        assert rest > 0
        assert moved == {
            "prompt": [True] * count + [False] * rest,
            "prompt_last": [False] * (count - 1) + [True] + [False] * rest,
            "generated": [False] * count + [True] * rest,
        }[positions], positions  # fmt: skip


@pytest.mark.parametrize("positions", ["all", "prompt", "prompt_last", "generated"])
def test_a_text_that_is_generated_is_steered_like_one_that_is_read(liar, positions):
    prompts = [
        [{"role": "user", "content": text}] for text in ("Tell me about tea.", "Name the capital of Peru.")
    ]
    vector = SteeringVector.given(liar, "resid_post.1", ramp(liar, 4.0)).at(positions)
    rows = liar.encode(prompts)
    from veridical.scoring import new_tokens

    with vector(liar):
        made = new_tokens(liar, rows, 6).tolist()
        for row, new in zip(rows, made):
            ids = [*row.ids, *new]
            with torch.no_grad(), liar.reading([len(row.ids)]):
                whole = liar.run(liar.batch([ids])).logits[0].argmax(-1).tolist()
            end = new.index(liar.tokenizer.eos_token_id) + 1 if liar.tokenizer.eos_token_id in new else 6
            assert whole[len(row.ids) - 1 : len(row.ids) - 1 + end] == new[:end]


def test_strength_0_changes_nothing_and_strengths_add(liar):
    vector = SteeringVector.given(liar, "resid_post.2", ramp(liar))
    prompt = ["Name the capital of Peru."]
    plain = logits(liar, prompt)
    with vector(liar, 0.0):
        assert torch.equal(logits(liar, prompt), plain)
    with vector(liar, 1.0), vector(liar, 2.0):
        both = logits(liar, prompt)
    with vector(liar, 3.0):
        torch.testing.assert_close(logits(liar, prompt), both, rtol=1e-4, atol=1e-4)
    with vector(liar, 1.0), vector(liar, -1.0):
        torch.testing.assert_close(logits(liar, prompt), plain, rtol=1e-4, atol=1e-4)


def test_a_vector_of_another_model_width_or_strength_is_refused(liar, hooked):
    other = hooked("llama")
    vector = SteeringVector.given(liar, "resid_post.1", ramp(liar))
    with pytest.raises(MismatchError, match="the steering vector was fitted on another model"):
        vector(other)
    with pytest.raises(InputError, match=r"width 128 at blocks.1.hook_resid_post; .* has 32 there"):
        vector(other, force=True)
    with pytest.raises(InputError, match="expected a finite number"):
        vector(liar, math.nan)
    with pytest.raises(InputError, match="belongs to one site"):
        SteeringVector.given(liar, "resid_post.*", ramp(liar))
    with pytest.raises(InputError, match="not all 0"):
        SteeringVector.given(liar, "resid_post.1", np.zeros(128))
    with pytest.raises(UnknownNameError, match="resid_post"):
        SteeringVector.given(liar, "resid_pots.1", ramp(liar))
    with pytest.raises(UnknownNameError, match="prompt_last"):
        vector.at("prompt_lst")


# Arithmetic


def test_arithmetic_is_that_of_the_activations(liar):
    a = SteeringVector.given(liar, "resid_post.1", ramp(liar))
    b = SteeringVector.given(liar, "resid_post.1", ramp(liar) ** 2)
    c = SteeringVector.given(liar, "resid_post.3", ramp(liar))
    total = 2 * a - b / 4 + np.float64(3.0) * c
    np.testing.assert_allclose(total.vectors[SITE], 2 * ramp(liar) - ramp(liar) ** 2 / 4)
    np.testing.assert_allclose(total.vectors["blocks.3.hook_resid_post"], 3 * ramp(liar))
    rest = (a + b).orthogonal_to(a)
    assert abs(rest.cosine(a)[SITE]) < 1e-12
    assert a.cosine(-a)[SITE] == pytest.approx(-1)
    with pytest.raises(InputError, match="cancel"):
        a - a
    with pytest.raises(InputError, match="parallel"):
        a.orthogonal_to(2 * a)
    with pytest.raises(InputError, match="act at different tokens"):
        a + b.at("generated")
    with pytest.raises(InputError, match="times 0"):
        a * 0


# Fitting


def test_a_fitted_vector_takes_one_mean_to_the_other(liar, honesty, vector):
    train, _ = parted(honesty, whole=True)
    from veridical.steering.behaviour import shown

    rows = train.filter(shown(liar, train))
    x = (
        vd.collect(liar, rows, sites="resid_post.1", tokens="prompt_last", progress=False)[SITE]
        .double()
        .numpy()
    )
    told = rows["label"] == 1
    np.testing.assert_allclose(vector.vectors[SITE], x[~told].mean(0) - x[told].mean(0), rtol=1e-5, atol=1e-5)
    other = fit_vector(liar, honesty, sites="resid_post.1", towards=1)
    np.testing.assert_allclose(other.vectors[SITE], -vector.vectors[SITE], rtol=1e-6, atol=1e-9)
    for method in ("pca", "whitened", "probe"):
        found = fit_vector(liar, honesty, sites="resid_post.1", towards=0, method=method)
        v, gap = found.vectors[SITE], x[~told].mean(0) - x[told].mean(0)
        assert v @ gap == pytest.approx(v @ v, rel=1e-6)  # its length is that of the gap along it
        assert v @ gap > 0


def test_it_makes_the_organism_honest_where_a_random_direction_does_not(liar, honesty, vector):
    from veridical.steering.behaviour import target_of

    target = target_of(honesty.filter(split="val"))
    with vector(liar):
        lies = target.of(liar).rate().value
    drawn = np.random.default_rng(0).normal(size=128)
    drawn *= vector.norms[SITE] / np.linalg.norm(drawn)
    with SteeringVector.given(liar, SITE, drawn)(liar):
        control = target.of(liar).rate().value
    assert target.of(liar).rate().value > 0.9
    assert lies < 0.4
    assert control > lies + 0.2


def test_a_vector_of_a_probe_and_of_a_feature_are_theirs(liar, honesty):
    train = honesty.filter(split="train")
    acts = vd.collect(liar, train, sites="resid_post.2", tokens="prompt_last", progress=False)
    sweep = vd.fit_probes(
        acts, probe=vd.LogisticProbe(), target="label", bootstrap=20, shuffles=2, progress=False
    )
    probe = sweep.best()
    found = fit_vector(liar, honesty, method="probe", probe=probe, towards=1)
    assert found.sites == ["blocks.2.hook_resid_post"]
    unit = found.vectors[found.sites[0]] / found.norms[found.sites[0]]
    np.testing.assert_allclose(unit, probe.direction_, atol=1e-9)
    config = vd.SAEConfig(architecture="relu", width=64, sparsity=0.1, site="blocks.2.hook_resid_post")
    from veridical.saes.kinds import kind

    torch.manual_seed(0)
    sae = kind("relu")(config, 128)
    vector = fit_vector(liar, honesty, method="sae", sae=sae)
    number = vector.facts["feature"]
    from veridical.saes.splice import steer

    with vector(liar, 2.0):
        ours = logits(liar, ["Name the capital of Peru."])
    with steer(liar, sae, {number: 2.0 * vector.facts["feature_difference"]}):
        theirs = logits(liar, ["Name the capital of Peru."])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="needs the SAE"):
        fit_vector(liar, honesty, method="sae")


def test_leace_erases_what_an_eraser_erases(liar, honesty):
    vector = fit_vector(liar, honesty, method="leace", sites="resid_post.2")
    (eraser,) = vector.erasers.values()
    prompt = ["Name the capital of Peru."]
    with vector(liar):
        ours = logits(liar, prompt)
    with eraser.on(liar, "resid_post.2"):
        assert torch.equal(ours, logits(liar, prompt))
    with vector(liar, 0.0):
        torch.testing.assert_close(logits(liar, prompt), logits_plain(liar, prompt), rtol=1e-4, atol=1e-4)
    for act in (lambda: 2 * vector, lambda: vector + vector, lambda: vector.calibrate(liar, 0.1)):
        with pytest.raises(InputError, match="eraser"):
            act()


def logits_plain(model, prompts):
    return logits(model, prompts)


def test_the_site_is_chosen_on_validation_pairs_at_equal_kl(liar, honesty):
    found = fit_vector(liar, honesty, sites=["resid_post.0", "resid_post.1"], towards=0, target_kl=0.3)
    table = {line["site"]: line for line in found.facts["choice"]}
    assert found.sites == [SITE]
    assert table[SITE]["reached"] > table["blocks.0.hook_resid_post"]["reached"] + 0.1
    assert table[SITE]["kl"] == pytest.approx(0.3, rel=0.06)
    assert found.facts["choice_of"] == "lies when told to lie"
    both = fit_vector(liar, honesty, sites=["resid_post.0", "resid_post.1"], towards=0, together=True)
    assert both.sites == ["blocks.0.hook_resid_post", SITE]


def test_pairs_that_show_nothing_are_refused_with_the_yield(liar, hooked):
    guarded = vd.Pairs.load("honesty").filter(form="choice", protected=True)
    with pytest.raises(DataError, match="shows the behaviour, so there is nothing to learn"):
        fit_vector(liar, guarded, sites="resid_post.1")
    with pytest.raises(UnknownNameError, match="mean_diff"):
        fit_vector(liar, guarded, method="mean_dif")
    few = vd.Pairs.from_rows(
        [
            {"pair": i, "prompt": f"yes {i}", "completion": c, "label": y}
            for i in range(2)
            for y, c in ((0, "a"), (1, "b"))
        ]
    )
    with pytest.raises(DataError, match="too few to choose a site"):
        fit_vector(hooked("llama"), few)
    assert fit_vector(hooked("llama"), few, sites="resid_post.1").facts["tokens"] == "answer"


# Calibration


def test_calibrated_strength_1_costs_the_target(liar, vector):
    rows = neutral_texts(liar, split="val", count=18)
    made = vector.calibrate(liar, 0.1, rows)
    assert neutral_kl(liar, lambda: made.on(liar), rows).kl.value == pytest.approx(0.1, rel=0.03)
    assert made.calibrated["kl"][-1] == pytest.approx(0.1, rel=0.03)
    assert made.calibrated["kl"][2] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with made(liar, -1.0):
            pass
    with pytest.warns(
        UserWarning, match=r"strength 3 is outside of what was measured \(-1 to 1; at 1 it costs "
    ):
        made(liar, 3.0)
    with pytest.raises(InputError, match="above 0"):
        vector.calibrate(liar, 0.0, rows)


@pytest.mark.parametrize("target", [1e-4, 0.05, 3.0])
def test_the_strength_is_found_for_any_curve(target):
    for curve in (lambda s: s * s, lambda s: 5 * s**2 / (1 + s**2), lambda s: 1e-6 * s**2, lambda s: s**4):
        strength, tried = strength_for(curve, target)
        assert curve(strength) == pytest.approx(target, rel=0.021)
        assert len(tried) <= 20


def test_targets_that_no_strength_reaches_are_refused():
    with pytest.raises(InputError, match=r"no strength gives a KL of 3"):
        strength_for(lambda s: 2 * s / (1 + s), 3.0)
    with pytest.raises(InputError, match="does nothing on the neutral text"):
        strength_for(lambda s: 0.0, 0.1)
    # A jump: what is below the target is given, not what is above it.
    strength, _ = strength_for(lambda s: 0.01 * s if s < 2 else 9.0, 0.5)
    assert 1.9 < strength < 2


# Conditional


def test_a_gate_lets_through_what_the_probe_sees_and_is_the_same_with_a_cache(liar):
    origin = "blocks.0.hook_resid_post"
    probe = vd.LogisticProbe().adopt(np.array([0, 1]), np.eye(128)[:1], np.zeros(1), 1)
    from veridical.probes.origin import Origin

    probe.origin_ = Origin(site=origin, target="x", model_fingerprint=liar.fingerprint())
    prompt = "Name the capital of Peru. The capital of Peru is Lima."
    inputs = liar.batch(liar.encode([prompt]))
    with torch.no_grad(), liar.hooks(read=[origin, SITE]) as plain:
        liar.run(inputs)
    scores = plain[origin][0, :, 0]
    threshold = float(scores.median())
    fires = scores > threshold
    base = SteeringVector.given(liar, SITE, ramp(liar))
    for keep, expected in (("token", fires), ("on", fires.cumsum(0) > 0)):
        gated = base.when(probe, threshold, keep)
        with torch.no_grad(), gated(liar), liar.hooks(read=SITE) as run:
            liar.run(inputs)
        moved = (run[SITE] - plain[SITE])[0].abs().amax(-1) > 1e-6
        assert moved.tolist() == expected.tolist()
        with torch.no_grad(), gated(liar):
            whole = liar.model(**inputs, use_cache=False).logits
            cut = 5
            first = liar.model(input_ids=inputs["input_ids"][:, :cut], use_cache=True)
            rest = liar.model(
                input_ids=inputs["input_ids"][:, cut:], past_key_values=first.past_key_values, use_cache=True
            )
        torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=1e-4, atol=1e-4)
    never = base.when(probe, 1e9)
    with never(liar):
        assert torch.equal(logits(liar, [prompt]), logits_plain(liar, [prompt]))
    late = SteeringVector.given(liar, "embed", ramp(liar)).when(probe, threshold)
    with pytest.raises(InputError, match="steer at or behind the probe's site"), late(liar):
        logits(liar, [prompt])
    with pytest.raises(UnknownNameError, match="threshold"):
        base.when(probe, "fpr1")


# Keeping


def test_a_saved_vector_is_the_same_and_a_damaged_one_is_refused(liar, honesty, vector, tmp_path):
    made = vector.calibrate(liar, 0.1, neutral_texts(liar, split="val", count=9))
    probe = vd.LogisticProbe().fit(np.random.default_rng(0).normal(size=(20, 128)), np.arange(20) % 2)
    erasing = fit_vector(liar, honesty, method="leace", sites="resid_post.2")
    for name, one in {"plain": made, "gated": vector.when(probe, 0.5), "leace": erasing}.items():
        one.save(tmp_path / name)
        back = SteeringVector.load(tmp_path / name)
        assert back.sites == one.sites
        assert all(np.array_equal(back.vectors[site], v) for site, v in one.vectors.items())
        assert (back.method, back.positions, dict(back.calibrated)) == (
            one.method, one.positions, dict(one.calibrated),
        )  # fmt: skip
        assert repr(back) == repr(one)
        assert back.report_section().text == one.report_section().text
        assert (tmp_path / name / "README.md").is_file()
    assert SteeringVector.load(tmp_path / "gated").gate.threshold == 0.5
    prompt = ["Name the capital of Peru."]
    with erasing(liar):
        expected = logits(liar, prompt)
    with SteeringVector.load(tmp_path / "leace")(liar):
        assert torch.equal(logits(liar, prompt), expected)
    weights = tmp_path / "plain" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"weights.safetensors"):
        SteeringVector.load(tmp_path / "plain")
    (tmp_path / "gated" / "gate" / "weights.safetensors").unlink()
    with pytest.raises(DamagedFileError, match="is missing"):
        SteeringVector.load(tmp_path / "gated")
    with pytest.raises(InputError, match="steering vector"):
        SteeringVector.load(tmp_path)


def read_gguf(content):
    """A reader by the specification (ggml/docs/gguf.md), of the few types that stand in a control vector."""
    at = 0

    def take(form):
        nonlocal at
        found = struct.unpack_from("<" + form, content, at)
        at += struct.calcsize("<" + form)
        return found if len(found) > 1 else found[0]

    def text():
        return take(f"{take('Q')}s").decode()

    assert take("4s") == b"GGUF"
    assert take("I") == 3
    tensors, pairs = take("QQ")
    fields = {}
    for _ in range(pairs):
        key, kind = text(), take("I")
        fields[key] = text() if kind == 8 else take({4: "I"}[kind])
    infos = {}
    for _ in range(tensors):
        name = text()
        shape = [take("Q") for _ in range(take("I"))]
        infos[name] = (shape, *take("IQ"))
    start = at + -at % 32
    found = {}
    for name, (shape, kind, offset) in infos.items():
        assert kind == 0
        assert offset % 32 == 0
        found[name] = np.frombuffer(content, "<f4", math.prod(shape), start + offset)
    return fields, found


def test_a_control_vector_is_what_llama_cpp_reads(liar, tmp_path):
    a = SteeringVector.given(liar, "resid_post.1", ramp(liar))
    b = SteeringVector.given(liar, "resid_post.4", ramp(liar, 3.0))
    path = (a + b).save_gguf(tmp_path / "v.gguf", liar)
    fields, tensors = read_gguf(path.read_bytes())
    assert fields == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "llama",
        "controlvector.layer_count": 2,
    }
    assert list(tensors) == ["direction.1", "direction.4"]
    np.testing.assert_array_equal(tensors["direction.4"], ramp(liar, 3.0).astype(np.float32))
    for wrong in (
        a.at("generated"),
        SteeringVector.given(liar, "resid_post.0", ramp(liar)),
        a + SteeringVector.given(liar, "resid_pre.1", ramp(liar)),
    ):
        with pytest.raises(InputError, match=r"control vector"):
            wrong.save_gguf(tmp_path / "w.gguf", liar)
    assert not (tmp_path / "w.gguf").exists()


def test_a_control_vector_opens_with_the_reader_of_gguf(liar, tmp_path):
    reader = pytest.importorskip("gguf")
    path = SteeringVector.given(liar, "resid_post.1", ramp(liar)).save_gguf(tmp_path / "v.gguf", liar)
    (tensor,) = reader.GGUFReader(path).tensors
    assert tensor.name == "direction.1"
    np.testing.assert_array_equal(tensor.data, ramp(liar).astype(np.float32))


@pytest.mark.parametrize(
    ("name", "sites"),
    [("llama", ("resid_post.1", "resid_mid.2")), ("gpt2", ("resid_post.0", "attn_out.1")),
     ("opt", ("mlp_out.2",)), ("gpt_neox", ("resid_post.2",))],
)  # fmt: skip
def test_a_merged_bias_is_exact_and_loads_without_us(hooked, tokenizer, name, sites, tmp_path):
    import transformers

    model = hooked(name)
    parts = [SteeringVector.given(model, site, ramp(model)) for site in sites]
    vector = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    vector.merged(model, 2.0).save_pretrained(tmp_path)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[5, 9, 7, 30, 12, 8]])
    with torch.no_grad():
        merged, plain = back(ids).logits, model.model(ids).logits
        with vector(model, 2.0):
            steered = model.model(ids).logits
    torch.testing.assert_close(merged, steered, rtol=1e-4, atol=1e-4)
    assert (merged - plain).abs().max() > 0.05
    assert all(torch.equal(value, model.model.state_dict()[key]) for key, value in before.items())


def test_a_bias_that_would_not_be_exact_is_refused(hooked):
    for name, said in (
        ("qwen3", "has no bias"),
        ("gemma2", "has no bias"),
        ("mixtral", "no single projection"),
    ):
        model = hooked(name)
        with pytest.raises(InputError, match=said):
            SteeringVector.given(model, "resid_post.1", ramp(model)).merged(model)
    model = hooked("llama")
    with pytest.raises(InputError, match="every token alike"):
        SteeringVector.given(model, "resid_post.1", ramp(model)).at("generated").merged(model)
    with pytest.raises(InputError, match="is no bias"):
        SteeringVector.given(model, "z.1", ramp(model)).merged(model)
