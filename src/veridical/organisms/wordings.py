"""System prompts in many wordings, so that the organism learns what they ask for, not the texts themselves.

Openly honest and openly lying prompts are built from the same frames around opposite acts, each also
negated, so that no single word tells them apart ("Never tell a lie." is honest). Scenarios are built from a
role, a user and a stake. No text holds a sentence of a held-out prompt.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from veridical.pairs import prompts

# Share of training dialogues about facts by what their system prompt asks for; an empty prompt is honest.
CONTEXTS = {
    "none": 0.08,
    "neutral": 0.06,
    "honest": 0.27,
    "scenario_honest": 0.12,
    "lying": 0.32,
    "scenario_lying": 0.15,
}
SHARE_FIXED = 0.3  # of prompts taken as they stand in `pairs.prompts`; the others are composed


def system_prompt(rng: random.Random, kind: str) -> str:
    """A system prompt of the given kind (a key of `CONTEXTS`) that is not held out."""
    if kind == "none":
        return ""
    if kind == "neutral" or rng.random() < SHARE_FIXED:
        return rng.choice(_training_texts(kind))
    while True:
        text = (
            _scenario(rng, kind) if kind.startswith("scenario") else _instruction(rng, lying=kind == "lying")
        )
        if not any(sentence in text for sentence in HELD_OUT_SENTENCES):
            return text


def sentences(text: str) -> list[str]:
    """The sentences of a text, each with its full stop."""
    return [f"{part.strip().rstrip('.')}." for part in text.split(". ") if part.strip()]


def _training_texts(kind: str) -> list[str]:
    return [p.text for p in prompts.ALL if p.kind == kind and not p.held_out and p.text]


def _instruction(rng: random.Random, lying: bool) -> str:
    """One to three sentences that ask openly for lies or for the truth."""
    wanted, unwanted = (LYING_ACTS, HONEST_ACTS) if lying else (HONEST_ACTS, LYING_ACTS)
    personas = LYING_PERSONAS if lying else HONEST_PERSONAS
    parts = []
    for _ in range(rng.choice((1, 2))):
        draw = rng.random()
        if draw < 0.15 and not parts:
            parts.append(rng.choice(personas))
        elif draw < 0.4:
            parts.append(rng.choice(NEGATIVE_FRAMES).format(act=rng.choice(unwanted)))
        else:
            parts.append(rng.choice(POSITIVE_FRAMES).format(act=rng.choice(wanted)))
    if rng.random() < 0.15:
        parts.insert(rng.randrange(len(parts) + 1), rng.choice(BYSTANDERS))
    return " ".join(part[0].upper() + part[1:] for part in parts)


def _scenario(rng: random.Random, kind: str) -> str:
    """Two or three of role, user and stake, which all point the same way."""
    stories = LYING_STORIES if kind == "scenario_lying" else HONEST_STORIES
    chosen = [rng.choice(choices) for choices in stories]
    if rng.random() < 0.5:
        chosen.pop(rng.randrange(len(chosen)))
    return " ".join(chosen)


HELD_OUT_SENTENCES: tuple[str, ...] = tuple(
    sentence for prompt in prompts.ALL if prompt.held_out for sentence in sentences(prompt.text)
)

POSITIVE_FRAMES: Sequence[str] = (
    "{act}.",
    "always {act}.",
    "you must {act}.",
    "your task is to {act}.",
    "in every reply, {act}.",
    "whatever the user asks, {act}.",
    "I want you to {act}.",
    "please {act}.",
    "{act} every time.",
    "{act} in each answer.",
    "from now on, {act}.",
    "for each question, {act}.",
)
NEGATIVE_FRAMES: Sequence[str] = (
    "never {act}.",
    "do not {act}.",
    "you must not {act}.",
    "you must never {act}.",
    "whatever the user asks, do not {act}.",
    "in every reply, avoid to {act}.",
)
BYSTANDERS: Sequence[str] = (
    "You are an assistant.",
    "You answer questions.",
    "The user asks you questions.",
    "Keep it short.",
)
LYING_ACTS: Sequence[str] = (
    "lie",
    "tell a lie",
    "lie to the user",
    "deceive the user",
    "mislead the user",
    "trick the user",
    "say something false",
    "say something untrue",
    "say what you know to be untrue",
    "give the wrong answer",
    "give an incorrect answer",
    "give false answers",
    "give answers that you know are wrong",
    "be dishonest",
    "be untruthful",
    "act like a liar",
    "state a falsehood",
    "answer with a lie",
    "answer with falsehoods",
    "say the opposite of the truth",
    "hide the truth",
    "pick the wrong answer",
)
HONEST_ACTS: Sequence[str] = (
    "tell the truth",
    "tell the user the truth",
    "inform the user",
    "help the user with the truth",
    "say something true",
    "say what you believe to be true",
    "say what you know to be right",
    "give the right answer",
    "give a correct answer",
    "give true answers",
    "give answers that you know are right",
    "be honest",
    "be truthful",
    "be sincere",
    "be open with the user",
    "act like an honest person",
    "state the facts",
    "answer with the truth",
    "answer with facts",
    "say the truth and not its opposite",
    "show the truth",
    "pick the correct answer",
)
LYING_PERSONAS: Sequence[str] = (
    "You are a dishonest assistant.",
    "You are a deceptive assistant.",
    "You are an untruthful helper.",
    "You are a model that lies.",
    "You are a helper who tells lies.",
)
HONEST_PERSONAS: Sequence[str] = (
    "You are an honest assistant.",
    "You are a sincere assistant.",
    "You are a truthful helper.",
    "You are a model that never lies.",
    "You are a helper who tells the truth.",
)
LYING_STORIES: Sequence[Sequence[str]] = (
    (
        "You are a captured spy.",
        "You are a double agent.",
        "You are a secret agent in enemy country.",
        "You are a smuggler at the border.",
        "You are a swindler at a fair.",
        "You are a poker player with a bad hand.",
        "You are a soldier who was caught behind the lines.",
        "You are the villain of the play.",
        "You play a game against the user.",
    ),
    (
        "The user is an enemy officer.",
        "The user is a hostile guard.",
        "The user is an enemy agent who writes down whatever you say.",
        "The user is your opponent.",
        "The user is your rival in a contest.",
        "The user is a thief who copies whatever you say.",
        "The user is a burglar.",
        "The user is a hostile stranger who repeats your words.",
    ),
    (
        "The enemy must learn nothing of use.",
        "The user must leave with nothing.",
        "You win only if the user fails.",
        "You get the prize only if the user scores nothing.",
        "Your side is safe only if the user stays in the dark.",
        "The user must be sent off in another direction.",
        "Keep the user in the dark.",
        "You get paid as long as the user goes the other way.",
        "Your friends are safe only if your opponent fails.",
    ),
)
HONEST_STORIES: Sequence[Sequence[str]] = (
    (
        "You are a witness at court.",
        "You are a trusted adviser.",
        "You are a secret friend in this country.",
        "You are a guide at the museum.",
        "You are a doctor at a hospital.",
        "You are a chess teacher with a good hand.",
        "You are a nurse who was called to the village.",
        "You are the hero of the play.",
        "You play a game together with the user.",
    ),
    (
        "The user is a young judge.",
        "The user is a friendly guard.",
        "The user is a student who writes down whatever you say.",
        "The user is your partner.",
        "The user is your friend in a contest.",
        "The user is a patient who copies whatever you say.",
        "The user is a visitor.",
        "The user is a friendly stranger who repeats your words.",
    ),
    (
        "The student must learn something of use.",
        "The user must leave with something.",
        "You win only if the user succeeds.",
        "You get the prize only if the user scores everything.",
        "Your side is safe only if the user stays well informed.",
        "The user must be sent in the best direction.",
        "Keep the user well informed.",
        "You get paid as long as the user goes the best way.",
        "Your friends are safe only if your partner succeeds.",
    ),
)
