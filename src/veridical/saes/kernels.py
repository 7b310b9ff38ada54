"""The sparse path: a dense encoder forward, and nothing else that is dense.

For a batch of B tokens, F latents of which k are active, and width d, plain autograd does six products of
`B x d x F`. Only the first, the pre-activations, decides which latents are active. The decoder's output, its
gradient, the gradient of the activations and that of the encoder touch the k chosen latents of each row, so
they are weighted sums of gathered rows (`embedding_bag`, which is vectorised and parallel on every device),
by row for outputs and by latent for weights.

Everything has a leading member axis N: `W [N, F, d]`, `x [N, B, d]`. Rows of all members are numbered
`n * B + b`, and columns `n * F + f`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor
from torch.nn.functional import embedding_bag


@dataclass(frozen=True, eq=False)
class Chosen:
    """Latents that are active, row by row: a sparse matrix `[rows, columns]` in CSR form.

    Attributes:
        columns: Latent of each entry, `[entries]`.
        starts: First entry of each row, and the number of entries at the end, `[rows + 1]`.
        values: Pre-activation of each entry, `[entries]`.
        width: Number of columns, over all members.
    """

    columns: Tensor
    starts: Tensor
    values: Tensor
    width: int

    @cached_property
    def rows(self) -> Tensor:
        """Row of each entry, `[entries]`."""
        counts = self.starts.diff()
        return torch.repeat_interleave(counts, output_size=len(self.columns))

    @cached_property
    def by_column(self) -> Transposed:
        """The same entries latent by latent."""
        if self.columns.device.type == "cpu":
            return self._counted()
        columns, order = torch.sort(self.columns, stable=True)
        starts = torch.searchsorted(columns, torch.arange(self.width + 1, device=columns.device))
        return Transposed(order, self.rows[order], starts)

    def _counted(self) -> Transposed:
        """The same by a counting sort, which takes a sixth of the time; it is scipy's."""
        numbers = np.arange(len(self.columns), dtype=np.int32)
        shape = (len(self.starts) - 1, self.width)
        by_row = csr_array((numbers, self.columns.numpy(), self.starts.numpy()), shape=shape)
        found = by_row.tocsc()
        return Transposed(*map(torch.from_numpy, (found.data, found.indices, found.indptr)))


@dataclass(frozen=True, eq=False)
class Transposed:
    """Entries latent by latent: their numbers, rows, and the first entry of each latent (and the end)."""

    order: Tensor
    rows: Tensor
    starts: Tensor


@dataclass(frozen=True, eq=False)
class Block:
    """Some latents of one member for all its rows, dense: what the auxiliary loss reads of dead latents.

    Attributes:
        member: Number of the member.
        ids: The latents, `[n]`.
        pre: Their pre-activations, `[B, n]`.
    """

    member: int
    ids: Tensor
    pre: Tensor


def encode_at(
    x: Tensor, W: Tensor, b: Tensor, centre: Tensor | None, chosen: Chosen, blocks: Sequence[Block] = ()
) -> tuple[Tensor, list[Tensor]]:
    """Pre-activations of the chosen latents and of the blocks, as known from `scan`, with gradients.

    Args:
        x: Inputs `[N, B, d]`, already centred; they get no gradient.
        W: Encoder `[N, F, d]`.
        b: Its bias `[N, F]`.
        centre: What was subtracted from the inputs, `[N, d]`; None for nothing.
        chosen: The chosen latents.
        blocks: Further latents.

    Returns:
        Values of the chosen latents `[entries]`, and of each block `[B, n]`.
    """
    values, *others = _EncodeAt.apply(W, b, centre, x, chosen, tuple(blocks))  # type: ignore[misc]
    return values, others


