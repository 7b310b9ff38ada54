"""A distillation as a result: how near the student came to its teacher, checkpoint by checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from veridical.preference.runs import PreferenceRun


@dataclass(frozen=True, repr=False)
class Distilled(PreferenceRun):
    """One student, measured before training and at every checkpoint, each loaded from disk.

    Attributes:
        table: One line per checkpoint (`step` 0 is the student before training): what `PreferenceRun` has,
            with `kl` to the teacher on the student's own samples; and on held-out answers, by token,
            `agreement` (share where both have the same likeliest token), `kl_of_teacher` (of the teacher to
            the student, nats) and `ce` beside `teacher_ce` (cross-entropy, nats).
        samples: Every sampled answer, with its checkpoint; those of the teacher have step -1.
        log: The training's own log by step, with `soft_loss` and `hard_loss`.
        facts: Teacher, student, data, options, sizes and fingerprints.
    """

    def findings(self) -> list[str]:
        """How near the student came, in sentences."""
        first, last, facts = self.table.iloc[0], self.table.iloc[-1], self.facts
        share = facts["parameters"] / facts["teacher_parameters"]
        where = "held out" if facts["held_out"] else "of the training, as none are held out"
        return [
            f"{facts['model']} learnt from {facts['teacher']}: {int(last['step'])} steps, {facts['rows']} "
            f"rows of {facts['data']}, {facts['weights']}. The student has {facts['parameters']:,} "
            f"parameters, {share:.1%} of its teacher's. Saved weights were loaded again for every figure.",
            f"On answers {where} both have the same likeliest token at {last['agreement']:.1%} of the tokens "
            f"(before training {first['agreement']:.1%}); the KL of the teacher to the student went from "
            f"{first['kl_of_teacher']:.3f} to {last['kl_of_teacher']:.3f} nats per token.",
            f"The cross-entropy of these answers is {last['ce']:.3f} nats per token, the teacher's "
            f"{last['teacher_ce']:.3f}.",
            f"On its own samples the student is {last['kl']:.2f} nats per answer from the teacher (before "
            f"training {first['kl']:.2f}).",
        ]

    def _side_by_side(self) -> pd.DataFrame:
        steps = self.table["step"]
        teacher, first, last = (self.at(step) for step in (-1, steps.iloc[0], steps.iloc[-1]))
        return pd.DataFrame(
            {
                "prompt": first["prompt"],
                "teacher": teacher["answer"],
                "student before": first["answer"],
                "student": last["answer"],
            }
        )

    def made_by(self) -> dict[str, Any]:
        """Seed, models and fingerprints, for the provenance."""
        return {
            **super().made_by(),
            **{name: self.facts[name] for name in ("teacher", "teacher_fingerprint")},
        }
