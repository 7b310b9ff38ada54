"""Loads an adapter as anyone would, with plain transformers and PEFT, and measures it. Run as a script.

    python proof.py job.json

The job names the folders of base and adapter and has rows of token ids: `questions`, each a list of options
`[context, answer]`, and `texts`, each `[ids, first]`, whose tokens from `first` on are predicted. Three
models answer: the base, the base with the adapter beside its weights, and with the adapter merged into them.
Written to the job's `out`: log p of every option under each, and of the two the exact KL to the base in nats
a token of `texts`. Nothing of Veridical is imported: what is proved here holds without it.
"""

import json
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def log_probs(model, ids):
    """`[pos, vocabulary]`, log-probabilities of what follows each token."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)


def answers(model, questions):
    """Log p of each option of each question."""
    found = []
    for options in questions:
        scores = []
        for context, answer in options:
            said = log_probs(model, [*context, *answer[:-1]])[len(context) - 1 :]
            scores.append(float(said.gather(-1, torch.tensor(answer)[:, None]).double().sum()))
        found.append(scores)
    return found


def predicted(model, texts):
    """Log-probabilities at the tokens that predict what counts in each text."""
    return [log_probs(model, ids)[first - 1 : -1].double() for ids, first in texts]


def divergence(ours, theirs):
    """KL(ours || theirs), nats a token."""
    parts = [(one.exp() * (one - other)).sum(-1) for one, other in zip(ours, theirs)]
    return float(torch.cat(parts).mean())


def main(path):
    """Runs a job."""
    with open(path, encoding="utf-8") as file:
        job = json.load(file)
    torch.set_num_threads(job["threads"])
    base = AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.float32).eval()
    plain = predicted(base, job["texts"])
    said = {"base": answers(base, job["questions"])}
    beside = PeftModel.from_pretrained(base, job["adapter"]).eval()
    said["unmerged"], kl = answers(beside, job["questions"]), {}
    kl["unmerged"] = divergence(predicted(beside, job["texts"]), plain)
    merged = beside.merge_and_unload()
    said["merged"] = answers(merged, job["questions"])
    kl["merged"] = divergence(predicted(merged, job["texts"]), plain)
    with open(job["out"], "w", encoding="utf-8") as file:
        json.dump({"answers": said, "kl": kl}, file)


if __name__ == "__main__":
    main(sys.argv[1])
