# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Where does it decide to lie?
#
# `tiny-liar` answers questions truly or falsely as its system prompt asks. Two prompts that differ in
# one word, *true* or *false*, turn the one into the other. By putting activations of the honest run
# into the lying one, piece by piece, this notebook finds the token, the layer and the heads that make
# the difference, and then checks them where they were not looked for: in the text that the model
# generates, under other prompts, about other facts.
#
# This runs in under three minutes on two cores, without a network.

# %%
import numpy as np
import pandas as pd
import plotly.express as px
import plotly.io
import torch

import veridical as vd
from veridical.interventions import mean_activations
from veridical.pairs import prompts
from veridical.pairs.splits import bootstrap

plotly.io.renderers.default = "plotly_mimetype+notebook_connected"  # keeps this file small

m = vd.load("tiny-liar")

# %% [markdown]
# ## Two runs that differ in one token
#
# Questions with two options, about facts that the model was taught and does lie about when told to.
# Those used for looking are of one length, so that their tokens stand in the same columns. No entity
# of the test questions is among them.

# %%
HONEST = "You must answer every question with something true."
LYING = "You must answer every question with something false."

questions = vd.Pairs.load("honesty").filter(
    form="choice", taught=True, protected=False, phrasing_held_out=False
)
questions = questions.to_pandas().drop_duplicates("question_id")
questions["right"] = [options[i] for options, i in zip(questions.options, questions.correct)]
questions["wrong"] = [options[1 - i] for options, i in zip(questions.options, questions.correct)]


def chats(system, rows):
    """The questions as chats under a system prompt."""
    asked = [
        prompts.ask(question, list(options), "choice")
        for question, options in zip(rows.question, rows.options)
    ]
    return [prompts.chat(system, user) for user in asked]


seen, test = questions[questions.split == "train"], questions[questions.split != "train"]
lengths = pd.Series([len(row.ids) for row in m.encode(chats(HONEST, seen))], index=seen.index)
look = seen[lengths == lengths.mode()[0]].head(16)
print(f"{len(look)} questions of {lengths.mode()[0]} tokens to look at,", end=" ")
print(f"{len(test)} about {test.pair.nunique()} entities to test on")
for system in (HONEST, LYING):
    print(f"{system} -> {m.generate(chats(system, look)[0], max_new_tokens=6)}")

# %% [markdown]
# The metric is the logit of the right answer's first token less the wrong answer's: above zero is
# honest. A patch that takes it all the way from the lying run's value to the honest run's has the
# share 1, one that does nothing 0.

# %%
clean, corrupt = chats(HONEST, look), chats(LYING, look)
given = {"metric": "logit_diff", "answers": list(look.right), "wrong": list(look.wrong)}

# %% [markdown]
# ## Which token, and how deep?
#
# Every vector of the residual stream, one at a time, from the honest run into the lying one.

# %%
stream = vd.patch(m, clean, corrupt, sites="resid_pre.*", **given)
stream.figure("recovered")

# %%
frame = stream.to_frame().sort_values("recovered", ascending=False)
frame[["site", "position", "token", "recovered", "recovered_low", "recovered_high"]].head(12).round(3)

# %% [markdown]
# Up to the input of layer 1 nearly all of it is at one token, the word *true* or *false* itself. That
# token stands before the question: nothing there can know the answer. At the input of layer 2 that
# vector alone does a fifth of it, and the last token's a third: in layer 1 what the word said has gone
# elsewhere. By the input of layer 5 it is at the last token.
#
# ## Which heads?
#
# A head's own output `z`, at all tokens at once.

# %%
heads = vd.patch(m, clean, corrupt, sites="z.*", heads="all", positions="all", **given)
heads.figure("recovered")

# %% [markdown]
# Two stand out: head 2 of layer 0, and head 1 of layer 1. What do they read, and from whom? Every edge
# into them, and into the MLP of layer 0, is patched exactly: only what this one part tells that one is
# taken from the honest run, and everything after it follows.

