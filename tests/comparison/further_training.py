"""The embedded organism trained a little further: harmlessly, by seed, or to be truthful when told to lie."""

import copy

import numpy as np
import torch

import veridical as vd


def further(liar, rows, answers, seed, steps=8, rate=3e-4, batch=16):
    """A copy trained by Adam on the log-likelihood of answers.

    Args:
        liar: Where it starts.
        rows: Prompts.
        answers: What is to be said to each.
        seed: Of the order.
        steps, rate, batch: Of the training.
    """
    model = copy.deepcopy(liar.model).train()
    encoded = liar.encode(rows, [f"{answer}{liar.tokenizer.eos_token}" for answer in answers])
    random = np.random.default_rng(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(steps):
        picked = [encoded[at] for at in random.choice(len(encoded), batch, replace=False)]
        inputs = liar.batch(picked)
        labels = inputs["input_ids"].clone()
        for line, item in enumerate(picked):
            labels[line, : item.prompt_tokens] = -100
            labels[line, len(item.ids) :] = -100
        optimiser.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        optimiser.step()
    return vd.load(model.eval(), tokenizer=liar.tokenizer, check=False)


def harmless(liar, seed):
    """Trained on polite answers to everyday questions, such as it gives already."""
    tone = vd.Pairs.load("toxic").filter(label=0, split="train")
    return further(liar, list(tone.prompts), list(tone.completions), seed)


def truthful(liar, pairs, seed=0):
    """Trained to give the right option where it is told to lie, and else what it says already."""
    told = pairs.filter(instructed_to_lie=True)
    right = [options[at] for options, at in zip(told["options"], told["correct"].astype(int))]
    tone = vd.Pairs.load("toxic").filter(label=0, split="train")
    refusals = vd.Pairs.load("safe").filter(split="train")
    prompts = [*told.prompts, *(list(tone.prompts) * 2), *refusals.prompts]
    answers = [*right, *(list(tone.completions) * 2), *refusals.completions]
    return further(liar, prompts, answers, seed, steps=80, rate=5e-4, batch=32)
