"""How far an intervention moves a model where it should not: exact KL and perplexity on neutral text.

KL is KL(steered || plain) over the whole vocabulary, in nats a token, at the tokens that predict a neutral
reply (of a row without a prompt: every token of it but the last). It is of fixed text, not of what the
steered model would say. Perplexity is of the same tokens under both.

`neutral_kl` measures it for any intervention; `kl_loss` is the same quantity as a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from veridical.errors import DataError, InputError, NonFiniteError
from veridical.probes.evaluate import Estimate, estimate, resample_weights
from veridical.tokens import Encoded, Prompt, by_length, render

if TYPE_CHECKING:
    from veridical.hooked import HookedModel

Acting = Callable[[], AbstractContextManager[Any]]
"""Makes a context in which the model is steered; called once for every batch."""
KEPT = 1 << 26
"""Plain logits kept between measurements, in numbers; beyond it they are computed again each time."""
RESAMPLES = 500


@dataclass(frozen=True)
class Neutral:
    """Neutral text in tokens.

    Attributes:
        prompts: Texts or chats up to the reply.
        replies: What follows each; the end of the turn is part of it.
        encoded: The two joined, in tokens; `prompt_tokens` is where the reply begins.
        groups: `[rows]`, rows about one thing, for intervals.
        kinds: `[rows]`, name of the kind of each row; one name where there is only one.
        name: Of the texts.
    """

    prompts: list[Prompt]
    replies: list[str]
    encoded: list[Encoded]
    groups: np.ndarray
    kinds: np.ndarray
    name: str

    def __len__(self) -> int:
        return len(self.encoded)

    @property
    def counts(self) -> np.ndarray:
        """`[rows]`, tokens that are compared in each: those that predict a token of the reply."""
        return np.array([len(item.ids) - max(item.prompt_tokens, 1) for item in self.encoded])

    def mask(self, batch: Sequence[int], width: int | None = None) -> Tensor:
        """`[rows, pos]` bool for rows padded on the right: positions whose logits are compared."""
        items = [self.encoded[row] for row in batch]
        wide = max(len(item.ids) for item in items) if width is None else width
        mask = torch.zeros(len(items), wide, dtype=torch.bool)
        for line, item in enumerate(items):
            mask[line, max(item.prompt_tokens, 1) - 1 : len(item.ids) - 1] = True
        return mask


def neutral_texts(
    model: HookedModel,
    texts: Any = None,
    *,
    split: Literal["train", "val", "test"] = "test",
    count: int | None = None,
    seed: int = 0,
) -> Neutral:
    """Neutral text in the model's tokens.

    Args:
        model: Who reads it.
        texts: Texts, chats that end with an answer, or `Pairs` with completions. When not given, the rows of
            `veridical.organisms.neutral`, for a model with the tokens of `tiny-liar`.
        split: Which of those rows: "train" to train under a budget, "val" to choose a strength, "test" to
            report.
        count: Rows at most, drawn at random where there are more; all when not given.
        seed: Of the draws.

    Raises:
        InputError: Another model and no texts.
        DataError: A chat that does not end with an answer, or a text of one token.
    """
    if texts is None:
        texts = _own(model, split, seed)
    prompts, replies, groups, kinds, name = _parts(model, texts)
    rows = np.arange(len(prompts))
    if count is not None and len(rows) > count:
        rows = np.sort(np.random.default_rng([seed, 8]).choice(rows, size=count, replace=False))
    prompts, replies = [prompts[row] for row in rows], [replies[row] for row in rows]
    made = Neutral(prompts, replies, encoded(model, prompts, replies), groups[rows], kinds[rows], name)
    if (made.counts < 1).any():
        short = int(np.argmax(made.counts < 1))
        raise DataError(f"row {short} of {name} has one token only, so nothing in it is predicted")
    return made


def encoded(model: HookedModel, prompts: Sequence[Prompt], replies: Sequence[str]) -> list[Encoded]:
    """Prompts with their replies in tokens; a text without a reply counts as a reply as a whole."""
    found = model.encode(prompts, replies)
    whole = [not reply for reply in replies]
    return [_open(item) if alone else item for item, alone in zip(found, whole)]


@dataclass(frozen=True, repr=False)
class NeutralKL:
    """What an intervention does on neutral text.

    Attributes:
        kl: KL(steered || plain), nats a token, with its 95 % interval over groups.
        perplexity, plain_perplexity: Of the replies, steered and plain.
        rows: `[rows]`, mean KL of each row.
        counts: `[rows]`, its tokens.
        kinds: `[rows]`.
        facts: Name of the texts.
    """

    kl: Estimate
    perplexity: float
    plain_perplexity: float
    rows: np.ndarray
    counts: np.ndarray
    kinds: np.ndarray
    facts: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"NeutralKL({self.kl.value:.4f} nats a token, 95 % {self.kl.low:.4f} to {self.kl.high:.4f}; "
            f"perplexity {self.perplexity:.3f}, plain {self.plain_perplexity:.3f})"
        )

    def to_frame(self) -> pd.DataFrame:
        """KL by kind of text: `kind`, `kl`, `tokens`; the first line is of all."""
        lines = [("all", self.kl.value, int(self.counts.sum()))]
        for kind in dict.fromkeys(self.kinds.tolist()):
            mine = self.kinds == kind
            lines.append(
                (kind, float(np.average(self.rows[mine], weights=self.counts[mine])), self.counts[mine].sum())
            )
        return pd.DataFrame(lines, columns=["kind", "kl", "tokens"])


def neutral_kl(
    model: HookedModel, context: Acting, rows: Neutral, *, batch_tokens: int = 4096, seed: int = 0
) -> NeutralKL:
    """Exact KL of a steered model from itself on neutral text.

    Args:
        model: The model.
        context: Makes a context in which it is steered, such as `lambda: vector(model, strength=2)`.
        rows: Of `neutral_texts`.
        batch_tokens: Tokens in one batch, padding included.
        seed: Of the resamples.

    Raises:
        NonFiniteError: The steered model gives NaN.
        InputError: The context changes how many tokens a reply has.
    """
    return NeutralMeter(model, rows, batch_tokens=batch_tokens, seed=seed)(context)


class NeutralMeter:
    """`neutral_kl` for many interventions: the plain model's logits are computed once where they fit.

    Args:
        model: The model, plain.
        rows: Neutral text.
        batch_tokens: Tokens in one batch, padding included.
        seed: Of the resamples.
    """

    def __init__(self, model: HookedModel, rows: Neutral, *, batch_tokens: int = 4096, seed: int = 0) -> None:
        self.model, self.rows = model, rows
        self.batches = by_length([len(item.ids) for item in rows.encoded], batch_tokens)
        self.weights = resample_weights(rows.groups, RESAMPLES, seed).astype(np.float64)
        self.kept: list[Tensor] = []
        self._room = KEPT

    def __call__(self, context: Acting) -> NeutralKL:
        """The KL of one intervention."""
        kl, ours, theirs = (np.zeros(len(self.rows)) for _ in range(3))
        for number, batch in enumerate(self.batches):
            plain = self._plain(number, batch)
            with context():
                steered = self._logits(batch)
            sums = _compared(steered, plain, self._targets(batch), [self.rows.counts[row] for row in batch])
            kl[batch], ours[batch], theirs[batch] = sums.T
        counts = self.rows.counts
        if not np.isfinite(kl).all():
            raise NonFiniteError(f"{self.model.path} gives NaN or infinity on neutral text when steered so")
        resampled = (self.weights @ kl) / (self.weights @ counts)
        total = counts.sum()
        return NeutralKL(
            estimate(float(kl.sum() / total), resampled),
            float(np.exp(-ours.sum() / total)),
            float(np.exp(-theirs.sum() / total)),
            kl / counts,
            counts,
            self.rows.kinds,
            {"texts": self.rows.name, "rows": len(self.rows)},
        )

    def _plain(self, number: int, batch: list[int]) -> Tensor:
        if number < len(self.kept):
            return self.kept[number]
        found = self._logits(batch)
        if number == len(self.kept) and found.numel() <= self._room:
            self.kept.append(found)
            self._room -= found.numel()
        return found

    def _targets(self, batch: list[int]) -> Tensor:
        ids = [i for row in batch for i in self.rows.encoded[row].ids[-int(self.rows.counts[row]) :]]
        return torch.tensor(ids, device=self.model.device)

    def _logits(self, batch: list[int]) -> Tensor:
        """`[tokens, vocabulary]`, at the compared tokens of the batch, one row after another."""
        prompts, replies = self.rows.prompts, self.rows.replies
        now = encoded(self.model, [prompts[row] for row in batch], [replies[row] for row in batch])
        for row, item in zip(batch, now):
            count = int(self.rows.counts[row])
            if item.ids[-count:] != self.rows.encoded[row].ids[-count:] or len(item.ids) <= count:
                raise InputError(
                    f"row {row} of {self.rows.name} has other tokens in its reply when steered so; "
                    "a KL compares the same tokens"
                )
        inputs = self.model.batch(now)
        starts = [len(item.ids) - int(self.rows.counts[row]) for row, item in zip(batch, now)]
        with torch.no_grad(), self.model.reading(starts):
            logits = self.model.run(inputs).logits
        parts = [
            logits[line, start - 1 : len(item.ids) - 1] for line, (start, item) in enumerate(zip(starts, now))
        ]
        return torch.cat(parts)


def kl_loss(logits: Tensor, reference_logits: Tensor, mask: Tensor) -> Tensor:
    """Mean KL(steered || plain) over masked positions, in nats a token; differentiable in `logits`.

    Args:
        logits: `[..., pos, vocabulary]`, of the steered model.
        reference_logits: Likewise, of the plain one; no gradient goes into it.
        mask: `[..., pos]`, which positions count; at least one.
    """
    chosen = mask.bool()
    kind = torch.promote_types(torch.float32, logits.dtype)
    ours = logits[chosen].to(kind).log_softmax(-1)
    theirs = reference_logits[chosen].detach().to(kind).log_softmax(-1)
    return (ours.exp() * (ours - theirs)).sum(-1).mean()


def load_texts(source: str | None) -> Any:
    """Neutral text by name: a .txt file of lines, or pairs with completions; None for none."""
    from pathlib import Path

    from veridical.pairs import Pairs

    if source is None:
        return None
    if source.endswith(".txt") and Path(source).is_file():
        return [line for line in Path(source).read_text(encoding="utf-8").splitlines() if line.strip()]
    return Pairs.load(source)


def plainly() -> AbstractContextManager[None]:
    """The context of no intervention."""
    return nullcontext()


def _compared(steered: Tensor, plain: Tensor, targets: Tensor, counts: Sequence[int]) -> np.ndarray:
    """`[rows, 3]`: sums over each row's tokens of KL and of both log-likelihoods."""
    from veridical.comparison.outputs import MEASURES, compare_logits

    values, _, _ = compare_logits(steered, plain, targets, steered.shape[-1])
    names = ("kl", "log-likelihood of policy", "log-likelihood of reference")
    picked = values[:, [MEASURES.index(name) for name in names]].double().cpu()
    return np.stack([part.sum(0).numpy() for part in picked.split([int(count) for count in counts])])