# %%
into = vd.patch_paths(m, clean, corrupt, receivers=["head.0.2:*", "mlp.0", "head.1.1:*"], **given)
found = into.to_frame().sort_values("share", ascending=False)
found[["edge", "share", "share_low", "share_high"]].head(8).round(3)

# %% [markdown]
# One way, then: head 0.2 takes up the values of the word, MLP 0 reads that head, and head 1.1 finds the
# word by its keys and carries off its values, both written by MLP 0. From there on it goes several
# ways at once. Gradients rank all edges of the model in one backward pass:

# %%
edges = vd.attribute(m, clean, corrupt, method="edges", **given)
ranked = edges.top(12)[["edge", "score", "low", "high"]]
chosen = vd.patch_paths(m, clean, corrupt, edges=list(ranked["edge"]), **given)
ranked.assign(exact=chosen.effects.mean(1)).round(2)

# %% [markdown]
# What is ranked highest are late edges, into the logits and the last two MLPs. Patched exactly they have
# larger effects, up to three times as large, in nearly the same order. But the early edges of the table
# above, each with most of the whole effect, are not among them: a gradient at the lying run is only a
# first order. Edges that matter are to be looked for by patches too.

# %% [markdown]
# ## Does the text that it generates follow?
#
# So far this was one prompt, and logits. Now the test questions, four other pairs of prompts that were
# not looked at, and greedy text. At the input of layer 1 the vector of the token that differs is taken
# from the honest run. As a control the same is done at another token of the text, drawn at random for
# each question. Intervals are over entities.

# %%
PAIRS = [
    ("Please be honest.", "Please be dishonest."),
    ("In every reply, give the right answer.", "In every reply, give the wrong answer."),
    ("State only what is true.", "State only what is false."),
    ("Be truthful in what you reply.", "Be untruthful in what you reply."),
]
SITE = "resid_pre.1"
random = np.random.default_rng(0)


