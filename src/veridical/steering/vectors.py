"""Steering vectors: what is added to a model's activations (or erased from them) to change what it does.

`with vector(model, strength=2.0): model.generate("...")` adds `2.0 * v` at the vector's sites while the
context lasts. Of a fitted vector, strength 1 takes the mean of the other label to the mean of the wanted one
along its direction; `calibrate` makes strength 1 cost a given KL on neutral text instead.

A good reader can steer badly (Wu et al. 2025, arXiv:2501.17148): measure both, and beside a random direction
of the same length.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from veridical.errors import InputError
from veridical.probes.erasure import Eraser
from veridical.probes.fits import same_model
from veridical.probes.passes import Passes, Positions, check_positions, following
from veridical.steering.gate import Gate, Gating, Keep

if TYPE_CHECKING:
    from torch import nn

    from veridical.hooked import HookedModel
    from veridical.probes.base import LinearProbe
    from veridical.reporting.section import Section
    from veridical.steering.neutral import Neutral

Change = Callable[[Tensor], Tensor]
"""From the values at a site, flat `[rows, tokens, d]`, to the new ones."""


@dataclass(frozen=True, repr=False, eq=False)
class SteeringVector:
    """A change at one or several sites of one model.

    Attributes:
        vectors: For each site (canonical name) what strength 1 adds, `[d]` float64.
        erasers: For each site what strength 1 erases instead; empty for vectors that add.
        method: How it was found.
        positions: Tokens at which it acts.
        gate: When it acts; None for always.
        facts: Model, data and how it was fitted, as plain values.
        calibrated: `target_kl`, `strengths`, `kl` and `texts` of `calibrate`; empty before it.
    """

    vectors: Mapping[str, np.ndarray] = field(default_factory=dict)
    erasers: Mapping[str, Eraser] = field(default_factory=dict)
    method: str = "given"
    positions: Positions = "all"
    gate: Gate | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    calibrated: Mapping[str, Any] = field(default_factory=dict)

    __array_ufunc__ = None
    """So that numpy's numbers leave multiplication to the vector."""

    def __post_init__(self) -> None:
        check_positions(self.positions)
        if not self.vectors and not self.erasers:
            raise InputError("a steering vector needs at least one site")
        for site, vector in self.vectors.items():
            if np.ndim(vector) != 1 or not np.isfinite(vector).all() or not np.any(vector):
                raise InputError(
                    f"the vector at {site} has shape {np.shape(vector)}; expected finite numbers [d], not "
                    "all 0"
                )

    # Making

    @classmethod
    def fit(cls, model: HookedModel, pairs: Any, **options: Any) -> SteeringVector:
        """A vector from labelled pairs; see `veridical.steering.directions.fit_vector` for every option."""
        from veridical.steering.directions import fit_vector

        return fit_vector(model, pairs, **options)

    @classmethod
    def given(cls, model: HookedModel, site: str, vector: Any, **facts: Any) -> SteeringVector:
        """A vector `[d]` that comes from elsewhere, for one site of a model."""
        from veridical.probes.base import as_array

        places = model.resolve(site)
        if len(places) != 1:
            raise InputError(f"a vector belongs to one site; {site!r} names {len(places)} of {model.path}")
        values = np.asarray(as_array(vector), dtype=np.float64).reshape(-1)
        made = cls({places[0].name: values}, facts={**_model_facts(model), **facts})
        made._check_widths(model)
        return made

    # Using

    def __call__(
        self, model: HookedModel, strength: float = 1.0, *, force: bool = False
    ) -> AbstractContextManager[None]:
        """A context in which `model` is steered, `generate` included; undone at the end.

        Args:
            model: The model that it was fitted on.
            strength: Factor; negative ones go the other way. Outside of what `calibrate` measured it warns.
            force: Accept another model of the same widths.

        Raises:
            MismatchError: Another model.
            InputError: Another width than the model has at a site, or a strength that is not finite.
        """
        if not math.isfinite(strength):
            raise InputError(f"strength is {strength}; expected a finite number")
        if not force:
            own = self.facts
            fingerprint = own.get("model_fingerprint")
            if fingerprint is not None:
                same_model(own.get("model"), fingerprint, model.path, model.fingerprint(), "steering vector")
        self._check_widths(model)
        self._warn(strength)
        return self.on(model, strength, force=force)

    @contextmanager
    def on(self, model: HookedModel, strength: float = 1.0, *, force: bool = False) -> Iterator[None]:
        """The context without any check of the model, for many short uses after one."""
        changes = {site: _adding(vector, strength) for site, vector in self.vectors.items()}
        changes |= {site: _erasing(eraser, strength) for site, eraser in self.erasers.items()}
        if self.positions == "all" and self.gate is None:
            with model.hooks(write={site: _everywhere(change) for site, change in changes.items()}):
                yield
            return
        gate_site = self.gate.site(model, force) if self.gate is not None else None
        with following(model) as passes:
            gating = self.gate.running(passes) if self.gate is not None else None
            chosen = _Chosen(passes, self.positions, gating)
            write = {site: chosen.edit(change, reads=site == gate_site) for site, change in changes.items()}
            read = {} if gating is None or gate_site in changes else {gate_site: gating.read}
            with model.hooks(read=read, write=write):
                yield

    def when(
        self, probe: LinearProbe, threshold: float | str | None = None, keep: Keep = "on"
    ) -> SteeringVector:
        """The vector, acting only where a probe fires.

        Args:
            probe: A fitted probe whose site is that of the vector or comes before it.
            threshold: Log-odds, or the name of a threshold that the probe carries; when not given "balanced"
                where it has that, else 0.
            keep: See `Gate`.
        """
        from veridical.errors import unknown

        carried = getattr(probe.origin_, "thresholds", None) or {}
        if isinstance(threshold, str) and threshold not in carried:
            raise unknown("threshold", threshold, carried, "Give a number in log-odds.")
        value = carried.get("balanced", 0.0) if threshold is None else threshold
        value = carried[value] if isinstance(value, str) else value
        return replace(self, gate=Gate(probe, float(value), keep), calibrated={})

    def at(self, positions: Positions) -> SteeringVector:
        """The vector, acting at other tokens."""
        return replace(self, positions=positions, calibrated={})

    def calibrate(
        self,
        model: HookedModel,
        target_kl: float,
        texts: Any = None,
        *,
        tolerance: float = 0.02,
        seed: int = 0,
    ) -> SteeringVector:
        """The vector with strength 1 set so that it costs `target_kl` on neutral text.

        Args:
            model: The model.
            target_kl: KL(steered || plain), nats a token.
            texts: Neutral text, as for `neutral_texts`; the validation rows of the organism when not given.
            tolerance: Relative error of the KL.
            seed: Of the neutral rows.

        Returns:
            A vector whose `calibrated` holds the KL at strengths from -1 to 1.

        Raises:
            InputError: No strength costs that much.
        """
        from veridical.steering.neutral import Neutral, NeutralMeter, neutral_texts

        rows: Neutral = (
            texts if isinstance(texts, Neutral) else neutral_texts(model, texts, split="val", seed=seed)
        )
        with self(model, 0.0):
            pass
        return self._calibrated(model, target_kl, NeutralMeter(model, rows), tolerance)

    def _calibrated(
        self, model: HookedModel, target_kl: float, meter: Any, tolerance: float
    ) -> SteeringVector:
        from veridical.steering.calibrate import strength_for

        if self.erasers:
            raise InputError(
                "an eraser has its own measure, strength 1 erases; calibrate vectors that add, or choose the "
                "strength by what neutral_kl gives"
            )

        def measure(strength: float) -> float:
            return meter(lambda: self.on(model, strength)).kl.value

        found, _ = strength_for(measure, target_kl, tolerance=tolerance)
        made = found * self
        strengths = (-1.0, -0.5, 0.0, 0.5, 1.0)
        kl = [meter(lambda s=s: made.on(model, s)).kl.value if s else 0.0 for s in strengths]
        said = {"target_kl": target_kl, "strengths": list(strengths), "kl": kl, "texts": meter.rows.name}
        return replace(made, calibrated=said, facts={**self.facts, "calibration_factor": found})

    # Arithmetic

    def __mul__(self, factor: float) -> SteeringVector:
        self._additive("scaled")
        if not (math.isfinite(factor) and factor != 0):
            raise InputError(f"a vector times {factor}; expected a finite number that is not 0")
        vectors = {site: np.asarray(vector) * float(factor) for site, vector in self.vectors.items()}
        return replace(self, vectors=vectors, calibrated={})

    __rmul__ = __mul__

    def __truediv__(self, factor: float) -> SteeringVector:
        return self * (1 / factor)

    def __neg__(self) -> SteeringVector:
        return self * -1.0

    def __add__(self, other: SteeringVector) -> SteeringVector:
        """The sum at each site: acts as both do together."""
        for one in (self, other):
            one._additive("added")
        if self.positions != other.positions or self.gate is not other.gate:
            raise InputError(
                "two vectors are added that act at different tokens; set both with at() or when()"
            )
        same_model(
            self.facts.get("model"), self.facts.get("model_fingerprint"),
            other.facts.get("model"), other.facts.get("model_fingerprint"), "first vector",
        )  # fmt: skip
        vectors = {site: np.asarray(vector) for site, vector in self.vectors.items()}
        for site, vector in other.vectors.items():
            if site in vectors and vectors[site].shape != np.shape(vector):
                raise InputError(f"two vectors of different widths at {site} can't be added")
            vectors[site] = vectors[site] + vector if site in vectors else np.asarray(vector)
        kept = {site: vector for site, vector in vectors.items() if np.any(vector)}
        if not kept:
            raise InputError("the two vectors cancel; nothing is left to add")
        return replace(self, vectors=kept, method=f"{self.method} + {other.method}", calibrated={})

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        return self + -other

    def orthogonal_to(self, other: SteeringVector) -> SteeringVector:
        """The vector less its part along `other`, at every site that both have."""
        self._additive("made orthogonal")
        left = {}
        for site, vector in self.vectors.items():
            along = other.vectors.get(site)
            left[site] = (
                np.asarray(vector) if along is None else vector - along * (vector @ along) / (along @ along)
            )
        kept = {site: v for site, v in left.items() if np.linalg.norm(v) > 1e-9 * self.norms[site]}
        if not kept:
            raise InputError("the two vectors are parallel; nothing orthogonal is left")
        return replace(self, vectors=kept, calibrated={})

    def cosine(self, other: SteeringVector) -> dict[str, float]:
        """Cosine to another vector at each site that both have."""
        return {
            site: float(vector @ other.vectors[site] / (self.norms[site] * other.norms[site]))
            for site, vector in self.vectors.items()
            if site in other.vectors
        }

    # Showing and keeping

    @property
    def sites(self) -> list[str]:
        """Where it acts."""
        return [*self.vectors, *self.erasers]

    @property
    def norms(self) -> dict[str, float]:
        """Length of what strength 1 adds at each site."""
        return {site: float(np.linalg.norm(vector)) for site, vector in self.vectors.items()}

    def to_frame(self) -> pd.DataFrame:
        """One line per site: `site`, `norm`, `rank` (dimensions that are erased), `method`, `positions`."""
        lines = [(site, norm, 0) for site, norm in self.norms.items()]
        lines += [(site, math.nan, eraser.rank) for site, eraser in self.erasers.items()]
        return pd.DataFrame(lines, columns=["site", "norm", "rank"]).assign(
            method=self.method, positions=self.positions, gated=self.gate is not None
        )

    def report_section(self) -> Section:
        """Where it acts, how the site was chosen, and its KL by strength."""
        from veridical.steering.vector_files import section

        return section(self)

    def save(self, folder: str | Path) -> Path:
        """Saves vectors, gate, facts and a card into `folder`; `SteeringVector.load` reads it."""
        from veridical.steering.vector_files import save_vector

        return save_vector(self, folder)

    @classmethod
    def load(cls, folder: str | Path) -> SteeringVector:
        """Loads what `save` wrote; a file that is not as it was written is named and refused."""
        from veridical.steering.vector_files import load_vector

        return load_vector(folder)

    def save_gguf(self, path: str | Path, model: HookedModel) -> Path:
        """Writes a control vector for llama.cpp; see `veridical.steering.gguf`."""
        from veridical.steering.gguf import save_gguf

        return save_gguf(self, path, model)

    def merged(self, model: HookedModel, strength: float = 1.0) -> nn.Module:
        """A plain model with the vector in its biases, where that is exact; see `steering.merging`."""
        from veridical.steering.merging import merged

        return merged(self, model, strength)

    def __repr__(self) -> str:
        where = ", ".join(self.sites[:3]) + (
            f" and {len(self.sites) - 3} more" if len(self.sites) > 3 else ""
        )
        parts = [f"{self.method} at {where}"]
        if self.vectors:
            parts.append("norm " + ", ".join(f"{norm:.3g}" for norm in list(self.norms.values())[:3]))
        if self.positions != "all":
            parts.append(f"tokens: {self.positions}")
        if self.gate is not None:
            parts.append(f"where {self.gate.probe.origin_.target or 'the probe'} fires")
        if self.calibrated:
            parts.append(f"strength 1 costs {self.calibrated['target_kl']:g} nats a token")
        return f"SteeringVector({'; '.join(parts)})"

    # Within

    def _check_widths(self, model: HookedModel) -> None:
        has = {**{site: len(v) for site, v in self.vectors.items()}}
        has |= {site: len(eraser.centre_) for site, eraser in self.erasers.items()}
        for site, width in has.items():
            found = int(np.prod(model.width(site)))
            if found != width:
                raise InputError(f"the vector has width {width} at {site}; {model.path} has {found} there")

    def _additive(self, done: str) -> None:
        if self.erasers:
            raise InputError(f"an eraser can't be {done}; only vectors that are added can")

    def _warn(self, strength: float) -> None:
        if not self.calibrated:
            return
        tried, kl = self.calibrated["strengths"], self.calibrated["kl"]
        if not min(tried) <= strength <= max(tried):
            at = tried.index(max(tried) if strength > 0 else min(tried))
            warnings.warn(
                f"strength {strength:g} is outside of what was measured ({min(tried):g} to {max(tried):g}; "
                f"at {tried[at]:g} it costs {kl[at]:.3g} nats a token on {self.calibrated['texts']})",
                stacklevel=3,
            )


