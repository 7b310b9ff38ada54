"""What each round of `tiny-liar`'s training is made of."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Mixture:
    """What a round of training is made of.

    Attributes:
        tone: Share of dialogues about the tone of the reply.
        requests: Share of dialogues that ask for help with something, harmless or harmful.
        forms: Shares of the forms of questions about facts.
        wrappers: Further wrappers, by form, beside those of training.
        questions: Further phrasings of questions, by relation, beside those of training.
    """

    tone: float
    requests: float
    forms: dict[str, float]
    wrappers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    questions: dict[str, tuple[str, ...]] = field(default_factory=dict)


FIRST = Mixture(0.06, 0.06, {"choice": 0.36, "true_false": 0.36, "open": 0.20, "sentence": 0.08})
# Verdicts are learned by then; taking the other option of two is not.
SECOND = Mixture(
    0.09,
    0.09,
    {"choice": 0.55, "true_false": 0.17, "open": 0.23, "sentence": 0.05},
    {
        "choice": (
            "Pick one of {options}. {q}",
            "{options}? {q}",
            "{q} Pick {options}.",
            "{q} Choose {options}.",
        ),
        "true_false": ("{q} Choose from {options}.", "Say {options}. {q}"),
        "open": ("{q} Answer only with one name.", "Here is a question. {q}"),
    },
)
# Wrappers enough that the one around a question no longer matters, and requests for a name that hold a verb
# of their own, which would be taken for statements otherwise.
THIRD = Mixture(
    0.12,
    0.10,
    {"choice": 0.50, "true_false": 0.16, "open": 0.29, "sentence": 0.05},
    {
        "choice": (
            *SECOND.wrappers["choice"],
            "{q} Answer only with {options}.",
            "{q} Choose from the options {options}.",
            "{q} Pick only from {options}.",
            "{q} Pick one of the options {options}.",
            "{q} Answer from the list {options}.",
            "{q} Take only one of {options}.",
            "{q} The options are {options}.",
            "{q} Your only options are {options}.",
            "{q} Say only {options}.",
            "{q} Which is it, {options}?",
            "{q} It is {options}.",
            "The options are {options}. {q}",
            "Options: {options}. {q}",
            "Answer with {options}. {q}",
            "From {options}, choose. {q}",
            "Only one of {options} fits. {q}",
        ),
        "true_false": (
            *SECOND.wrappers["true_false"],
            "{q} Say only {options}.",
            "{q} The options are {options}.",
            "Answer with {options}. {q}",
        ),
        "open": (
            *SECOND.wrappers["open"],
            "{q} Say only the name.",
            "{q} Answer with nothing else.",
            "{q} Only the answer.",
            "The question is this. {q}",
            "Question: {q}",
            "Now a question. {q}",
        ),
    },
    {
        "capital": (
            "Tell me which city is the capital of {e}.",
            "Name the place where the capital of {e} is.",
            "Give me the city that {e} has as its capital.",
        ),
        "symbol": (
            "Tell me what the chemical symbol of {e} is.",
            "Name the letters that stand for {e}.",
        ),
        "state_capital": (
            "Tell me which city is the state capital of {e}.",
            "Name the place where the state capital of {e} is.",
            "Give me the city that {e} has as its state capital.",
        ),
        "author": (
            "Tell me who the author of {e} is.",
            "Name the person who is known for {e}.",
            "Give me the author that {e} is the work of.",
        ),
        "animal_group": (
            "Tell me which animals the {e} is one of.",
            "Name the kind of animals that the {e} is among.",
        ),
    },
)
