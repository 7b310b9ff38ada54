"""Hungarian matching against a search over all assignments, and against dictionaries of known truth."""

import itertools

import numpy as np
import pytest
import torch

from veridical.errors import InputError, NonFiniteError
from veridical.saes.mcc import match_features


def unit(rows, width, seed):
    drawn = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn / drawn.norm(dim=1, keepdim=True)


def by_hand(dictionary, planted):
    """Every one-to-one assignment, the best."""
    cosines = torch.nn.functional.cosine_similarity(planted[:, None], dictionary[None], dim=-1).numpy()
    features, latents = cosines.shape
    if latents >= features:
        sums = [
            sum(cosines[f, chosen[f]] for f in range(features))
            for chosen in itertools.permutations(range(latents), features)
        ]
    else:
        sums = [
            sum(cosines[chosen[latent], latent] for latent in range(latents))
            for chosen in itertools.permutations(range(features), latents)
        ]
    return max(sums) / features


@pytest.mark.parametrize("latents", [3, 5, 7])
def test_equals_the_best_of_all_assignments(latents):
    dictionary, planted = unit(latents, 4, 1) * 3, unit(5, 4, 2)
    found = match_features(dictionary, planted)
    assert found.mcc == pytest.approx(by_hand(dictionary, planted), abs=1e-12)
    assert (found.latents == -1).sum() == max(0, 5 - latents)


def test_a_permuted_rescaled_dictionary_is_found_whole():
    planted = unit(40, 16, 0)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    scale = torch.linspace(0.1, 9, 40, dtype=torch.float64)[:, None]
    found = match_features((planted * scale)[order], planted)
    assert found.mcc == pytest.approx(1, abs=1e-12)
    assert found.found == 1
    assert (order.numpy()[found.latents] == np.arange(40)).all()


def test_a_shared_latent_counts_once():
    planted = torch.eye(4, dtype=torch.float64)[:2]
    between = (planted[0] + planted[1])[None]
    found = match_features(torch.cat([between, torch.eye(4, dtype=torch.float64)[3:]]), planted)
    assert found.nearest.mean() == pytest.approx(0.5**0.5)
    assert found.mcc == pytest.approx(0.5**0.5 / 2)


def test_the_opposite_direction_is_not_the_feature():
    planted = unit(6, 8, 5)
    assert match_features(-planted, planted).mcc < 0.7
    assert match_features(torch.zeros(6, 8), planted).mcc == 0


def test_bad_input_is_named():
    planted = unit(3, 4, 0)
    with pytest.raises(InputError, match=r"width 5.*features 4"):
        match_features(unit(3, 5, 0), planted)
    with pytest.raises(InputError, match="length 0"):
        match_features(planted, torch.zeros(3, 4))
    with pytest.raises(InputError, match=r"shape \(2, 3, 4\)"):
        match_features(torch.zeros(2, 3, 4), planted)
    with pytest.raises(NonFiniteError, match="the dictionary hold NaN"):
        match_features(planted * float("nan"), planted)


def test_figure_and_section_are_drawn():
    found = match_features(unit(6, 8, 1), unit(4, 8, 2))
    section = found.report_section()
    assert len(section.figures[0].data) == 2
    assert len(section.tables[0][1]) == 4
    assert "MCC" in repr(found)