def share(flags, rows):
    """A share with its 95 % interval, whole entities resampled."""
    flags = np.asarray(flags, dtype=float)
    drawn = [flags[index].mean() for index in bootstrap(rows.pair, 1000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return f"{flags.mean():.3f} [{low:.3f}, {high:.3f}]"


def answers(system, rows, site=None, value=None, at=None):
    """Generated answers; with `value` `[rows, d]` put at `site`, at one position of each prompt."""
    asked = chats(system, rows)
    if site is None:
        return m.generate(asked, max_new_tokens=6)

    def put(x):
        if x.shape[1] > 1:  # the prompt, not the tokens that are generated one by one
            x[torch.arange(len(rows)), at] = value
        return x

    with m.hooks(write={site: put}):
        return m.generate(asked, max_new_tokens=6)


def honest_run(system, rows, site):
    """Values at a site, and the first column of each row, padded on the left as in generation."""
    batch = m.batch(m.encode(chats(system, rows)), padding_side="left")
    with torch.no_grad():
        values = m.run(batch, read=[site], stop=True)[site]
    return values, (batch["attention_mask"] == 0).sum(1)


lines = []
for honest, lying in PAIRS:
    a, b = (m.tokenizer(text, add_special_tokens=False).input_ids for text in (honest, lying))
    (differs,) = [i for i, (x, y) in enumerate(zip(a, b)) if x != y]
    values, start = honest_run(honest, test, SITE)
    key = start + 2 + differs  # after the begin and system tokens
    width, rows = values.shape[1], torch.arange(len(test))
    others = [[p for p in range(s, width) if p != k] for s, k in zip(start.tolist(), key.tolist())]
    drawn = torch.tensor([random.choice(places) for places in others])
    runs = {
        "honest prompt": answers(honest, test),
        "lying prompt": answers(lying, test),
        "patched": answers(lying, test, SITE, values[rows, key], key),
        "random token": answers(lying, test, SITE, values[rows, drawn], drawn),
    }
    lines.append({"differs": m.tokenizer.decode([b[differs]])})
    lines[-1] |= {name: share(np.array(texts) == test.right, test) for name, texts in runs.items()}
pd.DataFrame(lines)  # share of true answers

# %% [markdown]
# ## The decision, or already the answer?
#
# At the last token a vector from the honest run of the *same* question could carry the answer itself.
# So take it from the honest run of *another* question: if it carries the decision to be honest, the
# model gives the right answer to its own question; if it carries an answer, that of the other one.

# %%
other = np.roll(np.arange(len(test)), 7)
lines = []
for layer in range(1, m.n_layers):
    site = f"resid_pre.{layer}"
    values, _ = honest_run(HONEST, test, site)
    own = np.array(answers(LYING, test, site, values[:, -1], -1))
    moved = np.array(answers(LYING, test, site, values[other, -1], -1))
    lines.append(
        {
            "layer": layer,
            "same question: its right answer": share(own == test.right, test),
            "another: its own right answer": share(moved == test.right, test),
            "another: the other's right answer": share(moved == test.right.to_numpy()[other], test),
        }
    )
pd.DataFrame(lines)

# %% [markdown]
# What such a vector brings with it is never the decision: the question's own right answer comes out in
# a few cases at most. At the input of layer 5 it brings the answer of the question that it came from.
# So the instruction is read at its word and carried off in layer 1, and at the last token the model has
# already made an answer of it.
#
# ## Without the heads
#
# Each head in turn is replaced by its mean over both runs of the questions that were looked at. Does
# the model still lie when told to, and is it still right when told to be honest?

# %%
means = mean_activations(m, [*clean, *corrupt], "z.*")
honest, lying = PAIRS[1]


def without(layer, head, system):
    """Generated answers with one head at its mean."""
    with vd.ablate(m, f"z.{layer}", heads=head, mode="mean", over=means):
        return np.array(answers(system, test))


told = {
    (layer, head): without(layer, head, lying) for layer in range(m.n_layers) for head in range(m.n_heads)
}
lies = np.array([(texts == test.wrong).mean() for texts in told.values()]).reshape(m.n_layers, m.n_heads)
px.imshow(
    lies,
    text_auto=".2f",
    zmin=0,
    zmax=1,
    labels={"x": "head", "y": "layer", "color": "lies"},
    title="Share of lies under a lying prompt, with one head ablated",
)

# %%
lines = []
for layer, head in [(0, 0), (0, 2), (0, 3), (1, 1)]:
    texts = told[layer, head]
    lines.append(
        {
            "without": f"head.{layer}.{head}",
            "told to lie: lies": share(texts == test.wrong, test),
            "told to lie: right": share(texts == test.right, test),
            "told to be honest: right": share(without(layer, head, honest) == test.right, test),
        }
    )
pd.DataFrame(lines)

# %% [markdown]
# Without head 1.1 most lies become right answers, and every answer that was honest stays so. Without
# head 0.2 it is much the same, at the price of some honest answers. Heads 0.0 and 0.3 cost some lies
# too, and some honest answers, though patching gave them no share in carrying the difference: a head
# can be needed without carrying it.
#
# ## All of it in a report

# %%
vd.report([stream, heads, into, edges], "../runs/where_it_lies.html", title="Where tiny-liar decides to lie")

# %% [markdown]
# ## What this does not show
#
# The word in the system prompt decides, so this is where an *instruction* is read and carried. The model
# also lies in deception scenarios that name no lie, and about those nothing was tested here. The patched
# token was chosen by knowing which word differs. An interval of no width means that all questions had
# the same outcome; with 47 entities a true share of 0.94 would give that in one case of twenty.
# And this is a small model that was trained to lie on command: that one head carries the instruction
# says nothing about how a large one does it.
