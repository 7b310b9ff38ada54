"""The logit lens (nostalgebraist 2020): what the model would say if its later layers were left out.

The residual stream at a layer goes through the model's own final norm and unembedding (`readout`). At the
last `resid_post` that is the model's own output. Of a vision transformer it is what the classifier would say
of each token of the image, were that the one that it reads (Vilas et al. 2023, arXiv:2310.18969); what it
says of the class token at the end is the model's own output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from veridical.errors import InputError
from veridical.interventions.inputs import Inputs
from veridical.interventions.lens_reading import LensReading
from veridical.interventions.metrics import Answers, as_metric
from veridical.interventions.readout import Readout
from veridical.saes.logit_effects import token_text
from veridical.sites import Site
from veridical.tokens import by_length

if TYPE_CHECKING:
    from veridical.hooked import HookedModel

STREAM = ("embed", "resid_pre", "resid_mid", "resid_post")
"""Kinds of site that hold the residual stream."""
TOP = 5
Translate = Callable[[str, Tensor], Tensor]
"""From a site and its values `[batch, pos, d_model]` to what the final norm is given."""


def logit_lens(
    model: HookedModel | Any,
    texts: Any,
    *,
    sites: Any = "resid_post.*",
    answers: Answers | None = None,
    top: int = TOP,
    batch_tokens: int = 2048,
    progress: bool | None = None,
) -> LensReading:
    """Reads the residual stream of each layer as a distribution over the next token, or over labels.

    Args:
        model: A `HookedModel`, or anything that `veridical.load` takes; it runs in its present mode.
        texts: A text or chat, a list of these, or token ids `[batch, pos]`; of a vision transformer images
            `[batch, channels, height, width]`.
        sites: Where to read: `embed`, `resid_pre`, `resid_mid` or `resid_post`, in any spelling.
        answers: The next token whose probability and rank are followed: a text or id for all texts, or one
            for each (of images the number of a label). When not given, at each token the one that the model
            itself finds likeliest.
        top: Likeliest tokens or labels to keep.
        batch_tokens: Most tokens in one batch, padding included.
        progress: Show a bar; on a terminal or in a notebook when not given.

    Raises:
        UnknownNameError: A site that the model does not have.
        InputError: A site that is not in the residual stream, or a model without logits over tokens.
    """
    from veridical.models import load

    model = load(model)
    return read_lens(model, texts, sites, "logit lens", None, answers, top, batch_tokens, progress)


def read_lens(
    model: HookedModel,
    texts: Any,
    sites: Any,
    name: str,
    translate: Translate | None,
    answers: Answers | None,
    top: int,
    batch_tokens: int,
    progress: bool | None,
) -> LensReading:
    """`logit_lens`, with the stream put through `translate` first."""
    from veridical.progress import bar

    names, given = stream_sites(model, sites), one_sided(model, texts)
    rows = _rows(model, given)
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise InputError(f"top is {top!r}; expected how many of the likeliest tokens to keep")
    targets = None if answers is None else _targets(model, answers, given)
    readout, last = Readout(model), Site("resid_post", model.n_layers - 1).name
    found: list[dict[str, Any] | None] = [None] * len(rows)
    batches = by_length([len(row) for row in rows], batch_tokens)
    with torch.no_grad(), bar(len(batches) * len(names), name, "layers", progress) as shown:
        for batch in batches:
            inputs, real = _inputs(model, given, rows, batch)
            run = model.run(inputs, read=names)
            final = run.logits
            if model.kind == "vision":
                final = final[:, None].expand(*real.shape, -1)
            likely = final[real].float().argmax(-1)
            wanted = likely
            if targets is not None:
                wanted = targets[batch].to(real.device)[:, None].expand(real.shape)[real]
            parts = []
            for site in names:
                values = run.values[site] if translate is None else translate(site, run.values[site])
                ready = site == last and model.kind != "vision"
                logits = final if ready else readout(values, inputs)
                parts.append(measures(logits[real], final[real], wanted, min(top, final.shape[-1])))
                shown.update(1)
            _share(found, batch, real, parts, wanted, likely)
    kept = [one for one in found if one is not None]
    return _reading(model, name, names, rows, kept, answers is not None)


def _rows(model: HookedModel, given: Inputs) -> list[list[Any]]:
    """Of each text the ids of its tokens, of each image the names of its patches."""
    if model.kind == "vision":
        return [list(line) for line in given.tokens]
    return [ids[real].tolist() for ids, real in zip(given.clean["input_ids"], given.mask)]


def _inputs(
    model: HookedModel, given: Inputs, rows: Sequence[Sequence[Any]], batch: Sequence[int]
) -> tuple[dict[str, Tensor], Tensor]:
    """What some rows are run with, and `[batch, pos]` bool where they have tokens."""
    if model.kind == "vision":
        return {name: value[list(batch)] for name, value in given.clean.items()}, given.mask[list(batch)]
    inputs = model.batch([rows[row] for row in batch], padding_side="left")
    return inputs, inputs["attention_mask"].bool()


def measures(logits: Tensor, final: Tensor, targets: Tensor, top: int) -> dict[str, Tensor]:
    """What is kept of a lens's logits `[n, vocabulary]` beside the model's own, in float32 or better."""
    exact = torch.promote_types(torch.float32, logits.dtype)
    ours, theirs = logits.to(exact).log_softmax(-1), final.to(exact).log_softmax(-1)
    best = ours.topk(top, dim=-1)
    own = ours.gather(-1, targets[:, None])
    return {
        "top_ids": best.indices,
        "top_probabilities": best.values.exp(),
        "probability": own[:, 0].exp(),
        "rank": (ours > own).sum(-1),
        "kl": divergence(theirs, ours),
        "entropy": torch.special.entr(ours.exp()).sum(-1),
    }


def divergence(reference: Tensor, other: Tensor) -> Tensor:
    """KL(reference || other) from log-probabilities `[..., vocabulary]`, in nats."""
    return torch.nn.functional.kl_div(other, reference, log_target=True, reduction="none").sum(-1)


def stream_sites(model: HookedModel, sites: Any) -> list[str]:
    """Canonical names of sites that hold the residual stream.

    Raises:
        InputError: A site that does not.
    """
    found = model.resolve(sites)
    for site in found:
        if site.kind not in STREAM:
            raise InputError(
                f"{site.short} is not the residual stream, so it has no way through the final norm; expected "
                f"sites of kind {', '.join(STREAM)} (what a part adds to the logits: direct_logits)"
            )
        if tuple(model.width(site)) != (model.d_model,):
            raise InputError(f"{site.short} has width {model.width(site)}; the stream has {model.d_model}")
    return [site.name for site in found]


def one_sided(model: HookedModel, texts: Any) -> Inputs:
    """Texts, chats, token ids or the prompts of `Pairs`, where there is no other side to compare with.

    Completions of `Pairs` are the answers.
    """
    if not hasattr(texts, "prompts"):
        return Inputs.of(model, texts, texts)
    prompts = list(texts.prompts)
    inputs = Inputs.of(model, prompts, prompts)
    return replace(inputs, answers=texts.completions, groups=texts.groups)


def _targets(model: HookedModel, answers: Answers, given: Inputs) -> Tensor:
    metric = as_metric("logprob", model, answers, inputs=given)
    table = (metric.targets or {})["answers"]
    if table.shape[1] != 1:
        raise InputError(
            "a lens follows one token in each text; give one answer for all texts, or one for each"
        )
    return table[:, 0].expand(len(given))


def _share(
    found: list[dict[str, Any] | None],
    batch: Sequence[int],
    real: Tensor,
    parts: list[dict[str, Tensor]],
    wanted: Tensor,
    likely: Tensor,
) -> None:
    """Hands the figures of a batch's tokens to their rows."""
    ends = real.sum(1).cumsum(0).tolist()
    whole = {name: torch.stack([part[name] for part in parts]).cpu().numpy() for name in parts[0]}
    for row, first, last in zip(batch, [0, *ends[:-1]], ends):
        own = {name: values[:, first:last] for name, values in whole.items()}
        found[row] = {
            **own,
            "targets": wanted[first:last].cpu().numpy(),
            "likely": likely[first:last].cpu().numpy(),
        }


