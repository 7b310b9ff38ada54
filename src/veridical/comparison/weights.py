"""What changed in the weights: by module, how much, in how many directions, and along which.

For each weight the relative change is |W' - W|_F / |W|_F. Of matrices, the singular values s of the
difference give its effective rank, exp(entropy of s / sum s) (Roy and Vetterli 2007, "The effective rank: a
measure of effective dimensionality"), and the share of its square that the first one holds. A LoRA of rank r
shows r singular values; full training shows a long tail.

The overlap with a direction u of the residual stream is |u'D|^2 / |D|_F^2 on the side of D that writes to or
reads from the stream; 1 / d_model is chance, and 1 is a change along u alone. With a subspace (the stream
side of a LoRA) it is the share of D within it, by chance its dimension / d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from veridical.architectures import inner
from veridical.errors import InputError
from veridical.weights import plain

if TYPE_CHECKING:
    from veridical.comparison.duo import Duo
    from veridical.hooked import HookedModel

EXACT = 1024
"""Matrices whose smaller side is longer get their `LEADING` singular values by a randomised method."""
LEADING = 64
ZERO = 1e-6
"""Singular values below this share of the first do not count towards the rank."""


@dataclass(frozen=True)
class WeightChange:
    """What `weight_change` found.

    Attributes:
        modules: One line per weight, see `weight_change`.
        spectra: `module`, `index` and `value`: singular values of each changed matrix, at most 64.
        overlaps: `module`, `direction`, `side` ("writes" or "reads"), `overlap`, `chance`.
    """

    modules: pd.DataFrame
    spectra: pd.DataFrame
    overlaps: pd.DataFrame

    def by_layer(self) -> pd.DataFrame:
        """One line per layer (-1 for embeddings, norms and head): `layer`, `relative` and `share` of the
        whole squared change."""
        layer = self.modules["layer"].to_numpy(dtype=int)
        change, size = (self.modules[name].to_numpy(dtype=float) ** 2 for name in ("norm", "reference_norm"))
        layers, at = np.unique(layer, return_inverse=True)
        changes, sizes = np.bincount(at, change), np.bincount(at, size)
        whole = changes.sum()
        share = changes / whole if whole > 0 else changes
        return pd.DataFrame({"layer": layers, "relative": np.sqrt(changes / sizes), "share": share})


def weight_change(duo: Duo, directions: Mapping[str, Tensor | np.ndarray] | None = None) -> WeightChange:
    """Compares the weights of two models of one architecture, module by module.

    Args:
        duo: The two; an adapter counts as merged.
        directions: By name, a direction `[d_model]` or a basis `[k, d_model]` of the residual stream, such as
            a probe's `direction_` or the stream side of a LoRA.

    Returns:
        Modules with `module`, `layer` (-1 outside the blocks), `part`, `relative`, `norm`, `reference_norm`,
        `largest` (absolute change of one number), and of matrices `rank`, `effective_rank`, `first_share`;
        NaN where only the leading singular values were computed, and for vectors.

    Raises:
        InputError: Models whose weights do not go together, or directions of another width.
    """
    if not duo.applies("weights"):
        raise InputError(f"the weights of the two can't be compared: {duo.not_applicable['weights']}")
    ours, theirs = (dict(inner(model.model).named_parameters()) for model in (duo.policy, duo.reference))
    bases = {name: _basis(name, given, duo.policy.d_model) for name, given in (directions or {}).items()}
    layers, sides = _layers(duo.policy), _Sides(duo.policy)
    lines, spectra, overlaps = [], [], []
    for name, weight in ours.items():
        # Embeddings of vocabularies that were padded differently are compared over the tokens of both.
        weight, other = plain(weight.detach()), plain(theirs[name].detach())
        count = min(len(weight), len(other))
        before = other[:count].to("cpu", torch.float64)
        change = weight[:count].to("cpu", torch.float64) - before
        norm, size = float(change.norm()), float(before.norm())
        values = _singular(change) if change.dim() == 2 and norm > 0 else None
        lines.append(
            {
                "module": name,
                "layer": layers(name),
                "part": name.removesuffix(".weight").rsplit(".", 1)[-1],
                "relative": norm / size if size > 0 else float("nan" if norm > 0 else 0.0),
                "norm": norm,
                "reference_norm": size,
                "largest": float(change.abs().max()) if change.numel() else 0.0,
                **_ranks(change, values),
            }
        )
        if values is not None:
            spectra += [(name, at, value) for at, value in enumerate(values[:LEADING].tolist())]
            overlaps += _overlaps(name, sides(name, change), bases)
    return WeightChange(
        pd.DataFrame(lines),
        pd.DataFrame(spectra, columns=["module", "index", "value"]),
        pd.DataFrame(overlaps, columns=["module", "direction", "side", "overlap", "chance"]),
    )


def _layers(model: HookedModel) -> Callable[[str], int]:
    """From a weight's name to the number of its block, -1 outside."""
    names = {module: name for name, module in inner(model.model).named_modules()}
    starts = {f"{names[block]}.": number for number, block in enumerate(model.architecture.blocks)}
    return lambda name: next((number for start, number in starts.items() if name.startswith(start)), -1)


