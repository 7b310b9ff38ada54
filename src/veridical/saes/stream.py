"""Where training vectors come from: a store, tensors, an iterator of batches, or a model as it runs.

A stream yields batches of one size, a dictionary of site to vectors `[B, d]`, for as long as it is asked. It
says where it stands and goes on from there exactly. Some vectors are held out: they are never trained on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from veridical.errors import DataError, InputError, NonFiniteError, unknown
from veridical.provenance import fingerprint

if TYPE_CHECKING:
    from veridical.activations import Activations

HELD_OUT = 16_384
"""Held-out vectors at most."""
Batch = dict[str, Tensor]


class Stream(ABC):
    """Batches of training vectors, and the held-out ones.

    Attributes:
        widths: Width of the vectors by site.
        vectors: Training vectors in one pass; None where that is not known.
        held_out: Held-out vectors by site, aligned; empty when nothing is held out.
        rewinds: Whether `restore` can go back.
    """

    rewinds: bool = True

    widths: dict[str, int]
    vectors: int | None
    held_out: Batch

    @abstractmethod
    def batches(self, size: int) -> Iterator[Batch]:
        """Batches of exactly `size` vectors from where the stream stands, pass after pass."""

    @abstractmethod
    def sample(self, size: int) -> Batch:
        """Up to `size` training vectors; where the stream stands does not change."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Where the stream stands after the batch that was yielded last, as plain JSON values."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """Digest of what the vectors are and of their order."""

    @property
    def facts(self) -> dict[str, Any]:
        """Model, its fingerprint, the data's and the token selection, where they are known."""
        return {}

    def site(self, name: str | None) -> str:
        """The stream's own name of a site; the only one when not given.

        Raises:
            UnknownNameError: It has no such site; names the nearest.
            InputError: Not given, and there are several.
        """
        if name is None:
            if len(self.widths) > 1:
                sites = ", ".join(self.widths)
                raise InputError(f"the config names no site, and the data hold several: {sites}")
            return next(iter(self.widths))
        canonical = _canonical(name)
        for known in self.widths:
            if canonical == _canonical(known) or name == known:
                return known
        raise unknown("site", name, self.widths, "collect it to train on it")


def as_stream(
    data: Any,
    *,
    model: Any = None,
    sites: Sequence[str] = (),
    holdout: float,
    seed: int,
    read: str | int = "all",
    tokens: int | None = None,
) -> Stream:
    """The stream that `data` are.

    Args:
        data: `Activations`; a tensor `[rows, d]`; a mapping of site to tensor; an iterable of such batches,
            or a function that returns one; with `model`, texts as `collect` takes them.
        model: A model that is run on the data as training goes on.
        sites: Sites to read from the store or the model; all of a store when empty.
        holdout: Share of the vectors that is held out.
        seed: Seed of the order and of what is held out.
        read: Tokens of each text that a model's vectors are read at, as `collect` names them.
        tokens: How many vectors will be trained on, which sizes what is held out of an iterator.

    Raises:
        InputError: Data that are none of these, or a share that is none.
    """
    if not 0 <= holdout < 1:
        raise InputError(f"holdout is {holdout}; expected a share from 0 to below 1")
    if model is not None:
        from veridical.saes.model_stream import ModelStream

        return ModelStream(model, data, sites, holdout, seed, read)
    if hasattr(data, "batches") and hasattr(data, "request"):
        return StoreStream(data, sites, holdout, seed)
    if isinstance(data, Tensor | np.ndarray):
        return TensorStream({"x": torch.as_tensor(data)}, holdout, seed)
    if isinstance(data, Mapping):
        tensors = {str(site): torch.as_tensor(values) for site, values in data.items()}
        return TensorStream(tensors, holdout, seed)
    if isinstance(data, str | bytes):
        raise InputError(
            f"data is one string ({data[:40]!r}); expected vectors, or texts together with model="
        )
    if callable(data) or isinstance(data, Iterable):
        return IteratorStream(data, min(round(holdout * (tokens or 0)), HELD_OUT))
    raise InputError(
        f"data is a {type(data).__name__}; expected Activations, a tensor [rows, d], a mapping of site to "
        "tensor, an iterable of batches, or texts together with model="
    )


