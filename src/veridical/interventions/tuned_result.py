"""A trained tuned lens: its maps, how good they are on held-out texts, and reading with it."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from veridical.errors import unknown
from veridical.interventions.lens_reading import LensReading
from veridical.interventions.lenses import TOP, read_lens
from veridical.interventions.metrics import Answers
from veridical.probes.fits import same_model
from veridical.saved_result import Saved
from veridical.sites import Site

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.hooked import HookedModel
    from veridical.reporting.section import Section


@dataclass(frozen=True, repr=False)
class TunedLens(Saved):
    """Affine maps from layers of a model to its last one.

    Attributes:
        sites: Where each reads, in short form, in order of depth.
        matrices: `[sites, d_model, d_model]` float32, A.
        offsets: `[sites, d_model]` float32, b.
        plain_kl: `[sites]`, KL of the logit lens from the model's output on held-out texts, in nats.
        held_out_kl: `[sites]`, of the maps. They were chosen among several by this figure, so that it is a
            little low.
        best_step: `[sites]`, the step whose map was kept; 0 is the identity.
        history: One line per look and site: `step`, `site`, `kl`.
        facts: Model, data, seed and settings.
    """

    sites: tuple[str, ...]
    matrices: np.ndarray
    offsets: np.ndarray
    plain_kl: np.ndarray
    held_out_kl: np.ndarray
    best_step: np.ndarray
    history: pd.DataFrame
    facts: Mapping[str, Any]

    def translate(self, site: str | Site, values: Tensor) -> Tensor:
        """`values` `[..., d_model]` of a site as its map sends them, in their own type.

        Raises:
            UnknownNameError: A site without a map.
        """
        name = Site.parse(site).short
        if name not in self.sites:
            raise unknown("site", name, self.sites, "The lens was trained at these sites.")
        at = self.sites.index(name)
        x = values.to(torch.promote_types(torch.float32, values.dtype))
        matrix, offset = (torch.as_tensor(part[at]).to(x) for part in (self.matrices, self.offsets))
        return (x + x @ matrix.T + offset).to(values.dtype)

    def read(
        self,
        model: HookedModel | Any,
        texts: Any,
        *,
        sites: Any = None,
        answers: Answers | None = None,
        top: int = TOP,
        batch_tokens: int = 2048,
        progress: bool | None = None,
        force: bool = False,
    ) -> LensReading:
        """Reads texts through the lens; arguments as for `logit_lens`.

        Args:
            model: The model that the lens was trained on.
            texts: As for `logit_lens`.
            sites: Some of the lens's sites; all of them, and the model's end, when not given.
            answers, top, batch_tokens, progress: As for `logit_lens`.
            force: Accept another model, such as a fine-tuned descendant.

        Raises:
            MismatchError: Another model than the lens was trained on.
        """
        from veridical.models import load

        model = load(model)
        if not force:
            facts = self.facts
            same_model(
                facts["model"], facts["model_fingerprint"], model.path, model.fingerprint(), "tuned lens"
            )
        last = Site("resid_post", model.n_layers - 1)
        wanted = [*self.sites, last.short] if sites is None else sites

        def translate(site: str, values: Tensor) -> Tensor:
            return values if site == last.name else self.translate(site, values)

        return read_lens(model, texts, wanted, "tuned lens", translate, answers, top, batch_tokens, progress)

    def to_frame(self) -> pd.DataFrame:
        """One line per site: `site`, `logit_lens_kl`, `tuned_lens_kl` (held out, nats), `best_step`."""
        return pd.DataFrame(
            {
                "site": self.sites,
                "logit_lens_kl": self.plain_kl,
                "tuned_lens_kl": self.held_out_kl,
                "best_step": self.best_step,
            }
        )

    def findings(self) -> list[str]:
        """What training did, in sentences."""
        said = [
            f"Over {len(self.sites)} sites, held-out KL from the model's output is on average "
            f"{self.plain_kl.mean():.3f} nats with the logit lens and {self.held_out_kl.mean():.3f} with the "
            "tuned lens."
        ]
        if kept := [site for site, step in zip(self.sites, self.best_step) if step == 0]:
            said.append(f"No map was better than none at {', '.join(kept)}.")
        if late := [s for s, step in zip(self.sites, self.best_step) if step == self.facts["steps"]]:
            said.append(f"Still getting better at the last step: {', '.join(late)}.")
        return said

    def figure(self) -> go.Figure:
        """Held-out KL by site, tuned and plain."""
        from veridical.interventions.lens_figures import tuned_lines

        return tuned_lines(self)

    def report_section(self) -> Section:
        """Findings, figure and table."""
        from veridical.reporting.section import Section

        return Section(
            title=f"Tuned lens of {self.facts['model']}",
            text="\n\n".join(self.findings()),
            figures=(self.figure(),),
            tables=(("Held-out KL from the model's output, in nats", self.to_frame().round(4)),),
            headline=(("mean held-out KL", f"{self.held_out_kl.mean():.3f} nats"),),
        )

    def __repr__(self) -> str:
        return (
            f"TunedLens({self.facts['model']}, {len(self.sites)} sites: held-out KL "
            f"{self.plain_kl.mean():.3g} plain, {self.held_out_kl.mean():.3g} tuned)"
        )

    def _repr_html_(self) -> str:
        said = "".join(f"<p>{html.escape(line)}</p>" for line in self.findings())
        return said + str(self.to_frame().round(4).to_html(index=False, border=0))
