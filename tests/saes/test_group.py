"""Members stepped together: each equals itself alone, whoever comes and goes; clocks count tokens."""

import pytest
import torch
from planted_features import activations
from sae_makers import CONFIGS

from veridical.errors import InputError
from veridical.saes import SAEConfig
from veridical.saes.group import Group, Member

D = 12


def member(name, tokens=64 * 40, **options):
    base = {"width": 32, "batch": 64, "lr": 1e-2, "dead_after": 64 * 6, **options}
    return Member(name, SAEConfig(name=name, **base), tokens)


def sparse(architecture):
    return {
        "architecture": architecture,
        **{k: v for k, v in CONFIGS[architecture].items() if k != "prefixes"},
    }


def train(group, data, steps, begin=0, y=None):
    for step in range(begin, begin + steps):
        rows = slice(step * 64, step * 64 + 64)
        group.step(data[rows], None if y is None else y[rows])


def silence(group):
    """A few latents far below zero, so that the auxiliary loss has work."""
    with torch.no_grad():
        group.stack.b_enc[:, :5] -= 3.0


def assert_same(one, other):
    for (name, value), expected in zip(one.state_dict().items(), other.state_dict().values()):
        torch.testing.assert_close(value, expected, rtol=2e-5, atol=2e-6, msg=name)


@pytest.fixture(scope="module")
def data():
    return activations(64 * 60)


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_together_equals_alone(architecture, data):
    """Learning rate, seed, k or penalty, and length of the run differ; dead latents are among them."""
    own = [
        {"lr": 1e-2, "seed": 0},
        {"lr": 3e-3, "seed": 1, **({"sparsity": 0.5} if architecture in ("relu", "gated") else {"k": 3})},
        {"lr": 1e-3, "seed": 2, "warmup": 0.3, "decay": 1.0},
    ]
    d_out = 9 if "transcoder" in architecture else D
    y = data[:, :9] * 2 + 1 if "transcoder" in architecture else None

    def members():
        return [member(f"m{n}", **{**sparse(architecture), **options}) for n, options in enumerate(own)]

    together = Group(members(), D, d_out)
    together.stack.calibrate(data, data if y is None else y)
    if architecture == "topk":
        silence(together)
    train(together, data, 30, y=y)
    for number, one in enumerate(members()):
        alone = Group([one], D, d_out)
        alone.stack.calibrate(data, data if y is None else y)
        if architecture == "topk":
            silence(alone)
        start = alone.stack.W_enc.detach().clone()
        train(alone, data, 30, y=y)
        assert (alone.stack.W_enc - start).abs().max() > 1e-3
        assert_same(together.stack.member(number), alone.stack.member(0))
        torch.testing.assert_close(together.silent[number], alone.silent[0])
    if architecture == "topk":
        assert together.dead().any()


def test_members_come_and_go_without_touching_the_others(data):
    first, second, third = member("a", seed=0, k=4), member("b", seed=1, k=4), member("c", seed=2, k=4)
    group = Group([first, second], D, D)
    group.stack.calibrate(data)
    late = Group([third], D, D)
    late.stack.calibrate(data)
    train(group, data, 10)
    (gone,) = group.remove(["a"])
    train(group, data, 5, begin=10)
    group.add(third, late.stack.member(0))
    train(group, data, 5, begin=15)

    alone = Group([member("a", seed=0, k=4)], D, D)
    alone.stack.calibrate(data)
    train(alone, data, 10)
    assert_same(gone, alone.stack.member(0))
    alone = Group([member("b", seed=1, k=4)], D, D)
    alone.stack.calibrate(data)
    train(alone, data, 20)
    assert_same(group.stack.member(0), alone.stack.member(0))
    alone = Group([member("c", seed=2, k=4)], D, D)
    alone.stack.calibrate(data)
    train(alone, data, 5, begin=15)
    assert_same(group.stack.member(1), alone.stack.member(0))


def test_a_member_of_another_shape_is_refused(data):
    group = Group([member("a", k=4)], D, D)
    with pytest.raises(InputError, match="another shape"):
        group.add(member("b", k=4, width=33), Group([member("b", k=4, width=33)], D, D).stack.member(0))


