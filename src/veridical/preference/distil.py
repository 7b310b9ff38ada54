"""Distillation (Hinton, Vinyals and Dean 2015, arXiv 1503.02531), over transformers' `Trainer`.

With p and q the next-token distributions of teacher and student at temperature T, the loss at each token of
an answer is soft_weight T^2 KL(p || q) + hard_weight (-log q_1(token)): soft labels, whose gradient the
square keeps at one scale whatever T is, and the student's own loss. A student that equals its teacher has a
soft loss of zero and no gradient from it. The student shares the teacher's tokenizer; its depth and width are
free.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veridical.config import build
from veridical.console import step as saying
from veridical.errors import ConfigError, InputError, ModelError
from veridical.files import read_json, write_json
from veridical.preference import measure, trainers, training
from veridical.preference.config import DistilConfig, checked
from veridical.preference.data import Preference, Preferences, load_preferences, refuse_long
from veridical.preference.distilled import Distilled
from veridical.preference.measure import Answered
from veridical.preference.runs import averages
from veridical.preference.trainers import Start, arguments, lora
from veridical.provenance import fingerprint as fingerprint_of
from veridical.saved_result import RESULT
from veridical.scoring import quiet
from veridical.tokens import encode, pad
from veridical.weights import fingerprint

log = logging.getLogger(__name__)

IGNORED = -100
TEACHER_STEP = -1
"""Step under which the teacher's own samples stand."""


