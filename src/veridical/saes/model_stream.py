"""Training vectors of a model that runs as training goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from veridical.errors import DataError
from veridical.provenance import fingerprint
from veridical.saes.stream import HELD_OUT, Batch, Stream, held_count, joined, length

if TYPE_CHECKING:
    from veridical.models import HookedModel

WINDOW = 64
"""Batches that vectors are shuffled among."""
TEXTS = 64
"""Texts that the model is run on at a time."""


class ModelStream(Stream):
    """Vectors of a model that runs as training goes on: nothing is stored.

    Texts come in an order that follows from the seed and the pass. Vectors are shuffled within windows of
    about `WINDOW` batches; what is left of a window, less than a batch, is passed over.
    """

    def __init__(
        self, model: Any, data: Any, sites: Sequence[str], holdout: float, seed: int, tokens: str | int
    ) -> None:
        from veridical.activations.collect import _loaded
        from veridical.activations.data import read_data

        self._model: HookedModel = _loaded(model)
        self._corpus, self._tokens, self._seed = read_data(data), tokens, seed
        self._sites = [site.name for site in self._model.resolve(list(sites) or ["resid_post.*"])]
        self.widths = {site: int(np.prod(self._model.width(site))) for site in self._sites}
        count = len(self._corpus)
        picks = np.random.default_rng([seed, 0]).permutation(count)
        held = held_count(count, holdout)
        self._rows = np.sort(picks[held:])
        self.vectors = None
        self._pass = self._row = self._done = 0
        self.held_out = self._collect(picks[:held], HELD_OUT) if held else {}

    def batches(self, size: int) -> Iterator[Batch]:
        while True:
            order = np.random.default_rng([self._seed, 1, self._pass]).permutation(self._rows)
            if self._row >= len(order):
                self._pass, self._row, self._done = self._pass + 1, 0, 0
                continue
            window, after = self._window(order, size)
            count = length(window)
            if count < size and self._row == 0 and after >= len(order):
                raise DataError(f"the texts have {count} training vectors, fewer than one batch of {size}")
            mixed = np.random.default_rng([self._seed, 2, self._pass, self._row]).permutation(count)
            numbers = torch.from_numpy(mixed)
            while self._done + size <= count:
                self._done += size
                some = numbers[self._done - size : self._done]
                yield {site: values[some] for site, values in window.items()}
            self._row, self._done = after, 0

    def sample(self, size: int) -> Batch:
        return self._collect(np.random.default_rng([self._seed, 3]).permutation(self._rows), size)

    def state(self) -> dict[str, Any]:
        return {"pass": self._pass, "row": self._row, "done": self._done}

    def restore(self, state: dict[str, Any]) -> None:
        self._pass, self._row, self._done = (int(state[name]) for name in ("pass", "row", "done"))

    @property
    def identity(self) -> str:
        from veridical.activations.data import rows_fingerprint

        facts = [str(self._tokens), str(self._seed), rows_fingerprint(self._corpus.rows), *self._sites]
        return fingerprint([self._model.fingerprint(), *facts])

    @property
    def facts(self) -> dict[str, Any]:
        model = {"model": self._model.path, "model_fingerprint": self._model.fingerprint()}
        return {**model, "tokens": str(self._tokens)}

    def _window(self, order: np.ndarray, size: int) -> tuple[Batch, int]:
        """Vectors of the texts from the current one on, and the first text that is not among them."""
        parts, after = [], self._row
        while after < len(order) and sum(map(length, parts)) < WINDOW * size:
            parts.append(self._read(order[after : after + TEXTS]))
            after += TEXTS
        return joined(parts), after

    def _collect(self, rows: np.ndarray, most: int) -> Batch:
        parts: list[Batch] = []
        for at in range(0, len(rows), TEXTS):
            parts.append(self._read(rows[at : at + TEXTS]))
            if sum(map(length, parts)) >= most:
                break
        return {site: values[:most] for site, values in joined(parts).items()}

    def _read(self, rows: np.ndarray) -> Batch:
        from veridical.activations import collect

        corpus = self._corpus.take(rows)
        acts = collect(self._model, corpus, sites=self._sites, tokens=self._tokens, progress=False)
        return {site: acts[site].flatten(1) for site in self._sites}
