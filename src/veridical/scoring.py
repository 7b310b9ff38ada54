"""What a model says: log-probabilities of given answers, and generated text."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from veridical.errors import DataError, InputError
from veridical.tokens import Encoded, Prompt, by_length

if TYPE_CHECKING:
    from veridical.hooked import HookedModel


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt (a text or a chat) or several, as a list."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], dict)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Scored:
    """One option: which input row holds its context, and which tokens follow from where."""

    row: int
    first: int
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Options laid out for scoring: made once, run as often as wanted.

    Attributes:
        rows: Token ids of each input row, without the last token of its longest option.
        scored: The options, in order.
        counts: Options of each prompt, in order.
        needed: Options that are read off each input row, by number.
        batches: Input rows that run together, of like length.
    """

    rows: list[tuple[int, ...]]
    scored: list[Scored]
    counts: list[int]
    needed: list[list[int]]
    batches: list[list[int]]

    def split(self, sums: np.ndarray) -> list[np.ndarray]:
        """Values of all options as one array for each prompt."""
        return list(np.split(sums, np.cumsum(self.counts)[:-1]))

    def prompt_tokens(self) -> list[int]:
        """Tokens of the prompt in each input row; where options split it differently, the fewest."""
        found = [len(row) for row in self.rows]
        for item in self.scored:
            found[item.row] = min(found[item.row], item.first + 1)
        return found


def option_logprobs(
    model: HookedModel, prompts: Sequence[Prompt], options: Sequence[Sequence[str]], batch_tokens: int = 4096
) -> list[np.ndarray]:
    """Sum of log p over the tokens of each option as the completion of its prompt; see `HookedModel`.

    The last token of an option is only predicted, so options of one token share the prompt's own row, and an
    option whose context begins another's is read off that row. Only the positions that predict an option's
    tokens are unembedded, and their softmax is taken in float32.
    """
    planned = plan(model, prompts, options, batch_tokens)
    sums = np.zeros(len(planned.scored))
    for batch in planned.batches:
        score(model, planned, batch, sums)
    return planned.split(sums)


def generate(
    model: HookedModel, prompts: Prompt | Sequence[Prompt], max_new_tokens: int, **options: Any
) -> Any:
    """Greedy continuation unless told to sample; only the new text; see `HookedModel`."""
    if model.kind != "causal":
        raise InputError(f"{model.path} is a model of kind {model.kind!r} and does not generate text")
    new = new_tokens(model, model.encode(as_list(prompts)), max_new_tokens, **options)
    texts = model.tokenizer.batch_decode(new, skip_special_tokens=True)
    single = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], dict))
    return texts[0] if single else texts


def new_tokens(
    model: HookedModel, rows: Sequence[Encoded | Sequence[int]], max_new_tokens: int, **options: Any
) -> Tensor:
    """Ids of what a model goes on with, `[rows, new]`; behind a row's end of sequence comes padding.

    Raises:
        InputError: Options that the model does not take.
    """
    inputs = model.batch(rows, padding_side="left")
    with torch.no_grad():
        if model.generates:
            return _generate_quickly(model, inputs, max_new_tokens, options)
        if options:
            raise InputError(
                f"{type(model.model).__name__} generates greedily here and takes no {', '.join(options)}"
            )
        return _generate_plainly(model, inputs, max_new_tokens)


def plan(
    model: HookedModel, prompts: Sequence[Prompt], options: Sequence[Sequence[str]], batch_tokens: int = 4096
) -> Plan:
    """Tokenises prompts with their options and decides what shares a row and a batch.

    Raises:
        DataError: No prompts, a prompt without options, an option without tokens; names the row.
    """
    prompts = list(prompts)
    if len(prompts) != len(options):
        raise DataError(
            f"{len(prompts)} prompts but {len(options)} lists of options; give one for each prompt"
        )
    counts = [len(choices) for choices in options]
    if not prompts or 0 in counts:
        raise DataError("there are no prompts" if not prompts else f"row {counts.index(0)} has no options")
    asked = [(prompt, option) for prompt, choices in zip(prompts, options) for option in choices]
    encoded = model.encode([prompt for prompt, _ in asked], [option for _, option in asked])
    groups = np.repeat(np.arange(len(prompts)), counts)
    planned: dict[int, tuple[tuple[int, ...], int, tuple[int, ...]]] = {}
    for index, item in enumerate(encoded):
        if item.prompt_tokens >= len(item.ids):
            raise DataError(f"row {groups[index]}: the option {asked[index][1]!r} has no tokens")
        if item.prompt_tokens == 0:
            raise DataError(f"row {groups[index]}: no token stands before the option, so nothing predicts it")
        planned[index] = item.ids[:-1], item.prompt_tokens - 1, item.ids[item.prompt_tokens :]
    row_of: dict[tuple[int, ...], int] = {}
    for group in range(len(prompts)):
        contexts = {planned[int(index)][0] for index in np.flatnonzero(groups == group)}
        for context in sorted(contexts, key=len, reverse=True):
            if context not in row_of:
                longer = next(
                    (c for c in contexts if len(c) > len(context) and c[: len(context)] == context), None
                )
                row_of[context] = row_of[longer] if longer is not None else len(set(row_of.values()))
    longest: dict[int, tuple[int, ...]] = {}
    for context, row in row_of.items():
        if len(context) > len(longest.get(row, ())):
            longest[row] = context
    rows = [longest[row] for row in range(len(longest))]
    scored = [Scored(row_of[context], first, targets) for context, first, targets in planned.values()]
    needed: list[list[int]] = [[] for _ in rows]
    for index, item in enumerate(scored):
        needed[item.row].append(index)
    return Plan(rows, scored, counts, needed, by_length([len(row) for row in rows], batch_tokens))


