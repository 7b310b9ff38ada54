"""What every sparse autoencoder shares: parameters, one or a stack of them, scales, decoder norms.

One layout everywhere, a row for each latent: `W_enc [F, d_in]`, `b_enc [F]`, `W_dec [F, d_out]`,
`b_dec [d_out]`. A stack of N SAEs of one shape has a leading member axis in each and is computed at once.
Vectors given and returned are in raw activation units: while training, inputs are multiplied by `scale` and
outputs divided by `scale_out`; `folded` puts both into the weights.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from veridical.errors import ConfigError, DataError
from veridical.saes.config import SAEConfig
from veridical.saes.median import geometric_median

if TYPE_CHECKING:
    from veridical.saes.evaluation import Evaluation
    from veridical.saes.origin import SAEOrigin

FIRED = 1e-3
"""A latent fires where it exceeds this (Gao et al. 2024); one that was picked with value 0 did not fire."""

ENCODER_NORM = 0.5
"""Norm of encoder rows at the start."""


@dataclass(frozen=True)
class Loss:
    """The training loss of one batch.

    Attributes:
        total: What is minimised, a scalar (`[N]` for a stack).
        parts: Its terms and figures beside it by name, detached, of the same shape as `total`.
        fired: Booleans `[F]` (`[N, F]`): the latents above 1e-3 for a token of the batch.
    """

    total: Tensor
    parts: dict[str, Tensor]
    fired: Tensor


class SAE(nn.Module):
    """A sparse autoencoder, or N of one shape; subclasses say how latents follow from pre-activations.

    Args:
        configs: One config, or several that agree in architecture and width for a stack.
        d_in: Width of the input vectors.
        d_out: Width of the output vectors; the input's when not given.

    Attributes:
        configs: The configs, one for each member.
        d_in, d_out, width: Widths of input and output, and number of latents F.
        stacked: Whether parameters have a leading member axis.
        scale, scale_out: Factors from raw units to the units of the weights, input and output, scalars.
        variance: Mean squared distance of the targets from their mean (summed over dimensions), in units of
            the weights: what reconstruction errors are divided by.

    Raises:
        ConfigError: Configs that make no SAE of this width, or no stack.
    """

    architecture: ClassVar[str]
    centred: ClassVar[bool] = True
    """Whether the decoder bias is subtracted from the input."""
    unit_norm: ClassVar[bool] = True
    """Whether decoder rows are held at norm 1."""
    homogeneous: ClassVar[tuple[str, ...]] = ("b_enc", "b_dec")
    """Parameters and buffers in units of the activations, which scale with the input."""
    origin: SAEOrigin | None = None
    """Where a single SAE came from and how it scored; None where that is not known."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    scale: Tensor
    scale_out: Tensor
    variance: Tensor

    def __init__(self, configs: SAEConfig | Sequence[SAEConfig], d_in: int, d_out: int | None = None) -> None:
        super().__init__()
        self.stacked = not isinstance(configs, SAEConfig)
        self.configs: tuple[SAEConfig, ...] = (configs,) if isinstance(configs, SAEConfig) else tuple(configs)
        self.d_in, self.d_out = d_in, d_in if d_out is None else d_out
        self._check()
        self.width = self.configs[0].latents(d_in)
        made = [self.initial(config, self.d_in, self.d_out) for config in self.configs]
        for name in made[0]:
            values = [one[name] for one in made]
            setattr(self, name, nn.Parameter(torch.stack(values) if self.stacked else values[0]))
        for name in ("scale", "scale_out", "variance"):
            self.register_buffer(name, torch.ones(()))

    @property
    def config(self) -> SAEConfig:
        """The config of a single SAE, the first member's of a stack."""
        return self.configs[0]

    @classmethod
    def initial(cls, config: SAEConfig, d_in: int, d_out: int) -> dict[str, Tensor]:
        """Initial parameters of one SAE, from its seed: random directions of norm 1 in the decoder, and the
        same in the encoder (Gao et al. 2024) where shapes allow, half as long, so that they turn faster."""
        random = torch.Generator().manual_seed(config.seed)
        width = config.latents(d_in)
        W_dec = unit_rows(torch.randn(width, d_out, generator=random))
        W_enc = W_dec.clone() if d_in == d_out else unit_rows(torch.randn(width, d_in, generator=random))
        return {
            "W_enc": ENCODER_NORM * W_enc,
            "b_enc": torch.zeros(width),
            "W_dec": W_dec,
            "b_dec": torch.zeros(d_out),
        }

    # Forward

    def pre_activations(self, x: Tensor) -> Tensor:
        """What the activation function is applied to: `x [..., d_in]` to `[..., F]`.

        A stack reads `[B, d_in]`, or `[N, B, d_in]` with an input of its own for each member, and gives
        `[N, B, F]`.
        """
        return self.inputs(x) @ self.W_enc.mT + self.row(self.b_enc)

    def encode(self, x: Tensor) -> Tensor:
        """Latents of `x [..., d_in]`, dense: `[..., F]` (`[N, B, F]` for a stack), in the weights' units."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Reconstruction from latents `[..., F]`: `[..., d_out]`, in raw units."""
        return (latents @ self.W_dec + self.row(self.b_dec)) / self.scale_out

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction of `x [..., d_in]`: `[..., d_out]`, both in raw units."""
        return self.rebuild(x, self.encode(x))

    def rebuild(self, x: Tensor, latents: Tensor) -> Tensor:
        """The output of `forward` where the latents of `x` are at hand already."""
        return self.decode(latents)

    def loss(
        self, x: Tensor, y: Tensor | None = None, *, dead: Tensor | None = None, ramp: Tensor | float = 1.0
    ) -> Loss:
        """The training loss of a batch.

        Args:
            x: Inputs `[B, d_in]`, raw units.
            y: Targets `[B, d_out]`; the inputs when not given.
            dead: Booleans `[F]` (`[N, F]`): the latents that count as dead. None for none.
            ramp: Factor on the sparsity penalty, from its warm-up; `[N]` for one each.
        """
        raise NotImplementedError

    def inputs(self, x: Tensor) -> Tensor:
        """`x` as the encoder reads it: in units of the weights, centred on the decoder bias where the
        architecture does that."""
        x = x.to(self.W_enc.dtype) * self.scale
        return x - self.row(self.b_dec) if self.centred else x

    def targets(self, x: Tensor, y: Tensor | None) -> Tensor:
        """What is to be reconstructed, in units of the weights."""
        return (x if y is None else y).to(self.W_dec.dtype) * self.scale_out

    def row(self, vector: Tensor) -> Tensor:
        """A vector for each member, `[F]` or `[N, F]`, shaped to stand beside `[..., F]`."""
        return vector.unsqueeze(-2) if self.stacked else vector

    def each(self, values: Sequence[float]) -> Tensor:
        """A number for each member, as a scalar or `[N]`, beside the weights."""
        made = torch.tensor(values, dtype=self.W_enc.dtype, device=self.W_enc.device)
        return made if self.stacked else made[0]

    # Members

    @classmethod
    def stack(cls, saes: Sequence[Self]) -> Self:
        """Several SAEs of one shape as one stack; their weights are copied.

        Raises:
            ConfigError: They differ in shape or scale.
        """
        first = saes[0]
        made = cls([sae.config for sae in saes], first.d_in, first.d_out)
        parameters = {name for name, _ in first.named_parameters()}
        state = {}
        for name, value in first.state_dict().items():
            values = [sae.state_dict()[name] for sae in saes]
            if name in parameters or name in made.member_buffers:
                state[name] = torch.stack(values)
            elif all(torch.equal(value, other) for other in values):
                state[name] = value
            else:
                raise ConfigError(f"a stack shares its {name}; these SAEs have different ones")
        return made._filled(state)

    def member(self, number: int) -> Self:
        """One SAE of a stack, its weights copied."""
        made = type(self)(self.configs[number], self.d_in, self.d_out)
        parameters = {name for name, _ in self.named_parameters()}
        own = {
            name: value[number] if name in parameters or name in self.member_buffers else value
            for name, value in self.state_dict().items()
        }
        return made._filled(own)

    member_buffers: ClassVar[tuple[str, ...]] = ()
    """Buffers that each member has its own of."""

    # Scales and norms

    @torch.no_grad()
    def calibrate(self, x: Tensor, y: Tensor | None = None) -> None:
        """Sets scales, decoder bias and variance from a sample of the data, raw units.

        Args:
            x: Inputs `[B, d_in]`.
            y: Targets `[B, d_out]`; the inputs when not given.

        Raises:
            DataError: Vectors that are all zero, or all the same.
        """
        y = x if y is None else y
        if self.config.normalise == "mean_norm":
            self.set_scales(x.double(), y.double())
        target = self.targets(x, y).double()
        middles = {config.bias_init: middle(target, config.bias_init) for config in self.configs}
        for number, config in enumerate(self.configs):
            (self.b_dec[number] if self.stacked else self.b_dec).copy_(middles[config.bias_init])
        if not self.centred:
            self._centre_encoder(self.inputs(x).double())
        variance = (target - target.mean(0)).square().sum(-1).mean()
        if not variance > 0:
            raise DataError(f"{len(target)} vectors are all the same: there is nothing to reconstruct")
        self.variance.copy_(variance)

    def _centre_encoder(self, x: Tensor) -> None:
        """Starts the encoder's bias where centring the inputs would put it: else a large mean, which real
        activations have, decides which latents are active."""
        middles = {config.bias_init: middle(x, config.bias_init) for config in self.configs}
        for number, config in enumerate(self.configs):
            W, b = (self.W_enc[number], self.b_enc[number]) if self.stacked else (self.W_enc, self.b_enc)
            b.copy_(-W.double() @ middles[config.bias_init])

    def set_scales(self, x: Tensor, y: Tensor) -> None:
        """Factors that bring a sample of inputs and targets to a mean norm of sqrt(d)."""
        self.scale.fill_(unit_factor(x))
        self.scale_out.fill_(unit_factor(y))

    @torch.no_grad()
    def folded(self) -> Self:
        """The same SAE with both scales put into its weights: same output, latents in raw units.

        ReLU, TopK and thresholds commute with a factor, so latents are divided by the output's scale, as are
        biases and thresholds; encoder rows take up what differs between the scales. Decoder norms stay.
        """
        made = type(self)(self.configs if self.stacked else self.config, self.d_in, self.d_out)
        state = {name: value.clone() for name, value in self.state_dict().items()}
        self._fold(state)
        filled = made._filled(state)
        filled.origin = self.origin
        return filled

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Brings decoder rows back to norm 1, where the architecture holds them there."""
        if self.unit_norm:
            self.W_dec.div_(row_norms(self.W_dec))

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Takes out the part of the decoder's gradient along its rows, which the norm undoes anyway and which
        would only feed Adam's moments (Bricken et al. 2023)."""
        if self.unit_norm and self.W_dec.grad is not None:
            along = torch.linalg.vecdot(self.W_dec.grad, self.W_dec).unsqueeze(-1)
            self.W_dec.grad.addcmul_(along, self.W_dec, value=-1)

    def _filled(self, state: dict[str, Tensor]) -> Self:
        """This SAE with the values, device and dtype of `state`."""
        made = self.to(state["W_enc"].device, state["W_enc"].dtype)
        made.load_state_dict(state)
        return made

    def _fold(self, state: dict[str, Tensor]) -> None:
        for name in self.homogeneous:
            state[name] /= self.scale_out
        state["W_enc"] *= self.scale / self.scale_out
        state["variance"] /= self.scale_out.square()
        state["scale"], state["scale_out"] = torch.ones_like(self.scale), torch.ones_like(self.scale_out)

    def save(self, folder: str | Path) -> Path:
        """Saves a single SAE as a SAELens folder with config, figures and a card; `load_sae` reads it."""
        from veridical.saes.saved import save_sae

        return save_sae(self, folder)

    def evaluate(self, data: Any, texts: Any = None, **options: Any) -> Evaluation:
        """Judges a single SAE on held-out rows, or in a model over texts; see `evaluate_sae`."""
        from veridical.saes.evaluate import evaluate_sae

        return evaluate_sae(self, data, texts, **options)

    def describe(self) -> str:
        """`k 32`, or the penalty: what decides the sparsity, in a word or two."""
        return f"k {self.config.k}"

    def __repr__(self) -> str:
        shape = f"{self.d_in}" if self.d_in == self.d_out else f"{self.d_in} to {self.d_out}"
        many = f"{len(self.configs)} of " if self.stacked else ""
        return f"{type(self).__name__}({many}{shape} with {self.width:,} latents, {self.describe()})"

    def _check(self) -> None:
        if not self.configs:
            raise ConfigError("no configs: a stack needs one or more")
        if self.d_in < 1 or self.d_out < 1:
            raise DataError(f"vectors are {self.d_in} to {self.d_out} wide; expected 1 or more")
        for config in self.configs:
            config.check(self.d_in)
            if config.architecture != self.architecture:
                raise ConfigError(
                    f"{config.label} is a {config.architecture}; expected a {self.architecture}"
                )
        widths = {config.latents(self.d_in) for config in self.configs}
        if len(widths) > 1:
            raise ConfigError(f"members of a stack have {sorted(widths)} latents; expected one width")
        weights = 4 * len(self.configs) * max(widths) * (self.d_in + self.d_out)
        if weights > (memory := _memory()):
            raise ConfigError(
                f"{self.config.label}: {max(widths):,} latents have {weights / 1e9:,.0f} GB of weights, and "
                f"this machine {memory / 1e9:,.0f} GB of memory; expected a smaller width"
            )


