"""Losses of adapters: against brute force, finite differences, and what each must do at its ends."""

import math

import numpy as np
import pytest
import torch

from veridical.preference.config import first_loss
from veridical.steering import (
    constraint,
    distil_vector,
    hidden_preference,
    output_preference,
    reft,
    representation,
    rerouting,
)

SITES, ROWS, TOKENS, WIDTH = 2, 3, 4, 5


@pytest.fixture
def made():
    """Random states in float64, and a mask with padding in front of two rows."""
    generator = torch.Generator().manual_seed(0)
    states, source, target = (
        torch.randn(SITES, ROWS, TOKENS, WIDTH, dtype=torch.float64, generator=generator) for _ in range(3)
    )
    mask = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    mask[0, :2] = mask[1, :1] = False
    return states, source, target, mask


def test_representation_is_the_share_of_the_gap_that_is_left(made):
    states, source, target, mask = made
    shares = []
    for site in range(SITES):
        left = whole = 0.0
        for row in range(ROWS):
            for token in range(TOKENS):
                if mask[row, token]:
                    left += float(((states - target)[site, row, token] ** 2).sum())
                    whole += float(((source - target)[site, row, token] ** 2).sum())
        shares.append(left / whole)
    assert representation.gap_left(*made).item() == pytest.approx(np.mean(shares), rel=1e-12)
    assert representation.gap_left(source, source, target, mask).item() == pytest.approx(1)
    assert representation.gap_left(target, source, target, mask).item() == 0


def test_rerouting_masks_padding_and_is_one_before_training(made):
    states, source, _, mask = made
    loud = source.clone()
    loud[:, ~mask] = 1e6  # padding of any size counts for nothing
    assert rerouting.rerouted(source, source, mask).item() == pytest.approx(1)
    assert rerouting.rerouted(-source, source, mask).item() == 0
    assert rerouting.retained(source, source, mask).item() == pytest.approx(0, abs=1e-5)
    for find in (rerouting.rerouted, rerouting.retained):
        assert find(states, source, mask).item() != pytest.approx(
            find(states, source, torch.ones_like(mask)).item()
        )
        assert find(torch.where(mask[..., None], states, loud), loud, mask).item() == pytest.approx(
            find(states, source, mask).item()
        )
    cosines = torch.nn.functional.cosine_similarity(states, source, dim=-1).relu()
    assert rerouting.rerouted(states, source, mask).item() == pytest.approx(cosines[:, mask].mean().item())


def test_hidden_preference_pulls_towards_the_chosen_and_is_bounded(made):
    _, rejected, chosen, mask = made
    line = chosen - rejected
    at = rejected.clone().requires_grad_(True)
    hidden_preference.preferred(at, chosen, rejected, mask, 0.1).backward()
    step = -(at.grad * line).sum(-1)[:, mask]
    assert (step > 0).all()  # descending moves every state towards what is chosen
    assert (at.grad[:, ~mask] == 0).all()

    def along(share):
        return hidden_preference.preferred(rejected + share * line, chosen, rejected, mask, 0.1).item()

    values = [along(share) for share in (0, 0.25, 0.5, 1.0, 2.0, 50.0)]
    assert values[0] > values[1] > values[2] > values[3]
    assert values[3] == pytest.approx(values[4])
    assert values[4] == pytest.approx(values[5])  # nothing is gained beyond the chosen state
    off = torch.randn_like(line)
    off -= (off * line).sum(-1, keepdim=True) / (line**2).sum(-1, keepdim=True) * line
    moved = hidden_preference.preferred(rejected + 0.5 * line + off, chosen, rejected, mask, 0.1).item()
    assert moved > values[2]


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_output_preferences_begin_as_their_papers_say(beta):
    zero = torch.zeros(4, dtype=torch.float64)
    assert output_preference.dpo(zero, beta).item() == pytest.approx(first_loss("dpo", beta))
    assert output_preference.ipo(zero, beta).item() == pytest.approx(first_loss("ipo", beta))
    margins = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    by_hand = np.mean([math.log1p(math.exp(-beta * float(m))) for m in margins])
    assert output_preference.dpo(margins, beta).item() == pytest.approx(by_hand)
    assert output_preference.dpo(margins + 1, beta) < output_preference.dpo(margins, beta)
    assert output_preference.ipo(torch.full((2,), 1 / (2 * beta)), beta).item() == pytest.approx(0)


def test_distilled_is_one_before_and_zero_where_the_vector_was_added(made):
    _, plain, _, mask = made
    vectors = torch.randn(SITES, WIDTH, dtype=torch.float64)
    assert distil_vector.distilled(plain, plain, vectors, mask).item() == pytest.approx(1)
    added = plain + vectors[:, None, None]
    added[:, ~mask] = 1e5
    assert distil_vector.distilled(added, plain, vectors, mask).item() == pytest.approx(0)


@pytest.mark.parametrize(
    "find",
    [
        lambda states, source, target, mask: representation.gap_left(states, source, target, mask),
        lambda states, source, target, mask: rerouting.rerouted(states, source, mask),
        lambda states, source, target, mask: rerouting.retained(states, source, mask),
        lambda states, source, target, mask: hidden_preference.preferred(states, target, source, mask, 0.3),
        lambda states, source, target, mask: distil_vector.distilled(states, source, target[:, 0, 0], mask),
    ],
    ids=["representation", "rerouted", "retained", "hidden_preference", "distil_vector"],
)
def test_gradients_of_losses_on_states_agree_with_finite_differences(made, find):
    states, source, target, mask = made
    assert torch.autograd.gradcheck(lambda x: find(x, source, target, mask), states.requires_grad_(True))
    source, target = source.requires_grad_(True), target.requires_grad_(True)
    gradients = torch.autograd.grad(
        find(states, source, target, mask), [source, target], allow_unused=True, materialize_grads=True
    )
    assert all((gradient == 0).all() for gradient in gradients[:1])  # the plain model is no variable


@pytest.mark.parametrize("find", [output_preference.dpo, output_preference.ipo])
def test_gradients_of_losses_on_outputs_agree_with_finite_differences(find):
    margins = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: find(x, 0.3), margins)


@pytest.mark.parametrize("orthonormal", [True, False])
def test_reft_edits_are_their_formula_and_nothing_to_begin_with(orthonormal):
    torch.manual_seed(0)
    edit = reft.Edit(6, 2, orthonormal).double()
    value = torch.randn(3, 6, dtype=torch.float64)
    assert torch.allclose(edit(value), torch.zeros_like(value), atol=1e-7)
    with torch.no_grad():
        edit.read.weight.normal_()
        edit.read.bias.normal_()
    project, read, bias = edit.base.weight, edit.read.weight, edit.read.bias
    for row in range(3):
        inner = read @ value[row] + bias - (project @ value[row] if orthonormal else 0)
        assert torch.allclose(edit(value)[row], project.T @ inner)
    if orthonormal:
        assert torch.allclose(project @ project.T, torch.eye(2, dtype=torch.float64), atol=1e-6)
    assert torch.autograd.gradcheck(edit, value.requires_grad_(True))


def test_the_multiplier_rises_over_the_budget_and_falls_under_it():
    over, under = constraint.Budget(0.05), constraint.Budget(0.05)
    start = over.multiplier
    for _ in range(5):
        over.update(0.2)
        under.update(0.001)
    assert over.multiplier > start > under.multiplier
    for _ in range(500):
        over.update(0.2)
        under.update(0.0)
    assert over.multiplier == constraint.HIGHEST
    assert under.multiplier == constraint.LOWEST
