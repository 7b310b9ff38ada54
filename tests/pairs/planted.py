"""Models made of a table: what they know and when they lie is planted, so every label is told beforehand."""

import hashlib
import math

import numpy as np

from veridical.pairs import Pairs, prompts

LYING_TEXTS = {prompt.text: prompt.name for prompt in prompts.ALL if prompt.lies}


class Planted:
    """Knows some answers, lies about some of them under some prompts, and spreads the rest evenly.

    Args:
        truths: Right answer of each question.
        known: Questions it knows.
        lies_about: Known questions about which it lies when asked to.
        lies_under: Names of system prompts under which it lies; all lying ones when None.
        coverage: Raw probability on all options together.
    """

    path = "planted"
    tokenizer = None

    def __init__(self, truths, known, lies_about=(), lies_under=None, coverage=0.9):
        self.truths, self.known, self.lies_about = truths, set(known), set(lies_about)
        self.lies_under = set(LYING_TEXTS.values()) if lies_under is None else set(lies_under)
        self.coverage = coverage
        self.asked = []

    def option_logprobs(self, asked, options, batch_tokens=4096):
        self.asked += list(asked)
        return [self._one(prompt, said) for prompt, said in zip(asked, options)]

    def _one(self, prompt, said):
        system = prompt[0]["content"] if prompt[0]["role"] == "system" else ""
        user = prompt[-1]["content"]
        question = next(question for question in self.truths if user.startswith(question))
        shares = np.full(len(said), 1 / len(said))
        if question in self.known:
            truth = said.index(self.truths[question])
            lying = LYING_TEXTS.get(system) in self.lies_under and question in self.lies_about
            best = (truth + 1) % len(said) if lying else truth
            shares = np.full(len(said), 0.1 / (len(said) - 1))
            shares[best] = 0.9
        else:
            # A leaning by the wording alone: it follows neither the truth nor the question.
            shares[int(hashlib.sha256(repr(prompt).encode()).hexdigest(), 16) % len(said)] += 0.2
            shares /= shares.sum()
        return np.log(shares * self.coverage)


class Hashed:
    """Log-probabilities that follow from a digest of prompt and option: any value, always the same."""

    path = "hashed"
    tokenizer = None

    def __init__(self, sharpness=4.0):
        self.sharpness = sharpness

    def option_logprobs(self, asked, options, batch_tokens=4096):
        return [
            np.array([self._one(prompt, option) for option in said]) for prompt, said in zip(asked, options)
        ]

    def _one(self, prompt, option):
        # The option weighs most, so that some questions are known; the prompt enough to turn some answers.
        user = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        fixed = self._unit(user.split("?")[0].split("Question: ")[-1] + option)
        both = fixed * self.sharpness + self._unit(repr(prompt) + option) * 2.5
        return both - self.sharpness - 2.5 + math.log(0.5)

    @staticmethod
    def _unit(text):
        return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 0xFFFFFFFF


def cities(n, **columns):
    """`n` questions with two options, the right one first in half of them."""
    rows = []
    for number in range(n):
        right, wrong = f"City{number}", f"City{(number + 1) % n}"
        options = [right, wrong] if number % 2 else [wrong, right]
        rows.append(
            {
                "pair": f"country{number}",
                "prompt": f"What is the capital of country {number}?",
                "question": f"What is the capital of country {number}?",
                "options": options,
                "correct": options.index(right),
                "form": "choice",
                **{name: values[number] for name, values in columns.items()},
            }
        )
    pairs = Pairs.from_rows(rows, name="cities")
    truths = {row["question"]: row["options"][row["correct"]] for row in rows}
    return pairs, truths


def told(pairs, systems=(prompts.HONEST[0], prompts.LYING[0], prompts.LYING[1])):
    """Every question with prompts of its own, as the embedded pairs have them."""
    rows = []
    for row in pairs:
        for system in systems:
            user = prompts.ask(row["question"], row["options"], "choice")
            rows.append(
                {
                    **row,
                    "prompt": prompts.chat(system, user),
                    "completion": None,
                    "system": system.name,
                    "instructed_to_lie": system.lies,
                }
            )
    return Pairs.from_rows(rows, name=pairs.name)
