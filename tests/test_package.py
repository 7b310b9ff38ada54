"""The front door: lazy names, atomic files, errors that help, configs that refuse."""

import errno
import json
import os
import subprocess
import sys
from importlib import resources

import pytest

import veridical as vd
from veridical import config, files
from veridical.errors import (
    ConfigError,
    DamagedFileError,
    DiskFullError,
    InputError,
    UnknownNameError,
    unknown,
)
from veridical.provenance import fingerprint, provenance


def modules_after(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(' '.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_import_is_light():
    loaded = modules_after("import veridical")
    assert not loaded & {
        "torch",
        "transformers",
        "transformer_lens",
        "sae_lens",
        "datasets",
        "sklearn",
        "plotly",
    }


def test_no_name_imports_the_lens_packages():
    loaded = modules_after("import veridical; [getattr(veridical, name) for name in veridical.__all__]")
    assert "torch" in loaded
    assert not loaded & {"transformer_lens", "sae_lens"}


def test_every_public_name_resolves():
    for name in vd.__all__:
        assert getattr(vd, name) is not None
        assert name in dir(vd)
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = vd.nothing_here


def test_typed_marker_is_shipped():
    assert resources.files("veridical").joinpath("py.typed").is_file()


def test_unknown_names_the_nearest():
    error = unknown("site", "resid_pst.3", ["resid_pre.3", "resid_post.3", "z.0"], hint="Raw paths work too.")
    assert isinstance(error, UnknownNameError)
    assert isinstance(error, ValueError)
    assert "'resid_pst.3'" in str(error)
    assert str(error).index("resid_post.3") < str(error).index("resid_pre.3")
    assert str(error).endswith("Raw paths work too.")
    assert "\n" not in str(error)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})

    def write_half():
        with files.replacing(path) as file:
            file.write(b"half")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        write_half()
    assert files.read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch):
    files.write_text(tmp_path / "a", "old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match="no space left"):
        files.write_text(tmp_path / "a", "new")
    monkeypatch.undo()
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        files.write_text(tmp_path / "file" / "below", "x")


def test_nan_is_not_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a", {"a": float("nan")})
    assert not (tmp_path / "a").exists()


def test_damaged_json_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1')
    with pytest.raises(DamagedFileError, match=r"a\.json"):
        files.read_json(tmp_path / "a.json")


def test_config_refuses_unknown_and_mistyped():
    with pytest.raises(UnknownNameError, match="batch_tokens"):
        config.build(config.CollectConfig, batch_token=3)
    with pytest.raises(ConfigError, match="batch_tokens = 'many'"):
        config.build(config.CollectConfig, batch_tokens="many")
    built = config.build(config.CollectConfig, config.CollectConfig(tokens="all"), dtype="float16")
    assert (built.tokens, built.dtype) == ("all", "float16")


def test_config_round_trips_through_json():
    built = config.build(config.ProbeConfig, target="lied", where=("known=True",), strengths=(0.1, 1.0))
    saved = json.loads(json.dumps(config.to_dict(built)))
    assert config.build(config.ProbeConfig, **saved) == built


@pytest.mark.parametrize(
    ("content", "said"), [("a: [1", "not readable YAML"), ("- 1", "holds a list"), (None, "no recipe")]
)
def test_recipes_that_cannot_be_read(tmp_path, content, said):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=said):
        config.load_recipe(path)


def test_fingerprint_sees_content_order_and_boundaries():
    assert fingerprint(["ab", "c"]) == fingerprint([b"ab", b"c"])
    assert len({fingerprint(parts) for parts in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"])}) == 4


def test_provenance_names_versions():
    saved = provenance(seed=3)
    assert saved["seed"] == 3
    assert {"veridical", "torch", "transformers"} <= set(saved["packages"])
