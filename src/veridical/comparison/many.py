"""Many models in one pass: each reads a batch once, and all pairs are taken from what they gave.

Nothing grows with the number of texts but a vector for each text, model and depth. The pairs' products grow
with the square of the number of models and of their widths, so a few depths are compared and not every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from veridical.comparison.cka import Products
from veridical.errors import DataError, InputError
from veridical.progress import bar
from veridical.tokens import by_length

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.tokens import Encoded

PIECE = 1 << 20
"""Logits of one model that are worked on at a time."""


@dataclass(frozen=True)
class Texts:
    """What all models read.

    Attributes:
        ids: For each model, each row's token ids; one list for all where they share their tokens.
        places: For each model, each row's positions that are compared; all equally many.
        shared: All models read the same tokens.
    """

    ids: list[list[tuple[int, ...]]]
    places: list[list[np.ndarray]]
    shared: bool

    def __len__(self) -> int:
        return len(self.places[0])

    @property
    def tokens(self) -> int:
        """Tokens that are compared, over all rows."""
        return sum(map(len, self.places[0]))


@dataclass
class Passed:
    """What one pass of all models gave.

    Attributes:
        products: By pair of models (i, j) and depth, for CKA over all compared tokens.
        ends: `[models]`, each `[depths][rows, d]` float32: the stream at each row's last compared token.
        divergence: By pair, sum over tokens of the Jensen-Shannon divergence in nats; empty where tokens are
            not shared.
        kl: By model, sum over tokens of KL(model || its reference).
        tokens: Compared tokens.
    """

    products: dict[tuple[int, int], list[Products]]
    ends: list[list[Tensor]]
    divergence: dict[tuple[int, int], float]
    kl: dict[int, float]
    tokens: int


def texts_of(models: Sequence[HookedModel], data: Any, shared: bool, on_long: Any = "error") -> Texts:
    """The rows in every model's tokens, and the positions that go together.

    Where tokens are not shared, those of each row are compared at which a token of every model ends.

    Raises:
        DataError: Rows that cannot be tokenised or aligned.
    """
    pairs = hasattr(data, "prompts")
    prompts = list(data.prompts) if pairs else list(data)
    completions = data.completions if pairs else None
    known = [model.context_length for model in models if model.context_length]
    options: dict[str, Any] = {"max_length": min(known, default=None), "on_long": on_long}
    if shared:
        rows = models[0].encode(prompts, completions, **options)
        ids, places = [row.ids for row in rows], [np.arange(len(row.ids)) for row in rows]
        return Texts([ids] * len(models), [places] * len(models), True)
    encoded = [model.encode(prompts, completions, **options) for model in models]
    aligned = [_aligned([rows[at] for rows in encoded], at) for at in range(len(prompts))]
    return Texts(
        [[row.ids for row in rows] for rows in encoded],
        [[places[number] for places in aligned] for number in range(len(models))],
        False,
    )


def _aligned(rows: list[Encoded], number: int) -> list[np.ndarray]:
    if any(row.offsets is None for row in rows):
        raise DataError("models of different tokens are aligned by characters, which needs fast tokenizers")
    if len({row.text for row in rows}) > 1:
        raise DataError(
            f"row {number}: the chat templates give different texts, and the models share no tokens, "
            "so nothing can be aligned; give prompts as text"
        )
    ends = [{end: at for at, (start, end) in enumerate(row.offsets or ()) if end > start} for row in rows]
    common = sorted(set.intersection(*map(set, ends)))
    if not common:
        raise DataError(f"row {number}: no token of all models ends at the same character")
    return [np.array([own[end] for end in common]) for own in ends]


def pass_all(
    models: Sequence[HookedModel],
    references: Sequence[int],
    texts: Texts,
    depths: Sequence[Sequence[str]],
    *,
    batch_tokens: int,
    progress: bool | None,
) -> Passed:
    """Runs every model over all rows once.

    Args:
        models: All that are compared.
        references: For each model the number of its reference; its own number for a reference.
        texts: What they read.
        depths: For each model the names of its sites, as many for each.
        batch_tokens: Tokens in one batch, padding included.
        progress: Show a bar.

    Raises:
        InputError: Another number of depths.
    """
    if len({len(sites) for sites in depths}) != 1:
        raise InputError("every model needs as many sites as the others")
    pairs = list(combinations(range(len(models)), 2))
    count = len(depths[0])
    found = Passed(
        {pair: [Products() for _ in range(count)] for pair in pairs},
        [[torch.zeros(len(texts), model.d_model) for _ in range(count)] for model in models],
        dict.fromkeys(pairs, 0.0) if texts.shared else {},
        {at: 0.0 for at, own in enumerate(references) if own != at} if texts.shared else {},
        texts.tokens,
    )
    lengths = [max(len(ids[row]) for ids in texts.ids) for row in range(len(texts))]
    with torch.no_grad(), bar(texts.tokens, "comparing models", "tokens", progress) as shown:
        for batch in by_length(lengths, batch_tokens):
            places = [np.concatenate([own[row] for row in batch]) for own in texts.places]
            line = np.repeat(np.arange(len(batch)), [len(texts.places[0][row]) for row in batch])
            ran = [
                _run(model, [ids[row] for row in batch], line, own, sites, texts.shared)
                for model, ids, own, sites in zip(models, texts.ids, places, depths)
            ]
            for (a, b), products in found.products.items():
                for depth in range(count):
                    products[depth].add(ran[a][1][depth], ran[b][1][depth])
            ends = np.cumsum(np.bincount(line, minlength=len(batch))) - 1
            for own, (_, streams) in zip(found.ends, ran):
                for depth in range(count):
                    own[depth][batch] = streams[depth][ends].float().cpu()
            if texts.shared:
                _outputs(found, [logits for logits, _ in ran], references)
            shown.update(len(line))
    return found


def _run(
    model: HookedModel,
    ids: list[tuple[int, ...]],
    line: np.ndarray,
    places: np.ndarray,
    sites: Sequence[str],
    logits: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """Logits and streams at the compared tokens, `[tokens, ...]`, of one batch."""
    run = model.run(model.batch(ids), read=list(sites), stop=not logits)
    rows, columns = (torch.from_numpy(each).to(model.device) for each in (line, places))
    streams = [run[site][rows, columns] for site in sites]
    return (run.logits[rows, columns] if logits else None), streams


def _outputs(found: Passed, logits: Sequence[Tensor | None], references: Sequence[int]) -> None:
    known = [each for each in logits if each is not None]
    vocabulary = min(each.shape[-1] for each in known)
    size = max(1, PIECE // vocabulary)
    for start in range(0, len(known[0]), size):
        logs = [each[start : start + size, :vocabulary].float().log_softmax(-1) for each in known]
        for a, b in found.divergence:
            found.divergence[a, b] += float(jensen_shannon(logs[a], logs[b].to(logs[a])).double().sum())
        for own in found.kl:
            theirs = logs[references[own]].to(logs[own])
            found.kl[own] += float((logs[own].exp() * (logs[own] - theirs)).sum(-1).double().sum())


def jensen_shannon(ours: Tensor, theirs: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats of log-probabilities `[n, vocabulary]`; between 0 and ln 2.

    Exactly 0 for equal ones.
    """
    apart = torch.log1p(torch.exp(-(ours - theirs).abs())) - torch.log1p(torch.ones_like(ours[:1]))
    middle = torch.maximum(ours, theirs) + apart
    return 0.5 * ((ours.exp() * (ours - middle)).sum(-1) + (theirs.exp() * (theirs - middle)).sum(-1))
