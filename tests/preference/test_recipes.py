"""Recipes of `veridical prefer`: those of the organism run with few steps, those of the hub are checked."""

import dataclasses
import json
import re

import pytest

from veridical import cli, organisms
from veridical.config import load_recipe
from veridical.preference.config import UNREAD
from veridical.preference.verbs import VERBS

pytestmark = pytest.mark.filterwarnings("ignore")
FOLDER = organisms.data_folder() / "recipes" / "prefer"
JOBS = ["sft", "reward", "dpo", "ipo", "rl", "distil", "constitution"]
REWARD = ["reward", "samples", "max_new_tokens"]
"""What a reward model does not read."""
FEW = ["--steps", "2", "--checkpoints", "1", "--batch", "4"]
SHORT = ["--samples", "4", "--max-new-tokens", "4"]


def test_there_is_a_recipe_for_every_job_here_and_on_the_hub():
    names = {path.stem for path in FOLDER.glob("*.yaml")}
    assert names == {*JOBS, *(f"{job}_hub" for job in JOBS)}


@pytest.mark.parametrize("job", JOBS)
def test_a_recipe_of_the_organism_runs(tmp_path, job, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = str(FOLDER / f"{job}.yaml")
    few = ["--limit", "3", "--max-new-tokens", "4"] if job == "constitution" else [*FEW, *SHORT]
    if job == "reward":
        few = FEW
    if job == "rl":
        assert cli.main(["prefer", "reward", "--config", str(FOLDER / "reward.yaml"), *FEW]) == 0
    assert cli.main(["prefer", job, "--config", recipe, *few]) == 0, capsys.readouterr().err
    out = tmp_path / load_recipe(recipe)["out"]
    assert out.parent.name == "runs"
    assert (out / "report.html").stat().st_size > 10_000
    assert json.loads((out / "config.json").read_text())["model"] == "tiny-liar"


@pytest.mark.parametrize("job", JOBS)
def test_a_recipe_for_the_hub_is_valid_and_explains_every_key(job):
    path = FOLDER / f"{job}_hub.yaml"
    options = cli.parse(f"prefer {job}", ["--config", str(path)])
    assert options.model.startswith("Qwen/")
    assert str(options.out) == f"runs/{path.stem}"
    recipe = load_recipe(path)
    unread = {*UNREAD.get(job, ()), *(REWARD if job == "reward" else [])}
    assert set(recipe) == {field.name for field in dataclasses.fields(VERBS[f"prefer {job}"])} - unread
    text = path.read_text()
    for key in recipe:
        assert re.search(rf"^# {key}: \S.*(?:\n#.*)*\n{key}:", text, re.MULTILINE), key
    assert f"veridical prefer {job} --config data/recipes/prefer/{path.name}" in text


def test_a_misspelt_key_is_named_with_the_nearest(tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text((FOLDER / "dpo.yaml").read_text().replace("learning_rate", "learning_rat"))
    assert cli.main(["prefer", "dpo", "--config", str(file)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "'learning_rat'; nearest: learning_rate" in line