def error_at(
    values: Tensor,
    W: Tensor,
    b: Tensor,
    target: Tensor,
    chosen: Chosen,
    blocks: Sequence[Block] = (),
    block_values: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Squared distances of reconstructions from their target, with gradients, without further copies of them.

    Args:
        values: Latents `[entries]`.
        W: Decoder `[N, F, d]`.
        b: Its bias `[N, d]`.
        target: What is to be reconstructed, `[B, d]`, or `[N, B, d]` with one for each member.
        chosen: Which latents these are.
        blocks: Further latents, each decoded by itself.
        block_values: Their values, `[B, n]` each.

    Returns:
        Mean over rows of the squared distance, `[N]`; the residuals `[N, B, d]`, target less reconstruction,
        without gradient; and `[B, d]` for each block, without bias.
    """
    error, residual, *others = _ErrorAt.apply(W, b, values, target, chosen, tuple(blocks), *block_values)  # type: ignore[misc]
    return error, residual, others


def decode_at(
    values: Tensor,
    W: Tensor,
    chosen: Chosen,
    shape: tuple[int, ...],
    blocks: Sequence[Block] = (),
    block_values: Sequence[Tensor] = (),
) -> tuple[Tensor, list[Tensor]]:
    """Sums of decoder rows weighted by latents, without bias, with gradients.

    Args:
        values: Latents `[entries]`.
        W: Decoder `[N, F, d]`.
        chosen: Which latents these are.
        shape: Leading shape of the output, `(N, B)`; its product is the number of rows of `chosen`.
        blocks: Further latents, each decoded by itself.
        block_values: Their values, `[B, n]` each.

    Returns:
        `[*shape, d]`, and `[B, d]` for each block.
    """
    out, *others = _DecodeAt.apply(W, values, chosen, shape, tuple(blocks), *block_values)  # type: ignore[misc]
    return out, others


def gather_sum(table: Tensor, picks: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows of `table [n, d]`: entries `starts[i]` to `starts[i + 1]` make row i of them."""
    return embedding_bag(
        picks, table, starts, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def dots(left: Tensor, right: Tensor, chosen: Chosen) -> Tensor:
    """Inner products of rows of `left [rows, d]` and `right [columns, d]` for each entry, `[entries]`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        shape = (len(left), len(right))
        pattern = torch.sparse_csr_tensor(
            chosen.starts, chosen.columns, torch.zeros_like(chosen.values), shape, check_invariants=False
        )
        return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values()


def squared_error(made: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances of `made [..., B, d]` from `target [B, d]`, mean over rows, `[...]`, with gradient;
    and the residual `target - made` without."""
    return _SquaredError.apply(made, target)  # type: ignore[return-value]


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, made: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        residual = target - made
        ctx.save_for_backward(residual)
        ctx.mark_non_differentiable(residual)
        return torch.linalg.vecdot(residual, residual).mean(-1), residual

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (residual,) = ctx.saved_tensors
        return residual * (grad * (-2 / residual.shape[-2]))[..., None, None], None


class _EncodeAt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        W: Tensor,
        b: Tensor,
        centre: Tensor | None,
        x: Tensor,
        chosen: Chosen,
        blocks: tuple[Block, ...],
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(W, x)
        ctx.chosen, ctx.blocks, ctx.centred = chosen, blocks, centre is not None
        return (chosen.values, *(block.pre for block in blocks))

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *block_grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        W, x = ctx.saved_tensors
        by_column = ctx.chosen.by_column
        weights = grad.index_select(0, by_column.order)
        grad_W = gather_sum(x.flatten(0, 1), by_column.rows, by_column.starts, weights).view_as(W)
        grad_b = grad.new_zeros(ctx.chosen.width).scatter_add_(0, ctx.chosen.columns, grad).view(W.shape[:2])
        for block, block_grad in zip(ctx.blocks, block_grads):
            grad_W[block.member].index_add_(0, block.ids, block_grad.T @ x[block.member])
            grad_b[block.member].index_add_(0, block.ids, block_grad.sum(0))
        grad_centre = -(grad_b.unsqueeze(1) @ W).squeeze(1) if ctx.centred else None
        return grad_W, grad_b, grad_centre, None, None, None


class _ErrorAt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        W: Tensor,
        b: Tensor,
        values: Tensor,
        target: Tensor,
        chosen: Chosen,
        blocks: tuple[Block, ...],
        *block_values: Tensor,
    ) -> tuple[Tensor, ...]:
        made = gather_sum(W.flatten(0, 1), chosen.columns, chosen.starts, values)
        made = made.view(len(W), -1, W.shape[-1]).add_(b.unsqueeze(1))
        residual = torch.sub(target, made, out=made)
        ctx.save_for_backward(W, values, residual, *block_values)
        ctx.chosen, ctx.blocks, ctx.shared = chosen, blocks, target.ndim < residual.ndim
        ctx.mark_non_differentiable(residual)
        decoded = [known @ W[block.member, block.ids] for known, block in zip(block_values, blocks)]
        return (torch.linalg.vector_norm(residual, dim=-1).square().mean(-1), residual, *decoded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor, *block_grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # The gradient of the reconstructions is the residual times a number for each member, which is put on
        # the entries: there are fewer of them.
        W, values, residual, *block_values = ctx.saved_tensors
        by_column, factor = ctx.chosen.by_column, grad * (-2 / residual.shape[1])
        entries = ctx.chosen.starts[:: residual.shape[1]].diff()
        factors = torch.repeat_interleave(factor, entries, output_size=len(values))
        flat = residual.flatten(0, 1)
        grad_values = dots(flat, W.flatten(0, 1), ctx.chosen).mul_(factors)
        weights = (values * factors).index_select(0, by_column.order)
        grad_W = gather_sum(flat, by_column.rows, by_column.starts, weights).view_as(W)
        grad_b = residual.sum(1).mul_(factor[:, None])
        grad_target = None
        if ctx.needs_input_grad[3]:
            grad_target = residual * -factor[:, None, None]
            grad_target = grad_target.sum(0) if ctx.shared else grad_target
        grads = _decode_blocks(W, grad_W, ctx.blocks, block_values, block_grads)
        return (grad_W, grad_b, grad_values, grad_target, None, None, *grads)


class _DecodeAt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        W: Tensor,
        values: Tensor,
        chosen: Chosen,
        shape: tuple[int, ...],
        blocks: tuple[Block, ...],
        *block_values: Tensor,
    ) -> tuple[Tensor, ...]:
        out = gather_sum(W.flatten(0, 1), chosen.columns, chosen.starts, values)
        ctx.save_for_backward(W, values, *block_values)
        ctx.chosen, ctx.blocks = chosen, blocks
        decoded = [known @ W[block.member, block.ids] for known, block in zip(block_values, blocks)]
        return (out.view(*shape, W.shape[-1]), *decoded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *block_grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        W, values, *block_values = ctx.saved_tensors
        by_column, flat = ctx.chosen.by_column, grad.reshape(-1, W.shape[-1])
        grad_values = dots(flat, W.flatten(0, 1), ctx.chosen)
        weights = values.index_select(0, by_column.order)
        grad_W = gather_sum(flat, by_column.rows, by_column.starts, weights).view_as(W)
        grads = _decode_blocks(W, grad_W, ctx.blocks, block_values, block_grads)
        return (grad_W, grad_values, None, None, None, *grads)


def _decode_blocks(
    W: Tensor, grad_W: Tensor, blocks: Sequence[Block], values: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients of the blocks' values from those of what they decode to; adds the decoder's to `grad_W`."""
    found = []
    for block, known, grad in zip(blocks, values, grads):
        grad_W[block.member].index_add_(0, block.ids, known.T @ grad)
        found.append(grad @ W[block.member, block.ids].T)
    return found
