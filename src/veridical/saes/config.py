"""What one sparse autoencoder is and how it is trained: API argument, recipe keys and saved JSON in one.

Nothing here imports torch.
"""

from __future__ import annotations

import math
import re
from typing import Literal, get_args

from pydantic.dataclasses import dataclass

from veridical.config import STRICT
from veridical.errors import ConfigError

Architecture = Literal[
    "relu",
    "gated",
    "jumprelu",
    "topk",
    "batch_topk",
    "matryoshka",
    "transcoder",
    "jumprelu_transcoder",
    "crosscoder",
]
ARCHITECTURES: tuple[str, ...] = get_args(Architecture)
SPARSITY = {"relu": 5.0, "gated": 5.0, "jumprelu": 1.0, "jumprelu_transcoder": 1.0}
"""Default sparsity coefficients, for inputs scaled to a mean norm of sqrt(d)."""
PENALISED = frozenset(SPARSITY)
"""Architectures whose sparsity comes from a penalty; the others keep `k` latents."""
TRANSCODERS = ("transcoder", "jumprelu_transcoder")
"""Architectures that read one site and predict another."""
DEAD_SHARE = 0.1
"""Largest share of the run in which a latent may be silent before it counts as dead."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SAEConfig:
    """One sparse autoencoder: its architecture, its size, and its training."""

    architecture: Architecture = "topk"
    """topk, batch_topk, matryoshka, relu, gated, jumprelu; transcoder and jumprelu_transcoder (site to
    target_site); crosscoder."""
    width: int | None = None
    """Number of latents F; expansion times the input width when not given."""
    expansion: int = 8
    """Latents per input dimension, where width is not given."""
    k: int = 32
    """Latents that are active for one token (on average over the batch for batch_topk, matryoshka and
    crosscoder). Not used by relu, gated and jumprelu."""
    sparsity: float | None = None
    """Coefficient of the sparsity penalty of relu, gated (5 when not given) and jumprelu (1), for inputs
    scaled to a mean norm of sqrt(d)."""
    site: str | None = None
    """Site whose activations are read; needed only where the data hold several."""
    target_site: str | None = None
    """Site that a transcoder predicts."""
    sites: tuple[str, ...] = ()
    """Sites that a crosscoder reads together (layers of one model, or one site in two models)."""
    skip: bool = False
    """Give a transcoder a linear path from input to output beside its latents."""
    prefixes: tuple[int, ...] = ()
    """Nested widths of a matryoshka, each reconstructing by itself; F/16, F/8, F/4, F/2, F when not given."""
    bandwidth: float = 0.05
    """Width of the window in which jumprelu's threshold gets a gradient, for inputs scaled to a mean norm of
    sqrt(d) (0.001 for inputs of norm 1 in the paper)."""

    lr: float | None = None
    """Peak learning rate of Adam; 2e-4 / sqrt(F / 2**14) when not given (Gao et al. 2024)."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of Adam's moments. On planted features (tests/benchmarks/bench_sae.py) 0.99 for the second
    finds more of them than the usual 0.999 in the same steps: mean cosine 0.97 against 0.93."""
    batch: int = 4096
    """Tokens in one step."""
    tokens: int | None = None
    """Tokens to train on; one pass over the training rows when not given."""
    warmup: float = 0.01
    """Share of the run in which the learning rate rises from 0: Adam's moments are noise at first."""
    decay: float = 0.2
    """Share of the run, at its end, in which the learning rate falls linearly to 0."""
    sparsity_warmup: float = 0.05
    """Share of the run in which the sparsity penalty rises from 0: at full strength from the start it kills
    latents that point nowhere yet."""

    aux: float = 1 / 32
    """Coefficient of the auxiliary loss that revives dead latents (Gao et al. 2024); 0 turns it off."""
    k_aux: int | None = None
    """Dead latents that the auxiliary loss activates for a token; the power of two nearest to half the input
    width when not given."""
    aux_variant: Literal["relu", "straight_through"] = "relu"
    """How the auxiliary loss moves a dead latent. `relu`, as published: through its activation, so that one
    whose pre-activation is never positive gets no gradient and stays dead. `straight_through`: also where it
    is negative, if that raises it, which revives those too."""
    dead_after: int = 10_000_000
    """Tokens without an activation above 1e-3 after which a latent is dead; at most a tenth of the run."""

    bias_init: Literal["geometric_median", "mean", "zero"] = "geometric_median"
    """What the decoder bias starts at. The geometric median is the mean's robust kin: a few huge vectors do
    not move it."""
    normalise: Literal["mean_norm", "none"] = "mean_norm"
    """`mean_norm` scales inputs to a mean norm of sqrt(d), so that learning rates and penalties mean the same
    at every site; the scale is folded into the weights when the SAE is saved."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the products in training; parameters and Adam's moments are float32."""
    seed: int = 0
    """Seed of the initial weights."""
    name: str | None = None
    """What to call it in tables and folders; made from the other options when not given."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Sites that are read, input first; empty where the data hold a single one."""
        if self.architecture == "crosscoder":
            return self.sites
        return tuple(site for site in (self.site, self.target_site) if site is not None)

    @property
    def label(self) -> str:
        """`name`, or a short description: `topk-x8-k32`."""
        if self.name is not None:
            return self.name
        size = f"x{self.expansion}" if self.width is None else f"f{self.width}"
        amount = f"l{self.penalty:g}" if self.architecture in PENALISED else f"k{self.k}"
        rate = "" if self.lr is None else f"-lr{self.lr:g}"
        seed = f"-s{self.seed}" if self.seed else ""
        return f"{self.architecture}-{size}-{amount}{rate}{seed}"

    @property
    def penalty(self) -> float:
        """The sparsity coefficient, or the architecture's default."""
        return SPARSITY.get(self.architecture, 0.0) if self.sparsity is None else self.sparsity

    def latents(self, d_in: int) -> int:
        """Number of latents F for inputs of width `d_in`."""
        return self.expansion * d_in if self.width is None else self.width

    def learning_rate(self, d_in: int) -> float:
        """Peak learning rate for inputs of width `d_in`."""
        return 2e-4 / math.sqrt(self.latents(d_in) / 2**14) if self.lr is None else self.lr

    def aux_latents(self, d_in: int) -> int:
        """Dead latents that the auxiliary loss activates for a token."""
        return max(1, 2 ** round(math.log2(max(d_in / 2, 1)))) if self.k_aux is None else self.k_aux

    def dead_clock(self, tokens: int) -> int:
        """Silent tokens after which a latent is dead, in a run over `tokens` tokens."""
        return min(self.dead_after, max(int(DEAD_SHARE * tokens), 1))

    def widths(self, d_in: int) -> tuple[int, ...]:
        """Nested widths of a matryoshka, the last one being F."""
        width = self.latents(d_in)
        return self.prefixes or tuple(sorted({max(width // part, 1) for part in (16, 8, 4, 2, 1)}))

    def check(self, d_in: int) -> None:
        """Refuses values that make no SAE for inputs of width `d_in`.

        Raises:
            ConfigError: Names the option, its value, and what was expected.
        """
        width = self.latents(d_in)
        for option in ("width", "expansion", "k", "k_aux", "batch", "tokens", "dead_after"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise ConfigError(f"{self.label}: {option} is {value}; expected 1 or more")
        for option in ("warmup", "decay", "sparsity_warmup"):
            if not 0 <= getattr(self, option) <= 1:
                raise ConfigError(
                    f"{self.label}: {option} is {getattr(self, option)}; expected a share from 0 to 1"
                )
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"{self.label}: seed is {self.seed}; expected a number from 0 to 2**63 - 1")
        if not all(0 <= rate < 1 for rate in self.betas):
            raise ConfigError(f"{self.label}: betas are {self.betas}; expected rates from 0 to below 1")
        if not 0 < self.bandwidth < math.inf:
            raise ConfigError(
                f"{self.label}: bandwidth is {self.bandwidth}; expected a finite number above 0"
            )
        for option in ("lr", "aux", "sparsity"):
            value = getattr(self, option)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"{self.label}: {option} is {value}; expected a finite number, 0 or more")
        if self.architecture not in PENALISED and self.k > width:
            raise ConfigError(
                f"{self.label}: k is {self.k}, but there are only {width} latents (input width {d_in}); "
                "expected k of at most the width"
            )
        self.check_name()
        self._check_sites()
        self._check_prefixes(width)

    def check_name(self) -> None:
        """Refuses a name that is none for a folder.

        Raises:
            ConfigError: Says what a name is made of.
        """
        if self.name is not None and not re.fullmatch(r"\w[\w.+-]{0,99}", self.name):
            said = self.name if len(self.name) < 100 else f"{self.name[:20]}..."
            raise ConfigError(f"name = {said!r}: expected letters, digits, dots and dashes, at most 100")

    def _check_sites(self) -> None:
        kind = self.architecture
        if kind in TRANSCODERS and (self.site is None) != (self.target_site is None):
            raise ConfigError(f"{self.label}: a transcoder names both site and target_site, or neither")
        if kind not in TRANSCODERS and (self.target_site is not None or self.skip):
            raise ConfigError(f"{self.label}: target_site and skip belong to a transcoder; this is a {kind}")
        if kind == "crosscoder" and (self.site is not None or len(self.sites) < 2):
            raise ConfigError(f"{self.label}: a crosscoder reads two or more `sites`, not one site")
        if len(set(self.sites)) < len(self.sites):
            raise ConfigError(f"{self.label}: sites are {', '.join(self.sites)}; expected each once")
        if kind != "crosscoder" and self.sites:
            raise ConfigError(f"{self.label}: sites belongs to a crosscoder; a {kind} reads one site")

    def _check_prefixes(self, width: int) -> None:
        if not self.prefixes:
            return
        if self.architecture != "matryoshka":
            raise ConfigError(
                f"{self.label}: prefixes belongs to a matryoshka; this is a {self.architecture}"
            )
        rising = all(low < high for low, high in zip((0, *self.prefixes), self.prefixes))
        if not rising or self.prefixes[-1] != width:
            raise ConfigError(
                f"{self.label}: prefixes are {self.prefixes}; expected rising widths that end at the SAE's, "
                f"{width}"
            )