def _singular(change: Tensor) -> Tensor:
    if min(change.shape) <= EXACT:
        return torch.linalg.svdvals(change)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return torch.svd_lowrank(change.float(), q=LEADING)[1].double()


def _ranks(change: Tensor, values: Tensor | None) -> dict[str, float]:
    if change.dim() != 2:
        return dict.fromkeys(("rank", "effective_rank", "first_share"), float("nan"))
    if values is None:
        return dict.fromkeys(("rank", "effective_rank", "first_share"), 0.0)
    share = values / values.sum()
    exact = min(change.shape) <= EXACT
    return {
        "rank": float((values > ZERO * values[0]).sum()) if exact else float("nan"),
        "effective_rank": float(torch.special.entr(share).sum().exp()) if exact else float("nan"),
        "first_share": float(values[0] ** 2 / change.square().sum()),
    }


def _basis(name: str, given: Tensor | np.ndarray, width: int) -> Tensor:
    rows = torch.as_tensor(given).detach().to("cpu", torch.float64)
    rows = rows.reshape(1, -1) if rows.dim() == 1 else rows
    if rows.dim() != 2 or rows.shape[1] != width:
        raise InputError(f"direction {name!r} has shape {tuple(rows.shape)}; the stream is {width} wide")
    found, values, _ = torch.linalg.svd(rows.T, full_matrices=False)
    if not values[0] > 0:
        raise InputError(f"direction {name!r} is zero")
    return found[:, values > ZERO * values[0]]


def _overlaps(
    name: str, side: tuple[str, Tensor] | None, bases: Mapping[str, Tensor]
) -> list[tuple[str, str, str, float, float]]:
    if side is None:
        return []
    which, matrix = side
    whole = float(matrix.square().sum())
    return [
        (name, label, which, float((basis.T @ matrix).square().sum()) / whole, basis.shape[1] / len(matrix))
        for label, basis in bases.items()
    ]


class _Sides:
    """From a weight of a block and its change to the side that meets the residual stream, stream as rows."""

    def __init__(self, model: HookedModel) -> None:
        self.model, self.layers = model, _layers(model)
        # What has a head's or a neuron's values as its input writes to the stream.
        places = model.architecture.places.items()
        self.writers = {place.module for site, place in places if site.kind in ("z", "mlp_post")}

    def __call__(self, name: str, change: Tensor) -> tuple[str, Tensor] | None:
        path, _, kind = name.rpartition(".")
        if kind != "weight" or self.layers(name) < 0:
            return None
        module = inner(self.model.model).get_submodule(path)
        # transformers' Conv1D (gpt2) holds its weight as [in, out].
        out, into = (change, change.T) if isinstance(module, nn.Linear) else (change.T, change)
        if module in self.writers:
            return ("writes", out) if len(out) == self.model.d_model else None
        return ("reads", into) if len(into) == self.model.d_model else None