class TensorStream(Stream):
    """Vectors in memory, in an order that follows from the seed and the pass."""

    def __init__(self, tensors: Batch, holdout: float, seed: int) -> None:
        lengths = {site: len(values) for site, values in tensors.items()}
        if not tensors or len(set(lengths.values())) != 1 or not next(iter(lengths.values())):
            raise DataError(f"sites have {lengths} vectors; expected one number for all, 1 or more")
        for site, values in tensors.items():
            if values.ndim < 2 or not values.is_floating_point():
                raise DataError(
                    f"{site} is {values.dtype} of shape {tuple(values.shape)}; expected floats [rows, d]"
                )
        self._tensors = {site: values.flatten(1) for site, values in tensors.items()}
        self.widths = {site: values.shape[1] for site, values in self._tensors.items()}
        count = next(iter(lengths.values()))
        picks = np.random.default_rng([seed, 0]).permutation(count)
        held = held_count(count, holdout)
        self.held_out = self._at(picks[:held]) if held else {}
        self._picks, self._seed, self._pass, self._done = np.sort(picks[held:]), seed, 0, 0
        self.vectors = len(self._picks)

    def batches(self, size: int) -> Iterator[Batch]:
        check_size(size, self.vectors)
        while True:
            order = np.random.default_rng([self._seed, 1, self._pass]).permutation(self._picks)
            while self._done + size <= len(order):
                self._done += size
                yield self._at(order[self._done - size : self._done])
            self._pass, self._done = self._pass + 1, 0

    def sample(self, size: int) -> Batch:
        order = np.random.default_rng([self._seed, 2]).permutation(self._picks)
        return self._at(order[:size])

    def state(self) -> dict[str, Any]:
        return {"pass": self._pass, "done": self._done}

    def restore(self, state: dict[str, Any]) -> None:
        self._pass, self._done = int(state["pass"]), int(state["done"])

    @property
    def identity(self) -> str:
        parts = ["tensors", str(self._seed)]
        for site, values in self._tensors.items():
            whole = values.detach().cpu().contiguous()
            parts += [site, str(whole.dtype), str(tuple(whole.shape))]
            parts.append(xxhash.xxh3_128_hexdigest(whole.view(torch.uint8).numpy().data))
        return fingerprint(parts)

    def _at(self, picks: np.ndarray) -> Batch:
        numbers = torch.from_numpy(picks)
        return {site: values[numbers.to(values.device)] for site, values in self._tensors.items()}


class StoreStream(Stream):
    """Vectors of a store, read shuffled in constant memory; whole texts (or pairs) are held out."""

    def __init__(self, acts: Activations, sites: Sequence[str], holdout: float, seed: int) -> None:
        self._sites = [acts._site(site) for site in sites] or acts.sites
        self._sites = list(dict.fromkeys(self._sites))
        self._train, held = held_out_rows(acts, holdout, seed)
        shapes = acts._source.shapes
        self.widths = {site: int(np.prod(shapes[site])) for site in self._sites}
        self.vectors, self._seed = len(self._train), seed
        self._state: dict[str, Any] | None = None
        self._reader: Any = None
        self.held_out = {} if held is None else self._first(held, HELD_OUT)

    def batches(self, size: int) -> Iterator[Batch]:
        check_size(size, self.vectors)
        self._reader = self._read(self._train, size, None)
        if self._state is not None:
            self._reader.load_state_dict(self._state)
        for batch in self._reader:
            yield {site: values.flatten(1) for site, values in batch.items()}

    def sample(self, size: int) -> Batch:
        return self._first(self._train, size)

    def state(self) -> dict[str, Any]:
        return (self._state or {}) if self._reader is None else self._reader.state_dict()

    def restore(self, state: dict[str, Any]) -> None:
        self._state, self._reader = state or None, None

    @property
    def identity(self) -> str:
        return fingerprint([self._train.fingerprint, *self._sites, str(self._seed)])

    @property
    def facts(self) -> dict[str, Any]:
        asked = self._train.request
        return {
            "model": asked.model.get("path"),
            "model_fingerprint": asked.model["fingerprint"],
            "data_fingerprint": self._train.fingerprint,
            "tokens": str(asked.tokens["selection"]),
        }

    def _read(self, acts: Activations, size: int, epochs: int | None) -> Any:
        return acts.batches(size, sites=self._sites, seed=self._seed, epochs=epochs, drop_last=epochs is None)

    def _first(self, acts: Activations, size: int) -> Batch:
        batch = next(iter(self._read(acts, min(size, len(acts)), 1)))
        return {site: values.flatten(1).clone() for site, values in batch.items()}


