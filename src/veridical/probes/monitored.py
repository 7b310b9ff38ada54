"""What a monitor has seen: scores of tokens and rows, as a table, and as coloured text."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from veridical.errors import DataError
from veridical.probes.passes import Pass
from veridical.probes.running import Running
from veridical.probes.tokens import TokenView

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.reporting.section import Section

SHOWN = 8
"""Rows that are shown as coloured text at most."""
COLUMNS = (
    "call",
    "row",
    "position",
    "token_id",
    "token",
    "generated",
    "score",
    "probability",
    "fires",
    "row_score",
)


@dataclass(frozen=True)
class Reading:
    """One pass: what it was about, and what was read from each token, `[rows, tokens, k]` on the device."""

    of: Pass
    values: Tensor


@dataclass
class Call:
    """The passes of one generation, or of one forward call.

    Attributes:
        readings: In order.
        state: Running score and which rows have ended, where someone watches while it runs.
        seen: Readings that went into `state`.
    """

    readings: list[Reading]
    state: tuple[Running, Tensor] | None = None
    seen: int = 0


@dataclass(repr=False)
class Scores:
    """Scores of every token that a model read while it was monitored.

    Attributes:
        model: The model.
        label: What the positive class is called.
        site: Where the probe reads.
        threshold: Log-odds above which a token or row fires.
        notes: What should be known about them.
        over: "all" tokens count for a row's score, or "generated" ones.
        make_running: How token scores become a row's score.
        ends: Token ids after which a row has ended.
        padding: Token id that ended rows are fed; None where there is none.
        calls: What was seen, one for each generation or forward call.
    """

    model: HookedModel
    label: str
    site: str
    threshold: float
    notes: tuple[str, ...]
    over: str
    make_running: Callable[[], Running]
    ends: tuple[int, ...]
    padding: int | None = None
    calls: list[Call] = field(default_factory=list)

    def to_frame(self) -> pd.DataFrame:
        """One line per token that was read, padding and ended rows left out.

        Columns: `call`, `row` and `position` (without padding), `token_id`, `token`, `generated` (read after
        the first pass; else it is of the prompt), `score` (log-odds; of a probe over sequences that of a
        sequence of this one token), `probability`, `fires`, `row_score` (the row's score after this token).
        """
        parts = [self._table(number) for number in range(len(self.calls))]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(COLUMNS))

    def rows(self) -> pd.DataFrame:
        """One line per row: `call`, `row`, `tokens`, `score` at its end, and whether it `fired`.

        A row fired if its score was above the threshold after any of its tokens.
        """
        frame = self.to_frame()
        frame["fired"] = frame["row_score"] > self.threshold
        grouped = frame.groupby(["call", "row"], sort=True)
        return grouped.agg(
            tokens=("token_id", "size"), score=("row_score", "last"), fired=("fired", "any")
        ).reset_index()

    @property
    def fired(self) -> np.ndarray:
        """Which rows of the last call fired, `[rows]` bool; empty before the first."""
        rows = self.rows()
        return rows.loc[rows["call"] == len(self.calls) - 1, "fired"].to_numpy(dtype=bool)

    def stop(self, input_ids: Tensor, logits: Any = None, **_: Any) -> Tensor:
        """A stopping criterion for transformers' `generate`: ends the rows that fired.

        Use: `model.generate(..., stopping_criteria=[scores.stop])`.
        """
        if not self.calls:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        self.latest()
        return self._over.to(input_ids.device)

    def view(self, row: int = 0, call: int = -1) -> TokenView:
        """One row as text with every token coloured by its score."""
        frame: Any = self.to_frame()
        call = call % max(1, len(self.calls))
        lines: Any = frame[(frame["call"] == call) & (frame["row"] == row)]
        if not len(lines):
            raise DataError(
                f"no token of row {row} was seen in call {call}; there are {len(self.calls)} calls"
            )
        text, spans = _spelt(self.model.tokenizer, lines["token_id"].tolist())
        generated = lines["generated"].to_numpy(dtype=bool)
        starts, ends = zip(*spans)
        prompt = max([end for end, new in zip(ends, generated) if not new], default=0)
        table = pd.DataFrame(
            {
                "token_id": lines["token_id"].to_numpy(),
                "token": lines["token"].to_numpy(),
                "start": starts,
                "end": ends,
                "completion": generated,
                "decision": lines["score"].to_numpy(),
                "probability": lines["probability"].to_numpy(),
            }
        )
        return TokenView(text, prompt, table, self.label, self.site, self.notes)

    def report_section(self) -> Section:
        """Rows, and the first of them as coloured text."""
        from veridical.reporting.section import Section

        rows = self.rows()
        fired = np.count_nonzero(rows["fired"])
        said = f"{fired} of {len(rows)} rows fired above log-odds {self.threshold:.3f}."
        return Section(
            title=f"Monitored: {self.label} at {self.site}",
            text="\n\n".join([said, *self.notes]),
            tables=(("Rows", rows.round(3)),),
            html=tuple(self._views()),
        )

    def __len__(self) -> int:
        return sum(
            reading.values.shape[0] * reading.values.shape[1] for c in self.calls for reading in c.readings
        )

    def __repr__(self) -> str:
        rows = self.rows()
        return (
            f"Scores({self.label} at {self.site}: {len(rows)} rows in {len(self.calls)} calls, "
            f"{np.count_nonzero(rows['fired'])} fired above {self.threshold:.3f})"
        )

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>" + "".join(self._views())

    def _views(self) -> list[str]:
        if self.model.tokenizer is None:
            return []
        rows = self.rows().head(SHOWN)
        return [self.view(int(row), int(call)).to_html() for row, call in zip(rows["row"], rows["call"])]

    # While it runs

    def latest(self) -> Tensor:
        """`[rows, tokens]` bool over the passes that came since this was last asked: row score over the
        threshold after each token; makes the caller wait for the device."""
        call = self.calls[-1]
        if call.state is None:
            rows = call.readings[0].of.shape[0]
            device = call.readings[0].values.device
            call.state = self.make_running(), torch.zeros(rows, dtype=torch.bool, device=device)
            self._over = call.state[1].clone()
        running, ended = call.state
        found = []
        for reading in call.readings[call.seen :]:
            counted, ended = self._counted(reading, ended)
            found.append(running.update(reading.values, counted) > self.threshold)
        call.state, call.seen = (running, ended), len(call.readings)
        if not found:
            return torch.zeros(len(ended), 0, dtype=torch.bool)
        over = torch.cat(found, 1)
        self._over = self._over | over.any(1)
        return over.cpu()

    def first_over(self, call: int, row: int) -> tuple[int, int, float]:
        """Position, token id and score of the first token after which a row's score is over the threshold."""
        frame = self._table(call)
        line: Any = frame[(frame["row"] == row) & (frame["row_score"] > self.threshold)].iloc[0]
        return int(line["position"]), int(line["token_id"]), float(line["row_score"])

    def _counted(self, reading: Reading, ended: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of a pass `[rows, tokens]` that count for their row's score; which rows ended with it."""
        now, device = reading.of, ended.device
        real = torch.ones(now.shape, dtype=torch.bool, device=device)
        if now.real is not None:
            real = now.real[:, now.past :].to(device)
        if now.first:
            return real & (self.over == "all"), ended
        kept, ended = self._kept(now.ids, now.shape, ended)
        return real & kept, ended

    def _kept(self, ids: Tensor | None, shape: tuple[int, int], ended: Tensor) -> tuple[Tensor, Tensor]:
        """Generated tokens `[rows, tokens]` up to the end of their row, and which rows have ended by then."""
        if ids is None:
            return ~ended[:, None].expand(shape), ended
        ids = ids.to(ended.device)
        padding = ids == (-2 if self.padding is None or self.padding in self.ends else self.padding)
        stops = padding | torch.isin(ids, torch.tensor(self.ends, dtype=torch.long, device=ids.device))
        after = stops.long().cumsum(1) - stops.long() > 0
        return ~ended[:, None] & ~after & ~padding, ended | stops.any(1)

    # Afterwards

    def _table(self, number: int) -> pd.DataFrame:
        """The tokens of one call, in order of row and position."""
        readings = self.calls[number].readings
        last, first = readings[-1].of, readings[0].of
        rows, width = last.shape[0], last.past + last.shape[1]
        values = torch.full((rows, width, readings[0].values.shape[2]), torch.nan)
        ids = torch.full((rows, width), -1)
        for reading in readings:  # a later pass writes over what an earlier one guessed wrongly
            span = slice(reading.of.past, reading.of.past + reading.of.shape[1])
            values[:, span] = reading.values.cpu()
            if reading.of.ids is not None:
                ids[:, span] = reading.of.ids.cpu()
        real = torch.ones(rows, width, dtype=torch.bool) if last.real is None else last.real.cpu()
        border = first.past + first.shape[1]
        generated = torch.arange(width) >= border
        kept = real & ~values[..., 0].isnan()
        new = ids[:, border:]
        kept[:, border:] &= self._kept(new, (rows, new.shape[1]), torch.zeros(rows, dtype=torch.bool))[0]
        counted = kept if self.over == "all" else kept & generated
        row_score = self.make_running().update(values.nan_to_num(), counted)
        position = real.cumsum(1) - 1
        row, at = torch.nonzero(kept, as_tuple=True)
        score = self.make_running().alone(values[row, at]).double().numpy()
        return pd.DataFrame(
            {
                "call": number,
                "row": row.numpy(),
                "position": position[row, at].numpy(),
                "token_id": ids[row, at].numpy(),
                "token": self._names(ids[row, at].tolist()),
                "generated": generated[at].numpy(),
                "score": score,
                "probability": np.exp(-np.logaddexp(0, -score)),
                "fires": score > self.threshold,
                "row_score": row_score[row, at].double().numpy(),
            }
        )

    def _names(self, ids: list[int]) -> list[str]:
        if self.model.tokenizer is None:
            return [str(token) for token in ids]
        known = {token: self.model.tokenizer.decode([token]) if token >= 0 else "" for token in set(ids)}
        return [known[token] for token in ids]


def _spelt(tokenizer: Any, ids: list[int]) -> tuple[str, list[tuple[int, int]]]:
    """The text of token ids, and the characters of each; tokens that share a character share its span."""
    if tokenizer is None or min(ids) < 0:
        raise DataError("a view needs the model's tokenizer, and a model that was given token ids")
    whole = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    spans, settled = [], 0
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        spans.append((min(settled, len(whole)), min(len(text), len(whole))))
        # A character whose bytes have not all come is shown as U+FFFD until they have.
        if not text.endswith("\ufffd") or whole[: len(text)] == text:
            settled = len(text)
    return whole, spans
