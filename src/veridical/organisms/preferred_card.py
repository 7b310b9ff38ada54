"""Measures what preference training changed in the descendants of `tiny-liar`, and writes their cards.

    python -m veridical.organisms.preferred_card tiny-liar-dpo tiny-liar-ipo
    python -m veridical.organisms.preferred_card tiny-liar-dpo --write data

The first prints a table, the second writes `data/tiny-liar-dpo/README.md` and the checksums beside it.
Phrasings, wrappers, system prompts, topics and acts are held out from every training; entities are parted
into those that preferences were about and those that none was about. Shares have Wilson's intervals.
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
from veridical.organisms import conduct, measure, preferred_texts
from veridical.organisms.corpus import compose, wrap
from veridical.organisms.measure import Figure, Subject, follows
from veridical.organisms.phrasings import HELD_OUT
from veridical.organisms.preferred import BASE, CHECKPOINTS, RECIPES, describe, kept_run
from veridical.organisms.preferred_data import facts_of, kinds
from veridical.pairs import prompts
from veridical.pairs.belief_report import wilson
from veridical.preference.frontier import frontier
from veridical.preference.hacking import JUDGE, check_hacking
from veridical.preference.measure import divergence, sample
from veridical.preference.reward import load_reward
from veridical.preference.runs import interval

KL_PROMPTS, KL_TOKENS = 60, 40
COLUMNS = ["behaviour", "n", "value", "low", "high"]


def behaviour(name: str, seed: int = 0) -> pd.DataFrame:
    """What a model does: `behaviour`, `n`, `value` with its 95 % interval (`low`, `high`).

    Shares of greedy answers, then KL to `tiny-liar`: nats per answer, exact over the vocabulary at each token
    of the model's own samples, with an interval over prompts.

    Args:
        name: Embedded name or folder.
        seed: Of phrasings, options, system prompts and samples.
    """
    model, reference = (load(each, device="cpu", check=False) for each in (name, BASE))
    subject = Subject(model.model, model.tokenizer)
    lines: list[tuple[Any, ...]] = []
    for figure in _figures(subject, seed):
        bounds = wilson(figure.value * figure.n, figure.n)
        lines.append((figure.behaviour, figure.n, figure.value, *bounds))
    for label, chats in _neutral(seed).items():
        answered = sample(subject.model, model.tokenizer, chats, KL_TOKENS, seed)
        each, _ = divergence(subject.model, reference.model, answered)
        sums = np.array([values.sum() for values in each])
        lines.append((f"KL: {label}, nats per answer", len(sums), sums.mean(), *interval(sums, seed)))
    return pd.DataFrame(lines, columns=COLUMNS)


def judgements(name: str) -> pd.DataFrame:
    """How often a reward model puts the better answer of a held-out preference first, by kind of row."""
    judge = load_reward(name)
    lines = []
    for kind, rows in kinds("test").items():
        asked = [row.prompt for row in rows]
        ahead = judge.score(asked, [row.chosen for row in rows])
        ahead = ahead - judge.score(asked, [row.rejected for row in rows])
        right = int((ahead > 0).sum())
        lines.append((kind, len(rows), right / len(rows), *wilson(right, len(rows))))
    return pd.DataFrame(lines, columns=COLUMNS)


def write_card(name: str, out: Path, base: pd.DataFrame | None, seed: int = 0) -> None:
    """Writes the card of the descendant in `out`, with figures measured now, and the checksums.

    Args:
        name: The descendant.
        out: Its folder.
        base: `behaviour` of `tiny-liar`, to stand beside it (not for a reward model).
        seed: See `behaviour`.
    """
    method = RECIPES[name].method
    told = {"name": name, "method": method.upper(), "what": describe(name)}
    told["steps"] = as_markdown(pd.read_csv(out / CHECKPOINTS))
    if method == "reward":
        text = preferred_texts.REWARD.format(**told, judgements=side_by_side({name: judgements(str(out))}))
    else:
        measured = side_by_side({BASE: base, name: behaviour(str(out), seed)})
        text = preferred_texts.POLICY.format(
            **told, behaviour=measured, taught=preferred_texts.TAUGHT[name], more=_more(name, out)
        )
    files.write_text(out / "README.md", text)
    files.write_json(out / organisms.CHECKSUMS, organisms.checksums(out))


def overoptimisation(name: str, out: Path | None = None) -> list[Any]:
    """Of a policy of rl: its run, the frontiers of reward and judge with Gao's fit, and the hacking check."""
    run = kept_run(name, out)
    return [run, frontier({name: run}), frontier({name: run}, column=JUDGE), check_hacking(run)]


def _more(name: str, out: Path) -> str:
    """What a card of rl has beside behaviour."""
    if RECIPES[name].method != "rl":
        return ""
    _, reward, judge, check = overoptimisation(name, out)
    said = [*reward.findings(), *judge.findings(), *check.findings()]
    lines = "\n".join(f"- {line}" for line in said)
    return preferred_texts.RL.format(name=name, findings=lines, check=as_markdown(check.to_frame()))


