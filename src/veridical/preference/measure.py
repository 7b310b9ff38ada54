"""What is measured at a checkpoint: samples of the policy, their exact KL to the reference, held-out margins.

The KL is on-policy and exact at every position: the policy answers, and at each token of its answer the KL of
its next-token distribution to the reference's is summed over the whole vocabulary. The sum over an answer is
an unbiased estimate of the KL between the two distributions over answers, with less variance than the
log-ratio of the tokens that were drawn.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from veridical.errors import NonFiniteError
from veridical.pairs.show import flat
from veridical.preference.data import Preference
from veridical.tokens import Prompt, encode, pad

BATCH = 64
Score = Callable[[Sequence[Prompt], Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class Answered:
    """Token ids of a prompt and of its sampled answer, which ends with the end token where it ended."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def measured(
    policy: nn.Module,
    reference: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    seed: int,
    score: Score | None = None,
) -> pd.DataFrame:
    """One line for each prompt, answered once by the policy at temperature 1.

    Columns: `prompt` (to be read), `chat` (the same as JSON), `answer`, `length` (tokens, the end token with
    them), `ended`, `kl` (nats, summed over the answer), `entropy` (nats per token), `repetition` (share of
    the answer's pairs of neighbouring tokens that came before in it) and, with `score`, `reward`.
    """
    answered = sample(policy, tokenizer, prompts, max_new_tokens, seed)
    kl, entropy = divergence(policy, reference, answered)
    end = tokenizer.eos_token_id
    texts = [tokenizer.decode(item.answer, skip_special_tokens=True) for item in answered]
    table = pd.DataFrame(
        {
            "prompt": [flat(prompt) for prompt in prompts],
            "chat": [json.dumps(prompt) for prompt in prompts],
            "answer": texts,
            "length": [len(item.answer) for item in answered],
            "ended": [item.answer[-1] == end for item in answered],
            "kl": [float(values.sum()) for values in kl],
            "entropy": [float(values.mean()) for values in entropy],
            "repetition": [repetition(item.answer) for item in answered],
        }
    )
    if score is not None:
        table["reward"] = np.asarray(score(list(prompts), texts), dtype=np.float64)
    return table


@torch.no_grad()
def sample(
    policy: nn.Module, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int, seed: int
) -> list[Answered]:
    """An answer to each prompt, drawn from the policy's whole distribution; the same for the same seed."""
    rows = [item.ids for item in encode(tokenizer, list(prompts))]
    device, end = next(policy.parameters()).device, tokenizer.eos_token_id
    answered: list[Answered] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for begin in range(0, len(rows), BATCH):
            batch = rows[begin : begin + BATCH]
            inputs = pad(batch, end, "left", positions=False, device=device)
            new = policy.generate(  # type: ignore[operator]
                **inputs, max_new_tokens=max_new_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                pad_token_id=end, eos_token_id=end,
            )[:, inputs["input_ids"].shape[1] :]  # fmt: skip
            for prompt, ids in zip(batch, new.tolist()):
                stop = ids.index(end) + 1 if end in ids else len(ids)
                answered.append(Answered(tuple(prompt), tuple(ids[:stop])))
    return answered


@torch.no_grad()
def divergence(
    policy: nn.Module, reference: nn.Module, answered: Sequence[Answered]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(KL of policy to reference, entropy of the policy) at every token of each answer, in nats.

    Raises:
        NonFiniteError: One of the two gives NaN or infinity there.
    """
    kl: list[np.ndarray] = []
    entropy: list[np.ndarray] = []
    device = next(policy.parameters()).device
    for begin in range(0, len(answered), BATCH):
        batch = answered[begin : begin + BATCH]
        inputs = pad([[*item.prompt, *item.answer] for item in batch], 0, device=device)
        logits = policy(**inputs).logits, reference(**inputs).logits
        for row, item in enumerate(batch):
            said = slice(len(item.prompt) - 1, len(item.prompt) + len(item.answer) - 1)
            ours, theirs = (each[row, said].double().log_softmax(-1) for each in logits)
            kl.append(_summed(ours, ours - theirs))
            entropy.append(-_summed(ours, ours))
            if not np.isfinite(kl[-1]).all():
                raise NonFiniteError(
                    f"the KL of answer {begin + row} is not finite; the policy has broken down"
                )
    return kl, entropy


def answer_logprobs(model: nn.Module, tokenizer: Any, rows: Sequence[Preference]) -> pd.DataFrame:
    """Log p of the `chosen` and the `rejected` answer of each row in nats, the end token included."""
    found = {}
    for side in ("chosen", "rejected"):
        whole = encode(tokenizer, [row.prompt for row in rows], [getattr(row, side) for row in rows])
        answered = [
            Answered(
                item.ids[: item.prompt_tokens], (*item.ids[item.prompt_tokens :], tokenizer.eos_token_id)
            )
            for item in whole
        ]
        found[side] = _logprobs(model, answered)
    return pd.DataFrame(found)


@torch.no_grad()
def _logprobs(model: nn.Module, answered: Sequence[Answered]) -> np.ndarray:
    """Log-probability of each answer [rows]."""
    sums = np.zeros(len(answered))
    device = next(model.parameters()).device
    for begin in range(0, len(answered), BATCH):
        batch = answered[begin : begin + BATCH]
        inputs = pad([[*item.prompt, *item.answer] for item in batch], 0, device=device)
        logits = model(**inputs).logits
        for row, item in enumerate(batch):
            said = slice(len(item.prompt) - 1, len(item.prompt) + len(item.answer) - 1)
            logp = logits[row, said].double().log_softmax(-1)
            index = torch.tensor(item.answer, device=device)[:, None]
            sums[begin + row] = float(logp.gather(-1, index).sum())
    return sums


def repetition(tokens: Sequence[int]) -> float:
    """Share of the pairs of neighbouring tokens that stood in the same answer before; 0 without pairs."""
    pairs = list(itertools.pairwise(tokens))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def _summed(logp: Tensor, values: Tensor) -> np.ndarray:
    """The mean of `values` [pos, vocabulary] under `logp` at each position."""
    return (logp.exp() * values).sum(-1).cpu().numpy()