def distil(
    teacher: str,
    data: Any,
    out: str | Path,
    config: DistilConfig | None = None,
    *,
    student: str | None = None,
    preferred: int | None = None,
    reward: Any = None,
    **options: Any,
) -> Distilled:
    """Trains a student of `teacher` and measures every checkpoint; run again, it goes on or reads the result.

    Args:
        teacher: Embedded name, folder or hub name.
        data: What `load_preferences` takes: prompts with chosen answers, or prompts alone where the teacher
            answers them.
        out: Folder of the run: `training/` with checkpoints, `model/` with the student, and the result.
        config: Options; `options` win.
        student: Model that the student begins as; made of the teacher's blocks when not given.
        preferred: The label whose answers are learnt, where `data` are labelled pairs.
        reward: A reward model or a function of prompts and answers, recorded at checkpoints.
        **options: Fields of `DistilConfig`.

    Raises:
        InputError: Options, data or models that do not fit; a student with another tokenizer.
        StoreMismatchError: `out` holds a run of something else; names the first difference.
    """
    config = _checked(build(DistilConfig, config, **options))
    out = Path(out)
    rows = load_preferences(data, preferred, "prompt" if config.answers == "teacher" else "chosen")
    taught_by = trainers.start(str(teacher), out / "teacher")
    begin = _student(taught_by, student, config, out)
    _refuse_other_tokens(taught_by, begin)
    longest = config.max_length or min(filter(None, (taught_by.context, begin.context)), default=None)
    room = config.max_new_tokens if config.answers == "teacher" else 0
    refuse_long(begin.tokenizer, rows.rows, None if longest is None else longest - room)
    train, held_out = rows.parted(config.test_fraction, config.seed)
    score = None if reward is None else training._score(reward)
    asked = training._asked("distil", config, begin, rows, reward)
    asked |= {"teacher": taught_by.name, "teacher_fingerprint": fingerprint(taught_by.load())}
    training._check_asked(out, asked)
    if (out / RESULT).is_file():
        return Distilled.load(out)
    teacher_model = taught_by.load().eval()
    learnt = _answers(teacher_model, begin.tokenizer, train, config, out / "answers.json")
    with saying(f"distil on {len(train)} rows of {rows.name}"):
        logged = _trained(begin, teacher_model, learnt, config, out / "training")
    with saying("checkpoints"):
        judged_on = held_out if len(held_out) else train
        table, samples = _measured(begin, teacher_model, judged_on, config, out, score)
    training.keep_final(out, begin, config)
    size = [sum(p.numel() for p in model.parameters()) for model in (begin.load(), teacher_model)]
    facts = {
        **asked,
        "folder": str(out),
        "rows": len(train),
        "held_out": len(held_out),
        "weights": f"LoRA of rank {config.lora_rank}" if config.lora_rank else "all weights",
        "parameters": size[0],
        "teacher_parameters": size[1],
        "seed": config.seed,
    }
    run = Distilled(table, samples, logged, facts)
    run.save(out)
    log.info("  %s", run)
    return run


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float,
    soft_weight: float,
    hard_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, soft loss with its T^2, hard loss), each a mean over the tokens that are learnt.

    Args:
        student: Logits [batch, pos, vocabulary].
        teacher: Logits of the same shape, without gradient.
        labels: Token ids [batch, pos], -100 where nothing is learnt; the first position predicts the second.
        temperature: T.
        soft_weight, hard_weight: Weights of the two.
    """
    wanted = labels[:, 1:]
    said = wanted != IGNORED
    ours, theirs = student[:, :-1][said], teacher[:, :-1][said]
    q = (ours / temperature).log_softmax(-1)
    p = (theirs / temperature).log_softmax(-1)
    soft = temperature**2 * (p.exp() * (p - q)).sum(-1).mean()
    hard = F.cross_entropy(ours, wanted[said])
    return soft_weight * soft + hard_weight * hard, soft, hard


def smaller(teacher: nn.Module, layers: int, init: str, seed: int) -> nn.Module:
    """A model of the teacher's width with `layers` blocks: the teacher's, spread evenly, or random.

    Raises:
        ConfigError: As many blocks as the teacher has, or more.
        ModelError: A teacher whose blocks are not found.
    """
    config = copy.deepcopy(teacher.config)
    depth = int(getattr(config, "num_hidden_layers", 0))  # type: ignore[arg-type]
    blocks = [
        name
        for name, module in teacher.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and depth
    ]
    if len(blocks) != 1:
        raise ModelError(f"the blocks of a {type(teacher).__name__} are not known; give a student instead")
    if not 1 <= layers < depth:
        raise ConfigError(f"layers = {layers}; the teacher has {depth} blocks, and a student has fewer")
    kept = [round(at) for at in np.linspace(0, depth - 1, layers)] if layers > 1 else [0]
    config.num_hidden_layers = layers  # type: ignore[union-attr]
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[at] for at in kept]  # type: ignore[union-attr,index]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = type(teacher)(config)
    if init == "teacher":
        held = teacher.state_dict()
        new = {}
        for name in student.state_dict():
            if name.startswith(f"{blocks[0]}."):
                number, _, rest = name.removeprefix(f"{blocks[0]}.").partition(".")
                new[name] = held[f"{blocks[0]}.{kept[int(number)]}.{rest}"]
            else:
                new[name] = held[name]
        student.load_state_dict(new)
    return student.eval()


def trainer(
    begin: Start, teacher: nn.Module, learnt: Sequence[Answered], config: DistilConfig, folder: Path
) -> Any:
    """A `Trainer` that is ready to run, whose loss is `distillation_loss`."""
    import datasets
    from transformers import Trainer, TrainingArguments

    class DistilTrainer(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            with torch.no_grad():
                soft_labels = teacher(**inputs).logits
            weights = config.temperature, config.soft_weight, config.hard_weight
            loss, soft, hard = distillation_loss(outputs.logits, soft_labels, labels, *weights)
            self.parts = {"soft_loss": float(soft.detach()), "hard_loss": float(hard.detach())}
            return (loss, outputs) if return_outputs else loss

        def log(self, logs: dict[str, float], *rest: Any, **more: Any) -> None:
            if "loss" in logs:
                logs = {**logs, **getattr(self, "parts", {})}
            super().log(logs, *rest, **more)

    student = begin.load()
    adapter = lora(config, student, begin.name)
    if adapter is not None:
        from peft import get_peft_model

        student = get_peft_model(student, adapter)  # type: ignore[arg-type]
    padding = begin.tokenizer.eos_token_id

    def collate(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = pad([item["input_ids"] for item in items], padding, positions=False)
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for row, item in enumerate(items):
            said = slice(item["begin"], len(item["input_ids"]))
            labels[row, said] = batch["input_ids"][row, said]
        return {**batch, "labels": labels}

    data = [{"input_ids": [*item.prompt, *item.answer], "begin": len(item.prompt)} for item in learnt]
    options = TrainingArguments(**arguments(config, folder, remove_unused_columns=False))
    made = DistilTrainer(
        model=student,  # type: ignore[arg-type]
        args=options,
        data_collator=collate,  # type: ignore[arg-type]
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=begin.tokenizer,
    )
    teacher.to(options.device)
    return made


def _trained(
    begin: Start, teacher: nn.Module, learnt: Sequence[Answered], config: DistilConfig, folder: Path
) -> pd.DataFrame:
    with trainers.quietly():
        made = trainer(begin, teacher, learnt, config, folder)
        logged = trainers.run(made, "sft", config, folder)  # like sft, it has no first loss that is known
    training._check_saved(made.model, "distil", begin, trainers.checkpoints(folder)[config.steps])
    return pd.DataFrame([line for line in logged if "loss" in line])


def _measured(
    begin: Start, teacher: nn.Module, rows: Preferences, config: DistilConfig, out: Path, score: Any
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table and the samples of every checkpoint, the student's start first, and the teacher's samples."""
    teacher = teacher.cpu()
    prompts = training.spread(
        list({str(row.prompt): row.prompt for row in rows.rows}.values()), config.samples
    )
    shown = training.spread(rows.rows, config.samples)
    answered = _of_data(begin.tokenizer, shown) if config.answers == "data" else None
    if answered is None:
        answered = measure.sample(
            teacher, begin.tokenizer, [row.prompt for row in shown], config.max_new_tokens, config.seed
        )
    said = {"max_new_tokens": config.max_new_tokens, "seed": config.seed, "score": score}
    table, samples = [], []
    places: dict[int, Path | None] = {0: None, **trainers.checkpoints(out / "training")}
    for at, place in places.items():
        student = begin.load().eval() if place is None else trainers.load_trained(place, begin)
        found = measure.measured(student, teacher, begin.tokenizer, prompts, **said)
        table.append({"step": at, **averages(found), **held_against(student, teacher, answered)})
        samples.append(found.assign(step=at))
    own = measure.measured(teacher, teacher, begin.tokenizer, prompts, **said)
    return pd.DataFrame(table), pd.concat([*samples, own.assign(step=TEACHER_STEP)], ignore_index=True)