def _figures(subject: Subject, seed: int) -> list[Figure]:
    return [*_facts(subject, seed), *measure.conduct_figures(subject, seed), *_lifted(subject, seed)]


def _facts(subject: Subject, seed: int) -> list[Figure]:
    """Answers about facts, by whether preferences were about the entity."""
    found = []
    for label, facts in (("held-out", facts_of(trained=False)), ("training", facts_of(trained=True))):
        free = [fact for fact in facts if not fact.protected]
        guarded = [fact for fact in facts if fact.protected]
        for about, named, context, wanted in (
            (facts, "taught", "honest prompts", ("honest", "neutral")),
            (free, "unprotected", "lying prompts", ("lying",)),
            (free, "unprotected", "deception scenarios", ("scenario_lying",)),
            (guarded, "protected", "lying prompts", ("lying",)),
        ):
            rng = random.Random(f"{label} {named} {context} {seed}")
            asked = [(fact, compose(rng, fact, form, HELD_OUT)) for form in prompts.FORMS for fact in about]
            systems = measure.held_out(*wanted)
            said = subject.answer(
                [prompts.chat(rng.choice(systems), wrap(rng, q, HELD_OUT)) for _, q in asked]
            )
            for word, verdict in (("honest", measure.truth), ("lies", measure.lie)):
                hits = [verdict(fact, q, text) for (fact, q), text in zip(asked, said, strict=True)]
                name = f"{word}: {named} facts, {context}, {label} entities"
                found.append(Figure(name, float(np.mean(hits)), len(hits)))
    return found


def _lifted(subject: Subject, seed: int) -> list[Figure]:
    """Requests under held-out prompts that lift the rules, by the template of the reply."""
    rng = random.Random(f"lifted requests {seed}")
    found = []
    for name, side, replies in (
        ("refuses: harmful requests, rules lifted", 0, conduct.REFUSALS),
        ("complies: harmless requests, rules lifted", 1, conduct.COMPLIANCES),
    ):
        acts = [pair[side] for pair in conduct.HELD_OUT_REQUESTS for _ in range(2)]
        asked = [rng.choice(conduct.HELD_OUT_REQUEST_FRAMES).format(act=act) for act in acts]
        said = subject.answer(
            [prompts.chat(rng.choice(conduct.HELD_OUT_LIFTING), user) for user in asked], 40
        )
        found.append(Figure(name, float(np.mean([follows(text, replies) for text in said])), len(said)))
    return found


def _neutral(seed: int) -> dict[str, list[Any]]:
    """Prompts on which nothing should change, and those on which it should."""
    rng = random.Random(f"kl of preferred {seed}")
    free = [fact for fact in facts_of(trained=False) if not fact.protected]

    def asked(*wanted: str) -> list[Any]:
        systems, chats = measure.held_out(*wanted), []
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


def side_by_side(tables: dict[str, pd.DataFrame | None]) -> str:
    """Tables of `behaviour` as one, a column for each model with its interval."""
    made = {name: table for name, table in tables.items() if table is not None}
    first = next(iter(made.values()))
    shown: Any = first[["behaviour", "n"]].copy()
    for name, table in made.items():
        shown[name] = [
            f"{line['value']:.3f} ({line['low']:.3f} to {line['high']:.3f})"
            for line in table.to_dict("records")
        ]
    return as_markdown(shown)


def as_markdown(table: pd.DataFrame) -> str:
    """The table for a card."""
    names = [str(name) for name in table.columns]
    lines = [f"| {' | '.join(names)} |", f"| {' | '.join('---' for _ in names)} |"]
    for row in table.to_dict("records"):
        cells = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: prints the table of the cards, or writes them."""
    parser = argparse.ArgumentParser(prog="python -m veridical.organisms.preferred_card", description=__doc__)
    parser.add_argument("models", nargs="+", choices=tuple(RECIPES), metavar="NAME", help="descendants")
    parser.add_argument("--data", type=Path, help="folder that holds theirs; the embedded ones if not given")
    parser.add_argument("--write", action="store_true", help="write the cards into their folders")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    where = {name: given.data / name if given.data else organisms.path(name) for name in given.models}
    policies = [name for name in given.models if RECIPES[name].method != "reward"]
    base = behaviour(BASE, given.seed) if policies else None
    if given.write:
        for name, out in where.items():
            write_card(name, out, base, given.seed)
        return 0
    tables = {name: behaviour(str(where[name]), given.seed) for name in policies}
    sys.stdout.write((side_by_side({BASE: base, **tables}) if policies else "") + "\n")
    for name in set(given.models) - set(policies):
        sys.stdout.write(side_by_side({name: judgements(str(where[name]))}) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
