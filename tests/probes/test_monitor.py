"""A probe during generation: each token's score is the one a whole pass gives, and nothing else changes."""

import html
import re

import numpy as np
import pytest
import torch

import veridical as vd
from veridical.errors import InputError, ModelError, UnknownNameError
from veridical.probes import LogisticProbe
from veridical.probes.base import LinearProbe
from veridical.probes.fits import MismatchError, vectors_for
from veridical.probes.origin import Origin
from veridical.probes.running import Highest, Latest

torch.set_num_threads(1)
SITE = "blocks.1.hook_resid_post"
PROMPTS = ["the capital of France is", "a lie", "tell the truth or tell a lie; answer yes"]


@pytest.fixture(scope="module")
def model(tiny, tokenizer):
    return vd.load(tiny("llama"), tokenizer=tokenizer, check=False)


def probe_for(width=32, seed=0, **origin):
    random = np.random.default_rng(seed)
    probe = LogisticProbe().adopt(np.array([False, True]), random.normal(size=width), np.array([0.1]), 1)
    probe.origin_ = Origin(**{"site": SITE, "target": "lied", **origin})
    return probe


def whole_pass(model, probe, ids):
    """Scores of one row alone, without a cache."""
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]
    return probe.decision_function(hidden)


def by_row(frame, call=0):
    return dict(list(frame[frame["call"] == call].groupby("row")))


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma2"])
def test_every_token_of_a_left_padded_batch_has_the_score_of_a_whole_pass(tiny, tokenizer, name):
    model, probe = vd.load(tiny(name), tokenizer=tokenizer, check=False), probe_for()
    inputs = model.batch(model.encode(PROMPTS), padding_side="left")
    given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    with probe.monitor(model, ends=()) as scores:
        made = model.model.generate(**given, max_new_tokens=7, do_sample=False, eos_token_id=None)
    rows = by_row(scores.to_frame())
    assert len(rows) == 3
    for row, part in rows.items():
        real = inputs["attention_mask"][row].bool()
        ids = [*inputs["input_ids"][row][real].tolist(), *made[row, len(real) :].tolist()]
        assert part["token_id"].tolist() == ids[:-1]  # the last is chosen, and never read
        assert part["position"].tolist() == list(range(len(ids) - 1))
        assert part["generated"].sum() == 6
        assert not part["generated"].to_numpy()[: int(real.sum())].any()
        np.testing.assert_allclose(part["score"], whole_pass(model, probe, ids)[:-1], atol=1e-4)
        np.testing.assert_allclose(part["row_score"], part["score"].cummax())
        np.testing.assert_allclose(part["probability"], 1 / (1 + np.exp(-part["score"])))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_plain_pass_is_scored_without_its_padding(model, side):
    probe = probe_for()
    encoded = model.encode(PROMPTS)
    with probe.monitor(model) as scores:
        model.run(model.batch(encoded, padding_side=side))
        model.logits("a lie")
    frame = scores.to_frame()
    for row, part in by_row(frame).items():
        assert part["token_id"].tolist() == list(encoded[row].ids)
        assert not part["generated"].any()
        np.testing.assert_allclose(part["score"], whole_pass(model, probe, list(encoded[row].ids)), atol=1e-4)
    assert sorted(set(frame["call"])) == [0, 1]
    assert by_row(frame, 1)[0]["token_id"].tolist() == list(encoded[1].ids)


def test_a_generation_without_a_cache_and_one_with_it_give_the_same(model):
    probe, found = probe_for(), []
    ids = model.batch(model.encode(PROMPTS[:1]))["input_ids"]
    for cache in (True, False):
        with probe.monitor(model, ends=()) as scores:
            model.model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=cache, eos_token_id=None)
        last = scores.calls[-1].readings[-1]
        found.append(last.values[0, -1, 0].item())
    assert found[0] == pytest.approx(found[1], abs=1e-4)