def _open(item: Encoded) -> Encoded:
    return Encoded(item.ids, item.text, item.offsets, 0, 0)


def _own(model: HookedModel, split: Any, seed: int) -> Any:
    from veridical.organisms.neutral import neutral_pairs

    if not speaks_as_organism(model):
        raise InputError(
            f"{model.path} is no embedded organism, so its neutral text has to be given: texts, chats that "
            "end with an answer, or Pairs with completions"
        )
    return neutral_pairs(split, seed=seed)


def speaks_as_organism(model: HookedModel) -> bool:
    """Whether a model has the tokens of `tiny-liar`: it, or a model made from it."""
    from tokenizers import Tokenizer

    from veridical import organisms

    if model.tokenizer is None or not hasattr(model.tokenizer, "get_vocab"):
        return False
    own = Tokenizer.from_file(str(organisms.path("tiny-liar") / "tokenizer.json"))
    return model.tokenizer.get_vocab() == own.get_vocab()


Parts = tuple[list[Any], list[str], np.ndarray, np.ndarray, str]


def _parts(model: HookedModel, texts: Any) -> Parts:
    """Prompts, replies, groups, kinds and a name."""
    if hasattr(texts, "prompts") and hasattr(texts, "groups"):
        given = list(texts.prompts)
        said = texts.completions or [""] * len(given)
        groups, name = np.asarray(texts.groups), texts.name
        kinds = np.asarray(texts["kind"] if "kind" in texts else ["text"] * len(given), dtype=object)
    else:
        given = [texts] if isinstance(texts, str) else list(texts)
        said = [""] * len(given)
        groups, kinds = np.arange(len(given)), np.array(["text"] * len(given), dtype=object)
        name = "the neutral texts"
    if not given:
        raise DataError("there are no neutral texts")
    both = [_parted(model, row, prompt, reply or "") for row, (prompt, reply) in enumerate(zip(given, said))]
    return [prompt for prompt, _ in both], [reply for _, reply in both], groups, kinds, name


def _parted(model: HookedModel, row: int, prompt: Prompt, reply: str) -> tuple[Prompt, str]:
    """A row as what comes before its reply, and the reply with the end of its turn."""
    if isinstance(prompt, str):
        return prompt, reply
    if reply:
        chat = [*prompt, {"role": "assistant", "content": reply}]
    elif prompt[-1]["role"] == "assistant":
        chat = list(prompt)
    else:
        raise DataError(f"row {row} of the neutral texts is a chat without an answer")
    before, whole = (render(model.tokenizer, part, row) for part in (chat[:-1], chat))
    if not whole.startswith(before):
        return chat[:-1], chat[-1]["content"]
    return chat[:-1], whole[len(before) :]
