"""SAEs that read every row in units of its own: layer norm, or rows brought to one length.

SAELens's `layer_norm` and `constant_norm_rescale`, as the SAEs of Gao et al. 2024 (arXiv:2406.04093) and
others have it. No factor can be folded into weights, since each row has another: the row is normalised, the
SAE inside runs, and its output is brought back to the row's units. Latents are in units of normalised rows.
Such SAEs are read, judged and used here, not trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from veridical.errors import InputError
from veridical.saes.base import SAE, Loss

ROW_NORMS = ("layer_norm", "constant_norm_rescale")
EPSILON = 1e-5
"""What SAELens adds to a row's standard deviation before dividing by it."""


class RowNormalised(SAE):
    """An SAE of normalised rows.

    Args:
        inner: The SAE, in units of normalised rows; output as wide as its input.
        how: `layer_norm` (less the row's mean, over its standard deviation) or `constant_norm_rescale` (to
            length sqrt(d)).

    Attributes:
        inner, how: As given.
    """

    inner: SAE

    def __init__(self, inner: SAE, how: str) -> None:
        nn.Module.__init__(self)
        if how not in ROW_NORMS:
            raise InputError(f"rows are normalised by {how!r}; expected one of {', '.join(ROW_NORMS)}")
        if inner.stacked or inner.d_in != inner.d_out:
            raise InputError(f"{inner!r} cannot read normalised rows: it is a stack, or writes another width")
        self.inner, self.how = inner, how
        self.configs, self.stacked = inner.configs, False
        self.d_in, self.d_out, self.width = inner.d_in, inner.d_out, inner.width
        for name in ("scale", "scale_out", "variance"):
            self.register_buffer(name, torch.ones(()))

    @property
    def W_enc(self) -> Tensor:  # type: ignore[override]
        """The inner SAE's, `[F, d_in]`."""
        return self.inner.W_enc

    @property
    def W_dec(self) -> Tensor:  # type: ignore[override]
        """The inner SAE's, `[F, d_out]`: directions; their length counts in the row's units."""
        return self.inner.W_dec

    @property
    def b_dec(self) -> Tensor:  # type: ignore[override]
        """Zero: what the inner bias adds has another length in each row."""
        return torch.zeros_like(self.inner.b_dec)

    def encode(self, x: Tensor) -> Tensor:
        """Latents of `x [..., d_in]`: `[..., F]`, in units of normalised rows."""
        return self.inner.encode(self._normalised(x)[0])

    def decode(self, latents: Tensor) -> Tensor:
        """Refused: without the row, its units are not known."""
        raise InputError("latents of normalised rows have no output without their rows; call the SAE itself")

    def rebuild(self, x: Tensor, latents: Tensor) -> Tensor:
        """Reconstruction of `x [..., d_in]` from its latents: `[..., d_out]`, in raw units."""
        row, spread, mean = self._normalised(x)
        return self.inner.rebuild(row, latents) * spread + mean

    def row_units(self, x: Tensor) -> Tensor:
        """Length in raw units of a step of 1 in normalised rows, `[..., 1]`."""
        return self._normalised(x)[1]

    def folded(self) -> Self:
        """Itself: there is nothing to fold."""
        return self

    def loss(
        self, x: Tensor, y: Tensor | None = None, *, dead: Tensor | None = None, ramp: Tensor | float = 1.0
    ) -> Loss:
        """Refused: such SAEs are read, not trained."""
        raise InputError(
            "an SAE of normalised rows is not trained here; normalise the vectors and train on them"
        )

    @classmethod
    def stack(cls, saes: Sequence[Self]) -> Self:
        """Refused, as for `loss`."""
        raise InputError("SAEs of normalised rows are not stacked")

    def describe(self) -> str:
        return f"{self.inner.describe()}, {self.how}"

    def _normalised(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rows as the inner SAE reads them, and what brings its output back: factor and shift."""
        x = x.to(self.W_enc.dtype)
        tiny = torch.finfo(x.dtype).tiny
        if self.how == "constant_norm_rescale":
            spread = x.norm(dim=-1, keepdim=True).clamp_min(tiny) / self.d_in**0.5
            return x / spread, spread, torch.zeros_like(spread)
        mean = x.mean(-1, keepdim=True)
        spread = (x - mean).std(-1, keepdim=True)
        return (x - mean) / (spread + EPSILON), spread, mean
