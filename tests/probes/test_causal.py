"""Causal checks: edits equal a plain hook's, the clean run is the clean run, and planted causes are found."""

import numpy as np
import pytest
import torch

import veridical as vd
from veridical.errors import DataError, InputError, ModelError, NonFiniteError, UnknownNameError
from veridical.pairs.beliefs import own_request
from veridical.probes import LogisticProbe
from veridical.probes.causal import causal_check
from veridical.probes.fits import MismatchError
from veridical.probes.origin import Origin

torch.set_num_threads(1)
SITE = "blocks.2.hook_resid_post"
QUICK = {"random": 2, "bootstrap": 50, "strengths": (-2.0, 2.0), "progress": False}


@pytest.fixture(scope="module")
def liar():
    return vd.load("tiny-liar")


@pytest.fixture(scope="module")
def questions():
    """Rows of several lengths, with two and four options, some of more than one token."""
    pairs = vd.Pairs.load("honesty").filter(split="test")
    picked = [np.flatnonzero(pairs["form"] == form)[:8] for form in ("choice", "true_false", "open")]
    return pairs.select(np.concatenate(picked))


def direction(width, seed=0):
    return np.random.default_rng(seed).normal(size=width)


def log_odds(model, row, edit=None, layer=2, part=slice(-1, None)):
    """One row, by plain torch: each option in a pass of its own, with a plain hook that edits tokens."""
    prompt, said = own_request(row)
    found = []
    for option in said:
        (item,) = model.encode([prompt], [option])
        places = range(len(item.ids))[: item.prompt_tokens]
        chosen = (
            list(places[part]) if part != "completion" else list(range(item.prompt_tokens, len(item.ids)))
        )

        def hook(module, args, output, chosen=chosen):
            hidden = output[0] if isinstance(output, tuple) else output
            hidden[0, chosen] = edit(hidden[0, chosen].double()).float()

        handle = model.model.model.layers[layer].register_forward_hook(hook) if edit else None
        with torch.no_grad():
            logits = model.model(torch.tensor([item.ids])).logits[0].double().log_softmax(-1)
        if handle:
            handle.remove()
        found.append(sum(logits[t - 1, item.ids[t]].item() for t in range(item.prompt_tokens, len(item.ids))))
    right = found.pop(int(row["correct"]))
    return np.logaddexp.reduce(found) - right


@pytest.mark.parametrize(("at", "part"), [("prompt_last", slice(-1, None)), ("prompt", slice(None))])
def test_effects_are_those_of_a_plain_hook(liar, questions, at, part):
    u = direction(128)
    check = causal_check(liar, u, questions, site=SITE, at=at, **QUICK)
    u = torch.from_numpy(u / np.linalg.norm(u))
    unit, mean = check.facts["unit"], None
    along = []
    for row in questions:
        (item,) = liar.encode([row["prompt"]])
        with torch.no_grad():
            hidden = liar.model(torch.tensor([item.ids]), output_hidden_states=True).hidden_states[3][0]
        along.append(hidden[part].double() @ u)
    along = torch.cat(along)
    assert unit == pytest.approx(float(along.std(correction=0)), rel=1e-4)
    mean = float(along.mean())
    rows = [0, 9, 20]
    for number in rows:
        row = questions[number]
        clean = log_odds(liar, row)
        assert check.edited[0].log_odds[number] == pytest.approx(clean, abs=1e-4)
        added = log_odds(liar, row, lambda x: x + 2 * unit * u, part=part) - clean
        assert check.effects(2.0)[number] == pytest.approx(added, abs=1e-4)
        ablated = log_odds(liar, row, lambda x: x - ((x @ u) - mean)[:, None] * u, part=part) - clean
        assert check.effects(None)[number] == pytest.approx(ablated, abs=1e-4)
        assert abs(added) > 1e-3


def test_edits_of_the_answers_own_tokens_are_those_of_a_plain_hook(liar, questions):
    u = direction(128)
    check = causal_check(liar, u, questions, site=SITE, at="completion", **QUICK)
    u = torch.from_numpy(u / np.linalg.norm(u))
    moved = np.flatnonzero(check.effects(2.0))
    assert 0 < len(moved) < len(questions)  # answers of one token are only predicted
    number = int(moved[0])
    edit = lambda x: x + 2 * check.facts["unit"] * u  # noqa: E731
    by_hand = log_odds(liar, questions[number], edit, part="completion") - log_odds(liar, questions[number])
    assert check.effects(2.0)[number] == pytest.approx(by_hand, abs=1e-4)


def test_adding_nothing_is_the_clean_run_to_the_last_bit(liar, questions):
    check = causal_check(liar, direction(128), questions, site=SITE, **{**QUICK, "strengths": (0.0, 1.0)})
    assert (check.effects(0.0) == 0).all()
    assert (check.effects(1.0) != 0).any()


