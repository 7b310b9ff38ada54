"""What a model loses when it runs on an SAE's reconstruction: cross-entropy, spliced in by the hook engine.

Cross-entropy recovered is `(H_none - H_sae) / (H_none - H_model)`, over the next-token losses of all texts
together: 1 for a reconstruction that is exact, 0 for one that is worth as little as nothing. Nothing is zero
at the site (as it is commonly reported; in a residual stream zeroing ruins the model, so even poor SAEs come
out near 1) and, beside it, the site's mean over the same texts, which is the harder thing to beat.

Losses are those of the completions where the data have them, else of all tokens. A model predicts well only
what it was trained to: on other text its loss can be above that of the ruined one, both differences are then
negative, and their ratio looks like a splendid SAE. Where nothing is lost, nothing is recovered (NaN).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from veridical.errors import InputError, NonFiniteError
from veridical.probes import evaluate as intervals
from veridical.probes.evaluate import Estimate
from veridical.saes.splice import Edit, hooks_for, reconstruct

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.saes.base import SAE

RUNS = ("model", "sae", "zero", "mean")
INVALID = 0.05
"""Share of resamples without a loss to recover above which no interval is given."""


@dataclass(frozen=True)
class SpliceLosses:
    """Sums over the predicted tokens of each text, in nats.

    Attributes:
        tokens: `[texts]`, predicted tokens.
        losses: `[texts]` cross-entropy by what the site held: `model`, `sae`, `zero`, `mean`.
        kl: `[texts]`, KL divergence from the model to the spliced model.
    """

    tokens: np.ndarray
    losses: dict[str, np.ndarray]
    kl: np.ndarray

    def notes(self) -> tuple[str, ...]:
        """What a reader should know of these losses."""
        model, zero = (self.losses[name].sum() / self.tokens.sum() for name in ("model", "zero"))
        if model < zero:
            return ()
        return (
            f"The model predicts these tokens no better than with the site at zero (cross-entropy {model:.3g}"
            f" against {zero:.3g}), so there is nothing to recover: judge it on text that it was trained to "
            "predict.",
        )

    def summary(self, bootstrap: int = 500, seed: int = 0) -> dict[str, Estimate]:
        """Mean losses per token, the share recovered, and the divergence, with 95 % intervals over texts.

        The share recovered is NaN where the model is no better than what it is compared with.
        """
        weights = intervals.resample_weights(np.arange(len(self.tokens)), bootstrap, seed)

        def ratio(above: np.ndarray, below: np.ndarray) -> Estimate:
            with np.errstate(invalid="ignore", divide="ignore"):
                return intervals.estimate(above.sum() / below.sum(), (weights @ above) / (weights @ below))

        ours = self.losses

        def recovered(none: str) -> Estimate:
            lost = ours[none] - ours["model"]
            if not lost.sum() > 0:
                return Estimate(np.nan, np.nan, np.nan)
            found, valid = ratio(ours[none] - ours["sae"], lost), weights @ lost > 0
            return found if valid.mean() > 1 - INVALID else Estimate(found.value, np.nan, np.nan)

        return {
            "recovered": recovered("zero"),
            "recovered_mean": recovered("mean"),
            "loss": ratio(ours["model"], self.tokens),
            "loss_spliced": ratio(ours["sae"], self.tokens),
            "loss_zero": ratio(ours["zero"], self.tokens),
            "loss_mean": ratio(ours["mean"], self.tokens),
            "kl": ratio(self.kl, self.tokens),
        }


def splice_losses(
    model: HookedModel,
    sae: SAE,
    texts: Any,
    mean: Tensor,
    *,
    site: str | None = None,
    batch_tokens: int = 2048,
    progress: bool | None = None,
) -> SpliceLosses:
    """Runs the model as it is, on the reconstruction, on zeros and on the mean, over the same tokens.

    Args:
        model: A causal model.
        sae: The SAE, in raw units.
        texts: Texts, chats, `Pairs` or token ids, as `collect` takes them. Losses are those of the completion
            in a row that has one, else of all tokens; every token is spliced.
        mean: `[d_out]`, the mean of the output site.
        site: As for `spliced`.
        batch_tokens: Tokens in one batch, padding included.
        progress: Progress bar; by default only on a terminal or in a notebook.

    Raises:
        InputError: The model predicts no next token, or no text has two tokens.
        NonFiniteError: The model gives NaN.
    """
    from veridical.progress import bar
    from veridical.tokens import by_length

    if model.kind != "causal":
        raise InputError(f"{model.path} is a model of kind {model.kind!r} and predicts no next token")
    rows, first = _encoded(model, texts)
    lengths = [len(row) for row in rows]
    if not any(length > start for length, start in zip(lengths, first)):
        raise InputError("no text has two tokens, so none is predicted")
    tokens, kl = np.zeros(len(rows)), np.zeros(len(rows))
    losses = {name: np.zeros(len(rows)) for name in RUNS}
    with torch.no_grad(), bar(sum(lengths), "splicing", "tokens", progress) as shown:
        for batch in by_length(lengths, batch_tokens):
            inputs = model.batch([rows[row] for row in batch])
            places = torch.arange(inputs["input_ids"].shape[1], device=model.device)
            starts = torch.tensor([first[row] for row in batch], device=model.device)
            scored = inputs["attention_mask"].bool() & (places >= starts[:, None])
            found, divergence = _batch(model, sae, inputs, scored, mean, site)
            for name, values in found.items():
                losses[name][batch] = values
            kl[batch] = divergence
            tokens[batch] = scored[:, 1:].sum(1).cpu().numpy()
            shown.update(sum(lengths[row] for row in batch))
    for name, values in losses.items():
        if not np.isfinite(values).all():
            where = int(np.flatnonzero(~np.isfinite(values))[0])
            raise NonFiniteError(f"the model gives NaN or infinity on text {where} with the site at {name!r}")
    return SpliceLosses(tokens, losses, kl)


def _batch(
    model: HookedModel, sae: SAE, inputs: dict[str, Tensor], scored: Tensor, mean: Tensor, site: str | None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Summed losses `[rows]` of each run over the `scored` tokens, and the divergence of the spliced one."""
    real = inputs["attention_mask"].bool()
    edits: dict[str, Edit] = {
        "sae": reconstruct(sae),
        "zero": lambda x, y: torch.zeros_like(y),
        "mean": lambda x, y: mean.to(y).expand_as(y),
    }
    before = model.run(inputs).logits[:, :-1].float().log_softmax(-1)
    found, divergence = {"model": _summed(before, inputs, scored)}, np.zeros(len(real))
    for name, edit in edits.items():
        read, write = hooks_for(model, sae, edit, site, where=real)
        after = model.run(inputs, read=read, write=write).logits[:, :-1].float().log_softmax(-1)
        found[name] = _summed(after, inputs, scored)
        if name == "sae":
            each = (before.exp() * (before - after)).sum(-1)
            divergence = (each * scored[:, 1:].to(each.device)).double().sum(1).cpu().numpy()
    return found, divergence


def _summed(logprobs: Tensor, inputs: dict[str, Tensor], scored: Tensor) -> np.ndarray:
    """Cross-entropy of the scored tokens from what is before them, summed over each row."""
    targets = inputs["input_ids"][:, 1:].to(logprobs.device)
    each = -logprobs.gather(-1, targets[..., None]).squeeze(-1)
    return (each * scored[:, 1:].to(each.device)).double().sum(1).cpu().numpy()


def _encoded(model: HookedModel, texts: Any) -> tuple[list[tuple[int, ...]], list[int]]:
    """Token ids of each row, and its first token whose prediction counts."""
    from veridical.activations.data import read_data

    rows = [row for _, part in read_data(texts).encoded(model) for row in part]
    first = [row.prompt_tokens if row.prompt_tokens < len(row.ids) else 1 for row in rows]
    return [row.ids for row in rows], [max(start, 1) for start in first]