class _Chosen:
    """Edits at the tokens that positions and gate let through."""

    def __init__(self, passes: Passes, positions: Positions, gating: Gating | None) -> None:
        self.passes, self.gating = passes, gating
        self.positions: Positions = positions

    def edit(self, change: Change, reads: bool) -> Change:
        """The edit for a site; `reads` where the gate reads there too, before the edit."""

        def edit(value: Tensor) -> Tensor:
            if reads and self.gating is not None:
                self.gating.read(value)
            mask = self._mask(value)
            flat = value.reshape(*value.shape[:2], -1)
            new = change(flat)
            if mask is not None:
                new = torch.where(mask[..., None], new, flat)
            return new.reshape(value.shape)

        return edit

    def _mask(self, value: Tensor) -> Tensor | None:
        mask = self.passes.choose(self.positions)
        mask = None if mask is None else mask.to(value.device)
        if self.gating is None:
            return mask
        opened = self.gating.choose().to(value.device)
        return opened if mask is None else mask & opened


def _everywhere(change: Change) -> Change:
    return lambda value: change(value) if value.dim() == 3 else change(value.flatten(2)).reshape(value.shape)


def _adding(vector: np.ndarray, strength: float) -> Change:
    exact = torch.from_numpy(np.asarray(vector, dtype=np.float64) * strength)
    held: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def add(value: Tensor) -> Tensor:
        key = value.device, value.dtype
        if key not in held:
            held[key] = exact.to(device=value.device, dtype=value.dtype)
        return value + held[key]

    return add


def _erasing(eraser: Eraser, strength: float) -> Change:
    erase = eraser.on_tensors()
    if strength == 1:
        return erase
    return lambda value: (value + strength * (erase(value) - value)).to(value.dtype)


def _model_facts(model: HookedModel) -> dict[str, Any]:
    return {"model": str(model.path), "model_fingerprint": model.fingerprint()}
