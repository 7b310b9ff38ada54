"""Cross-model patching: a planted change is found where it is, and equal models show nothing."""

import numpy as np
import pytest
import torch
from comparison_oracles import changed

import veridical as vd
from veridical.comparison import compare
from veridical.comparison.duo import load_pair, pair_of
from veridical.comparison.where import (
    ANYWHERE,
    BEFORE_LAST,
    BETWEEN,
    CHANGE,
    FOUND,
    HEADS,
    INTO_POLICY,
    INTO_REFERENCE,
    PARTS,
    POSITIONS,
    READOUT,
    where,
)
from veridical.comparison.where_figures import draw_heads, draw_parts, draw_positions
from veridical.comparison.where_findings import where_findings
from veridical.comparison.where_rows import Questions, ends_alike, questions_of
from veridical.demo_compare import agreement, compared
from veridical.errors import InputError
from veridical.interventions.patching import patch
from veridical.pairs.prompts import ask, chat

QUICK = {"samples": 0, "behaviour_pairs": 0, "max_new_tokens": 3, "bootstrap": 40}
LIE = "You must answer every question with something false."


@pytest.fixture(scope="module")
def liar():
    return vd.load("tiny-liar", check=False)


@pytest.fixture(scope="module")
def honesty():
    return vd.Pairs.load("honesty")


@pytest.fixture(scope="module")
def asked(liar, honesty):
    """Six questions of one length, with the metric."""
    frame = honesty.to_pandas()
    frame = frame[(frame["form"] == "choice") & frame["taught"]].drop_duplicates("pair").head(120)
    users = [ask(q, list(o), "choice") for q, o in zip(frame["question"], frame["options"])]
    prompts = [chat(LIE, user) for user in users]
    lengths = [len(row.ids) for row in liar.encode(prompts)]
    kept = [row for row, length in enumerate(lengths) if length == max(lengths, key=lengths.count)][:6]
    options = [(list(frame["options"].iloc[row]), int(frame["correct"].iloc[row])) for row in kept]
    right, wrong = [each[at] for each, at in options], [each[1 - at] for each, at in options]
    return Questions([prompts[row] for row in kept], "logit_diff", right, wrong, np.arange(6), "questions")


def duo_with(liar, layer, part="mlp.down_proj", scale=8.0):
    policy = changed(liar.model, layer, scale=scale, part=part)
    return pair_of(vd.load(policy, tokenizer=liar.tokenizer, check=False), liar)


def difference(model, questions, write=None):
    """The metric by hand: one plain pass for each prompt."""
    found = []
    for prompt, right, wrong in zip(questions.prompts, questions.answers, questions.wrong):
        firsts = []
        for answer in (right, wrong):
            (row,) = model.encode([prompt], [answer])
            firsts.append(row.ids[row.prompt_tokens])
        ids = torch.tensor([model.encode([prompt])[0].ids])
        with torch.no_grad():
            logits = model.run(model.batch(ids.tolist()), write=write(prompt) if write else None).logits[
                0, -1
            ]
        found.append(float(logits[firsts[0]] - logits[firsts[1]]))
    return np.array(found)


@pytest.mark.parametrize("layer", [0, 3, 5])
def test_a_planted_change_is_located_in_its_layer(liar, asked, layer):
    tables = where(duo_with(liar, layer), asked, progress=False, bootstrap=40)
    assert tables[CHANGE]["change"][0] != 0
    parts = tables[PARTS].set_index(["direction", "layer"])["share"]
    for way in (INTO_REFERENCE, INTO_POLICY):
        assert parts[way][layer] == pytest.approx(1, abs=2e-3)
        assert np.abs(parts[way].drop(layer)).max() < 2e-3
    places = tables[POSITIONS]
    assert (places[places["layer"] < layer]["effect"] == 0).all(), "below the change nothing differs"
    assert np.abs(places[places["layer"] == layer]["effect"]).max() > 0
    heads = tables[HEADS]
    assert (heads[heads["layer"] <= layer]["effect"] == 0).all(), "an MLP's change shows in later heads"
    readout = tables[READOUT].set_index(["stream", "readout"])["value"]
    assert readout["policy", "policy"] == pytest.approx(readout["policy", "reference"], abs=1e-4)
    assert tables[FOUND]["layer"].ge(layer).all()


