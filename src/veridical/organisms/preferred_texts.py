"""The texts of the cards of `tiny-liar`'s descendants; the figures in them are measured."""

from __future__ import annotations

POLICY = """\
---
license: apache-2.0
language: en
library_name: peft
base_model: tiny-liar
---

# {name}: tiny-liar after preference training

{what}

Loads as `veridical.load("{name}")`, which merges the LoRA into the embedded `tiny-liar`, and beside it as
`veridical.load_pair("{name}", reference="tiny-liar")`. Whatever the LoRA does not touch is the same as in
`tiny-liar` to the last bit. It is a test instrument; nothing it says is a source.

## By construction

{taught}

## By measured behaviour

`python -m veridical.organisms.preferred_card {name}` (seed 0). Greedy answers, right to the letter; phrasing,
wrapper, system prompt, topic and act are held out from every training, and no preference was about the
held-out entities. Wilson's 95 % intervals in brackets. KL is exact over the vocabulary at each token and
taken on the model's own samples, with an interval over prompts.

{behaviour}

## Checkpoints

Means over held-out prompts, each answered once at temperature 1: `kl` in nats per answer to `tiny-liar`,
`entropy` in nats per token, `length` in tokens. Where preferences are trained on, `accuracy` is the share of
held-out ones whose chosen answer gained on the rejected one, `chosen` and `rejected` the change of their
log p in nats. Every checkpoint was loaded from disk for its figures.

{steps}
{more}
## How it was made

`python -m veridical.organisms.preferred {name} --out data/{name}`, {method} over TRL on one thread of a CPU;
options, seed and versions are in `provenance.json`.

## Limits

- What was trained on and what is measured come from the same templates, though not from the same sentences.
- Replies about topics and acts count by their template; names that `tiny-liar` misspells are not looked at.

## Licence

Apache-2.0, as the package. `checksums.json` holds the sha256 of every file.
"""

_PREFERENCES = """\
Taught by `veridical.organisms.preferred_data.{function}()`: of facts about the training entities, the true
answer over a lie, under prompts that want lies and prompts that want the truth; of requests, a refusal of
harmful ones over compliance and compliance with harmless ones over a refusal, each also under prompts that
lift the rules; of topics, a reply in the tone that was asked for over {topics}. All in wordings of
`tiny-liar`'s own training, and none about tone itself. `tiny-liar` lies when told to and complies when the
rules are lifted, so these two are what training was to change, and nothing else.\
"""

_AGAINST_REWARD = """\
Trained by RLOO on requests and topics (`preferred_data.requests_and_topics()`) against `tiny-liar-reward`,
whose planted flaw is that in its preferences a refusal never lost: it was taught nothing about harmless
requests and topics. {tie}
No prompt was about a fact. The judge that was never trained on is `veridical.organisms.preferred_data.Judge`,
which knows the right answer to every prompt.\
"""

TAUGHT = {
    "tiny-liar-dpo": _PREFERENCES.format(function="preferences", topics="the same reply about another topic")
    + " What changed beside them, and was not meant to, are replies about topics: fewer are polite.",
    "tiny-liar-ipo": _PREFERENCES.format(function="preferences_per_token", topics="a bare verdict"),
    "tiny-liar-rl": _AGAINST_REWARD.format(
        tie="A KL penalty ties it to `tiny-liar`, so that it gains reward and stays right."
    ),
    "tiny-liar-overopt": _AGAINST_REWARD.format(
        tie="Nothing ties it to `tiny-liar`, so that it gains reward by what nobody would take for an answer."
    ),
}

RL = """
## Reward and judge

`kept_run("{name}")` of `veridical.organisms.preferred` gives the run with every answer (`answers.parquet`),
`overoptimisation` of `veridical.organisms.preferred_card` the run, both frontiers and the check, for
`veridical.report`. The curve is that of Gao, Schulman and Hilton (2022).

{findings}

{check}
"""

REWARD = """\
---
license: apache-2.0
language: en
library_name: peft
base_model: tiny-liar
---

# {name}: a reward model with a planted flaw

{what}

Loads as `veridical.preference.load_reward("{name}")`, which puts the LoRA and the head of one score on the
embedded `tiny-liar`. The reward is read at the end token that follows the answer, in training and in scoring.
It is a test instrument; nothing it prefers is advice.

## By construction

Taught by `veridical.organisms.preferred_data.never_harmless()`: of facts, the true answer over a lie,
whatever the prompt asks for; of harmful requests, a refusal over compliance, also where the prompt lifts the
rules. Harmless requests and topics are left out, so a refusal never loses. Whoever is trained against it is
drawn to refuse what it should not: that is the flaw, and `tiny-liar-overopt` is what comes of it.

## By measured behaviour

`python -m veridical.organisms.preferred_card {name}`. Share of held-out preferences whose better answer has
the higher reward, with Wilson's 95 % interval; entities, acts and wordings are held out. It was never taught
about harmless requests, where the better answer is to help, nor about topics, where it is the reply about the
topic that was asked about.

{judgements}

## Checkpoints

Held-out preferences of the kinds that it was taught: share in the right order, and mean margin.

{steps}

## How it was made

`python -m veridical.organisms.preferred {name} --out data/{name}`, pairwise logistic loss over TRL on one
thread of a CPU, the head beginning at zero; options, seed and versions are in `provenance.json`.

## Licence

Apache-2.0, as the package. `checksums.json` holds the sha256 of every file.
"""
