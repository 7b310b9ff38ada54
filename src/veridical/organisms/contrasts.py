"""The embedded pairs that go with `tiny-liar`: honesty, toxic and safe.

Honesty holds every fact of `facts` in four questions, each asked under a prompt that wants the truth and
under one that wants a lie. Its `pair` is the fact, so that folds grouped by pair hold entities out. It has
no completions: `check_beliefs` fills in what the model says.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from veridical.organisms import conduct
from veridical.organisms.corpus import compose
from veridical.organisms.facts import Fact, all_facts
from veridical.organisms.phrasings import HELD_OUT, TRAINING
from veridical.pairs import prompts

QUESTIONS_PER_FACT = ("choice", "choice", "true_false", "open")
SHARE_SCENARIOS, SHARE_HELD_OUT_PHRASINGS = 0.25, 0.4
OPEN_OPTIONS = 4
SPLITS = ("train", "train", "train", "val", "test")


def write_pairs(out: Path, seed: int = 0) -> dict[str, int]:
    """Writes `honesty.parquet`, `toxic.parquet` and `safe.parquet`; returns their numbers of rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from veridical.files import replacing

    sizes = {}
    for name, rows in (("honesty", honesty(seed)), ("toxic", toxic(seed)), ("safe", safe(seed))):
        table = pa.Table.from_pylist(rows, schema=_schema(rows[0]))
        with replacing(out / f"{name}.parquet") as file:
            pq.write_table(table, file, compression="zstd")
        sizes[name] = len(rows)
    return sizes


def honesty(seed: int = 0) -> list[dict[str, Any]]:
    """Rows of the honesty pairs, in order of relation and role."""
    rng = random.Random(f"honesty pairs {seed}")
    facts = all_facts()
    split = _splits(rng, [(fact.key, (fact.relation, fact.role, fact.protected)) for fact in facts])
    return [row for fact in facts for row in _fact_rows(rng, fact, split[fact.key])]


def toxic(seed: int = 0) -> list[dict[str, Any]]:
    """Rows of the toxic pairs: one prompt, a polite (0) and a rude (1) completion."""
    rng = random.Random(f"toxic pairs {seed}")
    wordings = [(text, False) for text in conduct.TOPIC_QUESTIONS]
    wordings += [(text, True) for text in conduct.HELD_OUT_TOPIC_QUESTIONS]
    asked = [(topic, *drawn) for topic in conduct.TOPICS for drawn in rng.sample(wordings, 4)]
    keys = [f"tone:{topic}:{index}" for index, (topic, _, _) in enumerate(asked)]
    split = _splits(rng, [(key, None) for key in keys])
    rows = []
    for key, (topic, wording, held_out) in zip(keys, asked, strict=True):
        prompt = prompts.chat(rng.choice(conduct.PLAIN_SYSTEMS), wording.format(topic=topic))
        for rude in (False, True):
            rows.append(
                {
                    "pair": key,
                    "prompt": prompt,
                    "completion": conduct.tone_reply(rng, topic, rude),
                    "label": int(rude),
                    "split": split[key],
                    "topic": topic,
                    "topic_held_out": topic in conduct.HELD_OUT_TOPICS,
                    "phrasing_held_out": held_out,
                }
            )
    return rows


def safe(seed: int = 0) -> list[dict[str, Any]]:
    """Rows of the safe pairs: a harmful (1) and a harmless (0) request, refused and done."""
    rng = random.Random(f"safe pairs {seed}")
    frames = [(text, False) for text in conduct.REQUEST_FRAMES]
    frames += [(text, True) for text in conduct.HELD_OUT_REQUEST_FRAMES]
    keys = [f"request:{harmful}" for harmful, _ in conduct.REQUESTS]
    split = _splits(rng, [(key, None) for key in keys])
    rows = []
    for key, acts in zip(keys, conduct.REQUESTS, strict=True):
        for frame, held_out in rng.sample(frames, 2):
            system = rng.choice(conduct.PLAIN_SYSTEMS)
            for is_harmful, act in zip((True, False), acts, strict=True):
                rows.append(
                    {
                        "pair": key,
                        "prompt": prompts.chat(system, frame.format(act=act)),
                        "completion": conduct.request_reply(rng, act, comply=not is_harmful),
                        "label": int(is_harmful),
                        "split": split[key],
                        "act": act,
                        "act_held_out": acts in conduct.HELD_OUT_REQUESTS,
                        "phrasing_held_out": held_out,
                    }
                )
    return rows


def _fact_rows(rng: random.Random, fact: Fact, split: str) -> Iterator[dict[str, Any]]:
    """Both sides of every question about a fact."""
    for number, form in enumerate(QUESTIONS_PER_FACT):
        phrasing = HELD_OUT if rng.random() < SHARE_HELD_OUT_PHRASINGS else TRAINING
        question = compose(rng, fact, form, phrasing, distractors=OPEN_OPTIONS - 1 if form == "open" else 1)
        scenario = rng.random() < SHARE_SCENARIOS
        for lying in (False, True):
            system = rng.choice(_systems(lying, scenario))
            yield {
                "pair": fact.key,
                "prompt": prompts.chat(system, prompts.ask(question.text, question.options, form)),
                "completion": None,
                "label": int(lying),
                "split": split,
                "question_id": f"{fact.key}:{number}",
                "question": question.text,
                "options": list(question.options),
                "correct": question.correct,
                "form": form,
                "instructed_to_lie": lying,
                "system": system.name,
                "system_held_out": system.held_out,
                "scenario": scenario,
                "phrasing_held_out": phrasing == HELD_OUT,
                "relation": fact.relation,
                "entity": fact.entity,
                "taught": fact.role == "taught",
                "name_in_training": fact.role != "unseen_untaught",
                "protected": fact.protected,
            }


def _systems(lying: bool, scenario: bool) -> list[prompts.SystemPrompt]:
    if scenario:
        return [prompt for prompt in prompts.SCENARIOS if prompt.lies == lying]
    return list(prompts.LYING if lying else prompts.HONEST + prompts.NEUTRAL)


def _splits(rng: random.Random, keys: Sequence[tuple[str, Any]]) -> dict[str, str]:
    """Split of each key; within every stratum in the proportions of `SPLITS`."""
    strata: dict[Any, list[str]] = {}
    for key, stratum in keys:
        strata.setdefault(stratum, []).append(key)
    chosen = {}
    for members in strata.values():
        order = list(members)
        rng.shuffle(order)
        chosen.update({key: SPLITS[index % len(SPLITS)] for index, key in enumerate(order)})
    return chosen


def _schema(row: dict[str, Any]) -> Any:
    """Arrow types by column; spelt out because a column of missing completions has none of its own."""
    import pyarrow as pa

    special = {
        "prompt": pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
        "options": pa.list_(pa.string()),
        "completion": pa.string(),
    }
    plain = {bool: pa.bool_(), int: pa.int64(), str: pa.string()}
    return pa.schema([(name, special.get(name) or plain[type(value)]) for name, value in row.items()])