def _memory() -> float:
    """Bytes of memory of this machine; infinite where the system does not say."""
    if not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def unit_rows(matrix: Tensor) -> Tensor:
    """`matrix [..., n, d]` with each row divided by its norm; a row of zeros stays."""
    return matrix / row_norms(matrix)


def row_norms(matrix: Tensor) -> Tensor:
    """Norms of the rows of `matrix [..., n, d]`, `[..., n, 1]`, none below the least normal number."""
    return torch.linalg.vector_norm(matrix, dim=-1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)


def middle(points: Tensor, how: str) -> Tensor:
    """The geometric median, mean or zero of `points [n, d]`, `[d]`."""
    if how == "geometric_median":
        return geometric_median(points)
    return points.mean(0) if how == "mean" else torch.zeros_like(points[0])


def unit_factor(vectors: Tensor) -> float:
    """What brings `vectors [n, d]` to a mean norm of sqrt(d)."""
    norm = float(vectors.norm(dim=-1).mean())
    if not norm > 0:
        raise DataError(f"{len(vectors)} vectors are all zero: they cannot be scaled")
    return math.sqrt(vectors.shape[-1]) / norm


def per_member(values: Tensor) -> Tensor:
    """Mean over the tokens of `values [..., B]`: a scalar, or `[N]` for a stack."""
    return values.mean(-1)


def figures(**parts: Any) -> dict[str, Tensor]:
    """Terms of a loss, detached."""
    return {name: value.detach() for name, value in parts.items()}
