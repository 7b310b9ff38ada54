"""The rows on which an SAE is judged: vectors block by block, with the text or pair that each belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from veridical.errors import DataError, InputError, NonFiniteError

if TYPE_CHECKING:
    from veridical.activations import Activations
    from veridical.saes.base import SAE

BLOCK_BYTES = 64 << 20
"""Latents of one block at most, so that a dense block of a wide SAE still fits."""


@dataclass(frozen=True)
class HeldOut:
    """Rows for judging an SAE.

    Attributes:
        count: Number of rows.
        groups: `[count]`, code of the text or pair of each row, from 0 without gaps.
        read: Rows of a block to inputs `[rows, d_in]` and targets `[rows, d_out]`, block after block.
        facts: Where they come from, for the record.
        notes: What a reader should know of them.
    """

    count: int
    groups: np.ndarray
    read: Callable[[int], Iterator[tuple[Tensor, Tensor]]]
    facts: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def blocks(self, sae: SAE) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Which rows, their inputs and targets on the SAE's device, in blocks that its latents fit.

        Raises:
            NonFiniteError: NaN or infinity; names the row.
        """
        size = max(1, BLOCK_BYTES // (4 * max(sae.width, 1)))
        at = 0
        for x, y in self.read(size):
            for what in (x, y):
                finite = torch.isfinite(what).all(1)
                if not bool(finite.all()):
                    row = at + int(torch.argmin(finite.to(torch.int8)))
                    raise NonFiniteError(f"the activations have NaN or infinity in row {row}")
            yield slice(at, at + len(x)), x.to(sae.W_dec.device), y.to(sae.W_dec.device)
            at += len(x)


def held_out(sae: SAE, data: Any, *, target: Any = None, groups: Any = None) -> HeldOut:
    """Brings a store's activations, a tensor, or a mapping of site to tensor into one form.

    Args:
        sae: What is to be judged; says which sites to take.
        data: `Activations` with the SAE's sites, a mapping of site to vectors, or vectors `[rows, d_in]`.
        target: `[rows, d_out]`, what a transcoder predicts, where `data` is a tensor.
        groups: `[rows]`, text or pair of each row; the store's pairs (or its rows, without pairs) when not
            given, each row by itself for a tensor.

    Raises:
        InputError: Widths or counts that do not fit, or no site where one is needed.
        UnknownNameError: A site that the data do not hold.
        DataError: Fewer than two rows.
    """
    config = sae.config
    notes: tuple[str, ...] = ()
    facts: dict[str, Any] = {}
    if isinstance(data, Tensor | np.ndarray):
        x = torch.as_tensor(data)
        made = _of_tensors(x, x if target is None else torch.as_tensor(target))
    elif hasattr(data, "chunks") and hasattr(data, "index"):
        made, facts = _of_store(data, _sites(sae, data.sites), config.architecture == "crosscoder")
        groups = data.groups if groups is None else groups
    elif isinstance(data, dict):
        sites = _sites(sae, list(data))
        parts = [torch.as_tensor(data[site]) for site in sites]
        if config.architecture == "crosscoder":
            x = torch.cat([part.flatten(1) for part in parts], 1)
            made = _of_tensors(x, x)
        else:
            made = _of_tensors(parts[0], parts[-1])
    else:
        raise InputError(
            f"data is a {type(data).__name__}; expected Activations, a tensor [rows, d], or a mapping of "
            "site to tensor"
        )
    count, read, widths = made
    _check_widths(sae, widths)
    if count < 2:
        raise DataError(f"{count} rows are too few to judge an SAE on; expected two or more")
    if groups is None:
        groups, notes = np.arange(count), ("Rows came without texts: each counts as independent.",)
    groups = np.asarray(groups)
    if groups.shape != (count,):
        raise InputError(f"groups have shape {groups.shape}; expected one for each of {count} rows")
    codes = np.unique(groups, return_inverse=True)[1].reshape(-1)
    return HeldOut(count, codes, read, facts, notes)


def _sites(sae: SAE, has: list[str]) -> list[str]:
    """Names in the data of the input site and of the output site (all sites of a crosscoder)."""
    from veridical.probes.data import site_name

    config = sae.config
    if config.architecture == "crosscoder" and config.sites:
        return [site_name(site, has) for site in config.sites]
    if config.site is None:
        if len(has) == 1:
            return has
        raise InputError(f"this SAE does not say which site it reads; the data hold {', '.join(has)}")
    named = [config.site] if config.target_site is None else [config.site, config.target_site]
    return [site_name(site, has) for site in named]


_Made = tuple[int, Callable[[int], Iterator[tuple[Tensor, Tensor]]], tuple[int, int]]


def _of_tensors(x: Tensor, y: Tensor) -> _Made:
    if x.dim() < 2 or y.dim() < 2 or len(x) != len(y):
        raise InputError(
            f"inputs have shape {tuple(x.shape)} and targets {tuple(y.shape)}; expected [rows, d] with as "
            "many rows"
        )

    def read(size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for at in range(0, len(x), size):
            yield x[at : at + size].flatten(1), y[at : at + size].flatten(1)

    return len(x), read, (x[0].numel(), y[0].numel()) if len(x) else (0, 0)


def _of_store(acts: Activations, sites: list[str], together: bool) -> tuple[_Made, dict[str, Any]]:
    def read(size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for parts in zip(*(acts.chunks(site, size) for site in dict.fromkeys(sites))):
            flat = [part.flatten(1) for part in parts]
            if together:
                flat = [torch.cat(flat, 1)]
            yield flat[0], flat[-1]

    widths = [acts.moments[site].mean.numel() for site in sites]
    both = (sum(widths), sum(widths)) if together else (widths[0], widths[-1])
    facts = {
        "model": acts.request.model.get("path"),
        "model_fingerprint": acts.request.model["fingerprint"],
        "data_fingerprint": acts.fingerprint,
        "tokens": str(acts.request.tokens["selection"]),
        "site": sites[0],
    }
    return (len(acts), read, both), facts


def _check_widths(sae: SAE, widths: tuple[int, int]) -> None:
    for width, wanted, what in zip(widths, (sae.d_in, sae.d_out), ("reads", "writes")):
        if width not in (0, wanted):
            raise InputError(f"the SAE {what} {wanted} dimensions; the data have {width}")
