"""What a sweep's figures say, and what they do not, in plain sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from veridical.probes.card import interval, number

if TYPE_CHECKING:
    from veridical.probes.evaluate import Estimate
    from veridical.probes.result import ProbeSweep, SiteResult

FEW_PAIRS = 20
INVERTED = 0.35


def verdict(sweep: ProbeSweep) -> list[str]:
    """Sentences for a report, the most important first."""
    best = sweep[sweep.best_site]
    said = [_strength(sweep, best), _text(sweep, best), _control(sweep, best)]
    said += [_selectivity(best), _random(best)]
    said += _cautions(sweep, best)
    return [sentence for sentence in said if sentence] + list(sweep.notes)


def _strength(sweep: ProbeSweep, best: SiteResult) -> str:
    auroc = best.metrics["auroc"]
    shown = interval(auroc.value, auroc.low, auroc.high)
    if np.isfinite(auroc.low) and auroc.low <= 0.5 <= auroc.high:
        return (
            f"No probe was found: at {best.site}, which the folds chose, the AUROC on held-out pairs is "
            f"{shown}, and that interval holds 0.5, which is chance."
        )
    if auroc.high < 0.5:
        return (
            f"At {best.site} the AUROC on held-out pairs is {shown}, below chance: the relation found in the "
            "fitted pairs is reversed in the held-out ones. Look for pairs that share rows or a split by "
            "topic."
        )
    others = [f"accuracy {_said(best.metrics['accuracy'])}"]
    others.append(f"recall at 1 % false positives {_said(best.metrics['recall_at_1pct_fpr'])}")
    return f"Best site, chosen on folds: {best.site}, AUROC {shown} on held-out pairs; {', '.join(others)}."


def _text(sweep: ProbeSweep, best: SiteResult) -> str:
    lead = best.lead_over_text
    if sweep.text is None or lead is None:
        if sweep.config.text_baseline:
            return "There was no text to compare with: the label may be readable from the words alone."
        return "The text baseline was switched off: the label may be readable from the words alone."
    text = sweep.text["auroc"]
    shown = f"{interval(text.value, text.low, text.high)}"
    if text.low > 0.5 and (lead.low <= 0 or text.value >= 0.99):
        return (
            f"The text baseline is as good as the probe ({shown}; lead of the probe {_said(lead)}): this set "
            "is solved by its text, so the probe's figure says nothing about what the model represents "
            "beyond the words."
        )
    if text.value < INVERTED and text.high < 0.5:
        return (
            f"The text baseline is below chance ({shown}), as happens when words point the other way in "
            "other pairs: rows of one subject may be spread over several pairs."
        )
    if lead.low <= 0:
        return (
            f"The probe is not surely better than the text alone ({shown}; lead of the probe {_said(lead)})."
        )
    return f"The text alone reaches {shown}; the probe leads by {_said(lead)}."


def _control(sweep: ProbeSweep, best: SiteResult) -> str:
    draws = sweep.selected_control
    if not len(draws):
        return "The shuffled-label control was switched off."
    value = best.metrics["auroc"].value
    p = (1 + int((draws >= value).sum())) / (len(draws) + 1)
    limit = float(np.quantile(draws, 0.95))
    if value <= limit:
        return (
            f"Labels shuffled over pairs do as well (95 % of {len(draws)} shuffles stay below "
            f"{number(limit)}, p = {p:.2f}): the figure is not above what choosing a site and a strength "
            "reaches by chance."
        )
    return (
        f"With labels shuffled over pairs, and the same choice of site and strength, the AUROC is "
        f"{number(float(draws.mean()))} on average and below {number(limit)} in 95 % of {len(draws)} "
        f"shuffles (p = {p:.2f})."
    )


def _selectivity(best: SiteResult) -> str:
    if best.selectivity is None:
        return ""
    return (
        f"Selectivity (AUROC less that of the same probe on control labels, which are the labels permuted "
        f"over pairs) is {_said(best.selectivity)}; the most that it could be here, with an AUROC of 1, is "
        f"{number(float(1 - np.nanmean(best.control)))}."
    )


def _random(best: SiteResult) -> str:
    if not len(best.random):
        return ""
    limit, value = float(np.quantile(best.random, 0.95)), best.metrics["auroc"].value
    shown = (
        f"AUROC {number(float(best.random.mean()))} on average and below {number(limit)} in 95 % of "
        f"{len(best.random)} draws"
    )
    if value <= limit:
        return (
            f"Random directions with their sign chosen on the fitted pairs do as well ({shown}): nearly any "
            "direction parts these classes, so this one is not special."
        )
    return f"Random directions with their sign chosen on the fitted pairs reach {shown}."


def _cautions(sweep: ProbeSweep, best: SiteResult) -> list[str]:
    said = []
    pairs, auroc = sweep.counts["test_pairs"], best.metrics["auroc"]
    if pairs < FEW_PAIRS:
        said.append(
            f"Only {pairs} pairs were held out: intervals this small a set gives are themselves uncertain."
        )
    negatives = sweep.counts["test_vectors"] - sweep.counts["test_positive"]
    if negatives < 100:
        said.append(
            f"With {negatives} negatives in the test, recall at 1 % false positives is recall without any "
            "false positive."
        )
    if auroc.low == auroc.high == 1:
        said.append(
            "No held-out row is out of order, so the resamples cannot show how far below 1 the AUROC might "
            "be."
        )
    if not all(result.converged for result in sweep.results):
        sites = ", ".join(result.site for result in sweep.results if not result.converged)
        said.append(f"The solver did not converge at {sites}; raise max_iter or drop the weakest penalty.")
    return said


def _said(estimate: Estimate) -> str:
    return interval(estimate.value, estimate.low, estimate.high)