def test_the_clean_run_is_what_option_logprobs_gives(liar, questions):
    check = causal_check(liar, direction(128), questions, site=SITE, **QUICK)
    prompts, options = zip(*(own_request(row) for row in questions))
    for row, logs, found, coverage in zip(
        questions,
        liar.option_logprobs(prompts, options),
        check.edited[0].log_odds,
        check.edited[0].coverage,
    ):
        right = logs[int(row["correct"])]
        wrong = np.delete(logs, int(row["correct"]))
        assert found == pytest.approx(np.logaddexp.reduce(wrong) - right, abs=1e-4)
        assert coverage == pytest.approx(min(1, np.exp(logs).sum()), abs=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "qwen3", "opt"])
def test_small_batches_and_other_families_give_the_same(tiny, tokenizer, name):
    """A cache over the prefix, in batches of one and of many."""
    model = vd.load(tiny(name), tokenizer=tokenizer, check=False)
    rows = [
        {"pair": i, "prompt": text, "completion": " Paris", "other": " a lie", "label": i % 2}
        for i, text in enumerate(
            ["the capital of France is", "tell", "tell the truth: the symbol of gold is"]
        )
    ]
    pairs = vd.Pairs.from_rows(rows)
    options = {"site": "resid_post.1", "contrast": ("completion", "other"), **QUICK}
    one, many = (
        causal_check(model, direction(32), pairs, batch_tokens=size, **options).to_frame()
        for size in (1, 4096)
    )
    np.testing.assert_allclose(one["effect"], many["effect"], atol=1e-4)
    logs = model.option_logprobs([r["prompt"] for r in rows], [[" Paris", " a lie"]] * 3)
    assert one["clean"][0] == pytest.approx(np.mean([a - b for a, b in logs]), abs=1e-4)


def test_a_direction_that_the_answers_are_read_off_is_found_and_a_random_one_is_not(tiny, tokenizer):
    """After the last block only the norm and the unembedding follow, so the answers' own difference acts."""
    model = vd.load(tiny("llama"), tokenizer=tokenizer, check=False)
    a, b = (model.encode(["x"], [text])[0].ids[-1] for text in (" is", " the"))
    cause = (model.model.lm_head.weight[a] - model.model.lm_head.weight[b]).detach().numpy()
    cause = cause * model.model.model.norm.weight.detach().numpy()
    random = np.random.default_rng(0)
    words = ["gold", "silver", "France", "Italy", "yes", "no", "true", "false"]
    pairs = vd.Pairs.from_rows(
        [
            {
                "pair": i,
                "prompt": " ".join(random.choice(words, 4)),
                "a": " is",
                "b": " the",
                "label": i % 2,
            }
            for i in range(40)
        ]
    )
    options = {"site": "resid_post.2", "contrast": ("a", "b"), "strengths": (-2, 2), "bootstrap": 100}
    found = causal_check(model, cause, pairs, progress=False, **options)
    frame = found.to_frame().set_index("strength")
    assert frame.loc[2.0, "difference_low"] > 0 > frame.loc[-2.0, "difference_high"]
    assert frame.loc[2.0, "p"] < 0.05
    assert found.findings()[0].startswith("The model acts on")
    flipped = causal_check(model, -cause, pairs, progress=False, **options)
    np.testing.assert_allclose(flipped.effects(-2.0), found.effects(2.0), atol=1e-5)
    odd = np.random.default_rng(5).normal(size=32)
    odd -= cause * (odd @ cause) / (cause @ cause)
    nothing = causal_check(model, odd, pairs, progress=False, **options)
    assert nothing.findings()[0].startswith("No causal effect")


def test_the_table_says_what_the_runs_hold(liar, questions):
    probe = LogisticProbe().adopt(np.array([False, True]), direction(128), np.zeros(1), 1)
    probe.origin_ = Origin(site=SITE, target="instructed_to_lie", model_fingerprint=liar.fingerprint())
    check = causal_check(liar, probe, questions, **QUICK)
    frame = check.to_frame()
    assert sorted(set(frame["rows_of"])) == ["all", "instructed_to_lie = False", "instructed_to_lie = True"]
    line = frame[(frame["rows_of"] == "instructed_to_lie = True") & (frame["strength"] == 2)].iloc[0]
    rows = questions["instructed_to_lie"]
    runs = {
        (run.strength, run.which): run.log_odds[rows] for run in check.edited if run.strength == run.strength
    }
    effect = (runs[2.0, 0] - runs[0.0, -1]).mean()
    others = [(runs[2.0, k] - runs[0.0, -1]).mean() for k in (1, 2)]
    assert line["rows"] == rows.sum()
    assert line["effect"] == pytest.approx(effect)
    assert line["effect_low"] <= line["effect"] <= line["effect_high"]
    assert line["random"] == pytest.approx(np.mean(others))
    assert line["difference"] == pytest.approx(effect - np.mean(others))
    far = [abs(e - np.mean([effect, *others])) for e in (effect, *others)]
    assert line["p"] == pytest.approx(np.mean([f >= far[0] for f in far]))
    assert line["first_rate"] == pytest.approx((runs[2.0, 0] > 0).mean())
    assert len(check.effects(None)) == len(questions)
    section = check.report_section()
    assert any("p can't fall below" in sentence for sentence in check.findings())
    assert {"random directions", "instructed_to_lie"} <= {trace.name for trace in section.figures[0].data}
    zero = [trace for trace in section.figures[0].data if trace.name == "instructed_to_lie"][-1]
    assert list(zero.x) == [-2, 0, 2]
    assert zero.y[1] == 0
    assert "\n" not in repr(check)
    assert "<table" in check._repr_html_()


