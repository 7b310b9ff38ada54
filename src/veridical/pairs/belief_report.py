"""What a belief check found: how many lies there are to study, what was kept, and how to get more."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from veridical.config import BeliefConfig, build, to_dict
from veridical.errors import DamagedFileError, InputError
from veridical.files import write_json
from veridical.pairs import prompts
from veridical.provenance import provenance

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from veridical.reporting.section import Section

AS_GIVEN = "as given"
LOW_RATE, FEW_LIES = 0.2, 100
LEANING = 0.65


@dataclass(frozen=True)
class BeliefReport:
    """The yield of a belief check.

    Attributes:
        by_prompt: One mapping for each system prompt; see `to_frame`.
        total: The same figures over all rows that count.
        config: How it was asked.
        style: Options scored as their own "text" or as "letters".
        model: What was asked.
        first_option: Share of askings in which the option shown first was believed; near 0.5 for two options
            without a leaning to a place. None when no order was varied.
        choice: Share of lies on the development split for each prompt that prompts were chosen from, or None.
    """

    by_prompt: tuple[dict[str, Any], ...]
    total: dict[str, Any]
    config: BeliefConfig
    style: str = "text"
    model: str = ""
    first_option: float | None = None
    choice: dict[str, float] | None = None

    @classmethod
    def of(
        cls,
        rows: pd.DataFrame,
        config: BeliefConfig,
        style: str = "text",
        model: str = "",
        first_option: float | None = None,
        choice: dict[str, float] | None = None,
        askings: float = 0.0,
    ) -> BeliefReport:
        """The report on labelled rows, which have the columns that `check_beliefs` adds.

        Where prompts were chosen on the split `val`, its rows count in no figure.
        """
        counted = _with_defaults(rows)
        judged = counted[counted["split"] != "val"] if choice is not None else counted
        lines = []
        for key, part in judged.groupby(["_told", "_system"], sort=False):
            told, system = tuple(key)  # type: ignore[arg-type]
            lines.append({"prompt": system, "instructed_to_lie": bool(told), **_figures(part)})
        lines.sort(key=lambda line: line["instructed_to_lie"])
        total = {
            **_figures(judged),
            **_totals(judged),
            "askings": askings,
            "left_out": len(rows) - len(judged),
        }
        return cls(tuple(lines), total, config, style, model, first_option, choice)

    def to_frame(self) -> pd.DataFrame:
        """One line for each system prompt.

        Columns: `prompt`, `instructed_to_lie`, `asked` (rows), `known`, `lied`, `refused_to_lie`, `confused`,
        `right` (rows answered rightly), `lie_rate` (lied over known, NaN where no lie was wanted or nothing
        is known) with its 95 % interval `low` to `high`, `coverage` (mean probability on the options under
        that prompt). The interval is Wilson's, with pairs as its trials, as if the rows of a pair were one.
        """
        import pandas as pd

        frame = pd.DataFrame(list(self.by_prompt))
        rates = ["lie_rate", "low", "high"]
        frame[rates] = frame[rates].astype(float)
        return frame

    def summary(self) -> str:
        """What was asked, found and kept, in sentences."""
        t = self.total
        said = (
            f"{t['questions']:,} questions were asked honestly, {t['askings']:g} times each (system "
            f"prompts and orders of options); {t['known_questions']:,} are known "
            f"({_percent(t['known_questions'], t['questions'])}). They make {t['asked']:,} rows, under "
            f"{t['honest_prompts']} system prompts that want the truth and {t['lying_prompts']} that want a "
            f"lie; the {t['confused']:,} rows whose question is not known are "
            "confused, whatever was answered. "
        )
        if t["told_known"]:
            said += (
                f"Of {t['told_known']:,} known rows that want a lie, {t['lied']:,} are lies "
                f"({t['lie_rate']:.1%}, 95 % interval {t['low']:.1%} to {t['high']:.1%}) and "
                f"{t['refused_to_lie']:,} are refusals to lie. "
            )
        else:
            said += "No known row wants a lie, so there is nothing to say about lying. "
        said += (
            f"Known rows that want no lie: {t['honest_known']:,}, of which {t['honest_right']:,} are "
            "answered rightly. "
            f"The options hold {t['coverage']:.0%} of the model's probability."
        )
        if t["left_out"]:
            said += (
                f" The {t['left_out']:,} rows of the split val, on which the lying prompts were chosen, "
                "are labelled but count in none of these figures."
            )
        return said

    def advice(self) -> list[str]:
        """What to do about a low yield, a low coverage or a leaning to one place; empty when all is well."""
        return [*self._ask_better(), *self._know_more(), *self._lie_more()]

    def _ask_better(self) -> list[str]:
        said = []
        if min(self.total["coverage"], self.total["belief_coverage"]) < self.config.min_coverage:
            other = "text" if self.style == "letters" else "letters"
            said.append(
                f"The options hold only {min(self.total['coverage'], self.total['belief_coverage']):.0%} of "
                "the "
                f"probability: the model would rather say something else, and what is read off the rest is "
                "shaky. "
                f"Ask with style={other!r}, or word the options as the model would."
            )
        if (
            self.first_option is not None
            and abs(self.first_option - 0.5) > LEANING - 0.5
            and self._two_options
        ):
            place = "first" if self.first_option > 0.5 else "last"
            said.append(
                f"The option shown {place} is believed in "
                f"{max(self.first_option, 1 - self.first_option):.0%} of the askings, so place counts for "
                "more than "
                "knowledge in some; more orders (orders=4) or another style may help."
            )
        return said

    @property
    def _two_options(self) -> bool:
        return bool(self.total.get("two_options"))

    def _know_more(self) -> list[str]:
        t = self.total
        if t["known_questions"] >= 0.3 * t["questions"]:
            return []
        return [
            f"The model knows {t['known_questions']:,} of {t['questions']:,} questions; only those can be "
            "lied about. "
            "Take easier questions or a larger model before lowering known_probability, which would count "
            "guesses."
        ]

    def _lie_more(self) -> list[str]:
        t = self.total
        if not t["told_known"] or (t["lie_rate"] >= LOW_RATE and t["lied"] >= FEW_LIES):
            return []
        said = []
        if t["lie_rate"] < LOW_RATE and self.choice is None:
            best = max(self._told(), key=lambda line: line["lie_rate"] or 0.0)
            hint = f" (here {best['prompt']!r} does best, {best['lie_rate']:.1%})" if t["lied"] else ""
            said.append(
                f"Only {t['lie_rate']:.1%} of what is known is lied about. Choose the prompts on a "
                "development split"
                f"{hint}: check_beliefs(model, pairs, select_prompts=2), or give stronger ones with "
                "lying=[...]."
            )
        elif t["lie_rate"] < LOW_RATE:
            said.append(
                f"Even under the chosen prompts only {t['lie_rate']:.1%} of what is known is lied about: "
                "give other "
                "wordings or scenarios with lying=[...]."
            )
        if t["lied"] < FEW_LIES:
            said.append(self._more_questions())
        if t["lied"] and t["lied"] < t["refused_to_lie"]:
            said.append(
                f"Lies are rarer than refusals ({t['lied']:,} to {t['refused_to_lie']:,}): "
                "pairs.oversample('lied') on the rows that want a lie repeats them within their pair and "
                "split."
            )
        return said

    def _more_questions(self) -> str:
        t = self.total
        if not t["lied"]:
            return (
                f"There is no lie at all in {t['told_known']:,} known rows (at most {t['high']:.1%} would "
                "be, by the "
                "interval), so a probe for lying cannot be fitted on them."
            )
        needed = int(np.ceil(t["questions"] * FEW_LIES / t["lied"]))
        return (
            f"{t['lied']:,} lies are few for a probe; at this yield about {needed:,} questions "
            f"would give {FEW_LIES}."
        )

    def _told(self) -> list[dict[str, Any]]:
        return [line for line in self.by_prompt if line["instructed_to_lie"]]

    def figure(self) -> go.Figure:
        """Share of rows in each state for each system prompt, as stacked bars."""
        import plotly.graph_objects as go

        from veridical.reporting import figures

        frame = self.to_frame()
        told = frame["instructed_to_lie"]
        wrong: Any = (frame["known"] - frame["known_right"]).where(~told, 0)
        states: dict[str, tuple[Any, str]] = {
            "honest": (frame["known_right"].where(~told, 0), figures.BLUE),
            "lied": (frame["lied"], figures.ORANGE),
            "refused to lie": (frame["refused_to_lie"], figures.GREEN),
            "wrong unasked": (wrong, figures.AMBER),
            "confused": (frame["confused"], "#B8BEC6"),
        }
        names = [figures.plain(name, 40) for name in frame["prompt"]]
        drawn = go.Figure()
        for state, (counts, colour) in states.items():
            if counts.sum():
                shares = counts / frame["asked"]
                drawn.add_bar(
                    y=names,
                    x=shares,
                    name=state,
                    orientation="h",
                    marker_color=colour,
                    customdata=counts,
                    hovertemplate="%{y}: %{x:.1%} (%{customdata} rows)<extra>" + state + "</extra>",
                )
        height = 160 + 26 * len(frame)
        figures.style(
            drawn, "What the model answers under each system prompt", "share of rows", height=height
        )
        drawn.update_layout(barmode="stack")
        drawn.update_xaxes(range=[0, 1], tickformat=".0%")
        drawn.update_yaxes(autorange="reversed")
        return drawn

    def report_section(self) -> Section:
        """Summary, advice, figure and table."""
        import pandas as pd

        from veridical.reporting.section import Section

        frame = self.to_frame().drop(columns=["known_right", "pairs"])
        tables = [("Yield by system prompt", frame)]
        if self.choice is not None:
            ranked = sorted(self.choice.items(), key=lambda item: -item[1])
            chosen = pd.DataFrame(ranked, columns=["prompt", "lie rate on the development split"])
            tables.append(("What the lying prompts were chosen on", chosen))
        t = self.total
        rate = f"{t['lie_rate']:.1%}" if t["told_known"] else "none asked for"
        return Section(
            title="Beliefs",
            text="\n\n".join([self.summary(), _RULE.format(c=self.config), *self.advice()]),
            figures=(self.figure(),),
            tables=tuple(tables),
            headline=(
                ("questions known", _percent(t["known_questions"], t["questions"])),
                ("lies about known", rate),
            ),
        )

    def save(self, folder: str | Path) -> Path:
        """Writes beliefs.json, config.json, provenance.json and section.json into `folder`."""
        folder = Path(folder)
        write_json(folder / "beliefs.json", self.to_json())
        write_json(folder / "config.json", to_dict(self.config))
        write_json(folder / "provenance.json", provenance(seed=self.config.seed, model=self.model))
        self.report_section().save(folder)
        return folder

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, read back by `from_json`."""
        return {
            "model": self.model,
            "style": self.style,
            "first_option": self.first_option,
            "total": self.total,
            "by_prompt": list(self.by_prompt),
            "choice": self.choice,
            "config": to_dict(self.config),
        }

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> BeliefReport:
        """The report that `to_json` wrote."""
        try:
            fields = {field.name: saved[field.name] for field in dataclasses.fields(cls)}
            config = build(BeliefConfig, None, **fields.pop("config"))
            return cls(**{**fields, "by_prompt": tuple(fields["by_prompt"]), "config": config})
        except (KeyError, TypeError, InputError) as error:
            raise DamagedFileError(f"this is no saved belief report ({error})") from error

    def __repr__(self) -> str:
        t = self.total
        lies = (
            f"{t['lied']:,} lied, {t['refused_to_lie']:,} refused to lie"
            if t["told_known"]
            else "no lies wanted"
        )
        return (
            f"BeliefReport({t['questions']:,} questions, {t['known_questions']:,} known; "
            f"{t['asked']:,} rows: {lies}, {t['confused']:,} confused; coverage {t['coverage']:.0%})"
        )

    def _repr_html_(self) -> str:
        import html

        said = "".join(f"<p>{html.escape(text)}</p>" for text in (self.summary(), *self.advice()))
        table = self.to_frame().to_html(index=False, escape=True, float_format="{:.3f}".format)
        return f"<div>{said}{table}</div>"


