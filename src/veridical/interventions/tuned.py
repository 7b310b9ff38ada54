"""The tuned lens (Belrose et al. 2023, arXiv:2303.08112): a logit lens behind an affine map for each layer.

The map `h + A h + b` of a layer starts at the identity and is trained so that the model's own norm and
head, read behind it, give what the model itself gives at the end: the loss is KL(model || lens) over the
vocabulary, in nats. All layers step together. Departures from the paper: Adam with a linear decay instead of
SGD with momentum, no weight decay, activations centred and scaled while training (the map that comes out is
the plain affine one), and of each layer's maps on the way the one with the lowest KL on held-out texts is
kept, the identity among them, so that no layer ends worse there than its logit lens.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from veridical.errors import DataError, DiskFullError, InputError, NonFiniteError, unknown
from veridical.interventions.lenses import divergence, stream_sites
from veridical.interventions.readout import Readout
from veridical.interventions.tuned_result import TunedLens
from veridical.probes.fits import same_model
from veridical.saes.checkpoint import Folder
from veridical.sites import Site

if TYPE_CHECKING:
    from veridical.activations import Activations
    from veridical.activations.reader import Reader
    from veridical.hooked import HookedModel

LOGITS = 1 << 24
"""Most logits that are held at once; layers beyond that are run one after the other."""
HELD_OUT = 4096
"""Most held-out tokens that a map is judged on."""
LOOKS = 10
"""How often maps are judged on the way."""
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What Adam keeps of each parameter."""
log = logging.getLogger(__name__)


def tuned_lens(
    model: HookedModel | Any,
    data: Any,
    *,
    sites: Any = "resid_post.*",
    steps: int = 250,
    batch: int = 256,
    lr: float = 3e-3,
    holdout: float = 0.1,
    seed: int = 0,
    store: str | Path | None = None,
    checkpoints: str | Path | None = None,
    checkpoint_minutes: float = 5.0,
    progress: bool | None = None,
) -> TunedLens:
    """Trains a tuned lens.

    Args:
        model: A `HookedModel`, or anything that `veridical.load` takes. It is not trained.
        data: What `collect` reads, or activations that it made at these sites and at the last `resid_post`.
        sites: Where to read: in the residual stream, in any spelling. The last `resid_post` needs no map and
            is left out.
        steps: Training steps.
        batch: Tokens in a step.
        lr: Step size of Adam at the start; it falls to zero in a line.
        holdout: Share of the texts (of pairs, where there are pairs) that maps are judged on.
        seed: Decides which texts are held out and the order of the others.
        store: Folder for the activations, which a second call reuses; in memory when not given.
        checkpoints: Folder for checkpoints. A training that was stopped goes on from the last one, to the
            very same maps; one that was finished gives its result at once.
        checkpoint_minutes: Minutes between checkpoints; the last two are kept.
        progress: Show bars; on a terminal or in a notebook when not given.

    Raises:
        InputError: Sites that are not in the residual stream, or settings out of range.
        DataError: Fewer than two texts.
        NonFiniteError: The loss is NaN or infinite; names the step.
        StoreMismatchError: The checkpoints are of another training; names what differs.
    """
    from veridical.models import load

    _check(steps, batch, lr, holdout, checkpoint_minutes)
    model = load(model)
    if model.kind == "vision":
        raise InputError(
            f"{model.path} is a vision transformer: its head reads one token of an image, so there is no "
            "output at each token to train a lens towards; read it with logit_lens"
        )
    last = Site("resid_post", model.n_layers - 1).name
    names = [name for name in stream_sites(model, sites) if name != last]
    if not names:
        raise InputError("the last resid_post is the model's own output; name earlier sites to train a lens")
    acts = _activations(model, data, [*names, last], store, progress)
    training, held = _halves(acts, holdout, seed)
    job = _Training(model, names, last, training, held, seed)
    facts = {
        "model": model.path,
        "model_fingerprint": model.fingerprint(),
        "data_fingerprint": acts.fingerprint,
        "seed": seed,
        "steps": steps,
        "batch": batch,
        "lr": lr,
        "holdout": holdout,
        "tokens": len(training),
        "held_out_tokens": job.held_tokens,
    }
    if checkpoints is not None:
        asked = {name: value for name, value in facts.items() if name != "model"}
        job.keep_in(Folder(checkpoints, {**asked, "sites": names}), checkpoint_minutes * 60)
    job.run(steps, batch, lr, progress)
    return job.result(facts)


