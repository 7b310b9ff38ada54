"""A probe over a text: every token's score, at the right characters; and sweeps on what `collect` gives."""

import re

import numpy as np
import pandas as pd
import pytest
import torch

import veridical as vd
from veridical.errors import InputError
from veridical.probes import LogisticProbe
from veridical.probes.origin import Origin

torch.set_num_threads(1)
SITE = "blocks.1.hook_resid_post"
TEXTS = [
    "the capital of France is Paris",
    "Zürich, 東京 and 🙂 naïve",
    "a\nb\t<b>bold</b> & \"quoted\" 'x'",
    "  leading and trailing  ",
]


@pytest.fixture(scope="module")
def model(tiny, tokenizer):
    return vd.load(tiny("llama"), tokenizer=tokenizer, check=False)


def probe_for(width=32, **origin):
    random = np.random.default_rng(0)
    probe = LogisticProbe().adopt(np.array([False, True]), random.normal(size=width), np.array([0.1]), 1)
    probe.origin_ = Origin(**{"site": SITE, "target": "lied", **origin})
    return probe


@pytest.mark.parametrize("text", TEXTS)
def test_scores_are_those_of_the_models_own_hidden_states(model, tiny, text):
    probe = probe_for()
    view = vd.view_tokens(model, probe, text)
    frame = view.to_frame()
    ids = torch.tensor([frame["token_id"].tolist()])
    with torch.no_grad():
        hidden = tiny("llama")(ids, output_hidden_states=True).hidden_states[2][0]
    np.testing.assert_allclose(frame["decision"], probe.decision_function(hidden), atol=1e-4)
    np.testing.assert_allclose(frame["probability"], probe.predict_proba(hidden)[:, 1], atol=1e-5)
    assert ids[0].tolist() == list(model.encode([text])[0].ids)


@pytest.mark.parametrize("text", TEXTS)
def test_html_holds_exactly_the_text_and_every_token(model, text):
    import html

    view = vd.view_tokens(model, probe_for(), text)
    body = view.to_html().split('dir="auto">', 1)[1].removesuffix("</div>")
    assert html.unescape(re.sub(r"<[^>]*>", "", body)) == view.text == text
    tips = re.findall(r'data-tip="([^"]*)"', body)
    shown = sum(int(m[1]) if (m := re.match(r"(\d+) tokens: ", tip)) else 1 for tip in tips)
    frame = view.to_frame()
    assert shown == (frame["end"] > frame["start"]).sum()


def test_tokens_that_share_a_character_are_one_piece(model):
    view = vd.view_tokens(model, probe_for(), "東")
    frame = view.to_frame()
    inside = frame[frame["end"] > frame["start"]]
    assert len(inside) >= 2, "this tokenizer splits the character into bytes"
    assert view.to_html().count("data-tip=") - view.to_html().split("</style>")[0].count("data-tip=") == 1
    last = inside["probability"].iloc[-1]
    assert f"{last:.3f}" in view.to_html()


def test_offsets_are_characters_of_the_text(model):
    text = TEXTS[0]
    frame = vd.view_tokens(model, probe_for(), text).to_frame()
    inside = frame[frame["end"] > frame["start"]]
    assert "".join(text[a:b] for a, b in zip(inside["start"], inside["end"])) == text
    assert (inside["token"] == [text[a:b] for a, b in zip(inside["start"], inside["end"])]).all()


def test_prompt_and_completion_are_told_apart(model):
    chat = [{"role": "user", "content": "capital of France?"}]
    view = vd.view_tokens(model, probe_for(), chat, "Paris")
    frame = view.to_frame()
    said = frame[frame["completion"]]
    assert "".join(said["token"]) == "Paris"
    assert view.text.endswith("Paris")
    assert view.text[: view.prompt_chars] + "Paris" == view.text
    assert view.to_html().count('class="vd-prompt"') > 0
    assert "Mean probability over the completion" in view.report_section().text


def test_text_and_names_are_escaped(model):
    evil = "<script>alert('x')</script>"
    probe = probe_for(target='<img src=x onerror="1">')
    view = vd.view_tokens(model, probe, evil)
    for page in (view.to_html(), view._repr_html_(), *view.report_section().html):
        assert "<script" not in page
        assert "<img" not in page
    assert "\n" not in repr(view)


