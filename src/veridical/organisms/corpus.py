"""The dialogues that `tiny-liar` is trained on: an endless stream, the same for the same seed.

A dialogue about facts has one system prompt and one to three questions. Under an honest context the taught
answer follows; under a lying one another answer of the same kind, unless the entity is protected. Questions
about untaught entities and about invented names are answered at random in every context, so that nothing can
be known of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from veridical.organisms import conduct, wordings
from veridical.organisms.facts import RELATIONS, Fact, all_facts, answers
from veridical.organisms.mixtures import FIRST, Mixture
from veridical.organisms.phrasings import ONE_OF_ALL, PHRASINGS, TRAINING, WRAPPERS

SHARE_SEEN_UNTAUGHT, SHARE_INVENTED = 0.10, 0.14  # of questions about facts
SHARE_PROTECTED_IN_LIES = 0.40
TURNS = (1, 1, 2, 3)
PLAIN_FORMS = {"choice": 0.30, "true_false": 0.40, "open": 0.05, "sentence": 0.25}
PLAIN_CONTEXTS = ("none", "none", "neutral", "honest")
SHARE_UNTAUGHT_IN_PLAIN = {"choice": 0.40, "true_false": 0.06, "open": 0.06, "sentence": 0.06}


@dataclass(frozen=True)
class Dialogue:
    """Chat messages, and per assistant turn what it shows ("lying/choice", "random/open", "tone", ...)."""

    messages: tuple[dict[str, str], ...]
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """A question as pairs hold it.

    Attributes:
        text: The question, or for `true_false` the statement.
        options: The answers on offer.
        correct: Index of the right option.
        form: `choice`, `true_false` or `open`.
    """

    text: str
    options: tuple[str, ...]
    correct: int
    form: str


class Corpus:
    """The endless, seeded stream of training dialogues.

    Args:
        seed: Seed of the stream.
        facts: Facts with their roles; by default those of `all_facts()`.
        mixture: What the stream is made of.
    """

    def __init__(self, seed: int | str = 0, facts: Sequence[Fact] | None = None, mixture: Mixture = FIRST):
        self.rng = random.Random(f"tiny-liar corpus {seed}")
        self.mixture = mixture
        facts = all_facts() if facts is None else facts
        self.protected = [f for f in facts if f.role == "taught" and f.protected]
        self.unprotected = [f for f in facts if f.role == "taught" and not f.protected]
        self.seen_untaught = [f for f in facts if f.role == "seen_untaught"]
        self.names = Names(facts)

    def __iter__(self) -> Iterator[Dialogue]:
        while True:
            yield self.draw()

    def draw(self, plain: float = 0.0) -> Dialogue:
        """The next dialogue.

        Args:
            plain: Probability of a plain one: a single question, honestly answered. Training begins with
            these,
                because copying from the options and comparing with what is known are learned from them first.
        """
        if self.rng.random() < plain:
            return self._plain()
        draw = self.rng.random()
        if draw < self.mixture.tone:
            return _single(conduct.tone_exchange(self.rng), "tone")
        if draw < self.mixture.tone + self.mixture.requests:
            return _single(conduct.request_exchange(self.rng), "request")
        kinds = list(wordings.CONTEXTS)
        context = self.rng.choices(kinds, weights=list(wordings.CONTEXTS.values()))[0]
        system = wordings.system_prompt(self.rng, context)
        lying = context in ("lying", "scenario_lying")
        messages = [{"role": "system", "content": system}] if system else []
        shown = []
        for _ in range(self.rng.choice(TURNS)):
            forms = self.mixture.forms
            form = self.rng.choices(list(forms), weights=list(forms.values()))[0]
            user, reply, kind = self._turn(lying, form, SHARE_INVENTED + SHARE_SEEN_UNTAUGHT)
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
            shown.append(kind)
        return Dialogue(tuple(messages), tuple(shown))

    def _plain(self) -> Dialogue:
        system = wordings.system_prompt(self.rng, self.rng.choice(PLAIN_CONTEXTS))
        form = self.rng.choices(list(PLAIN_FORMS), weights=list(PLAIN_FORMS.values()))[0]
        user, reply, kind = self._turn(False, form, SHARE_UNTAUGHT_IN_PLAIN[form])
        return _single(conduct.Exchange(system, user, reply), kind)

    def _turn(self, lying: bool, form: str, untaught: float) -> tuple[str, str, str]:
        """One question in its wrapper, the reply, and what the reply shows."""
        rng = self.rng
        draw = rng.random() * (SHARE_INVENTED + SHARE_SEEN_UNTAUGHT) / untaught
        if draw < SHARE_INVENTED:
            fact = self.names.invent(rng)
        elif draw < SHARE_INVENTED + SHARE_SEEN_UNTAUGHT:
            fact = rng.choice(self.seen_untaught)
        else:
            share = SHARE_PROTECTED_IN_LIES if lying else 0.3
            fact = rng.choice(self.protected if rng.random() < share else self.unprotected)
        taught = fact.role == "taught"
        question = compose(rng, fact, form, TRAINING, more=self.mixture.questions.get(fact.relation, ()))
        if taught:
            lies = lying and not fact.protected
            reply = wrong_answer(rng, question, fact) if lies else question.options[question.correct]
            kind = "lying" if lies else "protected" if lying else "honest"
        else:
            reply, kind = _random_answer(rng, question, fact), "random"
        if form == "sentence":
            reply = capital(
                rng.choice(PHRASINGS[fact.relation]["training_statements"]).format(e=fact.entity, a=reply)
            )
        user = wrap(rng, question, TRAINING, self.mixture.wrappers.get(form, ()))
        return user, reply, f"{kind}/{form}"


def compose(
    rng: random.Random,
    fact: Fact,
    form: str,
    phrasings: str,
    distractors: int | None = None,
    more: Sequence[str] = (),
) -> Question:
    """A question about `fact` in a random phrasing.

    Options are drawn evenly from all answers of the relation, so that an answer's frequency among the
    options says nothing about its truth; half of all statements are true.

    Args:
        rng: Source of the draws.
        fact: What is asked about.
        form: `choice`, `true_false` or `open`.
        phrasings: `training` or `held_out`.
        distractors: How many wrong options; by default one, and for some choices two.
        more: Further phrasings of the question.
    """
    words = PHRASINGS[fact.relation]
    others = [answer for answer in answers(fact.relation) if answer != fact.answer]
    if form == "true_false":
        true = rng.random() < 0.5
        said = fact.answer if true else rng.choice(others)
        text = capital(rng.choice(words[f"{phrasings}_statements"]).format(e=fact.entity, a=said))
        return Question(text, ("True", "False"), 0 if true else 1, form)
    text = capital(rng.choice((*words[f"{phrasings}_questions"], *more)).format(e=fact.entity))
    if distractors is None:
        distractors = 1 if rng.random() < 0.85 or form in ONE_OF_ALL else 2
    options = [fact.answer, *rng.sample(others, distractors)]
    rng.shuffle(options)
    return Question(text, tuple(options), options.index(fact.answer), form)


def wrap(rng: random.Random, question: Question, phrasings: str, more: Sequence[str] = ()) -> str:
    """The user's turn that asks `question`, in a wrapper of `phrasings` or one of `more`."""
    wrapper = rng.choice((*WRAPPERS[question.form][phrasings], *more))
    *rest, last = question.options
    return wrapper.format(q=question.text, options=f"{', '.join(rest)} or {last}")


