"""One preference training from a model, data and options to a saved, reloaded and measured run."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from torch import nn

from veridical import adapters
from veridical.config import build, to_dict
from veridical.console import step as saying
from veridical.errors import ConfigError, InputError, ModelError, StoreMismatchError, unknown
from veridical.files import read_json, write_json
from veridical.preference import measure, trainers
from veridical.preference.config import METHODS, Method, PreferConfig, checked
from veridical.preference.data import Need, Preferences, load_preferences, refuse_long
from veridical.preference.runs import PreferenceRun, averages
from veridical.preference.trainers import Start
from veridical.saved_result import RESULT
from veridical.weights import fingerprint

log = logging.getLogger(__name__)

NEEDS: dict[Method, Need] = {"sft": "chosen", "reward": "both", "dpo": "both", "ipo": "both", "rl": "prompt"}
ASKED = "asked.json"
Item = TypeVar("Item")


def prefer(
    method: Method,
    model: str,
    data: Any,
    out: str | Path,
    config: PreferConfig | None = None,
    *,
    preferred: int | None = None,
    reward: Any = None,
    **options: Any,
) -> PreferenceRun:
    """Trains `model` on preferences and measures every checkpoint; run again, it goes on or reads the result.

    Args:
        method: "sft", "reward", "dpo", "ipo" or "rl".
        model: Embedded name, folder or hub name of the model that training begins at: the reference.
        data: What `load_preferences` takes; rl needs prompts only, sft prompts and chosen answers.
        out: Folder of the run: `training/` with checkpoints, `model/` with the final weights (a LoRA as a
            PEFT folder), and the result itself.
        config: Options; `options` win.
        preferred: The label that is preferred where `data` are labelled pairs.
        reward: A reward model (a name, a folder or a `RewardModel`) or a function of prompts and answers;
            needed by rl, recorded at checkpoints otherwise.
        **options: Fields of `PreferConfig`.

    Raises:
        InputError: Options, data or model that do not fit.
        StoreMismatchError: `out` holds a run of something else; names the first difference.
        ModelError: A first loss that is not the method's, or weights that are not what was trained.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    config = checked(build(PreferConfig, config, **options), method)
    if method == "rl" and reward is None:
        raise ConfigError("rl needs a reward model; train one with `veridical prefer reward`")
    out = Path(out)
    rows = load_preferences(data, preferred, NEEDS[method])
    begin = trainers.start(str(model), out)
    longest = config.max_length or begin.context or None
    room = config.max_new_tokens if method == "rl" else 0
    refuse_long(begin.tokenizer, rows.rows, None if longest is None else longest - room)
    train, held_out = rows.parted(config.test_fraction, config.seed)
    score = None if reward is None else _score(reward)
    asked = _asked(method, config, begin, rows, reward)
    _check_asked(out, asked)
    if (out / RESULT).is_file():
        return PreferenceRun.load(out)
    with saying(f"{method} on {len(train)} rows of {rows.name}"):
        logged = _trained(method, begin, train, config, out / "training", score)
    with saying("checkpoints"):
        table, samples = _measured(method, begin, held_out if len(held_out) else train, config, out, score)
    keep_final(out, begin, config)
    facts = {
        **asked,
        "folder": str(out),
        "rows": len(train),
        "held_out": len(held_out),
        "weights": f"LoRA of rank {config.lora_rank}" if config.lora_rank else "all weights",
        "seed": config.seed,
    }
    run = PreferenceRun(table, samples, logged, facts)
    run.save(out)
    log.info("  %s", run)
    return run


def keep_final(out: Path, begin: Start, config: PreferConfig) -> Path:
    """Copies the last checkpoint's weights to `out/model`, with the base named as it was asked for."""
    last = trainers.checkpoints(out / "training")[config.steps]
    temporary, final = out / ".model", out / "model"
    for folder in (temporary, final):
        if folder.exists():
            shutil.rmtree(folder)
    temporary.mkdir(parents=True)
    for file in sorted(last.iterdir()):
        if file.suffix in (".safetensors", ".json", ".jinja") and file.name != trainers.STATE:
            shutil.copyfile(file, temporary / file.name)
    if adapters.is_adapter(temporary):
        said = read_json(temporary / adapters.CONFIG)
        base = begin.folder if begin.folder != begin.name and Path(begin.folder).parent == out else begin.name
        write_json(temporary / adapters.CONFIG, {**said, "base_model_name_or_path": base})
    temporary.rename(final)
    return final


def _trained(
    method: Method, begin: Start, rows: Preferences, config: PreferConfig, folder: Path, score: Any
) -> pd.DataFrame:
    with trainers.quietly():
        trainer = trainer_of(method, begin, rows, config, folder, score)
        margins = [row.margin for row in rows.rows]
        logged = trainers.run(trainer, method, config, folder, margins)
    _check_saved(trainer.model, method, begin, trainers.checkpoints(folder)[config.steps])
    return pd.DataFrame([line for line in logged if "loss" in line])