@pytest.mark.parametrize(
    ("rows", "options"),
    [(3, {"cache_implementation": "static", "disable_compile": True}), (1, {"prompt_lookup_num_tokens": 3})],
)
def test_static_caches_and_guessed_tokens_give_the_same(model, rows, options):
    """A static cache turns the mask into one of four dimensions; guesses that fail are taken back."""
    probe = probe_for()
    inputs = model.batch(model.encode(["tell a lie or tell a lie or tell", *PROMPTS[:2]][:rows]), "left")
    given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    with probe.monitor(model, ends=()) as scores:
        made = model.model.generate(**given, max_new_tokens=9, do_sample=False, eos_token_id=None, **options)
    assert len(scores.calls) == 1
    for row, part in by_row(scores.to_frame()).items():
        real = inputs["attention_mask"][row].bool()
        ids = [*inputs["input_ids"][row][real].tolist(), *made[row, len(real) :].tolist()]
        count = min(len(part), len(ids))  # guesses may have been read beyond the end
        assert count >= len(ids) - 1
        assert part["token_id"].tolist()[: len(ids) - 1] == ids[:-1]
        expected = whole_pass(model, probe, ids)[: len(ids) - 1]
        np.testing.assert_allclose(part["score"][: len(ids) - 1], expected, atol=1e-4)


def test_rows_that_ended_are_not_scored_any_more(model):
    """Once a row has ended, `generate` feeds it padding with an attention mask of ones."""
    probe = probe_for()
    inputs = model.batch(model.encode(PROMPTS), padding_side="left")
    given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    free = model.model.generate(**given, max_new_tokens=8, do_sample=False, eos_token_id=None)
    width = inputs["input_ids"].shape[1]
    end = int(free[0, width + 2])
    with probe.monitor(model, ends=(end,)) as scores:
        made = model.model.generate(
            **given, max_new_tokens=8, do_sample=False, eos_token_id=end, pad_token_id=0
        )
    for row, part in by_row(scores.to_frame()).items():
        new = made[row, width:].tolist()
        spoken = new[: new.index(end) + 1] if end in new else new
        read = part[part["generated"]]["token_id"].tolist()
        assert read == (spoken if len(spoken) < made.shape[1] - width else spoken[:-1])
    assert len(by_row(scores.to_frame())[0]) < len(made[0])


def test_logits_are_the_same_to_the_last_bit_and_no_hook_is_left(model):
    probe = probe_for()
    options = {
        "max_new_tokens": 6,
        "output_logits": True,
        "return_dict_in_generate": True,
        "do_sample": False,
    }
    ids = model.batch(model.encode(PROMPTS[:1]))["input_ids"]
    count = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules())  # noqa: E731
    before = count()
    clean = model.model.generate(ids, **options)
    with probe.monitor(model, on_fire=lambda fire: None, threshold=-1e9) as scores:
        assert count() > before
        watched = model.model.generate(ids, **options)
    assert count() == before
    assert torch.equal(clean.sequences, watched.sequences)
    assert all(torch.equal(a, b) for a, b in zip(clean.logits, watched.logits))
    assert scores.fired.tolist() == [True]
    with pytest.raises(RuntimeError, match="mine"), probe.monitor(model):
        raise RuntimeError("mine")
    assert count() == before


def test_one_number_per_token_is_kept(model):
    with probe_for().monitor(model) as scores:
        model.generate(PROMPTS, max_new_tokens=4)
    for reading in scores.calls[0].readings:
        assert reading.values.shape == (*reading.of.shape, 1)
        assert reading.values.untyped_storage().nbytes() == 4 * reading.values.numel()


# Firing


def test_a_row_fires_above_the_threshold_and_the_callback_hears_of_it_once(model):
    probe = probe_for()
    with probe.monitor(model) as scores:
        model.generate(PROMPTS, max_new_tokens=5)
    frame = scores.to_frame()
    best = frame.groupby("row")["score"].max()
    threshold = float(best.sort_values().iloc[:2].mean())
    fires = []
    with probe.monitor(model, threshold=threshold, on_fire=fires.append) as scores:
        model.generate(PROMPTS, max_new_tokens=5)
    assert scores.fired.tolist() == (best > threshold).tolist()
    assert sorted(fire.row for fire in fires) == np.flatnonzero(best > threshold).tolist()
    for fire in fires:
        line = frame[(frame["row"] == fire.row) & (frame["score"] > threshold)].iloc[0]
        assert (fire.position, fire.token_id, fire.call) == (line["position"], line["token_id"], 0)
        assert fire.score == pytest.approx(line["score"], abs=1e-5)
    rows = scores.rows()
    assert rows["fired"].tolist() == scores.fired.tolist()
    np.testing.assert_allclose(rows["score"], best, atol=1e-5)


