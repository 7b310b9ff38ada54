"""Many policies side by side: which are alike in what they do, in what was rewarded, and inside.

Each model reads the texts once, whatever the number of pairs, and is asked each question once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from veridical.comparison import behaviour
from veridical.comparison.alike import Alike, of_behaviour, of_changes, of_rewards
from veridical.comparison.config import CompareConfig
from veridical.comparison.duo import load_pair, refuse_own_path, shared_vocabulary, speaking
from veridical.comparison.many import Passed, pass_all, texts_of
from veridical.comparison.policies import Policies
from veridical.config import build, to_dict
from veridical.errors import DataError, InputError

if TYPE_CHECKING:
    from veridical.hooked import HookedModel

DEPTHS = 4
"""Depths that are compared: the ends of as many equal parts of each model."""


def compare_many(
    policies: Mapping[str, Any] | Sequence[Any],
    reference: Any,
    data: Any,
    *,
    trained_on: Mapping[str, str] | Sequence[str] | None = None,
    reward: Any = None,
    depths: int = DEPTHS,
    config: CompareConfig | None = None,
    load: Mapping[str, Any] | None = None,
    **options: Any,
) -> Policies:
    """Compares several policies with their references and with each other.

    Args:
        policies: By name, or a list, whatever `load_pair` takes as a policy; two at least.
        reference: The model that all of them started from, or by policy's name one for each. Policies of
            different backbones have different references.
        data: `Pairs`, texts or chats.
        trained_on: What each was trained on (a reward, a data set), by name or in order. Policies that
            share it are held against those that do not.
        reward: A reward model (see `veridical.preference.reward.load_reward`) that judges the answers.
        depths: Depths at which streams are compared.
        config: Options; `behaviour_pairs`, `max_new_tokens`, `batch_tokens`, `bootstrap`, `on_long`, `seed`
            and `progress` are read.
        load: Options of `veridical.load` for all models, such as `device` and `dtype`.
        **options: Options of `config` by name.

    Raises:
        InputError: Fewer than two policies, one name twice, a name without a reference, a policy that is its
            own reference.
        DataError: Rows that cannot be tokenised, or too few.
    """
    config = build(CompareConfig, config, **options)
    given = _named(policies)
    belongs = _belongs(list(given), trained_on)
    models, names, references, notes = _loaded(given, reference, dict(load or {}))
    shared = all(shared_vocabulary(model, models[0], [])[0] for model in models[1:])
    if shared:
        speaker = next((m for m in models if getattr(m.tokenizer, "chat_template", None)), models[0])
        models = [speaking(model, speaker) for model in models]
    else:
        notes.append("The models do not share their tokens: no divergence of predictions is given.")
    if hasattr(data, "prompts"):
        data = behaviour.drawn(data, config.behaviour_pairs, config.seed)
    texts = texts_of(models, data, shared, config.on_long)
    groups = data.groups if hasattr(data, "groups") else np.arange(len(texts))
    if len(texts) < 4:
        raise DataError(f"{len(texts)} texts arrived; expected 4 or more to compare models on")
    fewest = min((model.n_layers for model in models), default=0)
    sites = [_depths(model, max(1, min(depths, fewest))) for model in models]
    passed = pass_all(
        models, references, texts, sites, batch_tokens=config.batch_tokens, progress=config.progress
    )
    context = min((m.context_length for m in models if m.context_length), default=0)
    asked = behaviour.questions(data, context, config)
    done = [behaviour.answered(model, asked, config) for model in models]
    judged = _judged(reward, asked, done)
    pairs = _pairs(names, references, passed, asked, done, sites, groups, config)
    return Policies(
        _models(names, references, passed, asked, done, judged, belongs),
        pairs,
        {
            "references": [names[at] for at in sorted(set(references))],
            "fingerprints": {name: model.fingerprint() for name, model in zip(names, models)},
            "data": getattr(data, "name", "texts"),
            "data_fingerprint": getattr(data, "fingerprint", ""),
            "notes": notes,
            "options": {name: value for name, value in to_dict(config).items() if name != "progress"},
            "seed": config.seed,
            "said": (
                f"{len(texts)} texts of {getattr(data, 'name', 'texts')}, {texts.tokens} tokens; every model "
                "read them once. Intervals are 95 %, over whole pairs of texts; the null swaps the texts of "
                "one of the two models at random."
            ),
        },
    )


def _named(policies: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    if isinstance(policies, str | Path):
        raise InputError(f"one policy ({policies}) arrived; expected several, or use veridical.compare")
    if isinstance(policies, Mapping):
        found = {str(name): source for name, source in policies.items()}
    else:
        names = [_short(source) for source in policies]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(f"two policies are called {twice[0]!r}; give them names, as a dict")
        found = dict(zip(names, policies))
    if len(found) < 2:
        raise InputError(f"{len(found)} policies arrived; expected two or more, or use veridical.compare")
    return found


def _short(source: Any) -> str:
    path = str(source) if isinstance(source, str | Path) else str(getattr(source, "path", source))
    return Path(path).name or path


def _belongs(names: list[str], trained_on: Mapping[str, str] | Sequence[str] | None) -> dict[str, str]:
    if not trained_on:
        return {}
    if not isinstance(trained_on, Mapping):
        if len(trained_on) != len(names):
            raise InputError(
                f"trained_on has {len(trained_on)} entries for {len(names)} policies; expected one for each"
            )
        return dict(zip(names, map(str, trained_on)))
    if lone := sorted(set(names) ^ set(trained_on)):
        raise InputError(f"trained_on and policies differ in {lone[0]!r}; expected one entry for each policy")
    return {name: str(label) for name, label in trained_on.items()}


def _loaded(
    policies: dict[str, Any], reference: Any, options: dict[str, Any]
) -> tuple[list[HookedModel], list[str], list[int], list[str]]:
    """References first, each once, then policies; their names; and for each the number of its reference."""
    from veridical.models import load

    if isinstance(reference, Mapping):
        if lone := sorted(set(policies) ^ set(map(str, reference))):
            raise InputError(f"policies and references differ in {lone[0]!r}; expected one for each policy")
        sources = {name: reference[name] for name in policies}
    else:
        sources = dict.fromkeys(policies, reference)
    known: dict[Any, int] = {}
    models: list[HookedModel] = []
    names: list[str] = []
    for source in sources.values():
        key = str(source) if isinstance(source, str | Path) else id(source)
        if key not in known:
            known[key] = len(models)
            models.append(load(source, **options))
            names.append(_short(source))
    numbers, notes = list(range(len(models))), []
    for name, source in policies.items():
        theirs = sources[name]
        refuse_own_path(source, theirs)
        at = known[str(theirs) if isinstance(theirs, str | Path) else id(theirs)]
        duo = load_pair(source, reference=models[at], **options)
        notes += [note for note in duo.notes if note not in notes]
        models.append(duo.policy)
        names.append(name)
        numbers.append(at)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"two models are called {twice[0]!r}; give the policies other names, as a dict")
    return models, names, numbers, notes


def _depths(model: HookedModel, count: int) -> list[str]:
    if not model.n_layers:
        raise InputError(f"the layers of {model.path} are not known, so its insides cannot be compared")
    ends = [max(1, round((at + 1) * model.n_layers / count)) - 1 for at in range(count)]
    return [f"resid_post.{layer}" for layer in ends]


def _judged(reward: Any, asked: Sequence[Any], done: Sequence[Any]) -> list[float]:
    """Mean reward of each model's free answers; NaN without a reward model or answers."""
    free = [question for question in asked if question.options is None]
    if reward is None or not free:
        return [float("nan")] * len(done)
    from veridical.preference.reward import load_reward

    judge = load_reward(reward)
    return [float(judge.score(free[0].prompts, each.said).mean()) for each in done]


