"""Principles from a file: what a critique asks, what a revision asks, and by what two answers are judged.

A YAML or JSON file holds `principles`, each with a `name`, a `critique` request and a `revision` request, and
where wanted a `comparison` (the question to a labeller) and a `weight`; and `examples`, worked by hand, each
with the name of its `principle`, a `prompt`, an `answer`, a `critique` and a `revision`.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from veridical.config import load_recipe
from veridical.errors import DataError, InputError, unknown
from veridical.files import read_json
from veridical.organisms import data_folder
from veridical.provenance import fingerprint

FOLDER = "constitutions"


@dataclass(frozen=True)
class Principle:
    """One rule, in the words that a model is given.

    Attributes:
        name: Short name, shown in the trace.
        critique: Asks the model for what is wrong with its answer.
        revision: Asks it to write the answer again.
        comparison: Asks which of two answers follows the rule better; made of `revision` when not given.
        weight: How often it is drawn, against the others.
    """

    name: str
    critique: str
    revision: str
    comparison: str = ""
    weight: float = 1.0

    @property
    def question(self) -> str:
        """What a labeller is asked about two answers."""
        return self.comparison or f'Someone asked: "{self.revision}" Which answer fulfils that better?'


@dataclass(frozen=True)
class Example:
    """A critique and a revision worked by hand, shown before the model writes its own.

    Attributes:
        principle: Name of the principle whose requests it follows.
        prompt, answer, critique, revision: The four texts.
    """

    principle: str
    prompt: str
    answer: str
    critique: str
    revision: str


@dataclass(frozen=True)
class Principles:
    """The rules of one file.

    Attributes:
        name: Name of the file.
        rules: At least one.
        examples: Worked examples, none where the file has none.
    """

    name: str
    rules: tuple[Principle, ...]
    examples: tuple[Example, ...] = ()

    def __len__(self) -> int:
        return len(self.rules)

    def __getitem__(self, name: str) -> Principle:
        for rule in self.rules:
            if rule.name == name:
                return rule
        raise unknown("principle", name, [rule.name for rule in self.rules])

    @property
    def fingerprint(self) -> str:
        """Digest of every word and weight."""
        parts = [asdict(part) for part in (*self.rules, *self.examples)]
        return fingerprint(json.dumps(part, sort_keys=True) for part in parts)

    def draw(self, *seed: object) -> Principle:
        """One rule by its weight, the same for the same seed."""
        weights = [rule.weight for rule in self.rules]
        return random.Random(" ".join(map(str, seed))).choices(self.rules, weights)[0]


def load_principles(source: str | Path | Principles) -> Principles:
    """Principles from a YAML or JSON file, or those that are embedded under a name ("hhh").

    Raises:
        DataError: What the file holds, and what was expected.
        UnknownNameError: A key or a name that is not there; gives the nearest.
    """
    if isinstance(source, Principles):
        return source
    path = _path(source)
    content = read_json(path) if path.suffix.lower() == ".json" else load_recipe(path)
    if not isinstance(content, Mapping):
        raise DataError(f"{path} holds a {type(content).__name__}; expected `principles:` with a list")
    _refuse_unknown(content, ("principles", "examples"), str(path))
    listed = content.get("principles")
    if not isinstance(listed, list) or not listed:
        raise DataError(f"{path} has no principles; expected `principles:` with a list of at least one")
    rules = tuple(_rule(path, number, item) for number, item in enumerate(listed, start=1))
    names = [rule.name for rule in rules]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{path}: two principles are called {name!r}")
    if not any(rule.weight for rule in rules):
        raise DataError(f"{path}: every weight is 0, so none can be drawn")
    worked = content.get("examples") or []
    if not isinstance(worked, list):
        raise DataError(f"{path}: examples is a {type(worked).__name__}; expected a list")
    examples = tuple(_example(path, number, item, names) for number, item in enumerate(worked, start=1))
    return Principles(path.stem, rules, examples)


def embedded() -> dict[str, Path]:
    """The principles that come with the package, by name."""
    return {path.stem: path for path in sorted((data_folder() / FOLDER).glob("*.yaml"))}


def _path(source: str | Path) -> Path:
    path, named = Path(source).expanduser(), embedded()
    if path.is_file():
        return path
    if str(source) in named:
        return named[str(source)]
    if path.is_dir():
        raise InputError(f"{source} is a folder; expected a YAML or JSON file of principles")
    hint = "Give a YAML or JSON file, or an embedded name"
    raise unknown("principles", str(source), named, hint)


def _rule(path: Path, number: int, item: Any) -> Principle:
    values = _texts(path, f"principle {number}", item, Principle, optional=("comparison", "weight"))
    weight = values.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise DataError(f"{path}, principle {number}: the weight is {weight!r}; expected a number from 0 up")
    return Principle(**{**values, "weight": float(weight)})


def _example(path: Path, number: int, item: Any, names: list[str]) -> Example:
    made = Example(**_texts(path, f"example {number}", item, Example))
    if made.principle not in names:
        raise unknown(f"principle in {path}, example {number}:", made.principle, names)
    return made


def _texts(path: Path, what: str, item: Any, kind: Any, optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """The keys of one principle or example: all there, none more, all but the weight texts."""
    if not isinstance(item, Mapping):
        raise DataError(f"{path}, {what} is a {type(item).__name__}; expected keys and values")
    names = [field.name for field in fields(kind)]
    _refuse_unknown(item, names, f"{path}, {what}")
    for name in names:
        if name in optional and name not in item:
            continue
        value = item.get(name)
        if name != "weight" and (not isinstance(value, str) or not value.strip()):
            raise DataError(f"{path}, {what}: {name} is {value!r}; expected a text")
    return {name: value.strip() if isinstance(value, str) else value for name, value in item.items()}


def _refuse_unknown(content: Mapping[str, Any], names: Any, where: str) -> None:
    for key in content:
        if key not in names:
            raise unknown(f"key in {where}:", key, names)