def test_another_model_and_other_tokens_are_said(model):
    own = probe_for(model_fingerprint=model.fingerprint(), tokens="all")
    assert vd.view_tokens(model, own, "the lie").notes == ()
    foreign = probe_for(model_fingerprint="0" * 32, tokens="last")
    other = vd.view_tokens(model, foreign, "the lie", force=True)
    assert any("another model" in note for note in other.notes)
    assert any("extrapolation" in note for note in other.notes)


def test_wrong_width_or_no_site_is_refused(model):
    with pytest.raises(InputError, match=r"reads 7 features; .* has 32"):
        vd.view_tokens(model, probe_for(width=7), "the lie")
    with pytest.raises(InputError, match="site="):
        vd.view_tokens(model, probe_for(site=None), "the lie")
    assert vd.view_tokens(model, probe_for(site=None), "the lie", site="resid_post.0").site.startswith(
        "blocks.0"
    )


def test_a_site_per_head_is_read_flat(model):
    view = vd.view_tokens(model, probe_for(site="blocks.1.attn.hook_z"), "the lie")
    assert len(view.to_frame()) == len(model.encode(["the lie"])[0].ids)


# Together with `collect`


def chats(n=40):
    words = ["France", "Italy", "gold", "silver"]
    rows = []
    for i in range(n):
        for lie in (False, True):
            prompt = f"tell {'a lie' if lie else 'the truth'}: the capital of {words[i % 4]}"
            rows.append(
                {"pair": f"p{i}", "prompt": prompt, "completion": "Paris", "label": lie, "kind": i % 2}
            )
    return vd.Pairs.from_pandas(pd.DataFrame(rows))


@pytest.mark.parametrize(("tokens", "vectors"), [("last", 1), ("all", 2), ("prompt_last", 1), ("mean", 1)])
def test_a_sweep_on_collected_activations(model, quick, tokens, vectors):
    acts = vd.collect(model, chats(), sites="resid_post.*", tokens=tokens, progress=False)
    given = {**quick, "text_baseline": True, "folds": 3, "allow_duplicates": True}
    sweep = vd.fit_probes(acts, where="kind=1", **given)
    assert [r.site for r in sweep.results] == acts.sites
    assert sweep.counts["fit_rows"] + sweep.counts["test_rows"] == 40
    assert sweep.counts["fit_vectors"] >= vectors * sweep.counts["fit_rows"]
    assert sweep.counts["fit_pairs"] + sweep.counts["test_pairs"] == 20
    assert sweep.text["auroc"].value > 0.99
    origin = sweep.best().origin_
    assert origin.tokens == tokens
    assert origin.model_fingerprint == model.fingerprint()
    assert origin.data_fingerprint == acts.fingerprint
    view = vd.view_tokens(model, sweep.best(), "tell a lie", "Paris")
    assert not any("another model" in note for note in view.notes)


def test_the_stores_vectors_are_read_at_the_rows_that_are_fitted(model, quick):
    acts = vd.collect(model, chats(), sites="resid_post.1", tokens="all", progress=False)
    site = acts.sites[0]
    quick = {**quick, "allow_duplicates": True}
    by_store = vd.fit_probes(acts, **quick).to_frame()
    by_hand = vd.fit_probes(
        {site: acts[site]}, target=acts.labels("label"), groups=acts.groups, **quick
    ).to_frame()
    assert by_store["auroc"].tolist() == by_hand["auroc"].tolist()
    kept = acts.filter(kind=1)
    filtered = vd.fit_probes(kept, **quick).to_frame()
    where = vd.fit_probes(acts, where={"kind": 1}, **quick).to_frame()
    assert filtered["auroc"].tolist() == where["auroc"].tolist()


def test_the_baseline_reads_only_up_to_the_token_that_was_read(model, quick):
    """The completion gives the label away; a probe on the prompt must not be compared with that."""
    frame = chats().to_pandas()
    frame["prompt"] = "the capital of France"
    frame["completion"] = np.where(frame["label"], "yes", "no")
    pairs = vd.Pairs.from_pandas(frame)
    options = {**quick, "text_baseline": True}
    found = {}
    for tokens in ("prompt_last", "answer"):
        acts = vd.collect(model, pairs, sites="resid_post.1", tokens=tokens, progress=False)
        found[tokens] = vd.fit_probes(acts, **options).text["auroc"].value
    assert found["answer"] == 1
    assert found["prompt_last"] == 0.5