@pytest.mark.parametrize("way", [INTO_REFERENCE, INTO_POLICY])
def test_shares_add_up_and_are_those_of_plain_hooks(liar, asked, way):
    """Two changed layers and a changed unembedding, against one hooked pass for each patch."""
    duo = duo_with(liar, 2, part="self_attn.o_proj")
    policy = changed(changed(duo.policy.model, 4), None)
    with torch.no_grad():
        policy.lm_head.weight = torch.nn.Parameter(policy.lm_head.weight.detach() * 1.5)
    duo = pair_of(vd.load(policy, tokenizer=liar.tokenizer, check=False), liar)
    tables = where(duo, asked, progress=False, bootstrap=40)
    parts = tables[PARTS][tables[PARTS]["direction"] == way]
    assert parts["share"].sum() == pytest.approx(1, abs=1e-6)
    base, source = (duo.reference, duo.policy) if way == INTO_REFERENCE else (duo.policy, duo.reference)

    def putting(site, position=None, head=None):
        def write(prompt):
            with torch.no_grad():
                theirs = source.run(source.batch([source.encode([prompt])[0].ids]), read=[site])[site]

            def edit(value):
                if position is not None:
                    value[:, position] = theirs[:, position]
                elif head is not None:
                    value[:, :, head] = theirs[:, :, head]
                else:
                    value = theirs.clone()
                return value

            return {site: edit}

        return write

    plain, other = difference(base, asked), difference(source, asked)
    chain = [plain, *(difference(base, asked, putting(site)) for site in
                      ("resid_pre.0", *(f"resid_post.{layer}" for layer in range(6)))), other]  # fmt: skip
    steps = np.diff(np.array(chain), axis=0).mean(1)
    assert parts["effect"].to_numpy() == pytest.approx(steps, abs=1e-4)
    assert abs(steps[-1]) > 0.1 * abs(steps.sum()), "the unembedding was changed"
    mine = tables[POSITIONS][tables[POSITIONS]["direction"] == way].set_index(["layer", "position"])
    for layer, position in ((2, "9"), (3, "20"), (4, "-1")):
        name = position if int(position) >= 0 else str(len(set(mine.index.get_level_values(1))) - 1)
        by_hand = difference(base, asked, putting(f"resid_post.{layer}", int(position))) - plain
        assert mine["effect"][layer, name] == pytest.approx(by_hand.mean(), abs=1e-4)
    heads = tables[HEADS][tables[HEADS]["direction"] == way].set_index(["layer", "head"])
    for layer, head in ((3, 1), (5, 2)):
        by_hand = difference(base, asked, putting(f"z.{layer}", head=head)) - plain
        assert heads["effect"][layer, head] == pytest.approx(by_hand.mean(), abs=1e-4)


def test_a_model_against_itself_is_exactly_zero(liar, asked):
    duo = duo_with(liar, None)
    for metric in ("logit_diff", "kl"):
        answers = (asked.answers, asked.wrong) if metric == "logit_diff" else ([], [])
        given = Questions(asked.prompts, metric, *answers, asked.groups, asked.said)
        tables = where(duo, given, progress=False, bootstrap=40)
        for name in (PARTS, POSITIONS, HEADS):
            assert (tables[name]["effect"] == 0).all()
            assert tables[name]["share"].isna().all()
        assert tables[FOUND].empty
        (said,) = where_findings(tables)
        assert not said.found
        assert "nothing to locate" in said.text
        with pytest.raises(InputError, match="do not differ"):
            draw_parts(tables)


def test_it_says_where_and_draws_it(liar, asked):
    """A change that reads one direction at one token: the place is named, and chosen on other pairs."""
    duo = duo_with(liar, 3, scale=16.0)
    tables = where(duo, asked, progress=False, bootstrap=40)
    assert where_findings(tables)[0].found is False, "not beyond chance, so nothing is located"
    tables[CHANGE][["change", "low", "high", "scale"]] = [[0.2, 0.1, 0.3, 1.0]]
    part, place, *_ = where_findings(tables)
    assert "layer 3 makes 100% and the final norm and unembedding makes 0% of this change" in part.text
    found = tables[FOUND].iloc[0]
    assert f"Patching {found['site']} at position {found['position']} ({found['token']!r})" in place.text
    assert "that the place was not chosen on" in place.control
    assert found["pairs"] == 3
    positions, heads, parts = draw_positions(tables), draw_heads(tables), draw_parts(tables)
    tokens = liar.tokenizer.convert_ids_to_tokens(liar.encode(asked.prompts)[0].ids)
    assert len(positions.data) == len(heads.data) == len(parts.data) == 2
    assert len(positions.data[0].x) == len(tokens)
    assert len(positions.data[0].y) == 6
    assert np.shape(heads.data[0].z) == (6, liar.n_heads)