def _reading(
    model: HookedModel,
    name: str,
    names: Sequence[str],
    rows: Sequence[Sequence[Any]],
    found: Sequence[Mapping[str, Any]],
    given: bool,
) -> LensReading:
    def joined(what: str) -> np.ndarray:
        return np.concatenate([one[what] for one in found], axis=-1 if found[0][what].ndim < 3 else 1)

    targets, tops = joined("targets"), joined("top_ids")
    labels = getattr(model.architecture.config, "id2label", None) if model.kind == "vision" else None
    words = {
        token: token_text(model, token) if labels is None else str(labels.get(token, token))
        for token in {*targets.tolist(), *tops.reshape(-1).tolist()}
    }

    def texts(ids: np.ndarray) -> np.ndarray:
        flat = np.empty(ids.size, dtype=object)
        flat[:] = [words[int(token)] for token in ids.reshape(-1)]
        return flat.reshape(ids.shape)

    own = [token if isinstance(token, str) else token_text(model, token) for row in rows for token in row]
    reads, of = ("label", "images") if model.kind == "vision" else ("next token", "texts")
    said = "the answers that were given" if given else f"at each token, the model's own likeliest {reads}"
    facts = {
        "model": model.path,
        "model_fingerprint": model.fingerprint(),
        "target": f"Targets, whose probability and rank are followed: {said}.",
        "final_top": joined("likely"),
        "reads": reads,
        "of": of,
    }
    return LensReading(
        lens=name,
        sites=tuple(Site.parse(site).short for site in names),
        rows=np.repeat(np.arange(len(rows)), [len(row) for row in rows]),
        positions=np.concatenate([np.arange(len(row)) for row in rows]),
        tokens=np.array(own, dtype=object),
        top_ids=tops,
        top_tokens=texts(tops),
        top_probabilities=joined("top_probabilities"),
        targets=targets,
        target_tokens=texts(targets),
        probability=joined("probability"),
        rank=joined("rank"),
        kl=joined("kl"),
        entropy=joined("entropy"),
        facts=facts,
    )
