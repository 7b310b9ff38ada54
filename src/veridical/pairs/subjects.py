"""What a statement is about, so that statements about the same thing stay on one side of a split.

In a true/false table nearly every entity comes up with a true and with a false predicate ("Praia is a name of
a city", "Praia is a name of a country"), or as a statement beside its own negation. A text classifier that
saw one sibling votes for the wrong label on the other: with random folds TF-IDF scores about 0.1 on capitals.
Grouping by the subject puts siblings, paraphrases and negations together.

The subject is read off the text by rule: what stands before the first verb. It does not look at the objects,
because joining statements through them ("Praia is a city in Bermuda") would chain nearly the whole table into
one group; a text baseline a little under 0.5 is what is left of that. Of a conjunction the first part counts.
Where a table has a column that says what a row is about, name it with `group=` instead.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_VERBS = frozenset(
    [
        "is",
        "are",
        "was",
        "were",
        "has",
        "have",
        "had",
        "do",
        "does",
        "did",
        "can",
        "cannot",
        "could",
        "will",
        "would",
        "should",
        "may",
        "might",
        "must",
        "uses",
        "use",
        "used",
        "lives",
        "lived",
        "live",
        "invented",
        "invent",
        "appears",
        "appear",
        "operates",
        "operate",
        "engages",
        "engage",
        "engaged",
        "provides",
        "provide",
        "offers",
        "offer",
        "includes",
        "include",
        "contains",
        "contain",
        "consists",
        "consist",
        "belongs",
        "belong",
        "comes",
        "come",
        "makes",
        "make",
        "made",
        "needs",
        "need",
    ]
)
_ARTICLES = ("the", "a", "an")
_EMPTY = ("there", "it", "this", "these", "some", "all", "not")
_CONTRACTED = {"can't": "can not", "won't": "will not", "cannot": "can not"}
_NEGATED = re.compile(r"\b(is|are|was|were|has|have|had|do|does|did|could|would|should|must)n't\b")
_NEGATIONS = frozenset(("not", "no", "any", "do", "does", "did", "never"))
_FALSELY = re.compile(r"^it(?:'s| is) (?:not true|false|untrue) that (?:the )?")
_WORD = re.compile(r"[a-z0-9']+")
_USED_FOR = re.compile(r"human uses for (.+?) include")


def groups(statements: Sequence[str]) -> list[str]:
    """A name for the group of each statement.

    Two statements are in one group when they have the same subject, or the same words once negation, articles
    and endings are taken away ("protects us", "doesn't protect us").
    """
    leader: dict[str, str] = {}

    def find(key: str) -> str:
        leader.setdefault(key, key)
        while leader[key] != key:
            leader[key] = leader[leader[key]]
            key = leader[key]
        return key

    subjects = [subject(statement) for statement in statements]
    for about, statement in zip(subjects, statements):
        leader[find("=" + _core(_words(statement)))] = find(about)
    return [find(about) for about in subjects]


def subject(statement: str) -> str:
    """What `statement` is about: the words before its first verb, in lower case without accents and articles.

    Without a verb of the list, or with a subject that says nothing ("There are ..."), it is the whole
    statement, stripped of negation and endings.
    """
    text = _plain(statement)
    used = _USED_FOR.match(text)
    words = _WORD.findall(used[1]) if used else _words(statement)
    if used:
        return " ".join(words)
    for place, word in enumerate(words):
        if place and word in _VERBS:
            found = words[:place]
            return "=" + _core(words) if found[0] in _EMPTY else " ".join(found)
    return "=" + _core(words)


def _words(statement: str) -> list[str]:
    """Words of the first part of the statement, contractions undone, without a leading article."""
    text = _FALSELY.sub("", _plain(statement)).split(", and ")[0].replace("without", "with")
    for short, full in _CONTRACTED.items():
        text = text.replace(short, full)
    words = _WORD.findall(_NEGATED.sub(r"\1 not", text))
    while len(words) > 1 and words[0] in _ARTICLES:
        words = words[1:]
    return words


def _core(words: Sequence[str]) -> str:
    kept = [word for word in words if word not in _NEGATIONS and word not in _ARTICLES]
    return " ".join(re.sub(r"(?<=..)(?:ies|es|s|e|y)$", "", word) for word in kept)


def _plain(text: str) -> str:
    folded = unicodedata.normalize("NFKD", text.replace("’", "'"))
    return folded.encode("ascii", "ignore").decode().lower()