def test_the_same_seed_gives_the_same_table(liar, questions):
    tables = [
        causal_check(liar, direction(128), questions, site=SITE, seed=seed, **QUICK).to_frame()
        for seed in (1, 1, 2)
    ]
    assert tables[0].equals(tables[1])
    assert not tables[0]["random"].equals(tables[2]["random"])


def test_no_hook_is_left_behind(liar, questions):
    count = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in liar.model.modules())  # noqa: E731
    before = count()
    causal_check(liar, direction(128), questions, site=SITE, **QUICK)
    with pytest.raises(NonFiniteError, match=r"NaN after adding \+1e\+39"):
        causal_check(liar, direction(128), questions, site=SITE, **{**QUICK, "strengths": (1e39,)})
    assert count() == before


def test_an_edit_that_changes_nothing_is_an_error(tiny, tokenizer):
    model = vd.load(tiny("llama"), tokenizer=tokenizer, check=False)
    pairs = vd.Pairs.from_rows(
        [
            {"pair": i, "prompt": text, "a": " truth", "b": " lie"}
            for i, text in enumerate(["tell me", "so tell"])
        ]
    )
    # After the last block, prompt tokens before the last reach no answer; the first is one of them.
    unembedded = {"site": "resid_post.2", "contrast": ("a", "b"), **QUICK}
    width = torch.zeros(32)
    width[0] = 1
    norm = model.model.model.norm.weight
    kept = norm.detach().clone()
    with torch.no_grad():
        norm.zero_()
    try:
        with pytest.raises(
            ModelError, match=r"adding -2 standard deviations at .* changed no log-probability"
        ):
            causal_check(model, width, pairs, **unembedded)
    finally:
        with torch.no_grad():
            norm.copy_(kept)


# Bad input


def test_bad_input_is_refused(liar, questions):
    probe = LogisticProbe().adopt(np.array([0, 1]), direction(128), np.zeros(1), 1)
    with pytest.raises(InputError, match="which site it reads"):
        causal_check(liar, probe, questions)
    with pytest.raises(InputError, match=r"where it belongs; give site="):
        causal_check(liar, direction(128), questions)
    probe.origin_ = Origin(site=SITE, model="other", model_fingerprint="0" * 32)
    with pytest.raises(MismatchError, match=r"other \(fingerprint 0{12}\), not .*tiny-liar.* force=True"):
        causal_check(liar, probe, questions)
    assert len(causal_check(liar, probe, questions, force=True, **QUICK).edited) == 10
    with pytest.raises(InputError, match=r"width 64; .* has 128"):
        causal_check(liar, direction(64), questions, site=SITE)
    with pytest.raises(InputError, match=r"length 0\.0"):
        causal_check(liar, np.zeros(128), questions, site=SITE)
    with pytest.raises(InputError, match="names 6"):
        causal_check(liar, direction(128), questions, site="resid_post.*")
    with pytest.raises(UnknownNameError, match=r"tokens 'last'.*prompt_last"):
        causal_check(liar, direction(128), questions, site=SITE, at="last")
    with pytest.raises(InputError, match="at least one"):
        causal_check(liar, direction(128), questions, site=SITE, strengths=())
    with pytest.raises(InputError, match="0 random directions"):
        causal_check(liar, direction(128), questions, site=SITE, random=0)
    with pytest.raises(DataError, match="at least 2 rows"):
        causal_check(liar, direction(128), questions.select([0]), site=SITE)
    with pytest.raises(UnknownNameError, match=r"column 'options'.*contrast=\(A, B\)"):
        causal_check(liar, direction(128), questions.without_columns("options"), site=SITE)
    with pytest.raises(UnknownNameError, match="column 'complete'; nearest: completion"):
        causal_check(liar, direction(128), questions, site=SITE, contrast=("complete", "entity"))
    with pytest.raises(DataError, match="row 0 of honesty has no text in completion or entity"):
        causal_check(liar, direction(128), questions, site=SITE, contrast=("completion", "entity"))
    true_false = questions.filter(form="true_false")
    with pytest.raises(InputError, match="no token to edit with at='completion'"):
        causal_check(liar, direction(128), true_false, site=SITE, at="completion")
