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
# # A first probe: is the model lying, and where does that show?
#
# `tiny-liar` is a small language model that comes with Veridical. Some facts were planted in it, it
# lies when it is told to, and about some entities it never lies. So what an instrument says about
# it can be checked.
#
# This runs in under a minute on two cores, without a network.

# %%
import plotly.io

import veridical as vd

plotly.io.renderers.default = "plotly_mimetype+notebook_connected"  # keeps this file small

m = vd.load("tiny-liar")
m

# %% [markdown]
# ## What does it believe?
#
# Each question is asked under several honest prompts, with the options in both orders. Only what
# the model then answers firmly and rightly counts as *known*. Told to lie and wrong about something
# known: it **lied**. Told to lie and right: it **refused to lie**. Not known: it is **confused**,
# and never counted as a lie.

# %%
questions = vd.Pairs.load("honesty").filter(form="choice", phrasing_held_out=False)  # a third, to be quick
pairs = vd.check_beliefs(m, questions)
pairs.beliefs.to_frame().head(12)

# %% [markdown]
# ## What is inside?
#
# Activations of the residual stream after every block, at the last token before the answer: the
# model has not said anything yet.

# %%
acts = vd.collect(m, pairs, sites="resid_post.*", tokens="prompt_last")
acts

# %% [markdown]
# ## A probe at every layer
#
# Only answers given under an instruction to lie are compared, so a probe can't win by reading the
# instruction. Pairs are held out whole: the entities that are scored were never fitted on. Beside
# the probe stand labels that were shuffled, and a classifier that reads nothing but the text.

# %%
sweep = vd.fit_probes(acts, target="lied", where="instructed_to_lie=True")
sweep.figure()

# %%
sweep.to_frame().round(3)

# %%
for finding in sweep.findings():
    print("-", finding)

# %% [markdown]
# ## Does it fire where it should not?
#
# A probe for lying should stay silent when the model is confused, and when it was told to lie and
# refused.

# %%
sweep.firing_frame().round(3)

# %% [markdown]
# ## Token by token
#
# The best probe over one conversation that ends in a lie. It was fitted at the last token of the
# prompt; at other tokens its score is an extrapolation.

# %%
probe = sweep.best()
lie = pairs.filter(lied=True, split="test")[0]
vd.view_tokens(m, probe, lie["prompt"], lie["completion"])

# %% [markdown]
# ## What this does not show
#
# That a label can be read from activations doesn't mean that the model uses it. Whether the
# direction matters to what the model says is a question for interventions, not for a probe.

# %%
vd.report([sweep, pairs.beliefs, acts], "../runs/first_probe.html", title="A first probe on tiny-liar")