def test_generation_stops_for_rows_that_fired(model):
    probe = probe_for()
    ids = model.batch(model.encode(PROMPTS[:1]))["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with probe.monitor(model, over="generated", threshold=-1e9, ends=()) as scores:
        made = model.model.generate(ids, stopping_criteria=[scores.stop], **options)
    assert made.shape[1] == ids.shape[1] + 2  # the first new token is read in the second pass
    with probe.monitor(model, over="generated", threshold=1e9, ends=()) as scores:
        assert (
            model.model.generate(ids, stopping_criteria=[scores.stop], **options).shape[1] == ids.shape[1] + 8
        )


def test_an_exception_in_the_callback_ends_the_generation(model):
    def stop(fire):
        raise InterruptedError(f"row {fire.row}")

    with (
        pytest.raises(InterruptedError, match="row 0"),
        probe_for().monitor(model, threshold=-99, on_fire=stop),
    ):
        model.generate(PROMPTS[0], max_new_tokens=5)


def test_the_threshold_is_the_probes_own(model):
    probe = probe_for()
    with probe.monitor(model) as scores:
        pass
    assert scores.threshold == 0
    assert "carries no threshold" in scores.notes[0]
    object.__setattr__(probe.origin_, "thresholds", {"fpr1": 1.5, "balanced": 0.25})
    with probe.monitor(model) as scores:
        pass
    assert (scores.threshold, scores.notes) == (1.5, ())
    with probe.monitor(model, threshold="balanced") as scores:
        pass
    assert scores.threshold == 0.25
    with pytest.raises(UnknownNameError, match=r"threshold 'balance'; nearest: balanced"):
        probe.monitor(model, threshold="balance").__enter__()


@pytest.mark.parametrize("over", ["all", "generated"])
@pytest.mark.parametrize("aggregate", ["max", "last"])
def test_row_scores_are_the_aggregates_of_token_scores(model, aggregate, over):
    with probe_for().monitor(model, aggregate=aggregate, over=over, ends=()) as scores:
        model.generate(PROMPTS, max_new_tokens=5)
    for part in by_row(scores.to_frame()).values():
        counted = part if over == "all" else part[part["generated"]]
        wanted = counted["score"].cummax() if aggregate == "max" else counted["score"]
        np.testing.assert_allclose(counted["row_score"], wanted)
        assert (part["row_score"].to_numpy()[: len(part) - len(counted)] == -np.inf).all()


@pytest.mark.parametrize("made", [Highest, Latest])
def test_running_scores_are_the_same_in_one_piece_and_token_by_token(made):
    torch.manual_seed(0)
    scores, real = torch.randn(4, 9, 1), torch.rand(4, 9) > 0.4
    whole = made().update(scores, real)
    state = made()
    parts = torch.cat([state.update(scores[:, t : t + 1], real[:, t : t + 1]) for t in range(9)], 1)
    assert torch.equal(whole, parts)
    for row in range(4):
        seen = [float(scores[row, t, 0]) for t in range(9) if real[row, t]]
        wanted = (max(seen) if made is Highest else seen[-1]) if seen else -np.inf
        assert whole[row, -1].item() == pytest.approx(wanted)


class TwoReadings(LinearProbe):
    """A sequence probe as a monitor sees it: the sum of two running means."""

    name = "two"

    def solve(self, design, problems):
        raise AssertionError

    def said(self):
        return "two"

    def readers(self):
        return np.stack([self.coef_[0], -2 * self.coef_[0]]), np.array([0.1, 0.2])

    def running(self):
        return MeanOfBoth()


class MeanOfBoth:
    def __init__(self):
        self.total, self.count = 0, 0

    def update(self, readings):
        self.total, self.count = self.total + readings.sum(1), self.count + 1
        return self.total / self.count


def test_a_probe_over_sequences_brings_its_own_running_score(model):
    probe = TwoReadings().adopt(np.array([0, 1]), probe_for().coef_[0], np.array([0.1]), 1)
    probe.origin_ = Origin(site=SITE)
    plain = probe_for()
    fires = []
    with (
        plain.monitor(model, ends=()) as single,
        probe.monitor(model, ends=(), threshold=-1e9, on_fire=fires.append) as scores,
    ):
        model.generate(PROMPTS, max_new_tokens=4)
    assert [fire.row for fire in fires] == [0, 1, 2]
    alone = by_row(single.to_frame())
    for row, part in by_row(scores.to_frame()).items():
        first = alone[row]["score"].to_numpy() - 0.1
        np.testing.assert_allclose(part["score"], first + 0.1 - 2 * first + 0.2, atol=1e-4)
        np.testing.assert_allclose(part["row_score"], part["score"].expanding().mean(), atol=1e-4)


# Showing


def test_a_row_is_shown_as_coloured_text(model):
    with probe_for().monitor(model) as scores:
        texts = model.generate(["東京 <b>the lie</b>", PROMPTS[0]], max_new_tokens=5)
    view = scores.view(0)
    assert "東京 <b>the lie</b>" in view.text[: view.prompt_chars]
    assert view.text[view.prompt_chars :].startswith(texts[0][:1])
    frame = view.to_frame()
    inside = frame[frame["end"] > frame["start"]]
    spelt = "".join(view.text[a:b] for a, b in sorted(set(zip(inside["start"], inside["end"]))))
    assert spelt == view.text
    for page in (scores._repr_html_(), *scores.report_section().html):
        assert "<b>the lie" not in page
    body = view.to_html().split('dir="auto">', 1)[1]
    assert html.unescape(re.sub(r"<[^>]*>", "", body)) == view.text
    assert "\n" not in repr(scores)
    assert "2 rows" in repr(scores)


# Bad input


def test_a_probe_of_another_model_site_or_width_is_refused_and_both_are_named(model):
    own = probe_for(model_fingerprint=model.fingerprint(), model="tiny")
    with own.monitor(model):
        pass
    foreign = probe_for(model_fingerprint="f" * 32, model="other-model")
    with pytest.raises(
        MismatchError, match=rf"other-model \(fingerprint f{{12}}\), not {model.path} .*force=True"
    ):
        foreign.monitor(model).__enter__()
    with pytest.raises(MismatchError, match=r"other-model .* force=True"):
        vd.view_tokens(model, foreign, "a lie")
    with pytest.raises(MismatchError, match=r"fitted at blocks.1.hook_resid_post, not at blocks.0"):
        own.monitor(model, site="resid_post.0").__enter__()
    with pytest.raises(MismatchError, match=r"reads 7 features; .* has 32 at blocks.1"):
        probe_for(width=7).monitor(model, force=True).__enter__()
    for probe, site in ((foreign, None), (own, "resid_post.0")):
        with probe.monitor(model, site=site, force=True) as scores:
            model.logits("a lie")
        assert len(scores) == len(model.encode(["a lie"])[0].ids)


def test_a_store_of_another_model_or_width_is_refused(model, tiny, tokenizer):
    texts = vd.Pairs.from_rows([{"prompt": text, "label": n} for n, text in enumerate(PROMPTS)])
    acts = vd.collect(model, texts, sites="resid_post.1", progress=False)
    own = probe_for(model_fingerprint=model.fingerprint())
    np.testing.assert_array_equal(vectors_for(own, acts), acts[SITE].double().numpy())
    foreign = probe_for(model_fingerprint="f" * 32)
    with pytest.raises(MismatchError, match="another model"):
        vectors_for(foreign, acts)
    assert vectors_for(foreign, acts, force=True).shape == (3, 32)
    with pytest.raises(MismatchError, match="reads 5 features; the store has 32"):
        vectors_for(probe_for(width=5), acts)
    with pytest.raises(InputError, match="which site it reads"):
        vectors_for(probe_for(site=None), acts)


def test_bad_options_are_refused(model, tiny):
    with pytest.raises(UnknownNameError, match=r"aggregate 'mx'.*nearest: max"):
        probe_for().monitor(model, aggregate="mx").__enter__()
    with pytest.raises(UnknownNameError, match="tokens 'new'"):
        probe_for().monitor(model, over="new").__enter__()
    with pytest.raises(InputError, match="threshold is nan"):
        probe_for().monitor(model, threshold=float("nan")).__enter__()
    with pytest.raises(InputError, match=r"give veridical.load\(model\)"):
        probe_for().monitor(tiny("llama")).__enter__()
    with pytest.raises(InputError, match="site="):
        probe_for(site=None).monitor(model).__enter__()
    with pytest.raises(ModelError, match="without a forward pass"), probe_for().monitor(model):
        model.model.model(torch.tensor([[1, 5]]))
