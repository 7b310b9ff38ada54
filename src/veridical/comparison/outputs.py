"""What two models predict: full-vocabulary KL by token and position, agreement, likelihood, calibration.

Every figure is of the next-token distributions over the whole vocabulary, at each compared token; nothing is
estimated from samples of tokens. KL is KL(policy || reference) in nats. On fixed text it says how far the two
are apart where the text leads; on the policy's own samples its expectation is the KL that preference training
penalises. The two are different quantities and are kept in results of their own.

Calibration is the expected calibration error over ten bins of equal width (Guo et al. 2017, "On Calibration
of Modern Neural Networks"), of the likeliest next token against the text's own.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from veridical.comparison.logits import ELEMENTS, MEASURES, compare_logits
from veridical.comparison.resampling import Ratios, bounds, by_row

if TYPE_CHECKING:
    from veridical.comparison.resampling import Resampling
    from veridical.comparison.streaming import Step

POSITIONS = 256
"""Positions that are told apart; what is behind them is counted together."""
BEFORE, AFTER = 16, 64
"""Positions around a completion's first token that are told apart."""
BINS = 10
SHIFT_RESAMPLES = 30
SHOWN = 6
REGIONS = ("all", "answer", "last")
_KL, _CHANGE = MEASURES.index("kl"), MEASURES.index("log-likelihood change")


