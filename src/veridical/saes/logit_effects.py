"""What a feature does to the logits by the direct path: its decoder row through final norm and unembedding.

`effect = W_U (g ⊙ W_dec[feature])`, with g the gain of the final norm, less the mean over the vocabulary (a
constant added to every logit changes nothing). Later layers and the norm's division by the residual's length
are left out, so effects rank tokens and have no absolute scale: to know what the model does, steer or ablate
(`veridical.saes.splice`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from veridical.errors import InputError
from veridical.saes.splice import check_feature, places
from veridical.saes.units import unscaled
from veridical.sites import Site

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.saes.base import SAE

STREAM = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
"""Sites whose values are, or are added to, the residual stream."""


def logit_effects(model: HookedModel, sae: SAE, features: Sequence[int]) -> np.ndarray:
    """Direct effect of each feature on every logit, `[features, vocabulary]` float64, mean 0 in each row.

    Raises:
        InputError: The SAE writes elsewhere than to the residual stream, the model has no unembedding, or a
            feature that the SAE does not have.
    """
    sae = unscaled(sae)
    target = Site.parse(places(model, sae)[1])
    if target.kind not in STREAM:
        raise InputError(
            f"{target} is not in the residual stream, so its features have no direct path to the logits; "
            "expected one of " + ", ".join(STREAM)
        )
    numbers = [check_feature(sae, feature) for feature in features]
    with torch.no_grad():
        rows = sae.W_dec[numbers].double() * norm_gain(model).double().to(sae.W_dec.device)
        matrix = unembedding(model).double().to(rows.device)
        if len(matrix) != rows.shape[1]:
            raise InputError(
                f"{model.path} projects the residual stream from {rows.shape[1]} to {len(matrix)} dimensions "
                "before unembedding; there is no direct path to follow"
            )
        effects = rows @ matrix
        return (effects - effects.mean(1, keepdim=True)).cpu().numpy()


def top_tokens(model: HookedModel, sae: SAE, features: Sequence[int], count: int = 10) -> pd.DataFrame:
    """The tokens that each feature promotes and suppresses most by the direct path.

    Returns:
        `feature`, `rank` (from 1), `promotes`, `effect`, `suppresses`, `effect_down`.
    """
    effects = logit_effects(model, sae, features)
    lines = []
    for feature, row in zip(features, effects):
        order = np.argsort(row, kind="stable")
        for rank in range(min(count, len(row))):
            up, down = int(order[-1 - rank]), int(order[rank])
            lines.append(
                {
                    "feature": int(feature),
                    "rank": rank + 1,
                    "promotes": token_text(model, up),
                    "effect": float(row[up]),
                    "suppresses": token_text(model, down),
                    "effect_down": float(row[down]),
                }
            )
    return pd.DataFrame(lines)


def unembedding(model: HookedModel) -> Tensor:
    """The matrix from the normed residual stream to logits, `[d_model, vocabulary]`.

    Raises:
        InputError: The model has none.
    """
    from veridical import lens
    from veridical.architectures import inner

    if lens.is_lens(model.model):
        return model.model.W_U  # type: ignore[return-value]
    getter = getattr(inner(model.model), "get_output_embeddings", None)
    layer = getter() if getter is not None else None
    if layer is None:
        raise InputError(f"{model.path} has no unembedding: its output is not logits over a vocabulary")
    return layer.weight.T


def norm_gain(model: HookedModel) -> Tensor:
    """The factor that the final norm puts on each dimension, `[d_model]`; ones where there is no norm.

    Told by running it on a vector of mean 0 and mean square 1 and on its negative, which any LayerNorm or
    RMSNorm only multiplies by its gain (and shifts by its bias), however it stores them.
    """
    place = model.architecture.places.get(Site("ln_final"))
    if place is None or not isinstance(place.module, nn.Module):
        return torch.ones(model.d_model)
    probe = _probe(model.d_model).to(device=model.device, dtype=model.dtype)[None, None]
    with torch.no_grad():
        up, down = place.module(probe), place.module(-probe)
    return ((up - down) / (2 * probe))[0, 0].float()


def token_text(model: HookedModel, token: int) -> str:
    """A token as text; its number where the model has no tokenizer."""
    return str(token) if model.tokenizer is None else str(model.tokenizer.decode([token]))


def _probe(width: int) -> Tensor:
    """A vector of mean 0 and mean square 1 without zeros."""
    probe = torch.ones(width, dtype=torch.float64)
    probe[1::2] = -1
    if width % 2:
        if width == 1:
            return probe
        probe[-3:] = torch.tensor([1.0, 1.0, -2.0], dtype=torch.float64) / 2**0.5
    return probe