def _models(
    names: list[str],
    references: list[int],
    passed: Passed,
    asked: Sequence[Any],
    done: Sequence[Any],
    judged: list[float],
    belongs: dict[str, str],
) -> pd.DataFrame:
    """One line per model: what it is, how far it is from its reference, what it does."""
    lines = []
    for at, name in enumerate(names):
        own = references[at]
        line: dict[str, Any] = {
            "model": name,
            "reference": "" if own == at else names[own],
            "trained_on": belongs.get(name, ""),
            "kl": passed.kl[at] / passed.tokens if at in passed.kl else float("nan" if own != at else 0),
        }
        for question in asked:
            yes = done[at].outcomes[question.measure]
            for part, rows in question.parts.items():
                if rows.any():
                    label = question.measure if part == "all" else f"{question.measure}, {part}"
                    line[label] = float(yes[rows].mean())
        rewards, _ = _rewards(asked, done, at, own)
        line["implicit reward"] = float("nan") if rewards is None else _margin(asked, done, at, own)
        line["reward"] = judged[at]
        lines.append(line)
    return pd.DataFrame(lines).dropna(axis=1, how="all")


def _rewards(
    asked: Sequence[Any], done: Sequence[Any], at: int, own: int
) -> tuple[np.ndarray | None, np.ndarray]:
    """Implicit rewards of every option, less the mean of its question, and the pair of each."""
    values, groups = [], []
    for question in asked:
        if question.options is None:
            continue
        both = zip(done[at].scores[question.measure], done[own].scores[question.measure])
        for (ours, theirs), group in zip(both, question.groups.tolist()):
            values.append((ours - theirs) - (ours - theirs).mean())
            groups += [str(group)] * len(ours)
    return (np.concatenate(values) if values else None), np.array(groups)