def score(model: HookedModel, planned: Plan, batch: list[int], sums: np.ndarray) -> None:
    """Runs the input rows of one batch, padded on the left, and puts their options' values into `sums`.

    Args:
        model: The model.
        planned: Rows and options.
        batch: One of `planned.batches`.
        sums: `[options]`, filled where an option is read off one of these rows.
    """
    rows = [planned.rows[row] for row in batch]
    ends = [min(planned.scored[index].first for index in planned.needed[row]) + 1 for row in batch]
    with model.reading(ends):
        logits = last_logits(model, rows, positions(planned, batch))
    read_off(planned, batch, logits, sums)


def positions(planned: Plan, batch: list[int]) -> int:
    """How many last positions of a batch predict the tokens of its options."""
    return max(
        len(planned.rows[row]) - planned.scored[index].first for row in batch for index in planned.needed[row]
    )


def read_off(planned: Plan, batch: list[int], logits: Tensor, sums: np.ndarray) -> None:
    """Puts the values of a batch's options into `sums`, from its logits at (at least) `positions`."""
    kept = logits.shape[1]
    for place, row in enumerate(batch):
        for index in planned.needed[row]:
            item = planned.scored[index]
            start = kept + item.first - len(planned.rows[row])
            part = logits[place, start : start + len(item.targets)].float()
            targets = torch.tensor(item.targets, device=part.device)
            chosen = part.gather(-1, targets[:, None]).squeeze(-1) - part.logsumexp(-1)
            sums[index] = float(chosen.double().sum())


def last_logits(model: HookedModel, rows: Sequence[Sequence[int]], count: int) -> Tensor:
    """Logits at the last `count` positions of each row, [rows, count, vocabulary], padded on the left."""
    inputs: dict[str, Any] = model.batch(rows, padding_side="left")
    if "logits_to_keep" in model.forward_parameters:
        inputs["logits_to_keep"] = count
    with torch.no_grad():
        return model.run(inputs).logits[:, -count:]


def _generate_quickly(
    model: HookedModel, inputs: dict[str, Tensor], count: int, options: dict[str, Any]
) -> Tensor:
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    chosen: dict[str, Any] = {"do_sample": False, "pad_token_id": _pad(model), **options}
    if not chosen["do_sample"]:
        chosen = {"temperature": None, "top_p": None, "top_k": None, **chosen}
    with quiet():
        made = model.model.generate(**given, max_new_tokens=count, **chosen)  # type: ignore[operator]
    return made[:, inputs["input_ids"].shape[1] :]


def _generate_plainly(model: HookedModel, inputs: dict[str, Tensor], count: int) -> Tensor:
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"])]
    lengths = [len(row) for row in rows]
    end = getattr(model.tokenizer, "eos_token_id", None)
    for _ in range(count):
        following = last_logits(model, rows, 1)[:, -1].argmax(-1).tolist()
        ended = [len(row) > length and row[-1] == end for row, length in zip(rows, lengths)]
        rows = [[*row, end if stop else token] for row, token, stop in zip(rows, following, ended)]
        if all(row[-1] == end for row in rows):
            break
    return torch.tensor([row[length:] for row, length in zip(rows, lengths)])


def _pad(model: HookedModel) -> int:
    from veridical import tokens

    return tokens.pad_id(model.tokenizer, getattr(model.model, "config", None))


@contextlib.contextmanager
def quiet() -> Any:
    """Transformers without warnings and progress bars; as it was afterwards."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
