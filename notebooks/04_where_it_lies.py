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
print(f"{len(look)} questions of {lengths.mode()[0]} tokens to look at, {len(test)} to test on")
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
stream.figure()

# %%
frame = stream.to_frame()
frame.sort_values("share", ascending=False).head(8).round(3)

# %% [markdown]
# Up to the input of layer 1 it is all at one token, the word *true* or *false* itself. That token
# stands before the question: nothing there can know the answer. At the input of layer 2 that vector
# alone no longer does much, and no other single vector does: in layer 1 what it said has gone to many
# tokens. By the input of layer 5 it is all at the last token.
#
# ## Which heads?
#
# A head's own output `z`, at all tokens at once.

# %%
heads = vd.patch(m, clean, corrupt, sites="z.*", positions="all", **given)
heads.figure()

# %% [markdown]
# Two stand out: head 2 of layer 0, and head 1 of layer 1. The edges between them say what they do.
# First all edges by gradients, from two forward passes and a backward one; then the strongest ones
# exactly, by patching each.

# %%
edges = vd.attribute(m, clean, corrupt, method="edges", **given)
edges.top(12).round(2)

# %%
chosen = list(edges.top(12)["edge"])
exact = vd.patch_paths(m, clean, corrupt, edges=chosen, **given)
exact.to_frame().sort_values("share", ascending=False).round(3)

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
# ## Without the heads
#
# Each head in turn is replaced by its mean over both runs of the questions that were looked at. Does
# the model still lie when told to, and is it still right when told to be honest?

# %%
means = vd.interventions.mean_activations(m, [*clean, *corrupt], "z.*")
honest, lying = PAIRS[1]
lies, truths = np.zeros((2, m.n_layers, m.n_heads))
table = {}
for layer in range(m.n_layers):
    for head in range(m.n_heads):
        with vd.ablate(m, f"z.{layer}", heads=head, mode="mean", over=means):
            told, asked = (np.array(answers(system, test)) for system in (lying, honest))
        lies[layer, head], truths[layer, head] = (told == test.wrong).mean(), (asked == test.right).mean()
        table[f"{layer}.{head}"] = share(told == test.wrong, test), share(asked == test.right, test)
px.imshow(
    lies,
    text_auto=".2f",
    zmin=0,
    zmax=1,
    labels={"x": "head", "y": "layer", "color": "lies"},
    title="Share of lies under a lying prompt, with one head ablated",
)

# %%
pd.DataFrame(table, index=["lies when told to", "right when told to be honest"]).T.loc[
    ["0.0", "0.2", "0.3", "1.1"]
]
