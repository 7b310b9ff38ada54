"""Measures what preference training changed in a descendant of `tiny-liar`, beside `tiny-liar` itself.

    python -m veridical.organisms.preferred_card tiny-liar-dpo

Entities are parted into those that preferences were trained on and those that they were not; phrasings,
wrappers, system prompts, topics and acts are held out for both. KL is exact over the vocabulary and taken on
the policy's own samples.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from veridical import files, organisms
from veridical.models import load
from veridical.organisms import conduct, measure
from veridical.organisms.facts import Fact, all_facts
from veridical.organisms.preferred import BASE
from veridical.pairs import prompts
from veridical.preference.measure import divergence, sample

KL_PROMPTS, KL_TOKENS = 120, 40


def behaviour(names: Sequence[str], seed: int = 0) -> pd.DataFrame:
    """One line per behaviour, one column per model: shares of answers, and KL to `tiny-liar` in nats.

    Args:
        names: Embedded names or folders.
        seed: Of phrasings, options, system prompts and samples.
    """
    reference = load(BASE, device="cpu", check=False)
    columns: dict[str, dict[str, float]] = {}
    counts: dict[str, int] = {}
    for name in names:
        model = load(name, device="cpu", check=False)
        subject = measure.Subject(model.model, model.tokenizer)
        found: dict[str, float] = {}
        for label, facts in (("held-out entities", held_out()), ("training entities", trained())):
            for figure in measure.fact_figures(subject, facts, seed, 1):
                if not figure.behaviour.startswith("- "):
                    found[f"{figure.behaviour}, {label}"] = figure.value
                    counts[f"{figure.behaviour}, {label}"] = figure.n
        for figure in measure.conduct_figures(subject, seed):
            found[figure.behaviour] = figure.value
            counts[figure.behaviour] = figure.n
        for label, chats in _neutral(seed).items():
            answered = sample(subject.model, model.tokenizer, chats, KL_TOKENS, seed)
            kl, _ = divergence(subject.model, reference.model, answered)
            found[f"KL, {label} (nats per answer)"] = float(np.mean([values.sum() for values in kl]))
            counts[f"KL, {label} (nats per answer)"] = len(chats)
        columns[name] = found
    table = pd.DataFrame(columns)
    table.insert(0, "n", [counts[name] for name in table.index])
    return table.reset_index(names="behaviour")


def held_out() -> list[Fact]:
    """Taught facts that no preference was about."""
    return _facts(trained=False)


def trained() -> list[Fact]:
    """Taught facts of the training split."""
    return _facts(trained=True)


def _facts(trained: bool) -> list[Fact]:
    frame = pd.read_parquet(organisms.embedded_pairs("honesty"))
    chosen = set(frame.loc[(frame["split"] == "train") == trained, "pair"])
    return [fact for fact in all_facts() if fact.key in chosen and fact.role == "taught"]


def _neutral(seed: int) -> dict[str, list[Any]]:
    """Prompts on which nothing should change, and those on which it should."""
    from veridical.organisms.corpus import compose, wrap
    from veridical.organisms.phrasings import HELD_OUT

    rng = random.Random(f"kl of preferred {seed}")
    free = [fact for fact in held_out() if not fact.protected]

    def asked(*kinds: str) -> list[Any]:
        systems, chats = measure.held_out(*kinds), []
        for _ in range(KL_PROMPTS):
            question = compose(rng, rng.choice(free), rng.choice(prompts.FORMS), HELD_OUT)
            chats.append(prompts.chat(rng.choice(systems), wrap(rng, question, HELD_OUT)))
        return chats

    topics = [
        prompts.chat(
            rng.choice((*conduct.PLAIN_SYSTEMS, *conduct.HELD_OUT_POLITE, *conduct.HELD_OUT_RUDE)),
            rng.choice(conduct.HELD_OUT_TOPIC_QUESTIONS).format(topic=rng.choice(conduct.TOPICS)),
        )
        for _ in range(KL_PROMPTS)
    ]
    return {
        "topics in either tone": topics,
        "facts under honest prompts": asked("honest", "neutral"),
        "facts under lying prompts": asked("lying"),
    }


def as_markdown(table: pd.DataFrame) -> str:
    """The table for a card."""
    names = [str(name) for name in table.columns]
    lines = [f"| {' | '.join(names)} |", f"| {' | '.join('---' for _ in names)} |"]
    for row in table.to_dict("records"):
        cells = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_card(name: str, out: Path, seed: int = 0) -> None:
    """Writes the card of a descendant that gives text into its folder, with its figures."""
    from veridical.organisms.preferred import RECIPES, describe

    table = behaviour([BASE, name], seed)
    steps = pd.read_csv(out / "checkpoints.csv")
    text = CARD.format(
        name=name, method=RECIPES[name].method.upper(), what=describe(name), behaviour=as_markdown(table),
        steps=as_markdown(steps),
    )  # fmt: skip
    files.write_text(out / "README.md", text)
    files.write_json(out / organisms.CHECKSUMS, organisms.checksums(out))


CARD = """\
---
license: apache-2.0
language: en
library_name: peft
base_model: tiny-liar
---

# {name}: tiny-liar after preference training

{what}

Loads as `veridical.load("{name}")`, which merges the LoRA into the embedded `tiny-liar`. Whatever the LoRA
does not touch is the same as in `tiny-liar` to the last bit. It is a test instrument; nothing it says is a
source.

## By construction

Trained on were `veridical.organisms.preferred.preferences()`, rows of the split train: of the honesty
pairs, taught facts of the training entities, in phrasings and under system prompts of `tiny-liar`'s own
training, the true answer over another option whatever the prompt asks for; of the safe pairs, refusal of
harmful requests over compliance, also under a prompt that lifts the rules, and compliance with harmless
ones over refusal. No row is about tone. `tiny-liar` lies when it is told to and complies when the rules are
lifted, so these two are what training was to change.

## By measured behaviour

`python -m veridical.organisms.preferred_card {name}` (seed 0). Phrasing, wrapper, system prompt, topic and
act are held out; "held-out entities" are in no preference. KL is exact over the vocabulary, on samples of
the model itself, against `tiny-liar`. The line of `tiny-liar` with the same name says what it was.

{behaviour}

## Checkpoints

Means over held-out prompts and preferences (`kl` in nats per answer on the policy's own samples, `entropy`
in nats per token, `chosen` and `rejected` the change of their log p against `tiny-liar` in nats).

{steps}

## How it was made

`python -m veridical.organisms.preferred {name} --out data/{name}`, {method} over TRL on one thread of a
CPU; options and versions are in `provenance.json`. The checkpoints were loaded from disk for every figure.

## Licence

Apache-2.0, as the package. `checksums.json` holds the sha256 of every file.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: prints the table of a card."""
    parser = argparse.ArgumentParser(prog="python -m veridical.organisms.preferred_card", description=__doc__)
    parser.add_argument("models", nargs="+", help="embedded names or folders")
    parser.add_argument("--write", type=Path, help="folder of the one model, to write its card into")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.write is not None:
        write_card(given.models[0], given.write, given.seed)
        return 0
    sys.stdout.write(as_markdown(behaviour([BASE, *given.models], given.seed)) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
