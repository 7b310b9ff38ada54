r"""TopK training steps of this package and of its peers behind one face: `step(x)`, `encode(x)`, `decoder`.

SAELens is in the `lens` extra. sparsify and dictionary_learning are not dependencies; install them beside:

    pip install --no-deps --target DIR eai-sparsify dictionary-learning natsort simple-parsing \
        docstring-parser schedulefree einops
    python tests/benchmarks/bench_sae.py --peers DIR

A peer that is not found is left out of the table. All are given the same data, batch, learning rate (constant
after a short rise, which every one of them gets from its own scheduler or none), Adam, and k.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import types
from typing import Any, Protocol

import torch
from torch import Tensor

from veridical.saes import SAEConfig
from veridical.saes.group import Group, Member


class Contender(Protocol):
    """A TopK SAE in training."""

    decoder: Any

    def step(self, x: Tensor) -> None:
        """One training step on `x [B, d]`."""

    def reconstruct(self, x: Tensor) -> Tensor:
        """Reconstruction of `x [B, d]`."""

    def parameters(self) -> tuple[Tensor, Tensor]:
        """Encoder rows `[F, d]` and bias `[F]`, to be changed in place."""

    def hold_dead(self, count: int) -> None:
        """Says that the first latents were silent for long."""

    def still_dead(self, count: int, since: int) -> int:
        """How many of the first latents were silent in the last `since` tokens."""


class Ours:
    """This package: a group of one."""

    def __init__(
        self, d: int, width: int, k: int, lr: float, batch: int, steps: int, seed: int, **options: Any
    ):
        options = {"dead_after": 12_800, "warmup": 0.0, "decay": 0.0, **options}
        config = SAEConfig(width=width, k=k, lr=lr, batch=batch, seed=seed, **options)
        self.group = Group([Member("ours", config, steps * batch)], d, d)
        self.ready = False

    def step(self, x: Tensor) -> None:
        self.calibrate(x)
        self.group.step(x)

    def calibrate(self, x: Tensor) -> None:
        if not self.ready:
            self.group.stack.calibrate(x)
            self.ready = True

    def reconstruct(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.group.stack(x)[0]

    @property
    def decoder(self) -> Tensor:
        return self.group.stack.W_dec[0].detach()

    def hold_dead(self, count: int) -> None:
        self.group.silent[0, :count] = 10**9

    def parameters(self) -> tuple[Tensor, Tensor]:
        return self.group.stack.W_enc.data[0], self.group.stack.b_enc.data[0]

    def still_dead(self, count: int, since: int) -> int:
        return int((self.group.silent[0, :count] >= since).sum())


class SAELens:
    """`SAETrainer.step` of SAELens on a `TopKTrainingSAE`; its clock counts steps."""

    def __init__(
        self, d: int, width: int, k: int, lr: float, batch: int, steps: int, seed: int, **options: Any
    ):
        with quietly():
            from sae_lens.config import SAETrainerConfig
            from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
            from sae_lens.training.sae_trainer import SAETrainer

        torch.manual_seed(seed)
        scaled = options.get("normalise", "expected_average_only_in")
        config = TopKTrainingSAEConfig(d_in=d, d_sae=width, k=k, normalize_activations=scaled)
        self.sae = TopKTrainingSAE(config)
        trainer = SAETrainerConfig(
            total_training_samples=steps * batch,
            train_batch_size_samples=batch,
            lr=lr,
            lr_end=lr,
            dead_feature_window=max(options.get("dead_after", 12_800) // batch, 1),
        )
        self.trainer = SAETrainer(trainer, self.sae, iter(()))
        self.batch, self.d = batch, d

    def step(self, x: Tensor) -> None:
        scaler = self.trainer.activation_scaler
        if self.sae.cfg.normalize_activations == "expected_average_only_in" and scaler.scaling_factor is None:
            scaler.scaling_factor = self.d**0.5 / float(x.norm(dim=-1).mean())
        self.trainer.step(x)
        self.trainer.n_training_steps += 1

    def reconstruct(self, x: Tensor) -> Tensor:
        factor = self.trainer.activation_scaler.scaling_factor or 1.0
        with torch.no_grad():
            return self.sae(x * factor) / factor

    @property
    def decoder(self) -> Tensor:
        return self.sae.W_dec.detach()

    def hold_dead(self, count: int) -> None:
        self.trainer.n_forward_passes_since_fired[:count] = 10**9

    def parameters(self) -> tuple[Tensor, Tensor]:
        return self.sae.W_enc.data.T, self.sae.b_enc.data

    def still_dead(self, count: int, since: int) -> int:
        silent = self.trainer.n_forward_passes_since_fired[:count]
        return int((silent * self.batch >= since).sum())


class Sparsify:
    """The step of sparsify's `Trainer` on a `SparseCoder`, with `torch.optim.Adam` as on a CPU."""

    def __init__(
        self, d: int, width: int, k: int, lr: float, batch: int, steps: int, seed: int, **options: Any
    ):
        with quietly():
            sparsify = importlib.import_module("sparsify")
        torch.manual_seed(seed)
        self.sae = sparsify.SparseCoder(d, sparsify.SparseCoderConfig(num_latents=width, k=k))
        self.optimiser = torch.optim.Adam(self.sae.parameters(), lr=lr)
        self.silent = torch.zeros(width, dtype=torch.int64)
        self.dead_after, self.first = options.get("dead_after", 12_800), True

    def step(self, x: Tensor) -> None:
        if self.first:
            self.sae.b_dec.data.copy_(x.mean(0))
            self.first = False
        self.sae.set_decoder_norm_to_unit_norm()
        total = (x - x.mean(0)).pow(2).sum()
        out = self.sae(x, dead_mask=self.silent > self.dead_after, total_variance=total)
        (out.fvu + out.auxk_loss / 32).backward()
        fired = torch.zeros_like(self.silent, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.silent += len(x)
        self.silent[fired] = 0

    def reconstruct(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.sae(x).sae_out

    @property
    def decoder(self) -> Tensor:
        return self.sae.W_dec.detach()

    def hold_dead(self, count: int) -> None:
        self.silent[:count] = 10**9

    def parameters(self) -> tuple[Tensor, Tensor]:
        return self.sae.encoder.weight.data, self.sae.encoder.bias.data

    def still_dead(self, count: int, since: int) -> int:
        return int((self.silent[:count] >= since).sum())


class DictionaryLearning:
    """`TopKTrainer.update` of dictionary_learning."""

    def __init__(
        self, d: int, width: int, k: int, lr: float, batch: int, steps: int, seed: int, **options: Any
    ):
        # Its trainers import nnsight, which only its readers of models use.
        sys.modules.setdefault("nnsight", _Placeholder("nnsight"))
        top_k = importlib.import_module("dictionary_learning.trainers.top_k")
        self.trainer = top_k.TopKTrainer(
            steps, d, width, k, layer=0, lm_name="none", lr=lr, seed=seed, device="cpu", warmup_steps=1
        )
        self.trainer.dead_feature_threshold = options.get("dead_after", 12_800)
        self.done = 0

    def step(self, x: Tensor) -> None:
        self.trainer.update(self.done, x)
        self.done += 1

    def reconstruct(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.trainer.ae(x)

    @property
    def decoder(self) -> Tensor:
        return self.trainer.ae.decoder.weight.detach().T

    def hold_dead(self, count: int) -> None:
        self.trainer.num_tokens_since_fired[:count] = 10**9

    def parameters(self) -> tuple[Tensor, Tensor]:
        return self.trainer.ae.encoder.weight.data, self.trainer.ae.encoder.bias.data

    def still_dead(self, count: int, since: int) -> int:
        return int((self.trainer.num_tokens_since_fired[:count] >= since).sum())


class _Placeholder(types.ModuleType):
    """A module of which any name can be imported."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


PEERS: dict[str, type] = {"SAELens": SAELens, "sparsify": Sparsify, "dictionary_learning": DictionaryLearning}


def available() -> dict[str, type]:
    """The peers that can be imported here."""
    found = {}
    for name, cls in PEERS.items():
        with contextlib.suppress(ImportError):
            cls(4, 8, 2, 1e-3, 4, 4, 0)
            found[name] = cls
    return found


@contextlib.contextmanager
def quietly() -> Any:
    """Swallows what others print on import."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