class IteratorStream(Stream):
    """Batches that somebody else makes: an iterable, or a function that returns one.

    The first vectors of each pass are held out. A pass that is begun again must give the same vectors: that
    is what resuming rests on.
    """

    def __init__(self, source: Any, held: int) -> None:
        self._source: Callable[[], Any] = source if callable(source) else lambda: source
        self._once = not callable(source) and iter(source) is source
        self.rewinds = not self._once
        self._held, self._taken, self._skip = held, 0, 0
        self.vectors = None
        self._begin()
        if not self._fill(1):
            raise DataError(f"the iterator of batches has no more than the {held} vectors that are held out")
        self.widths = {site: values.shape[1] for site, values in self._pending[0].items()}

    def batches(self, size: int) -> Iterator[Batch]:
        while True:
            while self._fill(size):
                batch = self._take(size)
                if self._skip > 0:
                    self._skip -= size
                    continue
                self._taken += size
                yield batch
            if self._once:
                raise DataError(
                    f"the iterator of batches ended after {self._taken:,} training vectors; give a list or a "
                    "function that returns an iterator for a further pass, or ask for fewer tokens"
                )
            if not self._taken and not self._skip:
                raise DataError(f"a pass has fewer vectors than one batch of {size}; lower batch")
            self._begin()

    def sample(self, size: int) -> Batch:
        self._fill(size)
        return {site: values[:size] for site, values in joined(self._pending).items()}

    def state(self) -> dict[str, Any]:
        return {"taken": self._taken}

    def restore(self, state: dict[str, Any]) -> None:
        if self._taken:
            self._begin()
        self._skip = self._taken = int(state["taken"])

    @property
    def identity(self) -> str:
        return fingerprint(["iterator", *(f"{site}:{width}" for site, width in self.widths.items())])

    def _begin(self) -> None:
        self._pieces = _pieces(self._source())
        self._pending: list[Batch] = []
        self._fill(self._held)
        self.held_out = self._take(self._held) if self._held and self._pending else {}

    def _fill(self, size: int) -> bool:
        """Reads ahead until `size` vectors wait; False if there are not so many."""
        waiting = sum(map(length, self._pending))
        while waiting < size:
            piece = next(self._pieces, None)
            if piece is None:
                return False
            self._pending.append(piece)
            waiting += length(piece)
        return True

    def _take(self, size: int) -> Batch:
        whole = joined(self._pending)
        rest = {site: values[size:] for site, values in whole.items()}
        self._pending = [rest] if length(rest) else []
        return {site: values[:size] for site, values in whole.items()}


def held_out_rows(acts: Activations, share: float, seed: int) -> tuple[Activations, Activations | None]:
    """Activations to train on, and those held out: whole texts, or pairs where there are some.

    Raises:
        DataError: A single text, which cannot be on both sides.
    """
    if share == 0:
        return acts, None
    column = "pair" if "pair" in acts.rows.columns else None
    groups = acts.rows[column].to_numpy() if column else np.arange(len(acts.rows))
    _, codes = np.unique(groups, return_inverse=True)
    count = int(codes.max()) + 1
    if count < 2:
        raise DataError("the activations are of one text: none can be held out; pass holdout=0")
    picks = np.random.default_rng([seed, 0]).permutation(count)[: max(1, round(share * count))]
    held = np.isin(codes, picks[: count - 1])
    return acts.filter(~held), acts.filter(held)


def check_size(size: int, vectors: int | None) -> None:
    """Refuses a batch that is larger than a pass."""
    if vectors is not None and vectors < size:
        raise DataError(f"batch is {size:,}, but there are only {vectors:,} training vectors; lower batch")


def check_finite(batch: Batch, where: str) -> None:
    """Refuses vectors that hold NaN or infinity.

    Raises:
        NonFiniteError: Names the site, and says where in the stream.
    """
    for site, values in batch.items():
        if not torch.isfinite(values.sum()) and not torch.isfinite(values).all():
            raise NonFiniteError(
                f"{site} holds NaN or infinity {where}; collect it again, in float32 or bfloat16 if it was "
                "float16"
            )


def _pieces(source: Iterable[Any]) -> Iterator[Batch]:
    for number, piece in enumerate(source):
        made = piece if isinstance(piece, Mapping) else {"x": piece}
        tensors = {str(site): torch.as_tensor(values) for site, values in made.items()}
        for site, values in tensors.items():
            if values.ndim < 2 or not values.is_floating_point():
                raise DataError(
                    f"batch {number} of the iterator has {site} as {values.dtype} of shape "
                    f"{tuple(values.shape)}; expected floats [rows, d]"
                )
        yield {site: values.flatten(1) for site, values in tensors.items()}


def joined(parts: list[Batch]) -> Batch:
    """Batches one after the other as one."""
    if len(parts) == 1:
        return parts[0]
    return {site: torch.cat([part[site] for part in parts]) for site in parts[0]}


def length(batch: Batch) -> int:
    """Vectors in a batch."""
    return len(next(iter(batch.values())))


def held_count(count: int, share: float) -> int:
    """How many of `count` vectors or texts are held out."""
    return 0 if share == 0 else min(max(1, round(share * count)), HELD_OUT, count - 1)


def _canonical(site: str) -> str:
    from veridical.sites import Site

    try:
        return Site.parse(site).name
    except InputError:
        return site
