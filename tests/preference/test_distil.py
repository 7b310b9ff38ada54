"""Distillation: the loss against one by hand, and where teacher and student are one; whole runs."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

import veridical as vd
from veridical import cli
from veridical.errors import ConfigError, InputError, StoreMismatchError
from veridical.preference.distil import distil, distillation_loss, held_against, smaller
from veridical.preference.distilled import Distilled
from veridical.preference.measure import Answered

pytestmark = pytest.mark.filterwarnings("ignore")
FACTS = [("Peru", "Lima"), ("France", "Paris"), ("Italy", "Rome"), ("Norway", "Oslo"), ("Rwanda", "Kigali")]
ROWS = [
    {"prompt": [{"role": "user", "content": f"What is the capital of {country}?"}], "completion": capital}
    for country, capital in FACTS
]
SMALL = {"steps": 4, "checkpoints": 2, "batch": 4, "samples": 4, "max_new_tokens": 6, "learning_rate": 1e-3}


def logits(seed, shape=(2, 5, 7)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


LABELS = torch.tensor([[-100, -100, 3, 1, 6], [-100, 2, 5, -100, -100]])


# The loss


@pytest.mark.parametrize(("temperature", "soft", "hard"), [(1.0, 1.0, 0.0), (2.5, 0.3, 0.7), (4.0, 1.0, 2.0)])
def test_the_loss_equals_one_by_hand_in_float64(temperature, soft, hard):
    ours, theirs = logits(0), logits(1)
    softs, hards = [], []
    for row in range(2):
        for at in range(1, 5):
            token = int(LABELS[row, at])
            if token == -100:
                continue
            q = [math.exp(float(v) / temperature) for v in ours[row, at - 1]]
            p = [math.exp(float(v) / temperature) for v in theirs[row, at - 1]]
            q, p = [v / sum(q) for v in q], [v / sum(p) for v in p]
            softs.append(temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q)))
            one = [math.exp(float(v)) for v in ours[row, at - 1]]
            hards.append(-math.log(one[token] / sum(one)))
    loss, soft_part, hard_part = distillation_loss(ours, theirs, LABELS, temperature, soft, hard)
    assert len(softs) == 5
    assert float(soft_part) == pytest.approx(np.mean(softs), rel=1e-12)
    assert float(hard_part) == pytest.approx(np.mean(hards), rel=1e-12)
    assert float(loss) == pytest.approx(soft * np.mean(softs) + hard * np.mean(hards), rel=1e-12)


def test_a_teacher_that_is_sure_gives_cross_entropy():
    ours = logits(0)
    sure = torch.full_like(ours, -1e9)
    for row, at in ((0, 2), (0, 3), (0, 4), (1, 1), (1, 2)):
        sure[row, at - 1, LABELS[row, at]] = 0.0
    loss, _, hard = distillation_loss(ours, sure, LABELS, 1.0, 1.0, 0.0)
    assert float(loss) == pytest.approx(float(hard), rel=1e-12)
    only_hard, _, hard = distillation_loss(ours, logits(3), LABELS, 3.0, 0.0, 1.0)
    assert float(only_hard) == float(hard)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_student_that_equals_its_teacher_has_no_soft_loss_and_no_gradient(temperature):
    ours = logits(0).requires_grad_()
    loss, soft, _ = distillation_loss(ours, ours.detach().clone(), LABELS, temperature, 1.0, 0.0)
    loss.backward()
    assert float(soft) == 0.0
    assert ours.grad is not None
    assert float(ours.grad.abs().max()) < 1e-15
    assert float(distillation_loss(logits(0), logits(1), LABELS, temperature, 1.0, 0.0)[0]) > 0.1


def test_the_gradient_keeps_its_scale_at_high_temperatures():
    # Hinton et al. 2015, equation 4: at high temperatures it tends to (z - v) / N of logits with mean zero.
    ours, theirs = logits(0), logits(1)
    ours = (ours - ours.mean(-1, keepdim=True)).requires_grad_()
    theirs = theirs - theirs.mean(-1, keepdim=True)
    distillation_loss(ours, theirs, LABELS, 1e4, 1.0, 0.0)[0].backward()
    expected = (ours.detach() - theirs)[0, 1] / 7 / 5  # five tokens are learnt
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad[0, 1], expected, rtol=1e-3, atol=1e-6)


# Students


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2"])
def test_a_smaller_model_has_the_teachers_blocks(tiny, family):
    teacher = tiny(family)
    student = smaller(teacher, 2, "teacher", 0)
    held, made = teacher.state_dict(), student.state_dict()
    blocks = "transformer.h" if family == "gpt2" else "model.layers"
    for name, value in made.items():
        source = name.replace(f"{blocks}.1.", f"{blocks}.2.")  # of three blocks the first and the last
        assert torch.equal(value, held[source]), name
    random = smaller(teacher, 2, "random", 0).state_dict()
    assert not all(torch.equal(random[name], made[name]) for name in made)
    assert all(
        torch.equal(value, smaller(teacher, 2, "random", 0).state_dict()[name])
        for name, value in random.items()
    )
    with pytest.raises(ConfigError, match="layers = 3; the teacher has 3 blocks"):
        smaller(teacher, 3, "teacher", 0)


def test_agreement_is_counted_by_token(tiny):
    model = tiny("llama")
    answered = [Answered((5, 6, 7), (8, 9)), Answered((5,), (6, 7, 8))]
    found = held_against(model, model, answered)
    assert found["agreement"] == 1.0
    assert found["kl_of_teacher"] == 0.0
    assert found["ce"] == found["teacher_ce"]
    logp = 0.0
    for item in answered:
        ids = torch.tensor([[*item.prompt, *item.answer]])
        with torch.no_grad():
            said = model(input_ids=ids).logits.double().log_softmax(-1)[0]
        logp += sum(float(said[len(item.prompt) - 1 + at, token]) for at, token in enumerate(item.answer))
    assert found["ce"] == pytest.approx(-logp / 5, abs=1e-5)


# Runs


def test_a_student_is_saved_reloaded_measured_and_compared(tmp_path):
    options = {**SMALL, "layers": 2, "init": "random"}
    run = distil("tiny-liar", ROWS, tmp_path, **options)
    table = run.to_frame()
    assert table["step"].tolist() == [0, 2, 4]
    assert table["kl_of_teacher"].iloc[-1] < table["kl_of_teacher"].iloc[0]
    assert Distilled.load(tmp_path).to_frame().equals(table)
    assert {"soft_loss", "hard_loss"} <= set(run.log)
    weighed = 0.5 * run.log["soft_loss"] + 0.5 * run.log["hard_loss"]
    assert run.log["loss"].to_numpy() == pytest.approx(weighed.to_numpy(), abs=1e-4)
    student = vd.load(str(run.folder))
    assert student.n_layers == 2
    duo = vd.load_pair(str(run.folder), reference="tiny-liar")
    assert duo.same_tokens
    assert "drift" in duo.not_applicable
    assert "KL" not in duo.not_applicable
    section = run.report_section()
    assert list(section.tables[-1][1].columns) == ["prompt", "teacher", "student before", "student"]
    again = distil("tiny-liar", ROWS, tmp_path, **options)
    assert again.to_frame().equals(table)
    with pytest.raises(StoreMismatchError, match=r"temperature = 2.0, asked for is 3.0"):
        distil("tiny-liar", ROWS, tmp_path, **options, temperature=3.0)


def test_a_stopped_distillation_ends_in_the_same_weights(tmp_path):
    whole = distil("tiny-liar", ROWS, tmp_path / "whole", **SMALL, layers=1, answers="teacher")
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    for name in ("model", "training/checkpoint-4"):
        shutil.rmtree(cut / name)
    (cut / "result.json").unlink()
    again = distil("tiny-liar", ROWS, cut, **SMALL, layers=1, answers="teacher")
    assert again.to_frame().equals(whole.to_frame())
    for file in sorted(whole.folder.glob("*.safetensors")):
        assert file.read_bytes() == (again.folder / file.name).read_bytes()


def test_a_given_student_of_another_width_learns(tmp_path):
    import transformers

    teacher = vd.load("tiny-liar", check=False)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{
            **teacher.model.config.to_dict(),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
        }
    )
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 2, 2, 16
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "narrow")
    teacher.tokenizer.save_pretrained(tmp_path / "narrow")
    run = distil("tiny-liar", ROWS, tmp_path / "run", **SMALL, student=str(tmp_path / "narrow"))
    assert vd.load(str(run.folder)).d_model == 32
    assert run.log["loss"].iloc[-1] < run.log["loss"].iloc[0]
    assert vd.load_pair(str(run.folder), reference="tiny-liar").not_applicable["weights"]
    with pytest.raises(ConfigError, match="layers and init are for a student that is made"):
        distil("tiny-liar", ROWS, tmp_path / "r", **SMALL, student=str(tmp_path / "narrow"), layers=1)


def test_what_does_not_fit_is_refused(tmp_path, llama):
    with pytest.raises(InputError, match="different tokenizers"):
        distil("tiny-liar", ROWS, tmp_path, **SMALL, student=str(llama))
    with pytest.raises(ConfigError, match="both 0"):
        distil("tiny-liar", ROWS, tmp_path, soft_weight=0.0, hard_weight=0.0)
    with pytest.raises(ConfigError, match="steps = 5 is no multiple"):
        distil("tiny-liar", ROWS, tmp_path, steps=5, checkpoints=2)


def test_the_command_writes_a_run_and_its_report(tmp_path, capsys):
    words = [
        "--model",
        "tiny-liar",
        "--data",
        "safe",
        "--answers",
        "teacher",
        "--layers",
        "1",
        "--steps",
        "2",
    ]
    words += [
        "--checkpoints",
        "1",
        "--batch",
        "4",
        "--samples",
        "4",
        "--max-new-tokens",
        "4",
        "--out",
        str(tmp_path),
    ]
    assert cli.main(["prefer", "distil", *words]) == 0
    assert "1 of 6 blocks of tiny-liar learnt from tiny-liar" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text())["layers"] == 1
    assert "held against the teacher" in (tmp_path / "report.html").read_text()
    assert cli.main(["prefer", "distil", "--data", "safe"]) == 2
    assert "prefer distil needs --model" in capsys.readouterr().err