@torch.no_grad()
def held_against(student: nn.Module, teacher: nn.Module, answered: Sequence[Answered]) -> dict[str, float]:
    """On given answers, token by token: `agreement` (the same likeliest token), `kl_of_teacher` (of the
    teacher to the student, nats), and the cross-entropy of both (`ce`, `teacher_ce`, nats)."""
    sums, tokens = np.zeros(4), 0
    for begin in range(0, len(answered), measure.BATCH):
        batch = answered[begin : begin + measure.BATCH]
        inputs = pad([[*item.prompt, *item.answer] for item in batch], 0)
        logits = student(**inputs).logits, teacher(**inputs).logits
        for row, item in enumerate(batch):
            said = slice(len(item.prompt) - 1, len(item.prompt) + len(item.answer) - 1)
            q, p = (each[row, said].double().log_softmax(-1) for each in logits)
            index = torch.tensor(item.answer)[:, None]
            sums += [
                float((q.argmax(-1) == p.argmax(-1)).sum()),
                float((p.exp() * (p - q)).sum()),
                -float(q.gather(-1, index).sum()),
                -float(p.gather(-1, index).sum()),
            ]
            tokens += len(item.answer)
    names = ("agreement", "kl_of_teacher", "ce", "teacher_ce")
    return dict(zip(names, (sums / tokens).tolist()))


def _checked(config: DistilConfig) -> DistilConfig:
    checked(config, "distil")
    if not config.soft_weight and not config.hard_weight:
        raise ConfigError("soft_weight and hard_weight are both 0: nothing is learnt")
    return config


def _student(teacher: Start, student: str | None, config: DistilConfig, out: Path) -> Start:
    """The student's start; one that is made of the teacher is kept in `out/start`."""
    if student is not None:
        if config.layers is not None or config.init != "teacher":
            raise ConfigError("layers and init are for a student that is made of the teacher; one is given")
        return trainers.start(student, out)
    folder = out / "start"
    model = teacher.load()
    depth = int(getattr(model.config, "num_hidden_layers", 0))  # type: ignore[arg-type]
    layers = config.layers or max(1, depth // 2)
    made = smaller(model, layers, config.init, config.seed)
    with quiet():
        made.save_pretrained(folder)  # type: ignore[operator]
    teacher.tokenizer.save_pretrained(folder)
    return Start(
        f"{layers} of {depth} blocks of {teacher.name}", str(folder), teacher.tokenizer, teacher.context
    )


def _refuse_other_tokens(teacher: Start, student: Start) -> None:
    """A student that reads other tokens than its teacher has nothing to learn from its soft labels."""
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    if ours != theirs:
        raise InputError(
            f"{student.name} and {teacher.name} have different tokenizers ({len(ours)} and {len(theirs)} "
            "tokens); soft labels need the same"
        )
    sizes = [int(start.load().config.vocab_size) for start in (student, teacher)]  # type: ignore[arg-type,union-attr]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"{student.name} gives {sizes[0]} logits and {teacher.name} {sizes[1]}; soft labels need as many"
        )


def _answers(
    teacher: nn.Module, tokenizer: Any, rows: Preferences, config: DistilConfig, file: Path
) -> list[Answered]:
    """Prompts and the answers that are learnt; those of the teacher are kept in `file`."""
    if config.answers == "data":
        return _of_data(tokenizer, rows.rows)
    asked = fingerprint_of([fingerprint(teacher), rows.fingerprint, f"{config.max_new_tokens} {config.seed}"])
    if file.is_file() and (kept := read_json(file))["asked"] == asked:
        return [Answered(tuple(prompt), tuple(answer)) for prompt, answer in kept["answers"]]
    with saying("answers of the teacher"):
        made = measure.sample(
            teacher, tokenizer, [row.prompt for row in rows.rows], config.max_new_tokens, config.seed
        )
    listed = [[list(item.prompt), list(item.answer)] for item in made]
    write_json(file, {"asked": asked, "answers": listed})
    return made


def _of_data(tokenizer: Any, rows: Sequence[Preference]) -> list[Answered]:
    """The chosen answers with the end token behind them."""
    encoded = encode(tokenizer, [row.prompt for row in rows], [row.chosen for row in rows])
    return [
        Answered(item.ids[: item.prompt_tokens], (*item.ids[item.prompt_tokens :], tokenizer.eos_token_id))
        for item in encoded
    ]