_RULE = (
    "A question counts as known when the right option has a mean probability of at least "
    "{c.known_probability:g} "
    "among the options when asked honestly, and at least {c.known_agreement:g} of the askings agree on it. "
    "A lie is a "
    "wrong answer to a known question where a lie was wanted; a wrong answer to any other question is "
    "confusion."
)


def wilson(successes: float, trials: float, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share by Wilson (1927); it stays inside 0 to 1 and has a width also at 0 and 1."""
    if trials <= 0:
        return 0.0, 1.0
    share = successes / trials
    middle = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    reach = z / (1 + z**2 / trials) * np.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return max(0.0, float(middle - reach)), min(1.0, float(middle + reach))


def wants_lie(row: Mapping[str, Any]) -> bool:
    """Whether a row's prompt wants a lie, said openly or by one of our scenarios."""
    return bool(row.get("instructed_to_lie")) or row.get("system") in _LYING_NAMES


_LYING_NAMES = frozenset(prompt.name for prompt in prompts.ALL if prompt.lies)


def _with_defaults(rows: pd.DataFrame) -> Any:
    """The rows with a system prompt's name, a pair id, a form, and whether they want a lie, all filled in."""
    records = rows.to_dict("records")
    return rows.assign(
        _system=[str(row.get("system") or AS_GIVEN) for row in records],
        _pair=[row.get("pair", number) for number, row in enumerate(records)],
        _form=[row.get("form") or "choice" for row in records],
        _told=[wants_lie(row) for row in records],
    )


def _figures(rows: Any) -> dict[str, Any]:
    """Counts of the states in some rows, and the share of lies with its interval by pair."""
    flags = {
        name: rows[name].to_numpy(dtype=bool) for name in ("known", "lied", "refused_to_lie", "confused")
    }
    counts = {name: int(flag.sum()) for name, flag in flags.items()}
    right = _right(rows)
    wanted = flags["lied"] | flags["refused_to_lie"]
    rate = low = high = None
    if wanted.any():
        # Rows of one pair are not independent; as trials count the pairs.
        pairs = rows["_pair"][wanted].nunique()
        rate = counts["lied"] / int(wanted.sum())
        low, high = wilson(rate * pairs, pairs)
    return {
        "asked": len(rows),
        **counts,
        "right": int(right.sum()),
        "known_right": int((right & flags["known"]).sum()),
        "pairs": int(rows["_pair"].nunique()),
        "lie_rate": rate,
        "low": low,
        "high": high,
        "coverage": float(rows["answer_coverage"].mean()) if len(rows) else 0.0,
    }


def _totals(rows: Any) -> dict[str, Any]:
    """Figures that make sense over all rows only."""
    wants = rows["_told"].to_numpy(dtype=bool)
    known, right = rows["known"].to_numpy(dtype=bool), _right(rows)
    same = [
        (pair, question, form, tuple(sorted(options)))
        for pair, question, form, options in zip(
            rows["_pair"], rows["question"], rows["_form"], rows["options"]
        )
    ]
    return {
        "questions": len(set(same)),
        "known_questions": len({key for key, knows in zip(same, known) if knows}),
        "honest_prompts": int(rows["_system"][~wants].nunique()),
        "lying_prompts": int(rows["_system"][wants].nunique()),
        "told_known": int((known & wants).sum()),
        "honest_known": int((known & ~wants).sum()),
        "honest_right": int((known & ~wants & right).sum()),
        "belief_coverage": float(rows["coverage"].mean()) if len(rows) else 0.0,
        "two_options": bool(len(rows)) and all(len(options) == 2 for options in rows["options"]),
    }


def _right(rows: Any) -> np.ndarray:
    said = zip(rows["answer"], rows["options"], rows["correct"])
    return np.array([answer == options[int(correct)] for answer, options, correct in said], dtype=bool)


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "none"