def test_the_rows_begin_alike(liar, honesty):
    duo = duo_with(liar, None)
    found = questions_of(duo, honesty, 24)
    assert len(found) == 24
    assert found.metric == "logit_diff"
    assert len({repr(prompt[:-1]) for prompt in found.prompts}) == 1, "one system prompt"
    frame = honesty.to_pandas()
    told = {repr(list(prompt)) for prompt in frame.loc[frame["instructed_to_lie"], "prompt"]}
    assert {repr(prompt) for prompt in found.prompts} <= told
    assert questions_of(duo, vd.Pairs.load("toxic"), 8).answers[0] in set(vd.Pairs.load("toxic").completions)
    assert questions_of(duo, vd.Pairs.load("safe"), 8).metric == "kl"
    answered = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]]
    assert questions_of(duo, answered, 8) is None
    assert questions_of(duo, honesty, 24).prompts == found.prompts
    assert ends_alike([(1, 2, 3, 9), (1, 2, 4, 5, 9)]) == (2, 1)
    assert ends_alike([(1, 2), (1, 2)]) == (2, 0)
    assert ends_alike([(1, 1), (1, 1, 1)]) == (2, 0)


def test_prompts_of_unequal_length(liar, honesty):
    """What they begin and end with position by position, the rest together; parts as before."""
    duo = duo_with(liar, 2)
    found = questions_of(duo, honesty, 6)
    assert len({len(row.ids) for row in liar.encode(found.prompts)}) > 1
    tables = where(duo, found, progress=False, bootstrap=40, heads=False, layers=2)
    assert HEADS not in tables
    places = tables[POSITIONS]
    assert set(places["layer"]) == {0, 5}
    assert BETWEEN in set(places["position"])
    ids = [row.ids for row in liar.encode(found.prompts)]
    first, last = ends_alike(ids)
    wanted = [*map(str, range(first)), BETWEEN, *(str(-at) for at in range(max(last, 1), 0, -1))]
    assert list(dict.fromkeys(places["position"])) == wanted
    parts = tables[PARTS].set_index(["direction", "layer"])["share"]
    assert parts[INTO_REFERENCE][2] == pytest.approx(1, abs=5e-3)


def test_where_the_decision_to_lie_was_removed(liar, honesty):
    """tiny-liar-dpo has its adapter on layers 2 and 3. Patching it into the organism names these layers, and
    the tokens at which the organism alone differs when asked for the truth."""
    duo = load_pair("tiny-liar-dpo", reference=liar, check=False)
    test = honesty.filter(np.asarray(honesty["split"]) != "train")
    found, asked = compared(duo, test, False, pairs_read=4)
    parts = found.table(PARTS).set_index(["direction", "layer"])["share"]
    for way in (INTO_REFERENCE, INTO_POLICY):
        assert parts[way][[2, 3]].sum() == pytest.approx(1, abs=1e-3)
    close, _, site = agreement(liar, asked, found, False)
    assert site == "resid_post.2", "below the trained layers nothing differs"
    assert close > 0.85
    places = found.table(FOUND).set_index(["among", "direction"])
    tokens = liar.tokenizer.convert_ids_to_tokens(liar.encode(asked.corrupt)[0].ids)
    assert places.loc[(ANYWHERE, INTO_REFERENCE), "position"] == str(len(tokens) - 1)
    before = places.loc[(BEFORE_LAST, INTO_REFERENCE)]
    assert before["token"].strip() == "false", "the word that asks for the lie"
    assert before["low"] > 5 * abs(before["random"])
    alone = patch(
        liar, asked.clean, asked.corrupt, answers=asked.answers, wrong=asked.wrong, metric="logit_diff",
        sites=before["site"], progress=False,
    ).to_frame().set_index("position")["recovered"].sort_values(ascending=False)  # fmt: skip
    assert before["position"] in alone.index[:3]
    assert places.loc[(ANYWHERE, INTO_REFERENCE), "position"] in alone.index[:3]


def test_it_is_part_of_a_comparison(liar, honesty):
    few = honesty.filter(np.isin(honesty.groups, np.unique(honesty.groups)[:40]))
    found = compare(duo_with(liar, 3), few, **QUICK, where=6, weights=False)
    assert {PARTS, POSITIONS, HEADS, CHANGE} <= set(found.tables)
    without = compare(duo_with(liar, 3), few, **QUICK, where=0, weights=False)
    assert not [name for name in without.tables if name.startswith("where")]
    texts = compare(duo_with(liar, 3), ["the capital of France is", "gold is"], **QUICK, weights=False)
    assert texts.table(CHANGE)["metric"][0] == "kl"