def test_dead_by_tokens_not_by_steps(data):
    """The same tokens in other batches: dead at the same token, and only once that many have gone by."""
    for batch in (32, 64, 128):
        one = member("a", k=2, batch=batch, dead_after=256, tokens=64 * 60)
        group = Group([one], D, D)
        group.stack.calibrate(data)
        with torch.no_grad():
            group.stack.b_enc[0, :5] -= 100.0
        while one.seen < 256 - batch:
            group.step(data[one.seen : one.seen + batch])
        assert not group.dead().any()
        group.step(data[one.seen : one.seen + batch])
        assert one.seen == 256
        assert group.dead()[0, :5].all()


def test_dead_after_is_at_most_a_tenth_of_the_run():
    config = SAEConfig()
    assert config.dead_clock(10**9) == 10_000_000
    assert config.dead_clock(50_000) == 5_000


def test_learning_rate_rises_stays_and_falls():
    one = member("a", tokens=64 * 100, warmup=0.1, decay=0.2)
    rates = []
    for _ in range(100):
        rates.append(one.rate)
        one.seen += 64
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:80] == [1.0] * 71
    assert rates[80:] == pytest.approx([1 - step / 20 for step in range(20)])
    assert one.done


def test_a_diverging_member_leaves_the_others_numbers_alone(data):
    group = Group([member("a", k=4, seed=0), member("bad", k=4, seed=1)], D, D)
    group.stack.calibrate(data)
    train(group, data, 3)
    with torch.no_grad():
        group.stack.W_dec[1, 0, 0] = float("inf")
    train(group, data, 2, begin=3)
    assert not group.stack.W_enc[1].isfinite().all()
    alone = Group([member("a", k=4, seed=0)], D, D)
    alone.stack.calibrate(data)
    train(alone, data, 5)
    assert_same(group.stack.member(0), alone.stack.member(0))


def test_state_restores_with_a_member_that_has_not_begun(data):
    def fresh():
        group = Group([member("a", k=4, seed=0)], D, D)
        group.stack.calibrate(data)
        return group, group.stack.member(0)

    whole, start = fresh()
    train(whole, data, 7)
    whole.add(member("b", k=4, seed=0), start)
    kept = {name: value.clone() for name, value in whole.tensors().items()}
    train(whole, data, 5, begin=7)
    second = Group([member("a", k=4, seed=0), member("b", k=4, seed=0)], D, D)
    second.members[0].seen = 7 * 64
    second.load_tensors(kept)
    train(second, data, 5, begin=7)
    for name, value in whole.tensors().items():
        assert torch.equal(value, second.tensors()[name]), name


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "gated"])
def test_state_restores_to_the_same_bits(architecture, data):
    def fresh():
        made = Group([member(f"m{n}", **sparse(architecture), seed=n) for n in range(2)], D, D)
        made.stack.calibrate(data)
        return made

    whole = fresh()
    train(whole, data, 20)
    first = fresh()
    train(first, data, 12)
    kept = {name: value.clone() for name, value in first.tensors().items()}
    second = fresh()
    for one in second.members:
        one.seen = 12 * 64
    second.load_tensors(kept)
    train(second, data, 8, begin=12)
    for name, value in whole.tensors().items():
        assert torch.equal(value, second.tensors()[name]), name


@pytest.mark.parametrize(
    ("kind", "variant", "least", "most"),
    [
        ("tiny", "relu", 0, 3),
        ("negative", "straight_through", 0, 3),
        ("negative", "relu", 40, 48),
    ],
)
def test_dead_latents_are_revived(kind, variant, least, most):
    """48 of 128 latents start dead, by tiny weights or by a bias far below zero; 1,500 steps, default aux."""
    x = activations(1500 * 128, count=256, d=32, p=0.02)
    options = {"dead_after": 12_800, "tokens": 1500 * 128, "batch": 128, "lr": 1e-3}
    members = [member(f"s{s}", width=128, k=4, aux_variant=variant, seed=s, **options) for s in range(1)]
    group = Group(members, 32, 32)
    group.stack.calibrate(x[:8192])
    with torch.no_grad():
        if kind == "tiny":
            group.stack.W_enc[:, :48] *= 1e-3
        else:
            group.stack.b_enc[:, :48] = -8.0
    for batch in x.split(128):
        group.step(batch)
    for still in group.dead()[:, :48].sum(1).tolist():
        assert least <= still <= most
