"""Saving an adapter as a plain PEFT folder, proved from its own files before anyone can load it.

The folder is made under another name, loaded in a fresh process with plain transformers and PEFT (beside the
weights, and merged into them), measured again, and only then gets its name. An adapter that would load
without its effect is never there.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from veridical import files, hub
from veridical.adapters import CONFIG, WEIGHTS, is_adapter
from veridical.errors import DamagedFileError, DataError, InputError, ModelError, StoreMismatchError
from veridical.saved_result import RESULT
from veridical.sealed import digest
from veridical.steering.adapter import Adapter, AdapterReport
from veridical.steering.adapter_card import card
from veridical.steering.lora import PREFIX, LoRA, added, lora_of, peft_config, put_on

if TYPE_CHECKING:
    from veridical.hooked import HookedModel

REPORT, DATA, PROOF, SUMS = "report", "data.parquet", "proof.json", "checksums.json"
FILES = ("*.json", "*.safetensors", "*.parquet", "README.md")
"""What the folder of an adapter is made of."""
ASKED = 48
"""Questions, and rows of neutral text, that the proof is measured on."""
CLOSE = 2e-3
"""Nats by which log p of an answer may differ between this process and the fresh one."""
NOTHING = 1e-3
"""Nats: an adapter that moves the answers by less than this, on the mean, has no effect."""
TIMEOUT_S = 600


def save_adapter(adapter: Adapter, folder: str | Path, model: HookedModel | None = None) -> Path:
    """Saves an adapter; see `Adapter.save`."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG).is_file():
        raise InputError(f"{folder} holds something else than an adapter; give another folder")
    facts = adapter.report.facts
    if facts["kl"] > facts["kl_budget"]:
        raise ModelError(
            f"this adapter is at {facts['kl']:.4f} nats a token on neutral text, over its budget of "
            f"{facts['kl_budget']:g}; it is not saved"
        )
    if not isinstance(adapter.lora, LoRA):
        raise InputError(f"{adapter.lora} is no LoRA and cannot be saved as one; it is there for comparison")
    model = _base(adapter, model)
    adapter.check_base(model)
    with files.explaining_disk(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        _write(adapter, made, model)
        proof = prove(adapter, made, model)
        files.write_json(made / PROOF, proof)
        files.write_text(made / "README.md", card(adapter.report, proof))
        files.write_json(made / SUMS, _sums(made))
        if folder.exists():
            shutil.rmtree(folder)
        made.chmod(0o755)
        made.rename(folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    files.sync_folder(folder.parent)
    return folder


def load_adapter(folder: str | Path) -> Adapter:
    """Loads what `save_adapter` wrote; see `Adapter.load`."""
    from peft import LoraConfig, load_peft_weights

    from veridical.pairs import Pairs

    folder = Path(folder)
    if not is_adapter(folder) or not (folder / REPORT / RESULT).is_file():
        raise InputError(
            f"no adapter with a report in {folder}: expected a folder that an adapter was saved in"
        )
    expected = files.read_json(folder / SUMS)
    for name, found in _sums(folder).items():
        if name in expected and found != expected[name]:
            raise DamagedFileError(f"{folder / name} does not match its checksum; it was damaged or edited")
    for name in expected:
        if not (folder / name).is_file():
            raise DamagedFileError(f"{folder / name} is missing; the folder was cut short")
    config: Any = LoraConfig.from_pretrained(str(folder))
    lora = lora_of(config, load_peft_weights(str(folder), device="cpu"))
    report = AdapterReport.load(folder / REPORT)
    return Adapter(lora, report, Pairs.load(str((folder / DATA).resolve())))


def stored(folder: Path, asked: Mapping[str, Any]) -> Adapter | None:
    """The adapter in `folder` if it was made from what is asked for; None if there is none.

    Raises:
        StoreMismatchError: It was made from something else; names the first difference.
    """
    if not (folder / CONFIG).is_file():
        return None
    adapter = load_adapter(folder)
    for name, value in asked.items():
        there = adapter.report.facts.get(name)
        if json.loads(json.dumps(there)) != json.loads(json.dumps(value)):
            if isinstance(value, Mapping):
                name = next(key for key in value if (there or {}).get(key) != value[key])
                there, value = (there or {}).get(name), value[name]
            raise StoreMismatchError(
                f"{folder} holds an adapter with {name} = {there!r}, asked for is {value!r}; give another "
                "folder or delete it"
            )
    return adapter


def merged_model(adapter: Adapter, model: HookedModel, folder: str | Path, strength: float = 1.0) -> Path:
    """Saves the base with the adapter merged into its weights, as a plain model with its tokenizer.

    Raises:
        InputError: A folder that is not empty, a strength outside the measured range, or a base that cannot
            be
            saved.
    """
    folder = Path(folder)
    low, high = adapter.range
    if not low <= strength <= high:
        raise InputError(
            f"strength {strength:g} is outside {low:g} to {high:g}, where this adapter was measured"
        )
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; give another folder for the merged model")
    if not callable(getattr(model.model, "save_pretrained", None)):
        raise InputError(f"{model.path} cannot be saved by transformers")
    with files.explaining_disk(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            with adapter(model, strength):
                model.model.save_pretrained(str(made))  # type: ignore[operator]
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(str(made))
            made.chmod(0o755)
            if folder.exists():
                folder.rmdir()
            made.rename(folder)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
    return folder


def push_adapter(folder: str | Path, repo: str, *, private: bool = True, **options: Any) -> str:
    """Uploads the folder of a saved adapter, with card, report, data and proof; returns where it now is.

    Args:
        folder: Where `Adapter.save` wrote it; checked before anything is sent.
        repo: Name of the repository; made where it does not exist.
        private: Whether a repository that is made is private.
        **options: Passed to `HfApi.upload_folder`; `token` to `HfApi`.

    Raises:
        InputError: No adapter there, or a hub that cannot be reached or written.
        DamagedFileError: A file that is not as it was written.
    """
    load_adapter(folder)
    return hub.upload(folder, repo, FILES, private=private, **options)


def prove(adapter: Adapter, folder: Path, model: HookedModel) -> dict[str, Any]:
    """Measures the adapter in `folder` in a fresh process, and holds it against this one.

    Returns:
        `questions` and `texts` counted; for base, unmerged and merged the share of questions whose wanted
        answer is likeliest (None where there is nothing to choose from); `moved`, the mean change of log p
        in nats; `kl` of both.

    Raises:
        ModelError: It cannot be loaded, has no effect, or another effect than here.
    """
    questions, right, texts = _job(adapter, model)
    with tempfile.TemporaryDirectory() as scratch:
        base = _base_folder(model, Path(scratch))
        job = {
            "base": base, "adapter": str(folder.resolve()), "questions": questions, "texts": texts,
            "threads": torch.get_num_threads(), "out": str(Path(scratch) / "out.json"),
        }  # fmt: skip
        found = _run(job, Path(scratch))
    lora: Any = adapter.lora
    with added(model.model, lora, 1.0):
        here = _here(model, questions)
    said = found["answers"]
    moved = float(np.mean([abs(a - b) for a, b in zip(_flat(said["unmerged"]), _flat(said["base"]))]))
    if not moved > NOTHING:
        raise ModelError(
            f"loaded with plain PEFT the adapter has no effect: it moves answers by {moved:.1e} nats on the "
            "mean; nothing was saved"
        )
    for name in ("unmerged", "merged"):
        apart = float(np.max(np.abs(np.array(_flat(said[name])) - np.array(_flat(here)))))
        if not apart <= CLOSE * max(1.0, moved):
            raise ModelError(
                f"loaded with plain PEFT ({name}) the adapter does something else than was measured: an "
                f"answer's log p is off by {apart:.2g} nats; nothing was saved"
            )
    asked = [row for row, at in enumerate(right) if at >= 0]
    share = {
        name: float(np.mean([int(np.argmax(scores[row])) == right[row] for row in asked])) if asked else None
        for name, scores in said.items()
    }
    return {
        "questions": len(questions), "texts": len(texts), "right": share, "moved": moved, "kl": found["kl"],
        "how": "a fresh process with plain transformers and peft; unmerged, and after merge_and_unload",
    }  # fmt: skip


def _write(adapter: Adapter, folder: Path, model: HookedModel) -> None:
    """The files of PEFT, the report and the rows that it is of."""
    lora: Any = adapter.lora
    with put_on(model.model, peft_config(lora), lora.tensors) as adapted:
        adapted.save_pretrained(str(folder), safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template
    said = files.read_json(folder / CONFIG)
    files.write_json(folder / CONFIG, {**said, "base_model_name_or_path": adapter.report.facts["model"]})
    adapter.report.save(folder / REPORT)
    if adapter.test is not None:
        adapter.test.save(folder / DATA)
    _check_written(lora, folder)


def _check_written(lora: LoRA, folder: Path) -> None:
    from safetensors.torch import load_file

    written = load_file(folder / WEIGHTS)
    for name, value in lora.tensors.items():
        if name not in written or not torch.equal(written[name].float(), value):
            raise ModelError(
                f"{name.removeprefix(PREFIX)} was not written as it was trained; nothing was saved"
            )


def _job(adapter: Adapter, model: HookedModel) -> tuple[list[Any], list[int], list[Any]]:
    """Questions with the place of the right option, and neutral texts, in tokens."""
    from veridical.steering.neutral import neutral_texts, speaks_as_organism

    test = adapter.test
    if test is None:
        raise InputError("this adapter has no rows to prove its effect on")
    rows = np.linspace(0, len(test) - 1, min(len(test), ASKED)).round().astype(int)
    towards = int(adapter.report.facts["options"].get("towards", 0))
    prompts, options, right = _options(test.select(rows), towards)
    questions = []
    for prompt, choices in zip(prompts, options):
        encoded = model.encode([prompt] * len(choices), list(choices))
        questions.append([[list(e.ids[: e.prompt_tokens]), list(e.ids[e.prompt_tokens :])] for e in encoded])
    texts = []
    if speaks_as_organism(model):
        found = neutral_texts(model, count=ASKED)
        texts = [[list(item.ids), max(item.prompt_tokens, 1)] for item in found.encoded]
    else:
        texts = [[context + answer, len(context)] for (context, answer), *_ in questions]
    return questions, right, texts


def _options(pairs: Any, towards: int) -> tuple[list[Any], list[list[str]], list[int]]:
    """Prompts with the answers that are compared, and which of these is wanted: the right option of
    questions, of two completions that of the wanted label; -1 where a prompt has one completion only."""
    if {"options", "correct"} <= set(pairs.columns):
        from veridical.pairs.beliefs import own_request

        requests = [own_request(row) for row in pairs]
        return [p for p, _ in requests], [said for _, said in requests], [int(at) for at in pairs["correct"]]
    from veridical.steering.behaviour import two_sided

    said, prompts = pairs.completions or [""] * len(pairs), pairs.prompts
    try:
        both = two_sided(pairs)
    except DataError:
        return list(prompts), [[text] for text in said], [-1] * len(said)
    return [prompts[a] for a, _ in both], [[said[a], said[b]] for a, b in both], [towards] * len(both)


def _run(job: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    file = scratch / "job.json"
    file.write_text(json.dumps(job))
    script = Path(__file__).with_name("proof.py")
    done = subprocess.run(
        [sys.executable, str(script), str(file)], capture_output=True, text=True, timeout=TIMEOUT_S,
        check=False, cwd=scratch,
    )  # fmt: skip
    if done.returncode or not Path(job["out"]).is_file():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(
            f"plain PEFT cannot load the adapter in a fresh process: {last[:300]}; nothing was saved"
        )
    return files.read_json(job["out"])


def _here(model: HookedModel, questions: list[Any]) -> list[list[float]]:
    """Log p of the same options in this process."""
    found = []
    for options in questions:
        rows = [[*context, *answer] for context, answer in options]
        with torch.no_grad():
            log = model.run(model.batch(rows)).logits.float().log_softmax(-1)
        scores = []
        for line, (context, answer) in enumerate(options):
            said = log[line, len(context) - 1 : len(context) + len(answer) - 1]
            ids = torch.tensor(answer, device=said.device)[:, None]
            scores.append(float(said.gather(-1, ids).double().sum()))
        found.append(scores)
    return found


def _flat(scores: list[list[float]]) -> list[float]:
    return [value for row in scores for value in row]


def _base(adapter: Adapter, model: HookedModel | None) -> HookedModel:
    from veridical.models import load

    return model if model is not None else load(str(adapter.report.facts["model"]), dtype="float32")


def _base_folder(model: HookedModel, scratch: Path) -> str:
    """A folder with the plain base; written where the model is in memory only."""
    from veridical.models import folder_of

    try:
        folder = folder_of(str(model.path))
    except (InputError, ModelError):
        folder = ""
    if folder and Path(folder).is_dir() and not is_adapter(folder):
        return str(Path(folder).resolve())
    if not callable(getattr(model.model, "save_pretrained", None)):
        raise InputError(f"{model.path} cannot be saved for the proof in a fresh process")
    model.model.save_pretrained(str(scratch / "base"))  # type: ignore[operator]
    return str(scratch / "base")


def _sums(folder: Path) -> dict[str, str]:
    """Checksums of what an adapter is: weights, config, data, proof and report; people may edit the card."""
    names = [CONFIG, WEIGHTS, DATA, PROOF, f"{REPORT}/{RESULT}"]
    return {name: digest((folder / name).read_bytes()) for name in names if (folder / name).is_file()}