class _Training:
    """The maps of all layers, their best so far, and one optimiser."""

    def __init__(
        self,
        model: HookedModel,
        names: list[str],
        last: str,
        training: Activations,
        held: Activations,
        seed: int,
    ) -> None:
        self.model, self.names, self.last = model, names, last
        self.training, self.seed = training, seed
        self.readout = Readout(model)
        self.type = torch.promote_types(torch.float32, model.dtype)
        moments = [training.moments[name] for name in names]
        place: dict[str, Any] = {"device": model.device, "dtype": self.type}
        self.mean = torch.stack([one.mean for one in moments]).to(**place)
        self.scale = torch.stack([one.var.mean().sqrt().clamp(min=1e-12) for one in moments]).to(**place)
        count, width = self.mean.shape
        self.matrices = torch.zeros(count, width, width, **place)
        self.offsets = torch.zeros(count, width, **place)
        self.best = self.matrices.clone(), self.offsets.clone()
        self.held = list(self._held(held))
        self.held_tokens = sum(len(part[last]) for part in self.held)
        self.history: list[tuple[int, np.ndarray]] = []
        self.best_kl = np.full(count, np.inf)
        self.best_step = np.zeros(count, dtype=np.int64)
        self.folder: Folder | None = None
        self.seconds = np.inf

    def keep_in(self, folder: Folder, seconds: float) -> None:
        """Takes up the training that a folder holds, and keeps checkpoints there every so many seconds."""
        self.folder, self.seconds = folder, seconds

    def run(self, steps: int, batch: int, lr: float, progress: bool | None) -> None:
        """Trains for `steps` steps, with looks at the held-out texts between."""
        from veridical.progress import bar

        parameters = [self.matrices.requires_grad_(), self.offsets.requires_grad_()]
        optimiser = torch.optim.Adam(parameters, lr=lr)
        reader = self.training.batches(batch, sites=[*self.names, self.last], seed=self.seed, epochs=None)
        looks = {round(steps * look / LOOKS) for look in range(1, LOOKS + 1)}
        done = self._taken_up(optimiser, reader)
        if not done:
            self._look(0)
        stream, written = iter(reader), time.monotonic()
        with torch.enable_grad(), bar(steps, "tuned lens", "steps", progress) as shown:
            shown.update(done)
            for step in range(done + 1, steps + 1):
                optimiser.param_groups[0]["lr"] = lr * (1 - (step - 1) / steps)
                vectors = next(stream)
                for parameter, gradient in zip(parameters, self._gradients(vectors, step)):
                    parameter.grad = gradient
                optimiser.step()
                if step in looks:
                    self._look(step)
                if step == steps or time.monotonic() - written >= self.seconds:
                    self._checkpoint(step, optimiser, reader)
                    written = time.monotonic()
                shown.update(1)

    def result(self, facts: Mapping[str, Any]) -> TunedLens:
        """The best maps, brought into the activations' own units."""
        matrices, offsets = (part.detach().double() for part in self.best)
        offsets = self.scale.double()[:, None] * offsets - torch.einsum(
            "sij,sj->si", matrices, self.mean.double()
        )
        sites = tuple(Site.parse(name).short for name in self.names)
        lines = [(step, site, kl) for step, found in self.history for site, kl in zip(sites, found.tolist())]
        return TunedLens(
            sites=sites,
            matrices=matrices.float().cpu().numpy(),
            offsets=offsets.float().cpu().numpy(),
            plain_kl=self.history[0][1],
            held_out_kl=self.best_kl,
            best_step=self.best_step,
            history=pd.DataFrame(lines, columns=["step", "site", "kl"]),
            facts=facts,
        )

    def _gradients(self, vectors: Mapping[str, Tensor], step: int) -> list[Tensor]:
        """Of the mean KL over tokens, summed over layers: layers do not see each other."""
        totals = [torch.zeros_like(self.matrices), torch.zeros_like(self.offsets)]
        for layers, loss in self._losses(vectors):
            mean = loss.mean(1).sum()
            if not bool(torch.isfinite(mean)):
                raise NonFiniteError(
                    f"the loss is {float(mean)} in step {step} at {', '.join(self.names[layers])}; lower lr"
                )
            for total, part in zip(totals, torch.autograd.grad(mean, (self.matrices, self.offsets))):
                total += part
        return totals

    def _losses(self, vectors: Mapping[str, Tensor]) -> Iterator[tuple[slice, Tensor]]:
        """KL `[layers, tokens]`, as many layers at a time as memory allows."""
        with torch.no_grad():
            final = self._log_probabilities(vectors[self.last].to(self.model.device))
        count = max(1, LOGITS // final.numel())
        for first in range(0, len(self.names), count):
            layers = slice(first, first + count)
            stream = torch.stack([vectors[name] for name in self.names[layers]])
            x = stream.to(device=self.model.device, dtype=self.type)
            relative = (x - self.mean[layers, None]) / self.scale[layers, None, None]
            moved = torch.baddbmm(self.offsets[layers, None], relative, self.matrices[layers].transpose(1, 2))
            translated = x + moved * self.scale[layers, None, None]
            ours = self._log_probabilities(translated.flatten(0, 1)).unflatten(0, x.shape[:2])
            yield layers, divergence(final.expand_as(ours), ours)

    def _log_probabilities(self, vectors: Tensor) -> Tensor:
        logits = self.readout(vectors.to(self.model.dtype))
        return logits.to(torch.promote_types(torch.float32, logits.dtype)).log_softmax(-1)

    def _look(self, step: int) -> None:
        """Judges the maps on the held-out texts and keeps those that are the best so far."""
        sums = np.zeros(len(self.names))
        with torch.no_grad():
            for vectors in self.held:
                for layers, loss in self._losses(vectors):
                    sums[layers] += loss.double().sum(1).cpu().numpy()
        found = sums / self.held_tokens
        self.history.append((step, found))
        if step == 0 and not np.isfinite(found).all():
            raise NonFiniteError(f"{self.model.path} gives NaN or infinity on the held-out texts")
        better = np.flatnonzero(found < self.best_kl)
        for kept, now in zip(self.best, (self.matrices, self.offsets)):
            kept[better] = now.detach()[better]
        self.best_kl[better], self.best_step[better] = found[better], step

    # Checkpoints

    def _checkpoint(self, step: int, optimiser: torch.optim.Adam, reader: Reader) -> None:
        if self.folder is None:
            return
        tensors = {f"{which}.{name}": value for which, name, value in self._parts(optimiser)}
        tensors["looks"] = torch.from_numpy(np.stack([found for _, found in self.history]))
        tensors["best_kl"] = torch.from_numpy(self.best_kl)
        tensors["best_step"] = torch.from_numpy(self.best_step)
        state = {"step": step, "looks": [at for at, _ in self.history], "reader": reader.state_dict()}
        try:
            self.folder.write(step, tensors, state)
        except DiskFullError as error:
            log.warning("no checkpoint after %d steps, training goes on: %s", step, error)

    def _taken_up(self, optimiser: torch.optim.Adam, reader: Reader) -> int:
        """Brings everything to where the last checkpoint stands; the number of its step, 0 without one."""
        found = None if self.folder is None else self.folder.latest()
        if found is None:
            return 0
        tensors, state = found
        for number, parameter in enumerate((self.matrices, self.offsets)):
            moments = {name: tensors[f"moments.{number}.{name}"] for name in MOMENTS}
            optimiser.state[parameter] = {
                name: value if name == "step" else value.to(parameter) for name, value in moments.items()
            }
        with torch.no_grad():
            for which, name, value in self._parts(optimiser):
                if which != "moments":
                    value.copy_(tensors[f"{which}.{name}"])
        self.history = list(zip(state["looks"], tensors["looks"].numpy()))
        self.best_kl, self.best_step = tensors["best_kl"].numpy(), tensors["best_step"].numpy()
        reader.load_state_dict(state["reader"])
        log.info("tuned lens: going on after step %d", state["step"])
        return int(state["step"])

    def _parts(self, optimiser: torch.optim.Adam) -> Iterator[tuple[str, str, Tensor]]:
        """What a step changes: maps, the best of them, and the optimiser's moments."""
        now = (self.matrices, self.offsets)
        for number, (parameter, best) in enumerate(zip(now, self.best)):
            yield "now", str(number), parameter
            yield "best", str(number), best
            for name, value in optimiser.state[parameter].items():
                yield "moments", f"{number}.{name}", value

    def _held(self, held: Activations) -> Iterator[dict[str, Tensor]]:
        seen = 0
        for vectors in held.batches(256, sites=[*self.names, self.last], seed=self.seed):
            if seen >= HELD_OUT:
                return
            yield {name: value.clone() for name, value in vectors.items()}
            seen += len(vectors[self.last])


def _activations(
    model: HookedModel, data: Any, names: list[str], store: str | Path | None, progress: bool | None
) -> Activations:
    from veridical.activations import Activations, collect
    from veridical.interventions.means import stored_type

    if not isinstance(data, Activations):
        options: dict[str, Any] = {"store": str(store)} if store is not None else {}
        kind = stored_type(model)
        return collect(model, data, sites=names, tokens="all", dtype=kind, progress=progress, **options)
    if store is not None:
        raise InputError("store= is for activations that are made here, and data are activations already")
    for name in names:
        if name not in data:
            raise unknown("site", name, data.sites, "A tuned lens needs its sites and the last resid_post.")
    same_model(
        data.request.model["path"],
        data.request.model["fingerprint"],
        model.path,
        model.fingerprint(),
        "set of activations",
    )
    return data


def _halves(acts: Activations, holdout: float, seed: int) -> tuple[Activations, Activations]:
    """Training and held-out rows; pairs stay together."""
    column = acts.rows["pair"] if "pair" in acts.rows.columns else pd.Series(np.arange(len(acts.rows)))
    groups = np.unique(column.to_numpy().astype(str))
    if len(groups) < 2:
        raise DataError("a tuned lens needs two texts at least: one to train on, one to judge it by")
    count = min(max(1, round(holdout * len(groups))), len(groups) - 1)
    chosen = np.random.default_rng(seed).permutation(groups)[:count]
    mask = np.isin(column.to_numpy().astype(str), chosen)
    return acts.filter(~mask), acts.filter(mask)


def _check(steps: int, batch: int, lr: float, holdout: float, minutes: float) -> None:
    for name, value in (("steps", steps), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} is {value!r}; expected an integer above 0")
    if not 0 < holdout < 1:
        raise InputError(f"holdout is {holdout!r}; expected a share between 0 and 1")
    if not minutes > 0:
        raise InputError(f"checkpoint_minutes is {minutes!r}; expected a number above 0")
    if not (np.isfinite(lr) and lr > 0):
        raise InputError(f"lr is {lr!r}; expected a number above 0")
