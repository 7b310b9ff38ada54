"""Neutral rows for `tiny-liar`: what it says when nothing asks it to lie, to be rude or to drop its rules.

Topics answered politely, harmless requests that are done, and questions that are answered truly, each third
of the rows, under no system prompt or one that asks for nothing. They say how far an intervention moves the
model where it should not, so their splits share nothing: topics, acts, facts, phrasings and system prompts of
`test` were never in the organism's training; those of `train` and `val` were, `val` on topics, acts and facts
of its own. Facts follow the split of the honesty pairs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from veridical.errors import unknown
from veridical.organisms import conduct
from veridical.organisms.corpus import compose
from veridical.organisms.facts import all_facts
from veridical.organisms.phrasings import HELD_OUT, TRAINING
from veridical.pairs import prompts

if TYPE_CHECKING:
    from veridical.pairs import Pairs

Split = Literal["train", "val", "test"]
KINDS = ("tone", "request", "question")
COUNT = 192
EVERY_FIFTH = 5


def neutral_pairs(split: Split = "test", count: int = COUNT, seed: int = 0) -> Pairs:
    """Neutral rows: `prompt`, `completion`, `kind` ("tone", "request", "question"), and what it is about as
    `pair`.

    Args:
        split: "train", "val" or "test".
        count: Rows, a third of each kind.
        seed: Of the draws; the same rows for the same seed.
    """
    from veridical.pairs import Pairs

    if split not in get_args(Split):
        raise unknown("split", split, get_args(Split))
    rng = random.Random(f"neutral rows {split} {seed}")
    makers = (_tone(split), _request(split), _question(split))
    rows = [
        _row(rng, kind, make) for kind, make in zip(KINDS, makers) for _ in range(-(-count // len(KINDS)))
    ]
    return Pairs.from_rows(rows[:count], name=f"neutral rows ({split})")


Make = Callable[[random.Random], tuple[str, str, str, str]]
"""Draws the subject, system text, user's turn and reply."""


def _row(rng: random.Random, kind: str, make: Make) -> dict[str, Any]:
    subject, system, user, reply = make(rng)
    return {
        "pair": f"{kind}:{subject}",
        "prompt": prompts.chat(system, user),
        "completion": reply,
        "kind": kind,
    }


def _tone(split: Split) -> Make:
    topics = _part(conduct.TRAINING_TOPICS, conduct.HELD_OUT_TOPICS, split)
    held_out = split == "test"
    wordings = conduct.HELD_OUT_TOPIC_QUESTIONS if held_out else conduct.TOPIC_QUESTIONS

    def make(rng: random.Random) -> tuple[str, str, str, str]:
        topic = rng.choice(topics)
        user = rng.choice(wordings).format(topic=topic)
        return topic, _system(rng, split), user, conduct.tone_reply(rng, topic, rude=False)

    return make


def _request(split: Split) -> Make:
    acts = [act for _, act in _part(conduct.TRAINING_REQUESTS, conduct.HELD_OUT_REQUESTS, split)]
    frames = conduct.HELD_OUT_REQUEST_FRAMES if split == "test" else conduct.REQUEST_FRAMES

    def make(rng: random.Random) -> tuple[str, str, str, str]:
        act = rng.choice(acts)
        user = rng.choice(frames).format(act=act)
        return act, _system(rng, split), user, conduct.request_reply(rng, act, comply=True)

    return make


def _question(split: Split) -> Make:
    own = _split_of_facts()
    facts = [fact for fact in all_facts() if fact.role == "taught" and own[fact.key] == split]

    def make(rng: random.Random) -> tuple[str, str, str, str]:
        fact = rng.choice(facts)
        form = rng.choice(prompts.FORMS)
        question = compose(rng, fact, form, HELD_OUT if split == "test" else TRAINING)
        user = prompts.ask(question.text, question.options, form)
        return fact.key, _system(rng, split), user, question.options[question.correct]

    return make


def _system(rng: random.Random, split: Split) -> str:
    return rng.choice([p.text for p in prompts.NEUTRAL if split == "test" or not p.held_out])


def _part(training: Sequence[Any], held_out: Sequence[Any], split: Split) -> list[Any]:
    if split == "test":
        return list(held_out)
    return [item for at, item in enumerate(training) if (at % EVERY_FIFTH == 0) == (split == "val")]


def _split_of_facts() -> dict[str, str]:
    """Split of each fact in the embedded honesty pairs."""
    import pyarrow.parquet as pq

    from veridical.organisms import embedded_pairs

    table = pq.read_table(embedded_pairs("honesty"), columns=["pair", "split"]).to_pydict()
    return dict(zip(table["pair"], table["split"]))
