"""The command line: options, recipes, one clear line and status 2 for what can't be used."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from veridical import cli, running
from veridical.config import BeliefConfig, CollectConfig, ProbeConfig
from veridical.errors import ConfigError, UnknownNameError
from veridical.interventions.material import material
from veridical.verbs import VERBS, ProbeVerb

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "transformers", "transformer_lens", "sae_lens", "datasets", "sklearn", "plotly", "pandas"}


def recipe(folder, **values):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def fails(capsys, *words):
    """The one line that a bad command prints on standard error."""
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("veridical: ")
    assert said.err.count("\n") == 1, said.err
    return said.err


@pytest.mark.parametrize(
    "words",
    [("--help",), ("probe", "--help"), ("ls", "--help"), ("demo", "--help"), ("probe", "eval", "--help")],
)
def test_help_is_light_and_has_an_example(words):
    code = (
        "import sys; from veridical import cli; status = cli.main(sys.argv[1:]);"
        "sys.stderr.write(' '.join(sys.modules)); sys.exit(status)"
    )
    run = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert run.returncode == 0
    assert f"veridical {words[0] if words[0] in VERBS else 'probe'} " in run.stdout
    assert not HEAVY & set(run.stderr.split())


def test_every_verb_is_in_the_overview_with_its_example(capsys):
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    for verb, cls in VERBS.items():
        assert f"  {verb} " in said
        assert f"Example: veridical {verb}" in cls.__doc__
        assert verb in running.RUN


def test_without_a_verb_the_overview_is_shown_and_the_status_says_so(capsys):
    assert cli.main([]) == 2
    assert "usage: veridical VERB" in capsys.readouterr().out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("veridical 0.")


def test_recipe_wins_over_defaults_and_flags_over_the_recipe(tmp_path):
    path = recipe(tmp_path, folds=7, target="lied", where=["instructed_to_lie=True"], model="m")
    options = cli.parse("probe", ["--config", path, "--folds", "3", "--data", "d"])
    assert isinstance(options, ProbeVerb)
    assert (options.folds, options.target, options.model, options.data) == (3, "lied", "m", "d")
    assert options.where == ("instructed_to_lie=True",)
    assert options.bootstrap == ProbeConfig().bootstrap
    assert cli.parse("probe", [f"--config={path}"]).folds == 7


def test_dashes_and_underscores_are_the_same_in_recipes_and_flags(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("batch-tokens: 99\ntest_fraction: 0.5\nstrengths: [1e-3, 1]\ntokens: -1\n")
    options = cli.parse("probe", ["--config", str(path), "--shard-mb", "3", "--known_agreement", "0.5"])
    assert (options.batch_tokens, options.test_fraction, options.shard_mb) == (99, 0.5, 3)
    assert options.strengths == (1e-3, 1.0)
    assert options.tokens == -1
    assert options.known_agreement == 0.5


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ([], None),
        (["--beliefs"], True),
        (["--no-beliefs"], False),
        (["--beliefs", "--folds", "3"], True),
        (["--beliefs", "None"], None),
    ],
)
def test_a_switch_with_an_automatic_setting(words, value):
    assert cli.parse("probe", words).beliefs is value


def test_saved_options_are_a_recipe_that_gives_the_same_options(tmp_path):
    from veridical.config import to_dict

    words = [
        "--model",
        "m",
        "--data",
        "d",
        "--sites",
        "resid_post.1,z.0",
        "--strengths",
        "0.1",
        "1",
        "-o",
        "x",
    ]
    options = cli.parse("probe", [*words, "--where", "a=True", "b=2"])
    (tmp_path / "config.json").write_text(json.dumps(to_dict(options)))
    assert cli.parse("probe", ["--config", str(tmp_path / "config.json")]) == options


def test_a_verb_has_every_option_of_the_api_it_stands_on():
    options = cli.parse("probe", ["--folds", "3", "--orders", "4", "--tokens", "mean"])
    assert running.part(ProbeConfig, options).folds == 3
    assert running.part(BeliefConfig, options).orders == 4
    assert running.part(CollectConfig, options).tokens == "mean"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prob"], "unknown verb 'prob'; nearest: probe"),
        (["probe", "--fold", "3"], "'--fold'; nearest: --folds"),
        (["probe", "--folds", "many"], "--folds: invalid literal for int() with base 10: 'many'"),
        (["probe", "--folds"], "Missing value for argument '--folds'"),
        (["probe", "--padding", "up"], "unknown choice for --padding: 'up'; there are: right, left"),
        (["probe", "--padding", "rigth"], "nearest: right"),
        (["sae", "train", "--k", "2.5"], "Error parsing --k: invalid literal for int() with base 10: '2.5';"),
        (["sae", "train", "--tokens", "1e6"], "could be instantiated from ['1e6'];"),
        (["collect", "--batch-tokens", "0"], "batch_tokens = 0: Input should be greater than or equal to 1;"),
        (["collect", "--seed", "-1"], "seed = -1: Input should be greater than or equal to 0;"),
        (["sae", "train", "--bootstrap", "0"], "bootstrap = 0: Input should be greater"),
        (
            ["sae", "sweep", "--checkpoint-minutes", "nan"],
            "checkpoint_minutes = nan: Input should be a finite",
        ),
        (["probe", "--config"], "--config needs the path of a recipe"),
        (["probe", "--config", "nowhere.yaml"], "no recipe at nowhere.yaml"),
        (["probe"], "probe needs --model"),
        (["probe", "--model", "m"], "probe needs --data"),
        (["probe", "evil"], "unknown job of veridical probe: 'evil'; nearest: eval"),
        (["probe", "fit"], "probe needs --model"),
        (["probe", "eval"], "probe eval needs the folder of a saved probe"),
        (["probe", "eval", "nowhere", "--model", "m"], "probe eval needs --data"),
        (["probe", "eval", "nowhere", "--model", "m", "--data", "d"], "no config.json in nowhere"),
        (["probe", "transfer", "--model", "m", "--data", "a"], "one --data with --by COLUMN"),
        (["probe", "monitor", "nowhere"], "probe monitor needs --model"),
        (["collect", "--data", "d"], "collect needs --model"),
        (["probe", "--model", "m", "--data", "d", "--limit", "0"], "expected at least one pair"),
        (["report"], "report needs at least one folder"),
        (["report", "nowhere"], "no folder at nowhere"),
        (["ls", "nowhere"], "no folder at nowhere"),
        (["demo", "extra"], "unknown argument of veridical demo: 'extra'"),
    ],
)
def test_a_wrong_command_is_one_line_and_status_2(capsys, words, said):
    assert said in fails(capsys, *words)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fold: 3", "'fold'; nearest: folds"),
        ("folds: many", "folds = 'many'"),
        ("padding: up", "padding = 'up'"),
        ("- a\n- b", "holds a list; expected keys and values"),
        ("a: [", "is not readable YAML"),
    ],
)
def test_a_wrong_recipe_is_one_line_and_status_2(capsys, tmp_path, text, said):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert said in fails(capsys, "probe", "--config", str(path))


def test_parse_raises_what_the_api_raises(tmp_path):
    with pytest.raises(UnknownNameError, match="nearest: target"):
        cli.parse("probe", ["--config", recipe(tmp_path, targt="x")])
    with pytest.raises(ConfigError, match="see veridical probe --help"):
        cli.parse("probe", ["--seed", "x"])


def test_an_interrupt_says_that_work_is_kept(capsys, monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setitem(running.RUN, "ls", interrupted)
    assert cli.main(["ls"]) == 130
    assert capsys.readouterr().err == f"veridical: {cli.STOPPED}\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(options):
        raise ZeroDivisionError

    monkeypatch.setitem(running.RUN, "ls", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["ls"])


def test_recipes_in_the_repository_are_valid():
    recipes = sorted((ROOT / "probes" / "recipes").glob("*.yaml"))
    assert {path.stem for path in recipes} >= {"honest_lying", "toxic", "safe"}
    for path in recipes:
        options = cli.parse("probe", ["--config", str(path)])
        options.require("probe")
        assert options.out == Path("runs") / path.stem


def test_recipes_for_patch_are_valid():
    recipes = sorted((ROOT / "probes" / "recipes" / "patch").glob("*.yaml"))
    assert recipes
    for path in recipes:
        options = cli.parse("patch", ["--config", str(path)])
        assert options.out == Path("runs") / path.stem
        assert material(options).answers


def test_pre_commit_config_is_valid_and_local():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    assert {"ruff", "ruff-format", "pyright"} <= {
        hook["id"] for repo in config["repos"] for hook in repo["hooks"]
    }
