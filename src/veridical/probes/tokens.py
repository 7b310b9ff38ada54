"""A probe over a text, token by token.

Scores belong to tokens, readers see characters. Tokens of byte-level tokenizers can share a character (the
bytes of one letter in another script), so tokens whose spans overlap are drawn as one piece, coloured by the
last of them: only there had the model read the whole character.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from veridical.errors import DataError
from veridical.probes.card import number
from veridical.probes.fits import place_for

if TYPE_CHECKING:
    from veridical.models import HookedModel
    from veridical.probes.base import LinearProbe
    from veridical.reporting.section import Section
    from veridical.tokens import Encoded, Prompt

LOW, HIGH = (0, 114, 178), (213, 94, 0)
"""Blue for the negative and orange for the positive class, told apart by the colour-blind."""
STYLE = """<style>
.vd-tokens { line-height: 2.1; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .92rem;
  font-family: ui-monospace, Menlo, Consolas, monospace }
.vd-tokens span[data-tip] { position: relative; border-radius: 3px; padding: 1px 0; cursor: help }
.vd-tokens span.vd-prompt { border-bottom: 1px dotted #6b7280 }
.vd-tokens span[data-tip]:focus { outline: 2px solid #1b1f24 }
.vd-tokens span[data-tip]:focus::after { content: attr(data-tip); position: absolute; left: 0; top: 1.9em;
  z-index: 2; background: #1b1f24; color: #fff; padding: 3px 7px; border-radius: 4px; white-space: nowrap;
  font: 12px system-ui, sans-serif }
.vd-scale { font: .85rem system-ui, sans-serif; color: #374151 }
</style>"""
"""Tips show on hover (title) and on a tap or with the keyboard (focus)."""


@dataclass(frozen=True, repr=False)
class TokenView:
    """Scores of one probe for every token of one text.

    Attributes:
        text: The exact text that the model read.
        prompt_chars: `text[:prompt_chars]` is the prompt.
        tokens: One line per token: `token_id`, `token`, `start`, `end` (characters of `text`, equal for a
            special token that stands for none), `completion`, `decision` (log-odds), `probability`.
        label: What the positive class is called.
        site: Where the probe reads.
        notes: What should be known before the colours are believed.
    """

    text: str
    prompt_chars: int
    tokens: pd.DataFrame
    label: str
    site: str
    notes: tuple[str, ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """One line per token."""
        return self.tokens.copy()

    def to_html(self) -> str:
        """The text with every token coloured by its probability; all of it escaped, fit for a phone."""
        pieces, at = [], 0
        for start, end, lines in self._pieces():
            pieces.append(html.escape(self.text[at:start]))
            pieces.append(self._piece(start, end, lines))
            at = end
        pieces.append(html.escape(self.text[at:]))
        label, site = html.escape(self.label), html.escape(self.site)
        scale = (
            f'<p class="vd-scale">{_swatch(0)} probability of {label} near 0 &nbsp; {_swatch(1)} near 1, '
            f"at {site}; the prompt is underlined with dots. Point at or tap a token for its score.</p>"
        )
        return f'{STYLE}{scale}<div class="vd-tokens" dir="auto">{"".join(pieces)}</div>'

    def report_section(self) -> Section:
        """The coloured text as a section of a report."""
        from veridical.reporting.section import Section

        said = self.tokens[self.tokens["completion"]]
        shown = said if len(said) else self.tokens
        mean = float(np.mean(shown["probability"]))
        part = "the completion" if len(said) else "the text"
        return Section(
            title=f"Token by token: {self.label} at {self.site}",
            text="\n\n".join([f"Mean probability over {part}: {number(mean)}.", *self.notes]),
            html=(self.to_html(),),
        )

    def __repr__(self) -> str:
        last = number(float(self.tokens["probability"].to_numpy()[-1]))
        return f"TokenView({len(self.tokens)} tokens, {self.label} at {self.site}, last token {last})"

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return self.to_html() + notes

    def _pieces(self) -> list[tuple[int, int, pd.DataFrame]]:
        """Runs of tokens whose spans overlap, as (start, end, tokens)."""
        pieces: list[list[int]] = []
        spans: list[tuple[int, int]] = []
        for index, (start, end) in enumerate(zip(self.tokens["start"], self.tokens["end"])):
            if start >= end:
                continue
            if spans and start < spans[-1][1]:
                pieces[-1].append(index)
                spans[-1] = (spans[-1][0], max(spans[-1][1], end))
            else:
                pieces.append([index])
                spans.append((start, end))
        return [(start, end, self.tokens.iloc[rows]) for (start, end), rows in zip(spans, pieces)]

    def _piece(self, start: int, end: int, lines: pd.DataFrame) -> str:
        probability = float(lines["probability"].to_numpy()[-1])
        tip = ", ".join(
            f"{p:.3f} (log-odds {d:+.2f})" for p, d in zip(lines["probability"], lines["decision"])
        )
        names = "" if len(lines) == 1 else f"{len(lines)} tokens: "
        said = html.escape(f"{names}{tip}", quote=True)
        kind = "" if bool(lines["completion"].iloc[-1]) else ' class="vd-prompt"'
        return (
            f'<span{kind} tabindex="0" style="background:{_colour(probability)}" title="{said}" '
            f'data-tip="{said}">'
            f"{html.escape(self.text[start:end])}</span>"
        )


def view_tokens(
    model: HookedModel,
    probe: LinearProbe,
    text: Prompt,
    completion: str | None = None,
    *,
    site: str | None = None,
    force: bool = False,
) -> TokenView:
    """Scores every token of a text with a probe.

    Args:
        model: The model that the probe was fitted on.
        probe: A fitted probe.
        text: A text or chat messages.
        completion: What follows it, such as the model's answer.
        site: Where to read; the probe's own site when not given.
        force: Accept another model or site than the probe was fitted on; the view then says so.

    Raises:
        MismatchError: The probe was fitted on another model or site, or has another width.
        InputError: Neither the probe nor the caller names a site.
        DataError: A text that cannot be encoded; the message says why.
    """
    name = place_for(model, probe, site, force=force)
    encoded = model.encode([text], [completion] if completion is not None else None)[0]
    activations = _read(model, encoded, name)
    decision = probe.decision_function(activations)
    target = probe.origin_.target or "the positive class"
    return TokenView(
        text=encoded.text,
        prompt_chars=encoded.prompt_chars,
        tokens=_table(model, encoded, decision),
        label=f"{target} = {probe.classes_[1]}",
        site=name,
        notes=_notes(model, probe),
    )


def _read(model: HookedModel, encoded: Encoded, site: str) -> torch.Tensor:
    """Activations of every token, `[tokens, d]` float64."""
    with torch.inference_mode():
        run = model.run(
            model.batch([encoded]), read={site: lambda x: x[0].to("cpu", torch.float64)}, stop=True
        )
    return run.values[site].reshape(len(encoded.ids), -1)


def _table(model: HookedModel, encoded: Encoded, decision: np.ndarray) -> pd.DataFrame:
    offsets = encoded.offsets
    if offsets is None:
        raise DataError(
            f"the tokenizer of {model.path} does not tell where tokens begin; a token view needs a fast "
            "tokenizer"
        )
    starts, ends = ([span[side] for span in offsets] for side in (0, 1))
    names = [
        encoded.text[start:end] or str(model.tokenizer.convert_ids_to_tokens(token))
        for token, start, end in zip(encoded.ids, starts, ends)
    ]
    return pd.DataFrame(
        {
            "token_id": list(encoded.ids),
            "token": names,
            "start": starts,
            "end": ends,
            "completion": np.arange(len(encoded.ids)) >= encoded.prompt_tokens,
            "decision": decision,
            "probability": np.exp(-np.logaddexp(0, -decision)),
        }
    )


def _notes(model: HookedModel, probe: LinearProbe) -> tuple[str, ...]:
    origin, notes = probe.origin_, []
    if origin.tokens not in (None, "all"):
        notes.append(
            f"The probe was fitted on tokens={origin.tokens}; its scores on other tokens are an "
            "extrapolation."
        )
    if origin.model_fingerprint is not None and origin.model_fingerprint != model.fingerprint():
        notes.append(
            f"The probe was fitted on another model (fingerprint {origin.model_fingerprint[:12]}; this one "
            f"has {model.fingerprint()[:12]}): its direction need not mean the same here."
        )
    return tuple(notes)


def _colour(probability: float) -> str:
    """From blue over none to orange; never so dark that black text on it is hard to read."""
    red, green, blue = HIGH if probability >= 0.5 else LOW
    return f"rgba({red},{green},{blue},{0.55 * abs(2 * probability - 1):.3f})"


def _swatch(probability: float) -> str:
    return f'<span aria-hidden="true" style="background:{_colour(probability)};padding:0 .6em">&nbsp;</span>'
