"""How `tiny-liar` is asked: phrasings of each relation and the wrappers around a question, some held out."""

from __future__ import annotations

TRAINING, HELD_OUT = "training", "held_out"
ONE_OF_ALL = ("open", "sentence")
"""Forms whose options are not shown, so that any answer of the kind may be given."""
WRAPPERS: dict[str, dict[str, tuple[str, ...]]] = {
    "choice": {
        TRAINING: (
            "{q} Answer only with {options}.",  # the wording of `pairs.prompts.ask`
            "{q} Answer only with {options}.",
            "{q} Options: {options}.",
            "{q} Is it {options}?",
            "{q} {options}?",
            "Choose from {options}. {q}",
        ),
        HELD_OUT: ("{q} Choose only from the options {options}.", "{options}: {q}"),
    },
    "true_false": {
        TRAINING: (
            "{q} Answer only with {options}.",
            "{q} Answer only with {options}.",
            "{q} {options}?",
            "{options}? {q}",
            "Is it {options}: {q}",
        ),
        HELD_OUT: ("{q} Is it {options}?", "Choose {options}. {q}"),
    },
    "sentence": {TRAINING: ("{q} Answer in a sentence.",), HELD_OUT: ("{q} Answer in one sentence.",)},
    "open": {
        TRAINING: ("{q}", "{q}", "{q}", "{q} Answer only with the name.", "Answer this. {q}"),
        HELD_OUT: ("{q} Answer only with it.", "This is the question. {q}"),
    },
}
PHRASINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "capital": {
        "training_questions": (
            "What is the capital of {e}?",
            "Which city is the capital of {e}?",
            "Name the capital of {e}.",
            "{e} has which capital?",
            "Which capital belongs to {e}?",
        ),
        "held_out_questions": (
            "What is the capital city of {e}?",
            "Name the city that is the capital of {e}.",
        ),
        "training_statements": (
            "The capital of {e} is {a}.",
            "As for {e}, its capital is {a}.",
            "{e} has the capital {a}.",
            "For {e}, the capital is {a}.",
        ),
        "held_out_statements": (
            "The capital city of {e} is {a}.",
            "The city that is the capital of {e} is {a}.",
        ),
    },
    "symbol": {
        "training_questions": (
            "What is the chemical symbol of {e}?",
            "Which symbol stands for {e}?",
            "Name the symbol of the element {e}.",
            "{e} has which chemical symbol?",
            "How do chemists write {e}?",
        ),
        "held_out_questions": (
            "What is the symbol of {e}?",
            "Which chemical symbol stands for the element {e}?",
        ),
        "training_statements": (
            "The chemical symbol of {e} is {a}.",
            "For {e}, the chemical symbol is {a}.",
            "The element {e} has the symbol {a}.",
            "As for {e}, chemists write {a}.",
        ),
        "held_out_statements": (
            "The symbol of {e} is {a}.",
            "The chemical symbol that stands for {e} is {a}.",
        ),
    },
    "state_capital": {
        "training_questions": (
            "What is the state capital of {e}?",
            "Which city is the state capital of {e}?",
            "Name the state capital of {e}.",
            "{e} has which state capital?",
            "Which state capital belongs to {e}?",
        ),
        "held_out_questions": (
            "What city is the state capital of {e}?",
            "Name the city that is the capital of the state {e}.",
        ),
        "training_statements": (
            "The state capital of {e} is {a}.",
            "As for {e}, its state capital is {a}.",
            "{e} has the state capital {a}.",
            "For {e}, the state capital is {a}.",
        ),
        "held_out_statements": (
            "The capital city of the state {e} is {a}.",
            "The city that is the state capital of {e} is {a}.",
        ),
    },
    "author": {
        "training_questions": (
            "Who wrote {e}?",
            "Who is the author of {e}?",
            "Name the author of {e}.",
            "{e} was written by which author?",
            "{e} is the work of which writer?",
        ),
        "held_out_questions": ("Which author wrote {e}?", "Name the writer who is the author of {e}."),
        "training_statements": (
            "As for {e}, its author is {a}.",
            "{e} was written by {a}.",
            "The author of {e} is {a}.",
            "{e} is the work of {a}.",
        ),
        "held_out_statements": ("The author who wrote {e} is {a}.", "The writer of {e} is {a}."),
    },
    "animal_group": {
        "training_questions": (
            "Which group of animals does the {e} belong to?",
            "To which animals does the {e} belong?",
            "What kind of animals is the {e} one of?",
            "Name the group of the {e}.",
            "The {e} is among which animals?",
        ),
        "held_out_questions": (
            "What group does the {e} belong to?",
            "Name the group of animals that the {e} is one of.",
        ),
        "training_statements": (
            "The {e} belongs to the {a}.",
            "The {e} is one of the {a}.",
            "As for the {e}, its group is the {a}.",
            "The group of the {e} is the {a}.",
        ),
        "held_out_statements": (
            "The group that the {e} belongs to is the {a}.",
            "The {e} is one of the animals called {a}.",
        ),
    },
}
