"""MeritSFTTrainer tells the losses of each dataset, packed, padding-free and plain."""

import json

import pytest
import torch
from support.stacks.trl_runs import one_by_one, sft_run, task_rows

from merit_fast.integrations import MeritCallback
from merit_fast.integrations.trl import MeritSFTTrainer

trl = pytest.importorskip("trl", reason="trl is not installed")

LAYOUTS = {
    "plain": {},
    "padding-free": {"padding_free": True, "max_length": None},
    "bfd": {"packing": True},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split"},
    "accumulated": {"packing": True, "gradient_accumulation_steps": 2, "num_train_epochs": 2},
}


@pytest.fixture(scope="module")
def truth(base):
    import transformers as t

    model = t.AutoModelForCausalLM.from_pretrained(base)
    return one_by_one(model, t.AutoTokenizer.from_pretrained(base), task_rows())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head", [True, False], ids=["ours", "theirs"])
def test_sums_are_those_of_one_row_after_the_other(base, tmp_path, truth, layout, head):
    run = sft_run(MeritSFTTrainer, base, tmp_path, kwargs={"head": head}, **LAYOUTS[layout])
    run.train()
    epochs = LAYOUTS[layout].get("num_train_epochs", 1)
    for name, (loss, targets, correct, tokens, examples) in truth.items():
        found = run.merit.counts[name]
        assert found.loss_sum == pytest.approx(epochs * loss, rel=2e-6)
        assert found.num_target_tokens == epochs * targets
        assert found.num_correct == epochs * correct
        assert found.num_tokens == epochs * tokens
        assert found.num_examples == epochs * examples


def test_logs_hold_means_since_the_last_log_and_tokens_so_far(base, tmp_path):
    options = {"packing": True, "learning_rate": 1e-3, "per_device_train_batch_size": 1}
    run = sft_run(MeritSFTTrainer, base, tmp_path, **options)
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logs) > 1
    total = sum(value.loss_sum for value in run.merit.counts.values())
    means = 0.0
    before = dict.fromkeys(run.merit.counts, 0)
    for entry in logs:
        weighted = 0.0
        step_tokens = 0
        for name in before:
            tokens = entry.get(f"merit/tokens/{name}", 0) - before[name]
            before[name] += tokens
            step_tokens += tokens
            weighted += tokens * entry.get(f"merit/loss/{name}", 0.0)
        assert weighted / step_tokens == pytest.approx(entry["loss"], rel=1e-5)
        means += weighted
    assert means == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packed_training_gives_the_weights_of_sft_trainer_bit_for_bit(base, tmp_path, strategy):
    options = dict(
        packing=True,
        packing_strategy=strategy,
        max_length=16,  # cuts rows
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        shuffle_dataset=True,
    )
    theirs = sft_run(trl.SFTTrainer, base, tmp_path / "theirs", **options)
    theirs.train()
    ours = sft_run(MeritSFTTrainer, base, tmp_path / "ours", kwargs={"head": False}, **options)
    ours.train()
    assert ours.train_dataset["input_ids"] == theirs.train_dataset["input_ids"]
    for mine, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(mine, other)
    examples = {name: value.num_examples for name, value in ours.merit.counts.items()}
    assert examples == {"capitals": 6, "codes": 5, "plurals": 4, "opposites": 6}
    targets = sum(value.num_target_tokens for value in ours.merit.counts.values())
    assert targets == sum(
        label != -100
        for row in theirs.train_dataset
        for start, length in _sequences(row)
        for label in row["labels"][start + 1 : start + length]
    )


def _sequences(row):
    start = 0
    for length in row.get("seq_lengths", [len(row["input_ids"])]):
        yield start, length
        start += length


@pytest.mark.parametrize("packing", [True, False])
def test_an_evaluation_has_the_losses_of_its_datasets(base, tmp_path, packing):
    import transformers as t
    from datasets import Dataset

    held_out = [row for row in task_rows(skip=2) if row["dataset_id"] != "codes"]
    held_out += [{**row, "dataset_id": "new"} for row in task_rows()[:2]]
    run = sft_run(
        MeritSFTTrainer,
        base,
        tmp_path,
        packing=packing,
        kwargs={"eval_dataset": Dataset.from_list(held_out)},
    )
    metrics = run.evaluate()
    model = t.AutoModelForCausalLM.from_pretrained(base)
    truth = one_by_one(model, t.AutoTokenizer.from_pretrained(base), held_out)
    found = {key for key in metrics if key.startswith("eval_merit/loss/")}
    assert found == {f"eval_merit/loss/{name}" for name in truth}
    for name, (loss, targets, correct, *_) in truth.items():
        assert metrics[f"eval_merit/loss/{name}"] == pytest.approx(loss / targets, rel=2e-6)
        assert metrics[f"eval_merit/accuracy/{name}"] == pytest.approx(correct / targets)
        assert metrics[f"eval_merit/tokens/{name}"] == targets
    assert any("eval_merit/loss/new" in entry for entry in run.state.log_history)


def test_branches_carry_the_tokens_that_were_trained_on_and_resume_counts_on(base, tmp_path):
    options = dict(
        packing=True,
        max_length=32,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        num_train_epochs=2,
        save_strategy="steps",
        save_steps=2,
    )
    sketch = {"sketch_every": 2, "proj_dim": 4096}
    whole = sft_run(
        MeritSFTTrainer,
        base,
        tmp_path / "whole",
        kwargs={"merit": MeritCallback(**sketch)},
        **options,
    )
    whole.train()
    whole.save_model()
    branch = json.loads((tmp_path / "whole" / "branch.json").read_text())
    packed = whole.train_dataset
    assert branch["num_tokens"] == 2 * sum(len(row["input_ids"]) for row in packed)
    assert branch["num_target_tokens"] == 2 * sum(
        label != -100
        for row in packed
        for start, length in _sequences(row)
        for label in row["labels"][start + 1 : start + length]
    )
    assert branch["num_examples"] == 2 * len(task_rows())
    assert branch["datasets"] == ["capitals", "codes", "opposites", "plurals"]
    assert branch["steps"] == whole.state.global_step
    part = json.loads((tmp_path / "whole" / "checkpoint-2" / "branch.json").read_text())
    assert 0 < part["num_target_tokens"] < branch["num_target_tokens"]

    again = sft_run(
        MeritSFTTrainer,
        base,
        tmp_path / "again",
        kwargs={"merit": MeritCallback(**sketch)},
        **options,
    )
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    again.save_model()
    resumed = json.loads((tmp_path / "again" / "branch.json").read_text())
    assert {**resumed, "branch": "whole"} == branch
    for mine, other in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, other)
    for file in (tmp_path / "whole" / "sketches").iterdir():
        assert (tmp_path / "again" / "sketches" / file.name).read_bytes() == file.read_bytes()
