"""Who goes on at a rung: the rules by themselves, without any training."""

import itertools
import json
import math
import random

import pytest

from veridical.errors import ConfigError, UnknownNameError
from veridical.saes.config import SAEConfig
from veridical.saes.halving import Arrival, Entrant, Halving, Rules, peers_of, rungs_of

RULES = Rules(eta=2.0, rungs=3, first=None, grace=0.05, max_dead=0.75)
TOKENS = 8000


def entrants(count=None, configs=None):
    configs = configs or [SAEConfig(k=4, width=32)] * count
    made = []
    for number, config in enumerate(configs):
        made.append(Entrant(f"m{number}", config, peers_of(config, ["x"], 12, TOKENS), TOKENS))
    return made


def halving(count=None, configs=None, control="m0", **rules):
    return Halving(entrants(count, configs), Rules(**{**vars(RULES), **rules}), control)


def at(number, explained, l0=4.0, dead=0.0, tokens=1000):
    return Arrival(f"m{number}", tokens, explained, l0, dead)


def kept(judgements):
    return {one.name for one in judgements if one.kept}


@pytest.mark.parametrize("eta", [1.5, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("count", [2, 3, 7, 16])
def test_a_cohort_equals_the_obvious_sort(count, eta):
    chance = random.Random(count)
    for _ in range(20):
        figures = [chance.random() for _ in range(count)]
        judge = halving(count, eta=eta)
        survivors = set(range(count))
        for rung in range(3):
            here = [at(number, figures[number] + 0.001 * rung, tokens=rung) for number in sorted(survivors)]
            rivals = survivors - {0} if rung and 0 not in fair else survivors
            fair = set(sorted(rivals, key=lambda number: -figures[number])[: math.ceil(len(rivals) / eta)])
            going = kept(judge.judge(here))
            assert going == {f"m{number}" for number in fair | {0}}
            survivors = {int(name[1:]) for name in going}


def test_the_best_is_never_cancelled_in_any_order_of_arrival():
    figures = [0.5, 0.9, 0.1, 0.7, 0.3]
    for order in itertools.permutations(range(5)):
        judge = halving(5, control="m2")
        for number in order:
            judge.judge([at(number, figures[number])])
        gone = {one.name for one in judge.judgements if not one.kept}
        assert not {"m1", "m2"} & gone  # the best, and the control
    together = halving(5, control="m2")
    together.judge([at(number, figures[number]) for number in range(5)])
    assert {one.name for one in together.judgements if not one.kept} == {"m4"}


def test_unlike_members_are_never_compared():
    unlike = [
        {"k": 4, "width": 32},
        {"k": 8, "width": 32},
        {"k": 4, "width": 64},
        {"k": 4, "width": 32, "architecture": "batch_topk"},
        {"width": 32, "architecture": "relu"},
        {"width": 32, "architecture": "relu", "sparsity": 1.0},
        {"k": 4, "width": 32, "architecture": "matryoshka", "prefixes": (8, 32)},
        {"k": 4, "width": 32, "architecture": "matryoshka", "prefixes": (16, 32)},
    ]
    configs = [SAEConfig(**options) for options in unlike]
    assert len({one.peers for one in entrants(configs=configs)}) == len(configs)
    judge = halving(configs=configs)
    assert not any(judge.due(f"m{number}", TOKENS) for number in range(len(configs)))
    pairs = halving(configs=configs[:2] * 2)
    going = kept(pairs.judge([at(0, 0.1), at(1, 0.9), at(2, 0.2), at(3, 0.8)]))
    assert going == {"m0", "m1", "m2"}  # m0 is the control, m2 the best with k 4, m1 the best with k 8
    assert peers_of(configs[0], ["a"], 12, 10) != peers_of(configs[0], ["b"], 12, 10)
    assert peers_of(configs[0], ["a"], 12, 10) != peers_of(configs[0], ["a"], 12, 20)
    same = SAEConfig(k=4, width=32, lr=1e-5, seed=9, aux=0.0)
    assert peers_of(configs[0], ["a"], 12, 10) == peers_of(same, ["a"], 12, 10)


def test_a_penalised_member_is_measured_against_the_frontier():
    configs = [SAEConfig(architecture="relu", width=32)] * 6
    judge = halving(configs=configs, control="m5")
    arrivals = [
        at(0, 0.60, l0=3.0),  # on the frontier: sparse
        at(1, 0.80, l0=8.0),  # on the frontier
        at(2, 0.95, l0=20.0),  # on the frontier: dense
        at(3, 0.79, l0=8.5),  # just behind m1
        at(4, 0.50, l0=20.0),  # far behind m2 and m1, and m0
        at(5, 0.10, l0=3.0),
    ]
    made = {one.name: one for one in judge.judge(arrivals)}
    assert kept(made.values()) == {"m0", "m1", "m2", "m5"}
    assert made["m3"].behind == pytest.approx(0.01)
    assert made["m4"].behind == pytest.approx(0.45)
    assert made["m5"].spared
    assert "0.450 less than the best at matched L0" in made["m4"].reason


def test_l0_within_a_tenth_is_matched():
    configs = [SAEConfig(architecture="jumprelu", width=32)] * 3
    near = halving(configs=configs, control="m2").judge([at(0, 0.5, 10), at(1, 0.8, 10.9), at(2, 0.9, 30)])
    far = halving(configs=configs, control="m2").judge([at(0, 0.5, 10), at(1, 0.8, 11.1), at(2, 0.9, 30)])
    assert near[0].behind == pytest.approx(0.3)
    assert far[0].behind == 0


def test_all_on_the_frontier_go_on_but_a_collapsed_one_does_not():
    configs = [SAEConfig(architecture="relu", width=32)] * 5
    arrivals = [at(n, 0.1 + 0.2 * n, l0=2.0**n) for n in range(4)]
    assert len(kept(halving(configs=configs).judge(arrivals))) == 4
    collapsed = halving(configs=configs).judge([*arrivals, at(4, -0.01, l0=0.0)])
    assert kept(collapsed) == {"m0", "m1", "m2", "m3"}
    assert "explains nothing" in collapsed[-1].reason
    none = halving(configs=configs[:2]).judge([at(0, -0.1, 0), at(1, -0.2, 0.0)])
    assert "explains nothing" not in none[1].reason


def test_a_dying_member_goes_unless_its_peers_are_as_dead():
    judge = halving(4, control="m3")
    made = judge.judge([at(0, 0.9, dead=0.8), at(1, 0.5, dead=0.1), at(2, 0.4, dead=0.2), at(3, 0.1)])
    assert kept(made) == {"m1", "m2", "m3"}
    assert "80% of its latents are dead" in made[0].reason
    alike = halving(3, control="m2")
    assert "m0" in kept(alike.judge([at(0, 0.9, dead=0.8), at(1, 0.5, dead=0.9), at(2, 0.4, dead=0.8)]))


def test_a_spared_control_competes_no_more():
    judge = halving(8)
    made = judge.judge([at(n, 0.1 * n) for n in range(8)])
    assert kept(made) == {"m0", "m4", "m5", "m6", "m7"}
    assert made[0].spared
    assert made[0].reason.startswith("control, which is never cancelled; rank 8 of 8")
    second = judge.judge([at(n, 0.99 if n == 0 else 0.1 * n, tokens=2000) for n in (0, 4, 5, 6, 7)])
    assert kept(second) == {"m0", "m6", "m7"}  # two of the four, though the control is ahead of all now
    assert second[-1].rank == 1
    assert not second[0].spared


def test_a_member_is_due_at_the_rung_that_it_was_not_judged_at():
    judge = halving(6, control="m5")
    assert judge.due("m1", 1000)
    judge.judge([at(1, 0.6)])
    assert judge.due("m1", 2000)
    assert not judge.due("m1", 1999)


def test_the_state_is_json_and_decides_alike():
    chance = random.Random(0)
    one, other = halving(9), halving(9)
    for rung in range(3):
        names = [n for n in range(9) if all(j.kept for j in one.judgements if j.name == f"m{n}")]
        arrivals = [at(n, chance.random(), tokens=rung) for n in names]
        cut = len(arrivals) // 2
        one.judge(arrivals[:cut])
        other.judge(arrivals[:cut])
        resumed = halving(9)
        resumed.restore(json.loads(json.dumps(other.state())))
        other = resumed
        assert one.judge(arrivals[cut:]) == other.judge(arrivals[cut:])
    assert one.judgements == other.judgements


@pytest.mark.parametrize(
    ("config", "rules", "expected"),
    [
        ({}, {}, (1000, 2000, 4000)),
        ({}, {"eta": 4.0, "rungs": 2}, (800, 2000)),  # an eighth would be 500: warm-up and grace end at 800
        ({"warmup": 0.2}, {}, (2000, 4000)),
        ({"warmup": 0.3}, {"grace": 0.1}, (3200, 4000)),
        ({}, {"first": 900}, (900, 1800, 3600)),
        ({}, {"first": 900, "rungs": 9}, (900, 1800, 3600, 7200)),
        ({}, {"rungs": 1}, (4000,)),
    ],
)
def test_rungs_are_tokens_past_warm_up_and_grace(config, rules, expected):
    some = entrants(configs=[SAEConfig(width=32, k=4, **config), SAEConfig(width=32, k=4)])
    assert rungs_of(some, Rules(**{**vars(RULES), **rules})) == expected


def test_rules_that_could_judge_nobody_are_refused():
    with pytest.raises(ConfigError, match="take the whole training of m0") as caught:
        halving(configs=[SAEConfig(width=32, k=4, warmup=0.97)] * 2)
    assert "\n" not in str(caught.value)
    halving(configs=[SAEConfig(width=32, k=4, warmup=0.97)])  # nobody to be compared with anyway
    with pytest.raises(UnknownNameError, match="unknown control 'm9'"):
        halving(3, control="m9")