def _margin(asked: Sequence[Any], done: Sequence[Any], at: int, own: int) -> float:
    """Mean implicit reward of the right option less that of the others, in nats."""
    margins = []
    for question in asked:
        if question.options is None:
            continue
        both = zip(done[at].scores[question.measure], done[own].scores[question.measure])
        for (ours, theirs), right in zip(both, question.right.tolist()):
            gained = ours - theirs
            margins.append(gained[right] - np.delete(gained, right).mean())
    return float(np.mean(margins))


def _pairs(
    names: list[str],
    references: list[int],
    passed: Passed,
    asked: Sequence[Any],
    done: Sequence[Any],
    sites: list[list[str]],
    groups: np.ndarray,
    config: CompareConfig,
) -> pd.DataFrame:
    """One line per pair, measure and place; see `Policies`."""
    lines: list[dict[str, Any]] = []
    changes = {
        at: [ours.numpy() - theirs.numpy() for ours, theirs in zip(passed.ends[at], passed.ends[own])]
        for at, own in enumerate(references)
        if own != at and passed.ends[at][0].shape == passed.ends[own][0].shape
    }
    nothing = float("nan")
    for a, b in combinations(range(len(names)), 2):
        both = {"a": names[a], "b": names[b], "same_reference": references[a] == references[b]}

        def add(measure: str, place: str, found: Alike, both: dict[str, Any] = both) -> None:
            lines.append({**both, "measure": measure, "place": place, **vars(found)})

        for depth, products in enumerate(passed.products[a, b]):
            place = _place(sites[a][depth], sites[b][depth])
            add("cka", place, Alike(products.cka(), nothing, nothing, nothing, 0.0))
            if a in changes and b in changes:
                found = of_changes(changes[a][depth], changes[b][depth], groups, config.seed)
                add("cka of changes", place, found)
        if (a, b) in passed.divergence:
            apart = passed.divergence[a, b] / passed.tokens
            add("divergence", "all tokens", Alike(apart, nothing, nothing, nothing, nothing))
        if asked:
            yes = [np.concatenate([done[m].outcomes[q.measure] for q in asked]) for m in (a, b)]
            owners = np.concatenate([np.array([str(g) for g in q.groups.tolist()]) for q in asked])
            found = of_behaviour(yes[0], yes[1], owners, config.bootstrap, config.seed)
            add("same behaviour", "questions", found)
        if references[a] != a and references[b] != b:
            ours, owners = _rewards(asked, done, a, references[a])
            theirs, _ = _rewards(asked, done, b, references[b])
            if ours is not None and theirs is not None:
                found = of_rewards(ours, theirs, owners, config.bootstrap, config.seed)
                add("reward correlation", "options", found)
    return pd.DataFrame(lines)


def _place(ours: str, theirs: str) -> str:
    return ours if ours == theirs else f"{ours} and {theirs}"
