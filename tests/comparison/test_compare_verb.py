"""Options of `veridical compare` that do not go together, and its recipes."""

from pathlib import Path

import pytest

from veridical.cli import parse
from veridical.comparison.jobs import compare as job
from veridical.comparison.verbs import CompareVerb
from veridical.errors import ConfigError

RECIPES = Path(__file__).parents[2] / "data" / "recipes" / "compare"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data": "safe", "compress": "int8"}, "give a reference and no policy"),
        ({"data": "safe", "compress": "int8", "policy": "a", "reference": "b"}, "no policy"),
        ({"data": "safe", "policy": ("a", "b")}, "several policies need --reference"),
        ({"data": "safe", "policy": "a", "reward": "r"}, "--reward is for several policies; 1 arrived"),
        ({"data": "safe", "policy": "a", "trained_on": ("r",)}, "--trained-on is for several policies"),
        ({"data": "safe", "policy": ("a", "b"), "reference": "c", "probes": (Path("p"),)}, "probes and SAEs"),
        ({"data": "safe"}, "compare needs a policy"),
        ({"policy": "a"}, "--data"),
    ],
)
def test_what_does_not_go_together(options, said):
    with pytest.raises(ConfigError, match=said):
        job(CompareVerb(**options))


def test_one_policy_or_several():
    assert parse("compare", ["a", "--data", "safe"]).policy == ("a",)
    assert parse("compare", ["a", "b", "--data", "safe"]).policy == ("a", "b")
    assert CompareVerb(policy="a").policy == ("a",)


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes(recipe):
    options = parse("compare", ["--config", str(recipe)])
    assert options.data == "honesty"
    assert bool(options.compress) != bool(options.policy)
    assert not options.policy or len(options.trained_on) == len(options.policy)