class Outputs:
    """Takes the logits of every batch.

    Args:
        vocabulary: Tokens that both models give logits for.
        resampling: Where intervals come from.
    """

    def __init__(self, vocabulary: int, resampling: Resampling) -> None:
        self.vocabulary, count = vocabulary, resampling.count
        self.measures = Ratios(count, len(REGIONS) * len(MEASURES))
        self.positions = Ratios(count, 2 * POSITIONS)
        self.offsets = Ratios(count, 2 * (BEFORE + AFTER))
        self.sums = Ratios(count, 1)
        self.bins = torch.zeros(count + 1, 2, BINS, 3, dtype=torch.float64)
        kept = min(count, SHIFT_RESAMPLES) + 1
        self.shift = torch.zeros(kept, vocabulary, dtype=torch.float64)
        self.levels = torch.zeros(2, vocabulary, dtype=torch.float64)
        self.shift_rows = torch.zeros(kept, dtype=torch.float64)
        self.token_kl = torch.zeros(vocabulary, dtype=torch.float64)
        self.token_count = torch.zeros(vocabulary, dtype=torch.float64)
        self.texts: list[tuple[float, int, dict[str, np.ndarray]]] = []

    def add(self, step: Step) -> None:
        if step.logits is None or not len(step.row):
            return
        values, sure, means = self._distributions(step)
        self._by_region(step, values)
        self._by_position(step, values)
        self._calibrate(step, sure)
        self._shifted(step, means)
        self.token_kl.index_add_(0, step.ids.cpu(), values[:, _KL].cpu())
        self.token_count += torch.bincount(step.ids.cpu(), minlength=self.vocabulary)
        self._keep(step, values)

    def _distributions(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """By token: `MEASURES` `[tokens, measures]`; confidence and rightness of both `[tokens, 4]`; and the
        mean probabilities of both by row, `[2, rows, vocabulary]`."""
        count, device = len(step.row), step.row.device
        values = torch.zeros(count, len(MEASURES), dtype=torch.float64, device=device)
        sure = torch.zeros(count, 4, dtype=torch.float64, device=device)
        means = torch.zeros(2, len(step), self.vocabulary, device=device)
        lines = torch.arange(len(step), device=device)
        for at, ours, theirs in step.pieces(max(1, ELEMENTS // self.vocabulary)):
            following = step.following[at]
            found, odds, chances = compare_logits(ours, theirs, following, self.vocabulary)
            values[at], sure[at] = found, odds
            share = (step.row[at] == lines[:, None]) / step.counts.clamp_min(1)[:, None]
            for side, chance in enumerate(chances):
                touched = share.any(1)
                means[side, touched] += share[touched].to(chance.dtype) @ chance
        return values, sure, means

    def _by_region(self, step: Step, values: Tensor) -> None:
        known = torch.ones_like(values)
        known[:, _CHANGE:] = (step.following >= 0)[:, None]
        last = torch.zeros_like(step.answer)
        last[step.last[step.last >= 0]] = True
        sums, counts = [], []
        for region in (torch.ones_like(last), step.answer, last):
            mask = known * region[:, None]
            sums.append(by_row(step.row, len(step), values * mask))
            counts.append(by_row(step.row, len(step), mask))
        self.measures.add(step.weights, torch.cat(sums, 1), torch.cat(counts, 1))
        chosen = values[:, _KL : _KL + 1] * step.answer[:, None]
        answered = by_row(step.row, len(step), step.answer[:, None].double()) > 0
        self.sums.add(step.weights, by_row(step.row, len(step), chosen), answered)

    def _by_position(self, step: Step, values: Tensor) -> None:
        both = values[:, [_KL, _CHANGE]]
        known = torch.stack([torch.ones_like(both[:, 0]), (step.following >= 0).double()], 1)
        place = step.position.clamp(max=POSITIONS - 1)
        self._spread(self.positions, step, place, POSITIONS, both, known)
        offset = step.offset + 1  # the token that predicts the completion's first one comes to 0
        answered = by_row(step.row, len(step), step.answer[:, None].double())[:, 0] > 0
        near = (offset >= -BEFORE) & (offset < AFTER) & answered[step.row]
        self._spread(
            self.offsets, step, (offset + BEFORE).clamp(0, BEFORE + AFTER - 1), BEFORE + AFTER, both,
            known * near[:, None],
        )  # fmt: skip

    @staticmethod
    def _spread(into: Ratios, step: Step, place: Tensor, width: int, both: Tensor, known: Tensor) -> None:
        code = step.row * width + place
        sums, counts = (by_row(code, len(step) * width, part) for part in (both * known, known))
        shape = (len(step), width, 2)
        into.add(
            step.weights,
            sums.reshape(shape).transpose(1, 2).flatten(1),
            counts.reshape(shape).transpose(1, 2).flatten(1),
        )

    def _calibrate(self, step: Step, sure: Tensor) -> None:
        known = step.following >= 0
        for side in range(2):
            confidence, right = sure[:, 2 * side], sure[:, 2 * side + 1]
            place = (confidence * BINS).long().clamp(max=BINS - 1)
            each = torch.stack([torch.ones_like(right), confidence, right], 1) * known[:, None]
            found = by_row(step.row * BINS + place, len(step) * BINS, each).cpu()
            self.bins[:, side] += (step.weights @ found.reshape(len(step), -1)).reshape(-1, BINS, 3)

    def _shifted(self, step: Step, means: Tensor) -> None:
        moved = (means[0] - means[1]).cpu().double()
        present = (step.counts > 0).cpu()
        weights = step.weights[: len(self.shift)] * present
        self.shift += weights @ moved
        self.shift_rows += weights.sum(1)
        self.levels += means.sum(1).cpu().double()

    def _keep(self, step: Step, values: Tensor) -> None:
        """Keeps the texts on which the two differ most, token by token."""
        kl = by_row(step.row, len(step), values[:, :1])[:, 0] / step.counts.clamp_min(1)
        for line, mean in enumerate(kl.tolist()):
            number = int(step.numbers[line])
            if len(self.texts) == SHOWN and (mean, -number) <= self.texts[0][:2]:
                continue
            mine = step.row == line
            item = {
                "ids": step.ids[mine].cpu().numpy(),
                "kl": values[mine, _KL].cpu().numpy(),
                "change": values[mine, _CHANGE].cpu().numpy(),
            }
            push = heapq.heappush if len(self.texts) < SHOWN else heapq.heapreplace
            push(self.texts, (mean, -number, item))

    # What was found

    def frame(self) -> pd.DataFrame:
        """One line per region and measure: `value`, `low`, `high` (nats; a share for agreement), `tokens`.

        Regions: all compared tokens; those that predict the completion; the last of each row. The measure
        "kl of an answer" is the KL summed over a completion.
        """
        index = pd.DataFrame(
            [(region, measure) for region in REGIONS for measure in MEASURES], columns=["region", "measure"]
        )
        frame = index.assign(**self.measures.frame_columns())
        whole = {name: values[0] for name, values in self.sums.frame_columns().items()}
        whole = {"region": "answer", "measure": "kl of an answer", **whole}
        frame = pd.concat([frame, pd.DataFrame([whole])], ignore_index=True)
        return frame.loc[frame["tokens"] > 0].reset_index(drop=True)

    def position_frame(self) -> pd.DataFrame:
        """KL and change of the log-likelihood of the text's own next token by position.

        Columns: `axis` ("text": from its start; "answer": from the token that predicts the completion's
        first), `position`, `measure`, `value`, `low`, `high`, `tokens`.
        """
        parts = []
        for axis, ratios, first, width in (
            ("text", self.positions, 0, POSITIONS), ("answer", self.offsets, -BEFORE, BEFORE + AFTER),
        ):  # fmt: skip
            part = pd.DataFrame(
                {
                    "axis": axis,
                    "position": np.tile(np.arange(first, first + width), 2),
                    "measure": np.repeat(["kl", "log-likelihood change"], width),
                    **ratios.frame_columns(),
                }
            )
            parts.append(part[part["tokens"] > 0])
        return pd.concat(parts, ignore_index=True)

    def token_frame(self, names: Any, top: int = 20, least: int = 3) -> pd.DataFrame:
        """After which tokens the two differ most.

        Columns: `token`, `id`, `kl` (mean, nats), `count`, `share` of all KL.

        Args:
            names: From a token id to its text.
            top: Lines.
            least: Tokens that occur less often are left out.
        """
        kl, count = self.token_kl.numpy(), self.token_count.numpy()
        order = np.argsort(-kl, kind="stable")
        order = order[(count[order] >= least) & (kl[order] > 0)][:top]
        total = kl.sum()
        return pd.DataFrame(
            {
                "token": [names(int(number)) for number in order],
                "id": order,
                "kl": kl[order] / np.maximum(count[order], 1),
                "count": count[order].astype(int),
                "share": kl[order] / total if total > 0 else np.zeros(len(order)),
            }
        )

    def shift_frame(self, names: Any, top: int = 12) -> pd.DataFrame:
        """The tokens whose probability rose and fell most, mean over texts.

        Columns: `token`, `id`, `shift` (probability under the policy less that under the reference), `low`,
        `high` (95 %, normal, from 30 resamples of pairs), `policy`, `reference`.
        """
        rows = self.shift_rows.numpy()[:, None]
        shift = self.shift.numpy() / np.maximum(rows, 1)
        spread = shift[1:].std(0, ddof=1) if len(shift) > 2 else np.full(self.vocabulary, np.nan)
        order = np.argsort(-shift[0], kind="stable")
        picked = np.unique(np.concatenate([order[:top], order[::-1][:top]]))
        picked = picked[np.argsort(-shift[0][picked], kind="stable")]
        picked = picked[shift[0][picked] != 0]
        levels = self.levels.numpy() / max(rows[0, 0], 1)
        return pd.DataFrame(
            {
                "token": [names(int(number)) for number in picked],
                "id": picked,
                "shift": shift[0][picked],
                "low": (shift[0] - 1.96 * spread)[picked],
                "high": (shift[0] + 1.96 * spread)[picked],
                "policy": levels[0][picked],
                "reference": levels[1][picked],
            }
        )

    def calibration_frame(self) -> pd.DataFrame:
        """Expected calibration error and accuracy of both, and their change, with 95 % intervals."""
        bins = self.bins.numpy()
        count, confidence, right = (bins[..., part] for part in range(3))
        total = count.sum(-1)
        with np.errstate(invalid="ignore", divide="ignore"):
            error = np.abs(confidence - right).sum(-1) / total
            accuracy = right.sum(-1) / total
        lines = []
        for name, values in (("calibration error", error), ("accuracy", accuracy)):
            sides = {"policy": values[:, 0], "reference": values[:, 1], "change": values[:, 0] - values[:, 1]}
            for side, found in sides.items():
                low, high = bounds(found[1:, None])
                lines.append((name, side, found[0], low[0], high[0]))
        return pd.DataFrame(lines, columns=["measure", "of", "value", "low", "high"]).dropna(subset=["value"])

    def text_frame(self, names: Any) -> pd.DataFrame:
        """The texts that differ most, token by token: `row`, `position`, `token`, `kl`, `change`."""
        parts = [
            pd.DataFrame(
                {
                    "row": -number,
                    "position": np.arange(len(item["ids"])),
                    "token": [names(int(token)) for token in item["ids"]],
                    "kl": item["kl"],
                    "change": item["change"],
                }
            )
            for _, number, item in sorted(self.texts, key=lambda text: (-text[0], -text[1]))
        ]
        columns = ["row", "position", "token", "kl", "change"]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)
