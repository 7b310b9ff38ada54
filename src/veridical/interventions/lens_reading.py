"""What a lens reads: at each place and token of some texts (or images), a distribution over the next token
(or over labels)."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from veridical.saved_result import Saved

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.reporting.section import Section


@dataclass(frozen=True, repr=False)
class LensReading(Saved):
    """Next-token distributions read from the residual stream, beside the model's own.

    Arrays have one column for each real token of the texts; padding is not among them.

    Attributes:
        lens: "logit lens" or "tuned lens".
        sites: Where it was read, in short form, in order of depth.
        rows: `[tokens]`, text of each token.
        positions: `[tokens]`, its place in its text, from 0.
        tokens: `[tokens]`, its own text.
        top_ids: `[sites, tokens, top]`, the likeliest next tokens.
        top_tokens: The same as text.
        top_probabilities: The same, their probabilities.
        targets: `[tokens]`, id of the token whose probability and rank are followed.
        target_tokens: The same as text.
        probability: `[sites, tokens]`, of the target.
        rank: `[sites, tokens]`, tokens that are likelier than the target; 0 is top.
        kl: `[sites, tokens]`, KL(model's output || lens), in nats.
        entropy: `[sites, tokens]`, of the lens's distribution, in nats.
        facts: Model, data and what the targets are; what it `reads` ("next token" or "label") `of` what.
    """

    lens: str
    sites: tuple[str, ...]
    rows: np.ndarray
    positions: np.ndarray
    tokens: np.ndarray
    top_ids: np.ndarray
    top_tokens: np.ndarray
    top_probabilities: np.ndarray
    targets: np.ndarray
    target_tokens: np.ndarray
    probability: np.ndarray
    rank: np.ndarray
    kl: np.ndarray
    entropy: np.ndarray
    facts: Mapping[str, Any]

    def to_frame(self) -> pd.DataFrame:
        """One line per site and token.

        Columns: `site`, `row`, `position`, `token`, `top` (the likeliest next token), `top_id`,
        `top_probability`, `target`, `target_id`, `probability`, `rank`, `kl` and `entropy` (nats).
        """
        sites, count = len(self.sites), len(self.rows)

        def wide(values: np.ndarray) -> np.ndarray:
            return np.tile(values, sites)

        return pd.DataFrame(
            {
                "site": np.repeat(np.array(self.sites, dtype=object), count),
                "row": wide(self.rows),
                "position": wide(self.positions),
                "token": wide(self.tokens),
                "top": self.top_tokens[..., 0].reshape(-1),
                "top_id": self.top_ids[..., 0].reshape(-1),
                "top_probability": self.top_probabilities[..., 0].reshape(-1),
                "target": wide(self.target_tokens),
                "target_id": wide(self.targets),
                "probability": self.probability.reshape(-1),
                "rank": self.rank.reshape(-1),
                "kl": self.kl.reshape(-1),
                "entropy": self.entropy.reshape(-1),
            }
        )

    def by_site(self) -> pd.DataFrame:
        """One line per site, means over all tokens: `site`, `kl`, `entropy`, `probability` and `agreement`
        (share of tokens at which the lens's top token is the model's)."""
        final = self.facts["final_top"]
        return pd.DataFrame(
            {
                "site": self.sites,
                "kl": self.kl.mean(1),
                "entropy": self.entropy.mean(1),
                "probability": self.probability.mean(1),
                "agreement": (self.top_ids[..., 0] == np.asarray(final)).mean(1),
            }
        )

    def findings(self) -> list[str]:
        """What the reading says, in sentences."""
        table = self.by_site()
        agreed = table.loc[table["agreement"] >= 0.5, "site"]
        said = [
            f"The {self.lens} was read at {len(self.sites)} sites and {len(self.rows)} tokens of "
            f"{len(np.unique(self.rows))} {self.facts.get('of', 'texts')}."
        ]
        if len(agreed):
            said.append(
                f"From {agreed.iloc[0]} on its top token is the model's at half of the tokens or more."
            )
        else:
            said.append("At no site is its top token the model's at half of the tokens.")
        first = table.iloc[0]
        said.append(f"KL from the model's output is {first['kl']:.2f} nats at {first['site']}.")
        return said

    def figure(self, row: int = 0, value: str = "probability") -> go.Figure:
        """Heat map of a text: sites by tokens, with the likeliest next token written in each cell.

        Args:
            row: Which text.
            value: What the colour shows: "probability" (of the target), "rank", "kl" or "entropy".

        Raises:
            InputError: A text or value that is not there.
        """
        from veridical.interventions.lens_figures import lens_map

        return lens_map(self, row, value)

    def report_section(self) -> Section:
        """Findings, the first text's heat map, and the means by site."""
        from veridical.reporting.section import Section

        table = self.by_site()
        return Section(
            title=f"{self.lens.capitalize()} of {self.facts['model']}",
            text="\n\n".join([*self.findings(), str(self.facts["target"])]),
            figures=(self.figure(int(self.rows[0])),),
            tables=(("Means over all tokens, KL and entropy in nats", table.round(4)),),
            headline=(("KL at the first site", f"{table['kl'].iloc[0]:.2f} nats"),),
        )

    def __repr__(self) -> str:
        return (
            f"LensReading({self.lens} of {self.facts['model']}: {len(self.sites)} sites, {len(self.rows)} "
            f"tokens, KL {self.kl[0].mean():.3g} to {self.kl[-1].mean():.3g} nats)"
        )

    def _repr_html_(self) -> str:
        said = "".join(f"<p>{html.escape(line)}</p>" for line in self.findings())
        return said + str(self.by_site().round(4).to_html(index=False, border=0))
