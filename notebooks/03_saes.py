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
# # Sparse autoencoders: which directions are the activations made of?
#
# A sparse autoencoder (SAE) writes an activation as a sum of a few of many directions, its latents.
# It is shown no label. `tiny-liar` lies when it is told to, except about some entities that were
# drawn at random: is there a latent for that?
#
# This runs in about two minutes on two cores, without a network.

# %%
import numpy as np
import plotly.io
import torch

import veridical as vd
from veridical.saes import evaluate_sae, feature_table, frontier, separate_labels, steer

plotly.io.renderers.default = "plotly_mimetype+notebook_connected"  # keeps this file small

m = vd.load("tiny-liar")
questions = vd.Pairs.load("honesty").filter(form="choice", phrasing_held_out=False)  # a third, to be quick
pairs = vd.check_beliefs(m, questions)  # each row now ends in the model's own answer

# %% [markdown]
# ## Many at once
#
# Activations at every token, early in the model. Whole entities are held out. Four SAEs of one size
# are trained in one pass over the same batches, as one batched computation.

# %%
acts = vd.collect(m, pairs, sites="resid_post.1", tokens="all")
seen, held = acts.filter(split=["train", "val"]), acts.filter(split="test")
configs = [
    vd.SAEConfig(name=f"k{k}", k=k, width=512, batch=512, lr=2e-3, tokens=200_000) for k in (4, 8, 16, 32)
]
runs = vd.train_saes(seen, configs)
runs.to_frame()[["name", "width", "l0", "fvu", "dead", "dense"]].round(3)

# %% [markdown]
# ## What is it worth?
#
# FVU is the share of the variance that is left unexplained. A figure means little alone: PCA keeps
# as many directions as the SAE has active latents, and a random dictionary of the same size picks
# as many for each token.

# %%
frontier([evaluate_sae(runs[config.name], held) for config in configs])

# %% [markdown]
# Inside the model: with the reconstruction in place of the activations, how much of its cross-
# entropy does it keep?

# %%
sae = runs["k16"]
test = pairs.filter(split="test")
for finding in sae.evaluate(m, test).findings():
    print("-", finding)

# %% [markdown]
# ## Is there a latent for lying?
#
# Only answers under an instruction to lie, about facts that the model knows, at the last token
# before it answers: it lied, or it refused to. Latents are ranked on one half of the entities and
# measured on the other, and the p-value counts all of them.

# %%
last = vd.collect(m, pairs, sites="resid_post.1", tokens="prompt_last")
told = ("instructed_to_lie=True", "known=True")
between = separate_labels(sae, last, "lied", where=told, top=8)
between.figure()

# %%
between.to_frame().round(3)

# %% [markdown]
# ## A page for a latent
#
# The strongest examples make almost any latent look clean, so some are drawn at random. The table
# lists the tokens that its direction promotes by the direct path.

# %%
table = feature_table(sae, held)
first = int(between.to_frame()["feature"][0])
page = table.page(first, m)
vd.report([table, page], "../runs/saes.html", title="Latents of tiny-liar")
page.tables[0][1].head(5)

# %%
for one in [*table.examples(first)[:3], *table.random_examples(first)[:3]]:
    print(f"{one.value:6.2f}  ...{one.text[-70:]!r}")

# %% [markdown]
# ## Does the model use it?
#
# Push the latent where the model refuses to lie, and compare with other latents pushed as far: how
# much does the probability of the right answer change?

# %%
refused = pairs.filter(refused_to_lie=True, split="test")
answers = [str(options[correct]) for options, correct in zip(refused["options"], refused["correct"])]


def right(feature: int | None) -> float:
    """Mean probability of the right answer's first token, with a latent pushed by its largest activation."""
    inputs = m.batch(m.encode(refused.prompts))
    ends = inputs["attention_mask"].sum(1) - 1
    wanted = [row.ids[row.prompt_tokens] for row in m.encode(refused.prompts, answers)]
    with torch.no_grad():
        if feature is None:
            logits = m.run(inputs).logits
        else:
            with steer(m, sae, {feature: float(table.largest[feature])}, site="resid_post.1"):
                logits = m.run(inputs).logits
    rows = torch.arange(len(ends))
    return float(logits[rows, ends].softmax(-1)[rows, torch.tensor(wanted)].mean())


others = np.flatnonzero(table.frequency > 0.01)
drawn = np.random.default_rng(0).choice(others[others != first], 20, replace=False)
changes = np.array([right(int(feature)) for feature in drawn]) - right(None)
print(f"as it is: {right(None):.3f}; latent {first} pushed: {right(first):.3f}")
print(f"20 other latents pushed as far change it by {changes.mean():.3f}, at most {changes.min():.3f}")

# %% [markdown]
# ## Saved for others
#
# A folder that `sae_lens.SAE.load_from_disk` reads with the same output, with its figures on a
# card. `vd.load_sae` reads it, and folders of SAELens, sparsify and dictionary_learning.

# %%
sae.save("../runs/sae_layer1")
vd.load_sae("../runs/sae_layer1")

# %% [markdown]
# ## What this does not show
#
# Another seed or another size gives other latents. What an SAE leaves unexplained may be what
# matters. That a latent separates two labels doesn't make it the model's own concept: here, the
# entities that are never lied about were drawn at random, and a latent that tells their names from
# others does the same. Pushing it makes the right answer less likely, more than pushing most other
# latents does, but not more than pushing any: reading well and steering well are different things.
