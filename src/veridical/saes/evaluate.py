"""What an SAE is worth on held-out rows: reconstruction, sparsity, and what the model loses by it.

- FVU, the fraction of variance unexplained: sum of |y - ŷ|² over sum of |y - ȳ|², with ȳ the mean of the very
  rows that are judged; explained variance is 1 less that. A constant output can reach FVU 1, no less.
- L0: latents above 0 per row. Dead: latents that exceed 1e-3 on no row (the definition of Gao et al. 2024,
  arXiv:2406.04093, over these rows). Dense: latents that exceed it on more than a tenth of the rows.
- Norm ratio: mean |ŷ - b_dec| over mean |y - b_dec|; below 1 an SAE shrinks what it reconstructs.
- Two dictionaries that know nothing of features: PCA of as many components as the SAE has active latents,
  fitted on the other half of the texts; and as many random unit vectors as the SAE has latents, from which
  each row takes the same number (those of largest inner product, coefficients by least squares, of any sign).

Intervals resample whole texts (or pairs): tokens of one text are not independent. The mean ȳ is held.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from veridical.errors import DataError, InputError
from veridical.probes import evaluate as intervals
from veridical.probes.evaluate import Estimate
from veridical.saes.base import FIRED
from veridical.saes.evaluation import Evaluation
from veridical.saes.held_out import HeldOut, held_out
from veridical.saes.measure import DENSE
from veridical.saes.units import unscaled

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.saes.base import SAE


def evaluate_sae(
    sae: SAE,
    data: Any,
    texts: Any = None,
    *,
    target: Any = None,
    groups: Any = None,
    site: str | None = None,
    baselines: bool = True,
    bootstrap: int = 500,
    seed: int = 0,
    batch_tokens: int = 2048,
    progress: bool | None = None,
) -> Evaluation:
    """Judges an SAE on held-out rows or, given a model and texts, also inside the model.

    Args:
        sae: One SAE (a member of a stack: `sae.member(i)`).
        data: A `HookedModel` that then runs over `texts`; or `Activations` with the SAE's site, a tensor
            `[rows, d_in]`, or a mapping of site to tensor, none of which the SAE was trained on.
        texts: Held-out texts, chats or `Pairs`, where `data` is a model. All their tokens are read, as in
            training on `tokens="all"`; cross-entropy is that of completions where there are any.
        target: `[rows, d_out]`, what a transcoder predicts, where `data` is a tensor.
        groups: `[rows]`, text or pair of each row, for the intervals.
        site: Where to read, for an SAE that does not say.
        baselines: Also measure PCA and a random dictionary.
        bootstrap: Resamples of whole texts for the 95 % intervals.
        seed: Seed of the resamples and of the random dictionary.
        batch_tokens: Tokens in one batch of the model, padding included.
        progress: Progress bar; by default only on a terminal or in a notebook.

    Raises:
        InputError: A stack, a model without texts, widths that do not fit, or no site.
        DataError: Fewer than two rows, or rows that are all the same.
        NonFiniteError: NaN or infinity in the activations.
    """
    from veridical.hooked import HookedModel

    if sae.stacked:
        raise InputError("this is a stack of SAEs; judge one at a time with stack.member(number)")
    if site is not None:
        sae = _at(sae, site)
    raw = unscaled(sae)
    with torch.no_grad():
        if isinstance(data, HookedModel):
            if texts is None:
                raise InputError("a model came without texts; give held-out texts to judge the SAE on")
            return _in_model(raw, data, texts, baselines, bootstrap, seed, batch_tokens, progress)
        rows = held_out(raw, data, target=target, groups=groups)
        return _on_rows(raw, rows, baselines, bootstrap, seed)[0]


def _at(sae: SAE, site: str) -> SAE:
    """A shallow copy that reads at another site; the weights are shared."""
    import copy

    moved = copy.copy(sae)
    moved.configs = (replace(sae.config, site=site),)
    return moved


def _in_model(
    sae: SAE, model: HookedModel, texts: Any, baselines: bool, bootstrap: int, seed: int, batch_tokens: int,
    progress: bool | None,
) -> Evaluation:  # fmt: skip
    from veridical.activations import collect
    from veridical.saes.loss import splice_losses
    from veridical.saes.splice import places

    sites = list(dict.fromkeys(places(model, sae)))
    acts = collect(model, texts, sites=sites, tokens="all", batch_tokens=batch_tokens, progress=progress)
    rows = held_out(sae, acts)
    found, mean = _on_rows(sae, rows, baselines, bootstrap, seed)
    losses = splice_losses(model, sae, texts, mean, batch_tokens=batch_tokens, progress=progress)
    notes = (*found.notes, *losses.notes())
    return replace(found, loss=losses.summary(bootstrap, seed), notes=notes)


def _on_rows(
    sae: SAE, rows: HeldOut, baselines: bool, bootstrap: int, seed: int
) -> tuple[Evaluation, Tensor]:
    mean = _mean(sae, rows)
    sums = _measure(sae, rows, mean)
    weights = intervals.resample_weights(np.arange(sums.groups), bootstrap, seed)
    total = sums.total
    if not total.sum() > 0:
        raise DataError(f"all {rows.count} rows are the same, so there is no variance to explain")
    fvu = _ratio(sums.error, total, weights)
    l0 = _ratio(sums.l0, sums.rows, weights)
    beside: dict[str, Estimate] = {}
    lead: dict[str, Estimate] = {}
    if baselines:
        from veridical.saes.baselines import pca_errors, random_errors

        active = max(1, round(l0.value))
        errors = {
            f"PCA, {min(active, sae.d_out)} components": pca_errors(sae, rows, active),
            f"{sae.width:,} random vectors, {active} a row": random_errors(sae, rows, mean, active, seed),
        }
        beside = {name: _ratio(error, total, weights) for name, error in errors.items()}
        lead = {name: _ratio(error - sums.error, total, weights) for name, error in errors.items()}
    frequency = sums.fired / rows.count
    made = Evaluation(
        name=sae.config.label,
        metrics={
            "fvu": fvu,
            "explained_variance": Estimate(1 - fvu.value, 1 - fvu.high, 1 - fvu.low),
            "l0": l0,
            "norm_ratio": _ratio(sums.norm_out, sums.norm_in, weights),
        },
        dead=float((frequency == 0).mean()),
        dense=float((frequency > DENSE).mean()),
        frequency=frequency,
        largest=sums.largest,
        baselines=beside,
        lead=lead,
        counts={"rows": rows.count, "texts": sums.groups, "latents": sae.width, "width": sae.d_in},
        facts={"site": sae.config.site, "architecture": sae.config.architecture, **rows.facts},
        notes=(*rows.notes, *_notes(rows, sae)),
    )
    return made, mean


class _Sums:
    """Sums over the rows of each text, float64, and counts of each latent."""

    def __init__(self, groups: int, width: int):
        self.groups = groups
        for name in ("rows", "error", "total", "l0", "norm_in", "norm_out"):
            setattr(self, name, np.zeros(groups))
        self.fired = np.zeros(width)
        self.largest = np.zeros(width)

    rows: np.ndarray
    error: np.ndarray
    total: np.ndarray
    l0: np.ndarray
    norm_in: np.ndarray
    norm_out: np.ndarray

    def add(self, codes: np.ndarray, **values: Tensor) -> None:
        """Adds values `[rows]` to the sums of their texts."""
        np.add.at(self.rows, codes, 1)
        for name, value in values.items():
            np.add.at(getattr(self, name), codes, value.double().cpu().numpy())


def _measure(sae: SAE, rows: HeldOut, mean: Tensor) -> _Sums:
    sums = _Sums(int(rows.groups.max()) + 1, sae.width)
    centre = sae.b_dec.double()
    for where, x, y in rows.blocks(sae):
        latents = sae.encode(x)
        # The error is taken in float64: near a perfect reconstruction it is a difference of near equals.
        made, real = sae.rebuild(x, latents).double(), y.double()
        sums.add(
            rows.groups[where],
            error=(real - made).square().sum(1),
            total=(real - mean).square().sum(1),
            l0=(latents > 0).sum(1),
            norm_in=(real - centre).norm(dim=1),
            norm_out=(made - centre).norm(dim=1),
        )
        sums.fired += (latents > FIRED).sum(0).cpu().numpy()
        sums.largest = np.maximum(sums.largest, latents.amax(0).double().cpu().numpy())
    return sums


def _mean(sae: SAE, rows: HeldOut) -> Tensor:
    """Mean of the targets `[d_out]`, float64."""
    total = torch.zeros(sae.d_out, dtype=torch.float64, device=sae.b_dec.device)
    for _, _, y in rows.blocks(sae):
        total += y.double().sum(0)
    return total / rows.count


def _ratio(above: np.ndarray, below: np.ndarray, weights: np.ndarray) -> Estimate:
    """Sum over sum, with the middle 95 % of the same over resampled texts."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return intervals.estimate(above.sum() / below.sum(), (weights @ above) / (weights @ below))


def _notes(rows: HeldOut, sae: SAE) -> list[str]:
    said = []
    if rows.count < 10 * sae.width:
        said.append(
            f"{rows.count:,} rows for {sae.width:,} latents: a rare latent can be silent on all of them, so "
            "the dead share is an upper bound."
        )
    return said
