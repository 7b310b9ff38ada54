"""The demo's sparse autoencoders: what a few latents explain, and which of them tell lies from refusals."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from veridical.console import step
from veridical.reporting import Section
from veridical.running import limited

if TYPE_CHECKING:
    from veridical.activations import Activations
    from veridical.models import HookedModel
    from veridical.pairs import Pairs
    from veridical.saes import SAE
    from veridical.saes.runs import SAERuns

log = logging.getLogger(__name__)

DEPTH = 1 / 4
"""Where the SAEs read, as a share of the layers: early, where single latents tell lies from refusals."""
KS = (8, 16, 32)
CHOSEN = 16
WIDTH, BATCH, TOKENS, RATE = 512, 512, 200_000, 2e-3
JUDGED, SPLICED = 30, 12
"""Held-out pairs on which SAEs are judged, and those on which the model runs with the reconstruction."""
PAGES = 3
RESAMPLES = 200
FRONTIER = """\
Sparse autoencoders are trained together, for some seconds, on the activations at every token of the \
questions and answers above. Each writes an activation as a sum of a few of its directions, as many as L0 \
says. Lower left is better: PCA keeps as many directions, the same ones for every token, and the random \
dictionary picks as many from an equal number of random directions. All are judged on entities that no SAE \
was trained on; what is explained compares only at equal L0."""
LIES = """\
Only answers under an instruction to lie, about facts that the model knows, are compared, at the last token \
before it answers: it lied, or it refused to. No label was shown to the SAE."""


def saes_into(
    out: Path, model: HookedModel, pairs: Pairs, last: Activations, progress: bool | None
) -> dict[str, Any]:
    """Trains SAEs on all tokens of the pairs and saves sections into `out`.

    Args:
        out: Folder of the demo.
        model: The model.
        pairs: Rows with a split, labels of belief, and the model's answers.
        last: Activations of the same rows at the last token of the prompt, at every layer.
        progress: Progress bars.

    Returns:
        Figures of each SAE, and of the features that separate lies from refusals.
    """
    from veridical import SAEConfig, collect, train_saes
    from veridical.saes.steps import compared, figures

    site = f"resid_post.{int(DEPTH * model.n_layers)}"
    with step(f"SAEs: activations of every token at {site}, training {len(KS)} together"):
        acts = collect(
            model, pairs, sites=site, tokens="all", store=out / "saes" / "activations", progress=progress
        )
        shared = {"site": site, "width": WIDTH, "batch": BATCH, "tokens": TOKENS, "lr": RATE}
        runs = train_saes(
            acts.filter(acts.rows["split"].to_numpy() != "test"),
            [SAEConfig(name=f"k{k}", k=k, **shared) for k in KS],  # type: ignore[arg-type]
            store=out / "saes" / "training",
            progress=progress,
        )
        log.info("  %s", runs)
    with step("SAEs: figures on held-out entities, beside PCA and random directions"):
        found = judged(model, pairs, acts, runs, progress)
        log.info("  %s", found[f"k{CHOSEN}"])
    section = compared(found)
    chosen = found[f"k{CHOSEN}"]
    headline = f"SAE, {CHOSEN} of {WIDTH:,} latents a token: variance explained at {site}"
    dataclasses.replace(
        section,
        title="What a few latents explain",
        text="\n\n".join([FRONTIER, *chosen.findings()]),
        headline=((headline, f"{chosen.metrics['explained_variance'].value:.1%}"),),
    ).save(out / "saes")
    with step("SAEs: features, and those that tell lies from refusals"):
        separating = features_into(out, model, runs[f"k{CHOSEN}"], acts, last)
    return {"figures": figures(found), "separating": separating}


def judged(
    model: HookedModel, pairs: Pairs, acts: Activations, runs: SAERuns, progress: bool | None
) -> dict[str, Any]:
    """Evaluations by name on the test entities; of the chosen one also inside the model."""
    test = pairs.filter(split="test")
    held = acts.filter(np.isin(acts.rows["pair"], limited(test, JUDGED, 0).groups))
    found = {run.name: run.sae.evaluate(held, bootstrap=RESAMPLES) for run in runs if run.sae is not None}
    chosen = runs[f"k{CHOSEN}"]
    inside = chosen.evaluate(
        model, limited(test, SPLICED, 0), baselines=False, progress=progress, bootstrap=RESAMPLES
    )
    found[f"k{CHOSEN}"] = dataclasses.replace(found[f"k{CHOSEN}"], loss=inside.loss)
    return found


def features_into(
    out: Path, model: HookedModel, sae: SAE, acts: Activations, last: Activations
) -> list[dict[str, Any]]:
    """Index and pages over the test entities, and the features that separate lies, which it returns."""
    from veridical.running import records
    from veridical.saes.features import feature_table
    from veridical.saes.jobs import separation_section
    from veridical.saes.separate import separate_labels

    table = feature_table(sae, acts.filter(split="test"))
    told = ("instructed_to_lie=True", "known=True")
    between = separate_labels(sae, last, "lied", where=told, top=10, permutations=100, bootstrap=RESAMPLES)
    log.info("  %s", between)
    frame = between.to_frame()
    section: Section = separation_section(between)
    dataclasses.replace(section, text=f"{LIES}\n\n{section.text}").save(out / "saes-features")
    dataclasses.replace(table.report_section(), headline=()).save(out / "saes-index")
    pages = table.pages(frame["feature"].tolist()[:PAGES], model)
    for at, page in enumerate(pages):
        page.save(out / f"saes-page-{at}")
    return records(frame)