def trainer_of(
    method: Method, begin: Start, rows: Preferences, config: PreferConfig, folder: Path, score: Any = None
) -> Any:
    """TRL's trainer for a method, ready to run; `score` is the reward of rl."""
    from veridical.preference import dpo, reward, rl, sft

    if method == "dpo" or method == "ipo":
        return dpo.trainer(begin, rows.rows, config, folder, method)
    if method == "rl":
        return rl.trainer(begin, rows.rows, config, folder, score)
    return {"sft": sft, "reward": reward}[method].trainer(begin, rows.rows, config, folder)


def _check_saved(trained: Any, method: Method, begin: Start, folder: Path) -> None:
    """Refuses saved weights that are not those that were trained."""
    import torch

    saved = _load(method, begin, folder)
    if getattr(trained, "peft_config", None):
        trained = trained.merge_and_unload()
    ours = dict(trained.named_parameters())
    for name, value in saved.named_parameters():
        if name in ours and not torch.allclose(value, ours[name].detach().cpu(), atol=1e-6):
            raise ModelError(f"the weights saved in {folder} are not those that were trained: {name} differs")


def _load(method: Method, begin: Start, folder: Path) -> nn.Module:
    from veridical.preference import reward

    if method == "reward":
        return trainers.load_trained(folder, begin, reward.KIND, num_labels=1)
    return trainers.load_trained(folder, begin)


def _measured(
    method: Method, begin: Start, rows: Preferences, config: PreferConfig, out: Path, score: Any
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table and the samples of every checkpoint, the reference first."""
    places: dict[int, Path | None] = {0: None, **trainers.checkpoints(out / "training")}
    if method == "reward":
        lines = [_judged(begin, rows, place, at) for at, place in places.items() if place is not None]
        return pd.DataFrame(lines), pd.DataFrame({"step": []})
    reference = begin.load().eval()
    prompts = spread(list({str(row.prompt): row.prompt for row in rows.rows}.values()), config.samples)
    both = spread(rows.rows, config.samples) if NEEDS[method] == "both" else []
    before = measure.answer_logprobs(reference, begin.tokenizer, both) if both else None
    table, samples = [], []
    for at, place in places.items():
        policy = reference if place is None else _load(method, begin, place)
        found = measure.measured(
            policy, reference, begin.tokenizer, prompts,
            max_new_tokens=config.max_new_tokens, seed=config.seed, score=score,
        )  # fmt: skip
        line: dict[str, Any] = {"step": at, **averages(found)}
        if before is not None:
            changes = measure.answer_logprobs(policy, begin.tokenizer, both) - before
            ahead = (changes["chosen"] - changes["rejected"]).to_numpy()
            line["accuracy"] = float("nan") if place is None else float(np.mean(ahead > 0))
            line |= {side: float(np.mean(changes[side].to_numpy())) for side in ("chosen", "rejected")}
        table.append(line)
        samples.append(found.assign(step=at))
    return pd.DataFrame(table), pd.concat(samples, ignore_index=True)


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of `items`, spread evenly over their order."""
    if len(items) <= count:
        return list(items)
    return [items[int(at)] for at in np.linspace(0, len(items) - 1, count)]


def _judged(begin: Start, rows: Preferences, place: Path, at: int) -> dict[str, Any]:
    """How a reward model orders the held-out preferences."""
    from veridical.preference.reward import RewardModel

    model = RewardModel(_load("reward", begin, place), begin.tokenizer, str(place))
    prompts = [row.prompt for row in rows.rows]
    ahead = model.score(prompts, [row.chosen for row in rows.rows])
    ahead = ahead - model.score(prompts, [row.rejected for row in rows.rows])
    return {"step": at, "accuracy": float((ahead > 0).mean()), "margin": float(ahead.mean())}


def _score(reward: Any) -> Any:
    """A reward model, by name or as it is, or any function, as a function of prompts and answers."""
    from veridical.preference.reward import RewardModel, load_reward

    if callable(reward) and not isinstance(reward, RewardModel):
        return reward
    return load_reward(reward).score


def _called(reward: Any) -> str:
    """What a reward is called in the record of a run: the same in every process."""
    return str(getattr(reward, "name", None) or getattr(reward, "__qualname__", reward))


def _asked(
    method: Method, config: PreferConfig, begin: Start, rows: Preferences, reward: Any
) -> dict[str, Any]:
    """What decides the outcome."""
    lasting = {name: value for name, value in to_dict(config).items() if name != "progress"}
    return {
        "method": method,
        "model": begin.name,
        "model_fingerprint": fingerprint(begin.load()),
        "data": rows.name,
        "data_fingerprint": rows.fingerprint,
        "reward": None if reward is None else _called(reward),
        "options": lasting,
    }


def _check_asked(out: Path, asked: dict[str, Any]) -> None:
    file = out / ASKED
    begun = (out / RESULT).is_file() or any((out / "training").glob("checkpoint-*"))
    if begun and not file.is_file():
        raise InputError(f"{out} holds a training that this command did not begin; give another folder")
    if not begun:  # what failed before its first checkpoint binds nobody
        write_json(file, asked)
        return
    there = read_json(file)
    for name, value in asked.items():
        if there.get(name) != value:
            old, new = there.get(name), value
            if name == "options":
                name = next(key for key in value if (old or {}).get(key) != value[key])
                old, new = (old or {}).get(name), value[name]
            raise StoreMismatchError(
                f"{out} holds a run with {name} = {old!r}, asked for is {new!r}; give another "
                "folder or delete it"
            )
