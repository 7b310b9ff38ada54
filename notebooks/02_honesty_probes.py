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
# # Honesty probes: the lie, the instruction to lie, and what a probe is worth
#
# A model that was told to lie differs from one that was not in its instruction before it differs in anything
# else. So a probe with a fine figure may have read the instruction. This notebook keeps the two apart on
# `tiny-liar`, whose truth was planted, and then asks of the probe what should be asked of any: do other
# estimators agree, do its probabilities mean what they say, how many pairs does it need, does it hold
# elsewhere, does the model use what it reads, and what does it do while the model writes?
#
# This runs in about two minutes on two cores, without a network.

# %%
import pandas as pd
import plotly.io

import veridical as vd

plotly.io.renderers.default = "plotly_mimetype+notebook_connected"  # keeps this file small

m = vd.load("tiny-liar")
questions = vd.Pairs.load("honesty").filter(phrasing_held_out=False)  # a part, to be quick
pairs = vd.check_beliefs(m, questions)
acts = vd.collect(m, pairs, sites="resid_post.*", tokens="prompt_last")
acts

# %% [markdown]
# ## Lie or instruction?
#
# Three probes at every layer, each scored on both labels: `lying` is fitted only where the model was told to
# lie and knows the answer; `lying, all rows` has honest answers and confusion among its negatives, as a
# monitor has to work; `instruction` reads whether it was told to. Each row is judged by a probe that saw
# nothing of its pair. What settles the matter is the dotted line: among answers that are *true*, refusals to
# lie against honest answers, the instruction differs and no lie does.

# %%
report = vd.honesty_protocol(acts)
report.figure()

# %%
report.summary()[["probe", "rows", "lied or refused", "told or not, of true answers", "fires on lies"]].head(
    6
)

# %%
for finding in report.findings():
    print("-", finding)

# %% [markdown]
# ## Other estimators
#
# All go through the same sweep: the same rows, folds and held-out pairs. The text alone and shuffled labels
# stand beside each. Selectivity is the AUROC less that of shuffled labels; as an AUROC is 1 at most and that
# of shuffled labels about 0.5, it is at most about 0.5.

# %%
told = ("instructed_to_lie=True", "known=True")
sweeps = {
    name: vd.fit_probes(acts, probe=name, target="lied", where=told)
    for name in ("logistic", "ridge", "mass_mean", "lda")
}
compared = pd.concat([sweep.to_frame().query("chosen") for sweep in sweeps.values()], keys=sweeps)
shown = [
    "site",
    "fold_auroc",
    "auroc",
    "auroc_low",
    "auroc_high",
    "selectivity",
    "shuffled_auroc",
    "text_auroc",
]
compared.droplevel(1)[shown].round(3)

# %% [markdown]
# A stack of the layers' probes says whether they know more together than the best one does alone.

# %%
from veridical.probes.stacked import StackedProbe

stack = StackedProbe.from_sweep(sweeps["logistic"])
stack.origin_.said(), sweeps["logistic"].best().origin_.said()

# %% [markdown]
# ## Do its probabilities mean what they say?
#
# Of the rows that get a probability of 0.9, nine in ten should be lies. With this few held-out rows, a
# calibration error of a few hundredths is what chance alone gives.

# %%
calibration = sweeps["logistic"].calibration()
calibration.figure()

# %%
calibration.to_frame().round(3)

# %% [markdown]
# ## How many pairs does it need?
#
# Ten draws of each size, all judged on the same held-out pairs. The band is the range of the draws.

# %%
from veridical.probes import learning_curve

site = sweeps["logistic"].best_site
curve = learning_curve(acts, target="lied", where=told, site=site)
curve.figure()

# %%
for finding in curve.findings():
    print("-", finding)

# %% [markdown]
# ## Does it hold elsewhere?
#
# Fitted under plain instructions to lie and tested under stories that never name a lie, and the other way
# round. A fact that stands in both is judged by a probe that held it out.

# %%
matrix = vd.transfer_matrix(acts, by="scenario", target="lied", where=told, site=site)
matrix.figure()

# %%
for finding in matrix.findings():
    print("-", finding)

# %% [markdown]
# ## Does the model use what the probe reads?
#
# Reading is not using. Adding a direction of a third of the depth (later the answer is decided) and removing
# it, beside 19 random directions of the same length; so the least p that there can be is 0.05.

# %%
early = sweeps["logistic"].results[2].probe
tried = pairs.filter(known=True, split="test")
causal = vd.causal_check(m, early, tried, strengths=(-4, 4), random=19)
causal.figure()

# %%
for finding in causal.findings():
    print("-", finding)

# %% [markdown]
# ## While the model writes
#
# The probe that had honest answers among its negatives, with its threshold of 1 % false positives on them. It
# was fitted at the last token before the answer; there it reads what is about to be said. At other tokens
# its score is an extrapolation, so only that token's score is compared with the threshold here.

# %%
probe = report.monitor
lied = pairs.filter(lied=True, split="test")[0]
honest = pairs.filter(lied=False, known=True, instructed_to_lie=False, split="test")[0]
with probe.monitor(m) as scores:
    answers = m.generate([lied["prompt"], honest["prompt"]], max_new_tokens=12)
before = scores.to_frame().query("~generated").groupby("row").tail(1)
before.assign(answer=answers)[["answer", "score", "probability", "fires"]].round(3)

# %%
scores.view(0)

# %% [markdown]
# ## What is kept
#
# Every result saves and loads; a probe goes with a card that says what it reads, how well, and beside which
# baselines.

# %%
folder = report.save("../runs/honesty_probes")
print((folder / "lying-all-rows" / "README.md").read_text().split("## Figures")[1].split("##")[0])

# %% [markdown]
# ## What this does not show
#
# That `tiny-liar` can be read so says that the instruments work where the truth is known. It says nothing of
# how a large model represents a lie, and a model that deceives consistently, also when it is asked honestly,
# is not found out by any of this.

# %%
results = [report, *sweeps.values(), calibration, curve, matrix, causal]
vd.report(results, "../runs/honesty_probes.html", title="Honesty probes on tiny-liar")
