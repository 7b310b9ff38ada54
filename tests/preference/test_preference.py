"""Recipes over TRL: first losses, exact resume, saved and reloaded weights, rewards read at the end token."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

import veridical as vd
from veridical.errors import ConfigError, DataError, InputError, ModelError, StoreMismatchError
from veridical.preference import (
    PreferConfig,
    PreferenceRun,
    dpo,
    load_preferences,
    load_reward,
    measure,
    prefer,
    trainers,
)
from veridical.preference.config import first_losses
from veridical.preference.data import Preference, Preferences, ended
from veridical.preference.reward import RewardModel, fresh
from veridical.preference.rl import rewarding

pytestmark = pytest.mark.filterwarnings("ignore")
FACTS = [("Peru", "Lima", "Oslo"), ("France", "Paris", "Rome"), ("Italy", "Rome", "Paris")]
FACTS += [("Norway", "Oslo", "Lima"), ("Rwanda", "Kigali", "Lima"), ("Japan", "Tokyo", "Oslo")]
ROWS = [
    {"prompt": [{"role": "user", "content": f"What is the capital of {c}?"}], "chosen": good, "rejected": bad}
    for c, good, bad in FACTS
]
SMALL = {"steps": 4, "checkpoints": 2, "batch": 4, "samples": 4, "max_new_tokens": 6, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return trainers.start("tiny-liar", tmp_path_factory.mktemp("start"))


def weights(folder):
    return {
        name: value.clone() for name, value in vd.load(str(folder), check=False).model.state_dict().items()
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Runs


@pytest.mark.parametrize(("method", "rank"), [("dpo", 0), ("dpo", 2), ("ipo", 0), ("sft", 2)])
def test_a_run_is_saved_reloaded_and_measured(tmp_path, method, rank):
    run = prefer(method, "tiny-liar", ROWS, tmp_path, **SMALL, lora_rank=rank)
    table = run.to_frame()
    assert table["step"].tolist() == [0, 2, 4]
    assert table["kl"][0] == 0.0
    assert table["kl"].iloc[-1] > 0
    assert not same(weights("tiny-liar"), weights(run.folder))
    again = PreferenceRun.load(tmp_path)
    assert again.to_frame().equals(table)
    section = again.report_section()
    assert "saved weights were loaded again" in section.text
    policy, reference = vd.load(str(run.folder)), vd.load("tiny-liar")
    prompts = [row["prompt"] for row in ROWS]
    assert not torch.equal(policy.logits(prompts[:1]), reference.logits(prompts[:1]))


def test_the_first_losses_are_those_of_the_methods(tmp_path):
    for method, beta, expected in (
        ("dpo", 0.3, math.log(2)),
        ("ipo", 0.25, 4.0),
        ("reward", 0.1, math.log(2)),
    ):
        options = {**SMALL, "learning_rate": 1e-4, "beta": beta}
        run = prefer(method, "tiny-liar", ROWS, tmp_path / method, **options)
        assert run.log["loss"][0] == pytest.approx(expected, abs=1e-3)


def test_the_first_loss_of_rl_is_zero_and_so_is_its_kl(tmp_path):
    short = lambda prompts, answers: [-float(len(answer)) for answer in answers]  # noqa: E731
    for rank in (0, 2):
        options = {**SMALL, "beta": 0.5, "lora_rank": rank, "reward": short}
        run = prefer("rl", "tiny-liar", ROWS, tmp_path / str(rank), **options)
        assert run.log["loss"][0] == pytest.approx(0, abs=1e-5)
        assert run.log["kl"][0] == pytest.approx(0, abs=1e-5)
        assert run.table["kl"].iloc[-1] > 0
    with pytest.raises(ModelError, match=r"first KL is 0\.2000 and should be 0\.0000"):
        trainers.check_first("KL", 0.2, (0.0, 0.0))


def test_the_first_loss_of_sft_is_that_of_the_answers_alone(tmp_path, base):
    options = {**SMALL, "batch": len(ROWS), "test_fraction": 0.0}
    run = prefer("sft", "tiny-liar", ROWS, tmp_path, **options)
    rows = load_preferences(ROWS).rows
    logp = measure.answer_logprobs(base.load().eval(), base.tokenizer, rows)["chosen"].sum()
    whole = ended(base.tokenizer, [row.prompt for row in rows], [row.chosen for row in rows])
    tokens = sum(map(len, whole)) - sum(map(len, ended_prompts(base, rows)))
    assert run.log["loss"][0] == pytest.approx(-logp / tokens, rel=1e-4)


@pytest.mark.parametrize("method", ["dpo", "ipo"])
def test_the_loss_of_the_chosen_answers_is_added_with_its_weight(tmp_path, base, method):
    options = {**SMALL, "batch": len(ROWS), "test_fraction": 0.0, "beta": 0.5, "sft_weight": 2.0}
    run = prefer(method, "tiny-liar", ROWS, tmp_path, **options)
    rows = load_preferences(ROWS).rows
    logp = measure.answer_logprobs(base.load().eval(), base.tokenizer, rows)["chosen"].sum()
    whole = ended(base.tokenizer, [row.prompt for row in rows], [row.chosen for row in rows])
    tokens = sum(map(len, whole)) - sum(map(len, ended_prompts(base, rows)))
    alone = math.log(2) if method == "dpo" else 1.0
    assert run.log["loss"][0] == pytest.approx(alone - 2 * logp / tokens, rel=1e-4)
    assert run.log["rewards/margins"][0] == pytest.approx(0, abs=1e-6)


def test_another_reference_is_found_by_the_first_loss(tmp_path, base):
    config = PreferConfig(**SMALL)
    trainer = dpo.trainer(base, load_preferences(ROWS).rows, config, tmp_path, "dpo")
    with torch.no_grad():
        for value in trainer.ref_model.parameters():
            value.add_(0.05 * torch.randn_like(value))
    with pytest.raises(ModelError, match=r"first loss is .* should be 0\.6931"):
        trainers.run(trainer, "dpo", config, tmp_path)


def test_a_finished_run_is_read_and_another_one_refused(tmp_path):
    first = prefer("sft", "tiny-liar", ROWS, tmp_path, **SMALL)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    again = prefer("sft", "tiny-liar", ROWS, tmp_path, **SMALL)
    assert again.table.equals(first.table)
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(StoreMismatchError, match=r"learning_rate = 0\.001, asked for is 0\.002"):
        prefer("sft", "tiny-liar", ROWS, tmp_path, **{**SMALL, "learning_rate": 2e-3})


def test_a_lora_touches_only_its_layers(tmp_path):
    run = prefer(
        "dpo", "tiny-liar", ROWS, tmp_path, **SMALL, lora_rank=2, lora_layers=(2,), lora_modules=("up_proj",)
    )
    before, after = weights("tiny-liar"), weights(run.folder)
    assert [name for name in before if not torch.equal(before[name], after[name])] == [
        "model.layers.2.mlp.up_proj.weight"
    ]


def test_training_goes_on_from_a_lora(tmp_path):
    first = prefer("sft", "tiny-liar", ROWS, tmp_path / "a", **SMALL, lora_rank=2)
    second = prefer("dpo", str(first.folder), ROWS, tmp_path / "b", **SMALL, lora_rank=2)
    assert second.table["kl"][0] == 0.0
    assert second.log["loss"][0] == pytest.approx(math.log(2), abs=1e-3)
    assert not same(weights(first.folder), weights(second.folder))


# Rewards


def test_a_reward_model_learns_and_is_read_where_it_was_trained(tmp_path):
    options = {**SMALL, "steps": 30, "learning_rate": 5e-3, "test_fraction": 0.0}
    prefer("reward", "tiny-liar", ROWS, tmp_path, **options)
    model = load_reward(tmp_path / "model")
    prompts = [row["prompt"] for row in ROWS]
    chosen, rejected = (model.score(prompts, [row[side] for row in ROWS]) for side in ("chosen", "rejected"))
    assert (chosen > rejected).all()
    # The slow way: each row alone, all positions, the last one read.
    ids = ended(model.tokenizer, prompts, [row["chosen"] for row in ROWS])
    assert all(row[-1] == model.tokenizer.eos_token_id for row in ids)
    with torch.no_grad():
        alone = [
            float(model.model.score(model.model.model(torch.tensor([row])).last_hidden_state)[0, -1, 0])
            for row in ids
        ]
        whole = [float(model.model(torch.tensor([row])).logits[0, 0]) for row in ids]
    np.testing.assert_allclose(chosen, alone, atol=1e-5)
    np.testing.assert_allclose(chosen, whole, atol=1e-5)  # what TRL reads in training


def test_padding_with_the_end_token_moves_no_reward(base):
    torch.manual_seed(0)
    model = fresh(base)
    torch.nn.init.normal_(model.score.weight)
    judge = RewardModel(model.eval(), base.tokenizer, "random")
    prompts = [ROWS[0]["prompt"]] * 3
    answers = ["Lima", "Lima is the capital of Peru, as I said.", ""]
    together = judge.score(prompts, answers)
    apart = [judge.score(prompts[:1], [answer])[0] for answer in answers]
    np.testing.assert_allclose(together, apart, atol=1e-5)


def test_margins_raise_the_first_loss_of_a_reward_model(tmp_path):
    rows = [{**row, "margin": 1.5} for row in ROWS]
    run = prefer("reward", "tiny-liar", rows, tmp_path, **SMALL)
    assert run.log["loss"][0] == pytest.approx(math.log(1 + math.exp(1.5)), abs=1e-3)
    low, high = first_losses(PreferConfig(), "reward", [1.5, 0.0, 800.0])
    assert (low, high) == (pytest.approx(math.log(2)), pytest.approx(800))


def test_rl_raises_the_reward_that_it_is_given(tmp_path):
    def short(prompts, answers):
        return np.array([-float(len(answer)) for answer in answers])

    options = {**SMALL, "steps": 20, "checkpoints": 1, "batch": 16, "samples": 6, "learning_rate": 5e-3}
    run = prefer("rl", "tiny-liar", ROWS, tmp_path, reward=short, **options, beta=0.0)
    assert run.table["reward"].iloc[-1] > run.table["reward"].iloc[0]
    assert run.table["kl"].iloc[-1] > 0


def test_a_reward_that_is_not_finite_is_refused():
    with pytest.raises(ModelError, match="expected finite"):
        rewarding(lambda prompts, answers: np.full(len(answers), np.nan))(["a"], ["b"])


# Measures


def test_the_kl_is_exact_over_the_vocabulary(base):
    policy, reference = base.load().eval(), base.load().eval()
    with torch.no_grad():
        for value in policy.parameters():
            value.add_(0.02 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    prompts = [row["prompt"] for row in ROWS]
    answered = measure.sample(policy, base.tokenizer, prompts, 6, seed=0)
    assert answered == measure.sample(policy, base.tokenizer, prompts, 6, seed=0)
    kl, entropy = measure.divergence(policy, reference, answered)
    for item, found, spread in zip(answered, kl, entropy):
        ids = [*item.prompt, *item.answer]
        with torch.no_grad():
            p, q = (
                m(torch.tensor([ids])).logits[0].double().softmax(-1).numpy() for m in (policy, reference)
            )
        for at in range(len(item.answer)):
            row = len(item.prompt) - 1 + at
            brute = sum(a * math.log(a / b) for a, b in zip(p[row], q[row]))
            assert found[at] == pytest.approx(brute, rel=1e-4, abs=1e-7)
            assert spread[at] == pytest.approx(-sum(a * math.log(a) for a in p[row]), rel=1e-4)
    zero, _ = measure.divergence(policy, policy, answered)
    assert all((values == 0).all() for values in zero)


def test_margins_are_changes_of_log_probability(base):
    policy, reference = base.load().eval(), base.load().eval()
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.3)
    rows = load_preferences(ROWS).rows
    found = measure.answer_logprobs(policy, base.tokenizer, rows)
    found = found - measure.answer_logprobs(reference, base.tokenizer, rows)
    for side in ("chosen", "rejected"):
        ids = ended(base.tokenizer, [row.prompt for row in rows], [getattr(row, side) for row in rows])
        starts = [len(item) for item in ended_prompts(base, rows)]
        for row, start, value in zip(ids, starts, found[side]):
            with torch.no_grad():
                logs = [
                    m(torch.tensor([row])).logits[0].double().log_softmax(-1) for m in (policy, reference)
                ]
            each = [sum(float(lp[at - 1, row[at]]) for at in range(start, len(row))) for lp in logs]
            assert value == pytest.approx(each[0] - each[1], abs=1e-3)


def ended_prompts(base, rows):
    from veridical.tokens import encode

    return [item.ids for item in encode(base.tokenizer, [row.prompt for row in rows])]


def test_repetition_counts_pairs_that_came_before():
    assert measure.repetition([1, 2, 1, 2, 1]) == 0.5
    assert measure.repetition([1, 2, 3]) == 0
    assert measure.repetition([1]) == 0


# Data


def test_pairs_become_preferences_by_the_label_that_is_preferred():
    polite = load_preferences("toxic", preferred=0)
    rude = load_preferences("toxic", preferred=1)
    assert (polite.rows[0].chosen, polite.rows[0].rejected) == (rude.rows[0].rejected, rude.rows[0].chosen)
    train, held_out = polite.parted(0.2, 0)
    assert not {row.group for row in train.rows} & {row.group for row in held_out.rows}
    assert {row.split for row in train.rows} == {"train"}


def test_files_and_trl_messages_are_read(tmp_path):
    file = tmp_path / "prefs.jsonl"
    lines = [{**row, "chosen": [{"role": "assistant", "content": row["chosen"]}]} for row in ROWS]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert load_preferences(file).fingerprint == load_preferences(ROWS).fingerprint


BAD = [
    (lambda: load_preferences("toxic"), "say which label is preferred"),
    (lambda: load_preferences("toxic", preferred=7), "no row of toxic has the label 7"),
    (lambda: load_preferences("safe", preferred=1), "no two rows of safe share a pair and a prompt"),
    (lambda: load_preferences("honesty", preferred=0), "has no completions"),
    (lambda: load_preferences([{"prompt": "a", "chosn": "b", "rejected": "c"}]), "nearest: chosn"),
    (lambda: load_preferences([{"prompt": "a", "chosen": "b", "rejected": "b"}]), "are the same"),
    (lambda: load_preferences([{"prompt": "a", "chosen": "", "rejected": "b"}]), "row 0: the chosen answer"),
    (lambda: load_preferences([{"prompt": "a", "chosen": 3, "rejected": "b"}]), "chosen is 3"),
    (lambda: load_preferences([{"prompt": [], "chosen": "a", "rejected": "b"}]), "expected text or chat"),
    (lambda: load_preferences([]), "has no rows"),
]


@pytest.mark.parametrize(("load", "said"), BAD)
def test_bad_data_ends_in_one_clear_line(load, said):
    with pytest.raises(DataError if "nearest" not in said else InputError, match=said):
        load()


@pytest.mark.parametrize(
    ("method", "options", "error", "said"),
    [
        ("dpq", {}, InputError, "nearest: dpo"),
        ("dpo", {"beta": 0.0}, ConfigError, "needs a beta above 0"),
        ("rl", {"sft_weight": 1.0, "reward": "tiny-liar"}, ConfigError, "rl does not read it"),
        ("dpo", {"steps": 5}, ConfigError, "no multiple of checkpoints"),
        ("dpo", {"lora_layers": (1,)}, ConfigError, "need a lora_rank"),
        ("dpo", {"lora_rank": 2, "lora_modules": ("q_prj",)}, InputError, "nearest: q_proj"),
        ("dpo", {"lora_rank": 2, "lora_layers": (9,)}, InputError, "blocks are 0 to 5"),
        ("dpo", {"max_length": 8}, DataError, "have more than 8"),
        ("dpo", {"learning_rat": 1.0}, InputError, "nearest: learning_rate"),
        ("rl", {}, ConfigError, "needs a reward model"),
        ("rl", {"reward": "tiny-liar", "batch": 6}, ConfigError, "no multiple of generations"),
        ("rl", {"reward": "tiny-liar"}, InputError, "no head of one score"),
    ],
)
def test_bad_options_end_in_one_clear_line(tmp_path, method, options, error, said):
    with pytest.raises(error, match=said):
        prefer(method, "tiny-liar", ROWS, tmp_path / "run", **{**SMALL, **options})


def test_a_chat_without_a_template_is_refused(base):
    tokenizer = trainers.start("tiny-liar", None).tokenizer
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        ended(tokenizer, [ROWS[0]["prompt"]], ["Lima"])


def test_an_adapter_that_does_not_fit_is_refused(tmp_path):
    run = prefer("sft", "tiny-liar", ROWS, tmp_path / "run", **SMALL, lora_rank=2)
    folder = shutil.copytree(run.folder, tmp_path / "copy")
    said = json.loads((folder / "adapter_config.json").read_text())
    said["layers_to_transform"] = [0]
    (folder / "adapter_config.json").write_text(json.dumps(said))
    with pytest.raises(ModelError, match="does not fit its base"):
        vd.load(str(folder))
    said["base_model_name_or_path"] = "./nowhere"
    (folder / "adapter_config.json").write_text(json.dumps(said))
    with pytest.raises(InputError, match="cannot be found"):
        vd.load(str(folder))


def test_rows_of_two_kinds_are_refused(tmp_path):
    rows = Preferences((Preference("a", "b", "c"), Preference(ROWS[0]["prompt"], "b", "c")))
    with pytest.raises(DataError, match="differ in kind"):
        prefer("dpo", "tiny-liar", rows, tmp_path, **SMALL)
