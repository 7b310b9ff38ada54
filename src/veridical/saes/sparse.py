"""SAEs that keep a number of latents instead of penalising them: the training step, without dense latents."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from veridical.saes.auxk import Plan, auxiliary_loss, plans
from veridical.saes.base import FIRED, SAE, Loss, figures
from veridical.saes.config import SAEConfig
from veridical.saes.kernels import Block, Chosen, encode_at, error_at
from veridical.saes.scan import Scan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class SparseSAE(SAE):
    """What TopK and its kin share; a subclass says which latents are chosen, in `pick`.

    The training step has a leading member axis throughout, of length 1 for a single SAE.
    """

    def __init__(self, configs: SAEConfig | Sequence[SAEConfig], d_in: int, d_out: int | None = None) -> None:
        super().__init__(configs, d_in, d_out)
        self._scratch: list[Tensor] = []

    @abstractmethod
    def pick(self, scan: Scan) -> Chosen:
        """The latents that are active in a training batch, found while the pre-activations are scanned."""

    def loss(
        self, x: Tensor, y: Tensor | None = None, *, dead: Tensor | None = None, ramp: Tensor | float = 1.0
    ) -> Loss:
        """Squared error divided by the variance of the targets, plus AuxK for the dead latents.

        The inputs get no gradient. `ramp` does nothing here: there is no penalty to warm up.
        """
        with torch.no_grad():
            target, encoded = self.targets(x, y), self.led(self.inputs(x), 3)
            encoded = encoded.expand(len(self.configs), -1, -1)
            planned = plans(self.configs, self.d_in, None if dead is None else self.led(dead, 2))
            blocks = [
                Block(plan.member, plan.ids, encoded.new_empty(len(x), len(plan.ids))) for plan in planned
            ]
            W, b = self.led(self.W_enc, 3), self.led(self.b_enc, 2)
            scan = Scan(encoded, W, b, blocks, self.product_dtype, self._scratch)
            chosen = self.pick(scan)
        centre = self.led(self.b_dec, 2) if self.centred else None
        values, known = encode_at(
            encoded, self.led(self.W_enc, 3), self.led(self.b_enc, 2), centre, chosen, blocks
        )
        values = values.relu()
        acts = [plan.values(pre) for plan, pre in zip(planned, known)]
        errors, residual, revived = self.errors(encoded, target, values, chosen, blocks, acts)
        aux = self._auxiliary(planned, revived, residual)
        return self._finished(errors / self.variance, aux, values.detach(), chosen, len(x))

    def errors(
        self,
        x: Tensor,
        target: Tensor,
        values: Tensor,
        chosen: Chosen,
        blocks: Sequence[Block],
        acts: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Squared errors `[N, nested]`, the last of all latents; the residuals `[N, B, d_out]` that these
        leave, without gradient; and what each block reconstructs, `[B, d_out]`."""
        W, b = self.led(self.W_dec, 3), self.led(self.b_dec, 2)
        error, residual, revived = error_at(values, W, b, target, chosen, blocks, acts)
        return error.unsqueeze(1), residual, revived

    @property
    def product_dtype(self) -> torch.dtype:
        """Number format of the encoder's product in training."""
        return self.W_enc.dtype if self.config.dtype == "float32" else torch.bfloat16

    def led(self, tensor: Tensor, dims: int) -> Tensor:
        """`tensor` with a member axis of length 1 in front if it has fewer than `dims` axes."""
        return tensor if tensor.ndim == dims else tensor.unsqueeze(0)

    def _auxiliary(self, planned: list[Plan], revived: list[Tensor], residual: Tensor) -> Tensor:
        """The auxiliary loss of each member times its coefficient, `[N]`."""
        losses = [residual.new_zeros(())] * len(self.configs)
        for plan, reconstruction in zip(planned, revived):
            loss = auxiliary_loss(reconstruction, residual[plan.member])
            losses[plan.member] = self.configs[plan.member].aux * loss
        return torch.stack(losses)

    def _finished(self, fvu: Tensor, aux: Tensor, values: Tensor, chosen: Chosen, size: int) -> Loss:
        count = len(self.configs)
        fired = torch.zeros(chosen.width, device=values.device)
        fired = fired.scatter_add_(0, chosen.columns, (values > FIRED).float()) > 0
        active = torch.zeros(len(values) + 1, dtype=torch.int64, device=values.device)
        torch.cumsum(values > 0, 0, out=active[1:])
        l0 = active[chosen.starts[::size]].diff() / size
        total, parts = fvu.mean(1) + aux, figures(fvu=fvu[:, -1], aux=aux, l0=l0)
        if self.stacked:
            return Loss(total, parts, fired.view(count, -1))
        return Loss(total[0], {name: value[0] for name, value in parts.items()}, fired)
