"""`veridical sae` end to end on a tiny random model: what is written, what is resumed, what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sae_makers import random_sae
from safetensors.torch import save_file

import veridical as vd
from veridical import cli
from veridical.errors import ConfigError, DataError
from veridical.saes import steps, texts
from veridical.saes.formats import to_saelens
from veridical.saes.saved import load_sae

ROOT = Path(__file__).parents[2]
SITE = "resid_post.1"
NAMES = ["France", "Italy", "Rome", "gold", "silver", "truth", "Au", "Ag"]
QUICK = ["--bootstrap", "20", "--batch-tokens", "512"]
SMALL = ["--site", SITE, "--width", "64", "--batch", "64", "--tokens", "1280", "--lr", "0.003", *QUICK]


@pytest.fixture(scope="session")
def model_folder(tiny, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    tiny("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    rows = [
        {
            "pair": number,
            "prompt": f"the capital of {NAMES[number % 8]} is {NAMES[number % 5]} {'indeed ' * label}",
            "completion": "yes" if label else "no",
            "label": label,
            "split": "test" if number % 4 == 0 else "train",
        }
        for number in range(48)
        for label in (0, 1)
    ]
    path = tmp_path_factory.mktemp("data") / "capitals.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(scope="session")
def trained(model_folder, data, tmp_path_factory):
    """A run of two SAEs from a recipe."""
    folder = tmp_path_factory.mktemp("run")
    recipe = folder / "two.yaml"
    recipe.write_text("saes:\n  - {k: 4}\n  - {k: 8, name: eight}\n")
    words = ["--model", model_folder, "--data", data, "--config", str(recipe), *SMALL]
    assert cli.main(["sae", "train", *words, "--out", str(folder / "out")]) == 0
    return folder / "out"


def run(capsys, *words):
    capsys.readouterr()
    status = cli.main([str(word) for word in words])
    said = capsys.readouterr()
    assert status == 0, said.err
    assert said.err == "", "a verb is quiet on standard error when nobody watches"
    return said.out


def fails(capsys, *words):
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("veridical: ")
    assert said.count("\n") == 1, said
    return said


def test_train_writes_everything(capsys, trained, data, model_folder):
    for name in ("config.json", "provenance.json", "metrics.json", "section.json", "report.html"):
        assert (trained / name).is_file(), name
    metrics = json.loads((trained / "metrics.json").read_text())
    names = ["topk-f64-k4-lr0.003", "eight"]
    assert [line["name"] for line in metrics["saes"]] == names
    assert [line["k"] if "k" in line else line["sparsity"] for line in metrics["training"]] == ["k 4", "k 8"]
    assert json.loads((trained / "provenance.json").read_text())["verb"] == "sae train"
    page = (trained / "report.html").read_text()
    assert "PCA" in page
    assert "random" in page
    # The figures are those of the test pairs, over which a saved SAE gives them again.
    pairs = vd.Pairs.load(data)
    model = vd.load(model_folder)
    for name, line in zip(names, metrics["saes"]):
        sae = load_sae(trained / "saes" / name)
        found = sae.evaluate(model, pairs.filter(split="test"), bootstrap=20).to_dict()
        assert line["fvu"] == pytest.approx(found["fvu"], rel=1e-5)
        assert line["loss_spliced"] == pytest.approx(found["loss_spliced"], rel=1e-4)
        assert line["texts"] == 12
        assert sae.origin.metrics["fvu"] == line["fvu"]
        assert sae.origin.model_fingerprint == model.fingerprint()
        assert f"{line['fvu']:.3f}" in (trained / "saes" / name / "README.md").read_text()
        assert sae.origin.trained_on == 1280
    listed = run(capsys, "ls", trained)
    assert "run (sae train)" in listed
    assert listed.count(" SAE ") == 2
    assert "topk, resid_post.1, L0 8" in listed


def test_nothing_is_trained_on_that_is_held_out(trained):
    acts = vd.Activations.open(trained / "activations")
    assert set(acts.rows["split"]) == {"train"}


def test_a_run_goes_on_and_its_config_runs_it_again(capsys, trained, tmp_path):
    kept = {file: file.read_bytes() for file in (trained / "saes").rglob("*.safetensors")}
    stamps = {file: file.stat().st_mtime_ns for file in (trained / "activations").glob("shard*")}
    run(capsys, "sae", "train", "--config", trained / "config.json")
    assert {file: file.read_bytes() for file in kept} == kept
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps
    again = tmp_path / "again"
    run(
        capsys,
        "sae",
        "train",
        "--config",
        trained / "config.json",
        "--out",
        again,
        "--keep",
        tmp_path / "kept",
    )
    for file, content in kept.items():
        assert (again / file.relative_to(trained)).read_bytes() == content
        assert (tmp_path / "kept" / file.parent.name / file.name).read_bytes() == content
    said = fails(capsys, "sae", "train", "--config", trained / "config.json", "--lr", "0.01")
    assert "holds another training run" in said


def test_a_store_takes_the_place_of_a_model(capsys, model_folder, data, tmp_path):
    store, out = tmp_path / "acts", tmp_path / "run"
    words = ["--model", model_folder, "--data", data]
    run(capsys, "collect", *words, "--sites", SITE, "--tokens", "all", "--store", store)
    run(capsys, "sae", "train", "--activations", store, "--out", out, "--k", "4", *SMALL)
    (line,) = json.loads((out / "metrics.json").read_text())["saes"]
    acts = vd.Activations.open(store)
    held = acts.filter(split="test")
    sae = load_sae(out / "saes" / line["name"])
    assert line["fvu"] == pytest.approx(sae.evaluate(held, bootstrap=20).metrics["fvu"].value, rel=1e-6)
    assert line["rows"] == len(held)
    run(capsys, "sae", "train", "--activations", store, "--out", out, "--k", "4", *SMALL, "--eval-texts", "5")
    assert json.loads((out / "metrics.json").read_text())["saes"][0]["texts"] == 5
    said = fails(capsys, "sae", "train", "--activations", store, *words, *SMALL)
    assert "takes the place of --model and --data" in said
    assert "no activation store" in fails(
        capsys, "sae", "train", "--activations", tmp_path / "nowhere", *SMALL
    )
    assert "nearest: blocks.1.hook_resid_post" in fails(
        capsys,
        "sae",
        "train",
        "--activations",
        store,
        "--out",
        tmp_path / "x",
        *SMALL,
        "--site",
        "resid_post.2",
    )


def test_a_model_may_run_as_training_goes_on_over_pieces_of_long_texts(capsys, model_folder, tmp_path):
    frame = pd.DataFrame({"story": [" ".join(np.roll(NAMES, at)) * 12 for at in range(40)], "id": range(40)})
    frame.to_csv(tmp_path / "stories.csv", index=False)
    words = ["sae", "train", "--model", model_folder, "--data", tmp_path / "stories.csv", "--text", "story"]
    words += [*SMALL, "--k", "4", "--holdout", "0.2", "--out", tmp_path / "run"]
    assert "over the limit of 64" in fails(capsys, *words)
    assert "at most the model's 64" in fails(capsys, *words, "--context", "65")
    run(capsys, *words, "--context", "32", "--on-the-fly")
    (line,) = json.loads((tmp_path / "run" / "metrics.json").read_text())["saes"]
    assert line["texts"] == 8
    assert not (tmp_path / "run" / "activations").exists()


def test_pieces_hold_every_token_once_with_the_begin_token_before_each(model_folder, data):
    model, pairs = vd.load(model_folder), vd.Pairs.load(data)
    made = texts.cut(model, pairs, 7).to_pandas()
    assert made["input_ids"].map(len).max() == 7
    whole = model.encode(pairs.prompts, pairs.completions)
    begin = model.tokenizer.bos_token_id
    assert all(ids[0] == begin for ids in made["input_ids"])
    at = 0
    for row, one in enumerate(whole):
        joined = []
        while len(joined) < len(one.ids) - 1:
            joined += made["input_ids"][at][1:].tolist()
            assert made["pair"][at] == pairs.groups[row]
            assert made["label"][at] == pairs["label"][row]
            at += 1
        assert joined == list(one.ids[1:])
    assert at == len(made)
    assert texts.cut(model, pairs, None) is pairs


def test_parting_keeps_pairs_whole(data):
    pairs = vd.Pairs.load(data)
    seen, held = texts.parted(pairs, 0.5, 0)
    assert set(held["split"]) == {"test"}
    free = pairs.without_columns("split")
    seen, held = texts.parted(free, 0.25, 3)
    assert len(held) == 24
    assert not set(seen.groups) & set(held.groups)
    assert len(seen) + len(held) == len(pairs)
    assert texts.parted(free, 0.25, 4)[1].fingerprint != held.fingerprint
    for share in (0.0, 1.0, -0.1):
        with pytest.raises(ConfigError, match="above 0 and below 1"):
            texts.parted(free, share, 0)
    with pytest.raises(DataError, match="one text"):
        texts.held_rows(np.zeros(3), None, 0.5, 0)


def sweep_recipe(folder):
    path = folder / "sweep.yaml"
    common = f"common: {{site: {SITE}, width: 64, batch: 64, tokens: 2560}}"
    path.write_text(f"{common}\ngrid:\n  lr: [1e-3, 3e-3, 10.0, 30.0]\n  k: [4, 8]\nslots: 4\n")
    return path


def test_a_sweep_cancels_and_saves_what_came_through(capsys, model_folder, data, tmp_path):
    out = tmp_path / "out"
    words = [
        "sae",
        "sweep",
        "--config",
        sweep_recipe(tmp_path),
        "--model",
        model_folder,
        "--data",
        data,
        *QUICK,
    ]
    run(capsys, *words, "--out", out)
    metrics = json.loads((out / "metrics.json").read_text())
    cancelled = {line["name"] for line in metrics["training"] if line["cancelled"]}
    kept = {line["name"] for line in metrics["training"]} - cancelled
    assert {"topk-f64-k4-lr30", "topk-f64-k8-lr30"} <= cancelled
    assert kept == {folder.name for folder in (out / "saes").iterdir()}
    assert kept == {line["name"] for line in metrics["saes"]}
    assert {f"topk-f64-k{k}-lr0.003" for k in (4, 8)} <= kept
    assert metrics["share_of_tokens"] < 1
    assert {line["name"] for line in metrics["judgements"]} >= cancelled
    page = (out / "report.html").read_text()
    assert "The sweep, rung by rung" in page
    assert "tokens spent" in page
    before = {file: file.read_bytes() for file in (out / "saes").rglob("*.safetensors")}
    run(capsys, "sae", "sweep", "--config", out / "config.json")
    assert {file: file.read_bytes() for file in before} == before
    assert "run (sae sweep)" in run(capsys, "ls", out)


def test_a_sweep_may_go_to_ray(capsys, monkeypatch, model_folder, data, tmp_path):
    from veridical.saes import ray_engine

    seen = {}

    def stop(given, sweep, members, **options):
        seen.update(store=sweep.store, names=[config.label for config in members], rows=len(given.rows))
        raise ConfigError("as far as this goes")

    monkeypatch.setattr(ray_engine, "ray_sweep", stop)
    words = ["sae", "sweep", "--config", sweep_recipe(tmp_path), "--model", model_folder, "--data", data]
    fails(capsys, *words, "--engine", "ray", "--out", tmp_path / "out", "--store", tmp_path / "shared")
    assert seen["store"] == tmp_path / "shared"
    assert len(seen["names"]) == 8
    assert seen["rows"] == 72


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("grid: {lr: []}", "grid.lr is an empty list"),
        ("grid: {lrr: [1]}", "nearest: lr"),
        ("slots: 2", "no members"),
        ("configs: [{k: 4}]\ncommon: {width: 64}", "needs --site"),
        ("configs: [{k: 4, site: resid_post.1}]\neta: 0.5", "eta is 0.5"),
        ("configs: [{k: 4, site: resid_post.1}]\nslots: 0", "slots is 0"),
    ],
)
def test_bad_sweeps_are_one_line_and_status_2(capsys, model_folder, data, tmp_path, text, said):
    (tmp_path / "recipe.yaml").write_text(text)
    words = ["--model", model_folder, "--data", data, "--out", tmp_path / "run"]
    assert said in fails(capsys, "sae", "sweep", "--config", tmp_path / "recipe.yaml", *words)


# Saved SAEs


@pytest.fixture(scope="session")
def foreign(tmp_path_factory):
    """Folders of SAELens, sparsify and dictionary_learning with the same weights as one of ours."""
    root = tmp_path_factory.mktemp("foreign")
    sae = random_sae("topk", d_in=32, width=64, k=4, site=SITE)
    sae.save(root / "ours")
    to_saelens(sae, root / "saelens")
    (root / "sparsify" / "layers.1").mkdir(parents=True)
    weights = {"encoder.weight": sae.W_enc, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    weights = {name: value.detach().clone().contiguous() for name, value in weights.items()}
    save_file(weights, root / "sparsify" / "layers.1" / "sae.safetensors")
    cfg = {"activation": "topk", "k": 4, "num_latents": 64, "d_in": 32, "expansion_factor": 2}
    cfg |= {"normalize_decoder": False, "multi_topk": False, "skip_connection": False, "transcode": False}
    (root / "sparsify" / "layers.1" / "cfg.json").write_text(json.dumps(cfg))
    (root / "dictionary").mkdir()
    theirs = {
        "encoder.weight": sae.W_enc, "encoder.bias": sae.b_enc, "decoder.weight": sae.W_dec.T,
        "b_dec": sae.b_dec, "k": torch.tensor(4), "threshold": torch.tensor(-1.0),
    }  # fmt: skip
    torch.save(
        {name: value.detach().clone() for name, value in theirs.items()}, root / "dictionary" / "ae.pt"
    )
    said = {"dict_class": "AutoEncoderTopK", "activation_dim": 32, "dict_size": 64, "k": 4, "layer": 1}
    (root / "dictionary" / "config.json").write_text(json.dumps({"trainer": said}))
    return root


def test_eval_reads_four_kinds_of_folders_and_finds_them_equal(capsys, foreign, model_folder, data, tmp_path):
    folders = [foreign / name for name in ("ours", "saelens", "sparsify/layers.1", "dictionary")]
    words = ["--model", model_folder, "--data", data, "--site", SITE, "--split", "test", *QUICK]
    run(capsys, "sae", "eval", *folders, *words, "--out", tmp_path / "eval")
    lines = json.loads((tmp_path / "eval" / "metrics.json").read_text())["saes"]
    assert [line["name"] for line in lines] == ["ours", "saelens", "layers.1", "dictionary"]
    for line in lines[1:]:
        assert line["fvu"] == pytest.approx(lines[0]["fvu"], rel=1e-4)
        assert line["l0"] == pytest.approx(lines[0]["l0"])
    assert {line["texts"] for line in lines} == {12}
    assert "layers.1" in (tmp_path / "eval" / "report.html").read_text()


def test_the_list_names_folders_of_four_libraries(capsys, foreign, tmp_path):
    said = run(capsys, "ls", foreign).split("In ")[1]
    lines = {line.split()[0].removeprefix(f"{foreign}/"): line for line in said.splitlines()[2:]}
    assert set(lines) == {"ours", "saelens", "sparsify/layers.1", "dictionary"}
    assert all(line.split()[1] == "SAE" for line in lines.values())
    assert lines["saelens"].endswith("of SAELens")
    assert lines["sparsify/layers.1"].endswith("of sparsify: topk, k 4, input width 32")
    said = "of dictionary_learning: AutoEncoderTopK, latents 64, input width 32, k 4, layer 1"
    assert lines["dictionary"].endswith(said)
    shutil.copytree(foreign / "dictionary", tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text("[]")
    assert "cannot be read" in run(capsys, "ls", tmp_path)


def test_eval_reads_a_label_from_few_latents(capsys, trained, model_folder, data, tmp_path):
    words = [trained / "saes" / "eight", "--model", model_folder, "--data", data, *QUICK]
    run(capsys, "sae", "eval", *words, "--target", "label", "--out", tmp_path / "eval")
    frame = pd.read_csv(tmp_path / "eval" / "latents-eight.csv")
    assert {"latents, k=1", "dimensions, k=1", "all dimensions", "text alone"} <= set(frame["who"])
    page = (tmp_path / "eval" / "report.html").read_text()
    assert "few latents" in page
    assert "not measured" not in page.split("Feature absorption")[0]
    # Without a label it is said that these figures are missing, and what they need; nothing old stays.
    said = run(capsys, "sae", "eval", *words, "--out", tmp_path / "eval")
    why = "Give --target COLUMN, a column of two values (these data have label, split)"
    assert why in said
    page = (tmp_path / "eval" / "report.html").read_text()
    assert why in page
    assert "few latents" not in page
    run(capsys, "sae", "eval", *words, "--target", "label", "--out", tmp_path / "eval")
    assert why not in (tmp_path / "eval" / "report.html").read_text()


def test_missing_absorption_is_said(capsys, monkeypatch, trained, model_folder, data, tmp_path):
    def refuse(*_, **__):
        raise DataError("the linear probe finds label on no held-out row: there is no feature to absorb")

    monkeypatch.setattr("veridical.saes.absorption.measure_absorption", refuse)
    words = [trained / "saes" / "eight", "--model", model_folder, "--data", data, *QUICK, "--target", "label"]
    assert cli.main([*map(str, ["sae", "eval", *words]), "--out", str(tmp_path / "eval")]) == 0
    shown = " ".join(capsys.readouterr().err.split())
    page = (tmp_path / "eval" / "report.html").read_text()
    for part in ("not measured: the linear probe finds label on no held-out row", "give more labelled rows"):
        assert part in shown
        assert part in page


def test_features_get_an_index_and_pages(capsys, trained, model_folder, data, tmp_path):
    out = tmp_path / "features"
    words = ["sae", "features", trained / "saes" / "eight", "--model", model_folder, "--data", data, *QUICK]
    run(capsys, *words, "--target", "label", "--pages", "3", "--out", out)
    frame = pd.read_csv(out / "features.csv")
    assert len(frame) == 64
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["silent"] == int((frame["frequency"] == 0).sum())
    best = [int(line["feature"]) for line in metrics["separating"][:3]]
    assert sorted(folder.name for folder in out.glob("feature-*")) == [
        f"feature-{at:03d}-{feature}" for at, feature in enumerate(best)
    ]
    page = (out / "report.html").read_text()
    assert f"Feature {best[0]} at" in page
    assert "promotes and suppresses" in page
    run(capsys, *words, "--features", "5", "--out", out)
    assert [folder.name for folder in out.glob("feature-*")] == ["feature-000-5"]
    assert "feature 64: this SAE has features 0 to 63" in fails(capsys, *words, "--features", "64")


def test_the_most_active_features_get_pages_and_dense_ones_come_last():
    class Table:
        frequency = np.array([0.5, 0.0, 0.02, 0.09, 0.2])

    from veridical.saes.jobs import most_active

    assert most_active(Table(), 3) == [3, 2, 0]
    assert most_active(Table(), 10) == [3, 2, 0, 4]


def test_an_sae_of_another_model_is_said(capsys, trained, tiny, tokenizer, data, tmp_path):
    tiny("gpt2").save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    capsys.readouterr()
    words = ["sae", "eval", trained / "saes" / "eight", "--model", tmp_path / "gpt2", "--data", data, *QUICK]
    assert cli.main([*map(str, words), "--out", str(tmp_path / "eval")]) == 0
    assert "trained on another model" in capsys.readouterr().err
    assert "trained on another model" in (tmp_path / "eval" / "figures-eight" / "section.json").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--k", "65"], "k is 65, but there are only 64 latents"),
        (["--site", "resid_pst.1"], "resid_post.1"),
        (["--site", "None"], "needs --site"),
        (["--batch", "100000"], "lower batch"),
        (["--text", "storey"], "storey"),
        (["--holdout", "1"], "holdout"),
        (["--eval-texts", "0"], "eval_texts = 0"),
        (["--tokens", "10"], "tokens is 10, less than a batch"),
        (["--architecture", "transcoder"], "names both site and target_site"),
        (["--name", "a/b"], "letters, digits"),
        (["--split", "tets"], "no row"),
        (["--device", "gpu"], "device is 'gpu', where float32 cannot be had"),
        (["--device", "meta"], "device is 'meta'"),
        (["--betas", "1.5", "0.9"], "betas are (1.5, 0.9)"),
        (["--data-seed", "-1"], "data_seed = -1"),
        (["--batch-tokens", "0"], "batch_tokens = 0"),
        (["--keep", "/proc/nowhere"], "cannot write /proc/nowhere"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, model_folder, data, tmp_path, words, said):
    given = ["sae", "train", "--model", model_folder, "--data", data, *SMALL, "--k", "4", "--out", tmp_path]
    assert said in fails(capsys, *given, *words)


def test_bad_recipes_of_several_saes(capsys, model_folder, data, tmp_path):
    given = ["--model", model_folder, "--data", data, *SMALL, "--out", tmp_path / "run"]
    for text, said in (
        ("saes: [{kk: 3}]", "nearest: k"),
        ("saes: [{k: many}]", "k = 'many'"),
        ("saes: [3]", "saes"),
    ):
        (tmp_path / "recipe.yaml").write_text(text)
        assert said in fails(capsys, "sae", "train", "--config", tmp_path / "recipe.yaml", *given)


def test_a_run_in_which_every_sae_diverged_ends_with_status_2(capsys, model_folder, data, tmp_path):
    words = ["--model", model_folder, "--data", data, *SMALL, "--k", "4", "--lr", "1e30", "--name", "wild"]
    assert cli.main(["sae", "train", *words, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("veridical: none of 1 SAEs was trained to the end; wild was cancelled: its loss")
    assert "wild was cancelled" in (tmp_path / "run" / "report.html").read_text()


def test_bad_sweeps(capsys, model_folder, data, tmp_path):
    common = f"common: {{site: {SITE}, width: 64, batch: 64, tokens: 2560}}\n"
    for text, said in (
        ("grid: {k: [4, 8]}\nfirst: 2560", "first = 2560: nobody would be judged"),
        ("configs: [{k: 4, name: a/b}]", "name = 'a/b'"),
        ("grid: {k: [4, 8]}\nresources: {cpu: 1}", "engine ray"),
        ("grid: {k: [4, 8]}\ngrid: {k: [4]}", "the key 'grid' twice"),
    ):
        (tmp_path / "bad.yaml").write_text(common + text)
        words = ["--config", tmp_path / "bad.yaml", "--model", model_folder, "--data", data]
        assert said in fails(capsys, "sae", "sweep", *words, "--out", tmp_path / "run")


def test_an_sae_read_at_another_site_says_so(capsys, trained, model_folder, data, tmp_path):
    words = [trained / "saes" / "eight", "--model", model_folder, "--data", data, *QUICK]
    words += ["--site", "resid_post.0", "--out", tmp_path / "eval"]
    assert cli.main([*map(str, ["sae", "eval", *words])]) == 0
    assert (
        "eight was trained at resid_post.1; as asked, it is read at resid_post.0" in capsys.readouterr().err
    )


def test_bad_folders(capsys, trained, model_folder, data, tmp_path):
    words = ["--model", model_folder, "--data", data, "--out", tmp_path / "out"]
    assert "needs folders of saved SAEs" in fails(capsys, "sae", "eval", *words)
    assert "needs the folder of a saved SAE" in fails(capsys, "sae", "features", *words)
    assert "no folder" in fails(capsys, "sae", "eval", tmp_path / "nowhere", *words)
    random_sae("topk", d_in=12, width=40, site=SITE).save(tmp_path / "narrow")
    assert "12 dimensions" in fails(capsys, "sae", "eval", tmp_path / "narrow", *words)
    random_sae("topk", d_in=32, width=40).save(tmp_path / "homeless")
    assert "give --site" in fails(capsys, "sae", "features", tmp_path / "homeless", *words)
    shutil.copytree(trained / "saes" / "eight", tmp_path / "copy")
    file = tmp_path / "copy" / "sae_weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    assert "sae_weights.safetensors" in fails(capsys, "sae", "eval", tmp_path / "copy", *words)
    said = fails(capsys, "sae", "features", trained / "saes" / "eight", *words, "--target", "labl")
    assert "nearest: label" in said


def test_recipes_in_the_repository_are_valid():
    recipes = {path.stem: path for path in (ROOT / "saes" / "recipes").glob("*.yaml")}
    assert set(recipes) >= {"tiny_liar", "gpt2_small", "llama3_8b"}
    widths = {"tiny_liar": 128, "gpt2_small": 768, "llama3_8b": 4096}
    for name, width in widths.items():
        options = cli.parse("sae train", ["--config", str(recipes[name])])
        options.require("sae train")
        assert options.out == Path("runs") / f"sae_{name}"
        for config in steps.members(options):
            config.check(width)
            assert config.aux == 1 / 32
            assert config.site
    swept = cli.parse("sae sweep", ["--config", str(recipes["tiny_liar_sweep"])])
    assert len(steps.sweep_config(swept).members()) == 12
    large = steps.members(cli.parse("sae train", ["--config", str(recipes["llama3_8b"])]))[0]
    assert (large.latents(4096), large.k, large.batch) == (131_072, 192, 131_072)
    assert large.learning_rate(4096) == pytest.approx(2e-4 / 8**0.5)
    assert large.warmup + large.decay == pytest.approx(1)


def test_jobs_are_listed_and_others_refused(capsys):
    assert cli.main(["sae", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  sae {job} " in said for job in ("train", "sweep", "eval", "features"))
    assert "probe" not in said.split("Every verb")[0].replace("probes", "")
    assert "needs a job: train, sweep, eval, features" in fails(capsys, "sae")
    assert "nearest: features" in fails(capsys, "sae", "feature")
    for job in ("train", "sweep", "eval", "features"):
        assert cli.main(["sae", job, "--help"]) == 0
        assert f"Example: veridical sae {job}" in capsys.readouterr().out


def test_names_of_folders_are_told_apart(tmp_path):
    one, two = tmp_path / "a" / "best", tmp_path / "b" / "best"
    assert list(steps.named({one: 1, two: 2})) == ["a-best", "b-best"]
    assert list(steps.named({one: 1})) == ["best"]
