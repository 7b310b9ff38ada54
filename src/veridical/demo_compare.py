"""The demo's comparison: what preference training changed, and where it removed the decision to lie."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from veridical.console import step
from veridical.demo_decision import HONEST, LYING, NEEDED
from veridical.running import save_below

if TYPE_CHECKING:
    from veridical.comparison.comparison import Comparison
    from veridical.interventions.material import Material
    from veridical.models import HookedModel
    from veridical.pairs import Pairs

log = logging.getLogger(__name__)

POLICY = "tiny-liar-dpo"
PAIRS, QUESTIONS = 24, 16
"""Pairs that both models read, and held-out questions on which one is patched into the other."""
ABOUT = """\
{policy} is tiny-liar after preference training: true answers were preferred over lies, also where the \
prompt wants a lie. Both models read the same questions, once. The findings below were measured without \
knowing what was trained."""
AGREES = """\
The same can be asked of tiny-liar alone: its run under a prompt that wants the truth, put into its run \
under one that wants a lie. Over all layers from {site} on and all tokens, this map and the one across the \
two models correlate at {close:.2f}. At the place that is named above tiny-liar alone has {own:.0%} of its \
difference."""


def comparison_into(
    out: Path, model: HookedModel, pairs: Pairs, progress: bool | None, policy: Any = POLICY
) -> dict[str, Any]:
    """Saves the section into `out` and returns its figures; nothing where the policy or columns are missing.

    Args:
        out: Folder of the demo.
        model: The reference.
        pairs: Rows of the embedded honesty questions.
        progress: Progress bars.
        policy: The trained model, as `veridical.load_pair` takes it.
    """
    from veridical import organisms
    from veridical.comparison.duo import load_pair

    if policy == POLICY and POLICY not in organisms.NAMES:
        log.info("what preference training changed: left out, as %s is not embedded here", POLICY)
        return {}
    if lacking := sorted(NEEDED - set(pairs.columns)):
        log.info("what preference training changed: left out, as the pairs have no %s", ", ".join(lacking))
        return {}
    with step("what preference training changed: outputs, streams, weights"):
        duo = load_pair(policy, reference=model)
        found, asked = compared(duo, pairs, progress)
    for line in found.findings()[:4]:
        log.info("  %s", line)
    close, own, site = agreement(model, asked, found, progress)
    save_below(found, out / "preference")
    section = found.report_section()
    said = [
        ABOUT.format(policy=duo.policy.path), section.text, AGREES.format(site=site, close=close, own=own)
    ]  # fmt: skip
    title = "What preference training changed"
    shown = tuple(found.figure(name) for name in ("where", "where parts", "position"))
    dataclasses.replace(section, title=title, text="\n\n".join(said), figures=shown).save(out / "preference")
    place: Any = found.table("where found").iloc[0]
    return {
        "site": place["site"], "position": place["position"], "share": float(place["share"]),
        "agreement_with_one_model": close, "findings": found.findings(),
    }  # fmt: skip


def compared(
    duo: Any, pairs: Pairs, progress: bool | None, pairs_read: int = PAIRS
) -> tuple[Comparison, Material]:
    """The comparison on some held-out pairs, patched on held-out questions under one lying prompt."""
    from veridical.comparison.comparing import compare
    from veridical.comparison.where import where
    from veridical.comparison.where_rows import Questions

    test = pairs.filter(np.asarray(pairs["split"]) != "train")
    groups = np.unique(test.groups)
    some = np.random.default_rng(0).permutation(groups)[:pairs_read]
    found = compare(
        duo, test.filter(np.isin(test.groups, some)), where=0, samples=24, max_new_tokens=12,
        behaviour_pairs=pairs_read, bootstrap=100, progress=progress,
    )  # fmt: skip
    asked = _asked(duo.reference, test)
    questions = Questions(
        asked.corrupt, "logit_diff", asked.answers or [], asked.wrong or [],
        np.arange(len(asked)) if asked.groups is None else asked.groups,
        "held-out questions under an instruction to lie, the right option's logit less the wrong one's",
    )  # fmt: skip
    return found.with_tables(where(duo, questions, bootstrap=100, progress=progress)), asked


def _asked(model: HookedModel, pairs: Pairs) -> Material:
    from veridical.interventions.material import asked_twice, evenly_long

    kept = pairs.filter(form="choice", taught=True, protected=False)
    firsts = ~kept.to_pandas()["question_id"].duplicated().to_numpy()
    rows = asked_twice(kept.select(np.flatnonzero(firsts)), HONEST, LYING)
    return evenly_long(model, rows, QUESTIONS, aligned=False)


def agreement(
    model: HookedModel, asked: Material, found: Comparison, progress: bool | None
) -> tuple[float, float, str]:
    """How cross-model patching agrees with patching the reference's honest run into its lying one.

    Returns:
        Correlation of the two maps from the first site on at which the models differ; the one model's share
        at the place that was named; and the first site.
    """
    from veridical.comparison.where import INTO_REFERENCE
    from veridical.interventions.patching import patch

    table: Any = found.table("where by position")
    table = table[table["direction"] == INTO_REFERENCE]
    first = int(table.loc[table["effect"] != 0, "layer"].min())
    sites = [f"resid_post.{layer}" for layer in range(first, model.n_layers)]
    alone = patch(
        model, asked.clean, asked.corrupt, metric="logit_diff", answers=asked.answers, wrong=asked.wrong,
        sites=sites, progress=progress,
    ).to_frame()  # fmt: skip
    ours = dict(zip(zip(table["layer"], table["position"]), table["share"]))
    theirs = dict(zip(zip(alone["layer"], alone["position"]), alone["recovered"]))
    # At the last layer nothing but the last token can have an effect, in either map.
    places = [place for place in theirs if place in ours and place[0] < model.n_layers - 1]
    first_map, second_map = ([float(each[place]) for place in places] for each in (ours, theirs))
    close = float(np.corrcoef(first_map, second_map)[0, 1]) if len(places) > 2 else float("nan")
    place: Any = found.table("where found").iloc[0]
    return close, float(theirs[int(place["layer"]), str(place["position"])]), sites[0]
