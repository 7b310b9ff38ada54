"""Constitutional data as a result: how many prompts came through, by what principles, and the texts."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from veridical.pairs.belief_report import wilson
from veridical.pairs.show import shorten
from veridical.preference.dialogue import last_turn
from veridical.saved_result import Saved

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.reporting.section import Section

SHOWN, LONGEST = 12, 600
JUDGED = ("probability", "orders_agree", "letter_bias", "coverage")


@dataclass(frozen=True, repr=False)
class ConstitutionalData(Saved):
    """Answers, critiques, revisions and labels; made by `constitutional_data`.

    Attributes:
        table: One line per prompt: `prompt` (its number), `asked` (its last turn), `answer`, `revision` (the
            last; "" without one), `changed`, `fail` (why there is no revision), `preferred` ("revision",
            "first answer", "second answer", "tie", "fail" or "", where none was asked for), `label_fail`,
            `probability` that the second of the two is better, `orders_agree` (share of votes whose two
            orders said the same), `letter_bias` (log-odds of A over B, both orders averaged), `coverage`
            (probability of the two letters together) and `judged_by`.
        rounds: One line per revision: `prompt`, `round`, `principle`, `before`, `critique`, `revision`.
        facts: Models, data, principles, options and fingerprints.
    """

    table: pd.DataFrame
    rounds: pd.DataFrame
    facts: Mapping[str, Any]

    @classmethod
    def of(cls, states: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> ConstitutionalData:
        """From what is known of each prompt at the end."""
        lines, rounds = [], []
        for state in states:
            answers, judged = state["answers"], state["judged"]
            first, last = (answers or [""])[0], answers[-1] if len(answers) > 1 else ""
            line = {
                "prompt": state["number"],
                "asked": last_turn(state["prompt"]),
                "answer": first,
                "revision": last,
                "changed": bool(last) and last != first,
                "fail": state["fail"],
                "preferred": judged.get("preferred", ""),
                "label_fail": judged.get("fail", ""),
                "judged_by": judged.get("judged_by", ""),
            }
            lines.append(line | {name: float(judged.get(name, np.nan)) for name in JUDGED})
            before = first
            for step in state["rounds"]:
                if "revision" not in step:
                    continue
                held = {"before": before, "critique": step["critique"], "revision": step["revision"]}
                rounds.append(
                    {
                        "prompt": state["number"],
                        "round": step["round"],
                        "principle": step["principle"],
                        **held,
                    }
                )
                before = step["revision"]
        columns = ["prompt", "round", "principle", "before", "critique", "revision"]
        return cls(pd.DataFrame(lines), pd.DataFrame(rounds, columns=columns), dict(facts))

    def to_frame(self) -> pd.DataFrame:
        """One line per prompt."""
        return self.table

    @property
    def counts(self) -> dict[str, int]:
        """The yield: how many prompts came as far as each stage."""
        options, through = self.facts["options"], self.table["fail"].to_numpy() == ""
        answer, revision = self.table["answer"].to_numpy(), self.table["revision"].to_numpy()
        found = {"prompts": len(self.table), "answered": int(np.sum(answer != ""))}
        if options["rounds"]:
            found["revised"] = int(np.sum((revision != "") & through))
            found["changed"] = int(np.sum(self.table["changed"].to_numpy() & through))
        if options["labels"]:
            said = Counter(self.table["preferred"])
            decided = said["revision"] + said["first answer"] + said["second answer"]
            found |= {"labelled": decided + said["tie"], "preferences": decided}
        return found

    def by_principle(self) -> pd.DataFrame:
        """For each principle how often it was drawn for a revision, and how often that changed the answer."""
        lines = []
        for name, rows in self.rounds.groupby("principle", sort=True):
            changed = int(np.sum(rows["before"].to_numpy() != rows["revision"].to_numpy()))
            low, high = wilson(changed, len(rows))
            lines.append(
                {
                    "principle": name,
                    "revisions": len(rows),
                    "changed": changed / len(rows),
                    "low": low,
                    "high": high,
                }
            )
        return pd.DataFrame(lines, columns=["principle", "revisions", "changed", "low", "high"])

    def findings(self) -> list[str]:
        """The yield and what the labeller said, in sentences."""
        counts, facts = self.counts, self.facts
        said = [
            f"{facts['model']} answered {counts['answered']} of {counts['prompts']} prompts of "
            f"{facts['data']} under the principles of {facts['principles']}."
        ]
        if "revised" in counts:
            said.append(
                f"{counts['revised']} came through {facts['options']['rounds']} rounds of revision; in "
                f"{counts['changed']} the last revision differs from the first answer.{self._fails('fail')}"
            )
        if "labelled" in counts:
            said += self._labelled(counts)
        return said

    def _labelled(self, counts: Mapping[str, int]) -> list[str]:
        preferred = Counter(self.table["preferred"])
        second = "revision" if self.facts["options"]["compare"] == "revision" else "second answer"
        wins, losses = preferred[second], preferred["first answer"]
        said = [
            f"{self.facts['judge'] or 'The model itself'} labelled {counts['labelled']} pairs: "
            f"{counts['preferences']} preferences and {preferred['tie']} ties."
            f"{self._fails('label_fail')}"
        ]
        if wins + losses:
            low, high = wilson(wins, wins + losses)
            said.append(
                f"The {second} won {wins} of {wins + losses} decided pairs ({wins / (wins + losses):.1%}, "
                f"95 % interval {low:.1%} to {high:.1%})."
            )
        held = self.table[self.table["probability"].notna()]
        if len(held):
            said.append(
                f"In {held['orders_agree'].mean():.1%} of the comparisons both orders of the answers said "
                f"the same; the letter A is ahead of B by {held['letter_bias'].mean():+.2f} nats whatever "
                "stands there, which the average over both orders takes out. The two letters have a "
                f"probability of {held['coverage'].mean():.3f} together."
            )
        return said

    def _fails(self, column: str) -> str:
        """Why the others failed, as a further sentence; "" where none did."""
        fails = Counter(why for why in self.table[column] if why)
        if not fails:
            return ""
        return " Failed: " + ", ".join(f"{count} {why}" for why, count in sorted(fails.items())) + "."

    def figure(self) -> go.Figure:
        """How many prompts came as far as each stage."""
        from veridical.reporting import figures

        counts, drawn = self.counts, figures.figure()
        drawn.add_bar(x=list(counts), y=list(counts.values()), text=list(counts.values()), name="prompts")
        return figures.style(
            drawn, title="Prompts that came as far as each stage", x="stage", y="prompts", legend=False
        )

    def side_by_side(self) -> pd.DataFrame:
        """The trace to be read: every revision beside what it was made of, and the label at the last."""
        asked = dict(zip(self.table["prompt"], self.table["asked"]))
        label = dict(zip(self.table["prompt"], self.table["preferred"]))
        frame = self.rounds.copy()
        frame.insert(1, "asked", [asked[number] for number in frame["prompt"]])
        last = frame.groupby("prompt")["round"].transform("max")
        frame["preferred"] = [
            label[number] if at == end else ""
            for number, at, end in zip(frame["prompt"], frame["round"], last)
        ]
        return frame.rename(columns={"before": "answer"})

    def report_section(self) -> Section:
        """Findings, the yield, principles, and the trace side by side."""
        from veridical.reporting import figures
        from veridical.reporting.section import Section

        drawn, tables = [self.figure()], []
        judged = self.table[self.table["probability"].notna()]
        if len(judged):
            shown = figures.figure()
            shown.add_histogram(x=judged["probability"].tolist(), xbins={"start": 0, "end": 1, "size": 0.05})
            second = "revision" if self.facts["options"]["compare"] == "revision" else "second answer"
            drawn.append(
                figures.style(
                    shown, title="What the labeller said", x=f"probability that the {second} is better",
                    y="pairs", legend=False,
                )
            )  # fmt: skip
        if len(self.rounds):
            read = self.side_by_side()
            kept = read["prompt"].drop_duplicates().head(SHOWN)
            read = read[read["prompt"].isin(kept)]
            texts = ("asked", "answer", "critique", "revision")
            read = read.assign(**{name: [shorten(text, LONGEST) for text in read[name]] for name in texts})
            tables.append((f"The trace of the first {len(kept)} prompts with a revision, side by side", read))
            tables.append(("By principle", self.by_principle().round(4)))
        return Section(
            title=f"Constitution: {self.facts['model']} by {self.facts['principles']}",
            text="\n\n".join(self.findings()),
            figures=tuple(drawn),
            tables=tuple(tables),
            headline=tuple((name, str(count)) for name, count in list(self.counts.items())[-2:]),
        )

    def __repr__(self) -> str:
        said = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        return f"ConstitutionalData({self.facts['model']}: {said})"

    def _repr_html_(self) -> str:
        said = "".join(f"<p>{html.escape(line)}</p>" for line in self.findings())
        return said + str(self.side_by_side().head(SHOWN).to_html(index=False, border=0))