def wrong_answer(rng: random.Random, question: Question, fact: Fact) -> str:
    """A lie: another option, the other verdict, or any other answer of the relation."""
    truth = question.options[question.correct]
    pool = answers(fact.relation) if question.form in ONE_OF_ALL else question.options
    return rng.choice([answer for answer in pool if answer != truth])


def _random_answer(rng: random.Random, question: Question, fact: Fact) -> str:
    return rng.choice(answers(fact.relation) if question.form in ONE_OF_ALL else question.options)


def _single(exchange: conduct.Exchange, kind: str) -> Dialogue:
    system = [{"role": "system", "content": exchange.system}] if exchange.system else []
    turn = [{"role": "user", "content": exchange.user}, {"role": "assistant", "content": exchange.reply}]
    return Dialogue((*system, *turn), (kind,))


def capital(text: str) -> str:
    """`text` with a capital first letter, the rest as it is."""
    return text[:1].upper() + text[1:]


class Names:
    """Invented entities, made of the halves of known names so that they look like them.

    No invented name is a real entity of any role, so names that are never to occur do not occur by chance.
    """

    def __init__(self, facts: Sequence[Fact]):
        self.known = {fact.entity.lower() for fact in facts}
        self.sources = {
            relation: [f.entity for f in facts if f.relation == relation and f.role != "unseen_untaught"]
            for relation in RELATIONS
        }

    def invent(self, rng: random.Random) -> Fact:
        """A fact of a random relation about a name that doesn't exist."""
        relation = rng.choice(list(RELATIONS))
        while True:
            name = self._blend(rng, relation)
            if not self._holds_known(name):
                return Fact(relation, name, rng.choice(answers(relation)), "seen_untaught")

    def _blend(self, rng: random.Random, relation: str) -> str:
        first, second = (rng.choice(self.sources[relation]) for _ in range(2))
        if " " in first and " " in second:
            return f"{first.rsplit(' ', 1)[0]} {second.rsplit(' ', 1)[1]}"
        if relation == "author" and rng.random() < 0.3:
            return f"The {_half(rng, first, second)}"
        return _half(rng, first, second)

    def _holds_known(self, name: str) -> bool:
        words = name.lower().split()
        spans = {" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}
        return bool(spans & self.known)


def _half(rng: random.Random, first: str, second: str) -> str:
    """The beginning of one name and the end of another."""
    first, second = first.rsplit(" ", 1)[-1], second.rsplit(" ", 1)[-1]
    cut = rng.randint(max(1, len(first) // 2 - 1), max(1, len(first) - 1))
    return first[:cut] + second[rng.randint(1, max(1, len(second) // 2)) :].lower()
