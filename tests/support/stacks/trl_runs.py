"""Tiny SFTTrainer runs on rows of four datasets, for tests."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import TASKS
from torch.nn import functional as F


def task_rows(column: str = "dataset_id", skip: int = 0) -> list[dict[str, Any]]:
    """Prompts and completions of the tasks; two datasets are smaller than the others."""
    return [
        {"prompt": f"{instruction} {question}", "completion": f" {answer}", column: name}
        for number, (name, (instruction, facts)) in enumerate(TASKS.items())
        for question, answer in list(facts.items())[skip : 6 - number % 3]
    ]


def sft_arguments(out: Path, **changes: Any) -> Any:
    from trl.trainer.sft_config import SFTConfig

    options: dict[str, Any] = dict(
        num_train_epochs=1,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=3,
        learning_rate=0.0,
        bf16=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        dataloader_pin_memory=False,
        max_length=48,
    )
    return SFTConfig(str(out), **{**options, **changes})


def sft_run(cls: Any, base: Path, out: Path, model: Any = None, **options: Any) -> Any:
    """A trainer of class ``cls``; keywords of the class are in ``kwargs``."""
    import transformers as t
    from datasets import Dataset

    kwargs = options.pop("kwargs", {})
    rows = options.pop("rows", None)
    run = cls(
        model or t.AutoModelForCausalLM.from_pretrained(base),
        args=sft_arguments(out, **options),
        train_dataset=Dataset.from_list(task_rows() if rows is None else rows).shuffle(seed=1),
        processing_class=t.AutoTokenizer.from_pretrained(base),
        **kwargs,
    )
    run.remove_callback(t.PrinterCallback)
    return run


def logs_of(run: Any) -> list[dict[str, Any]]:
    """Trains, and returns the logs without what depends on the clock."""
    run.train()
    timed = ("runtime", "per_second", "step_time", "flos")
    return [
        {key: value for key, value in entry.items() if not any(part in key for part in timed)}
        for entry in run.state.log_history
    ]


def assert_same_logs(mine: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Compares every figure of two runs of TRL."""
    assert len(mine) == len(theirs) > 2
    for ours, other in zip(mine, theirs, strict=True):
        assert ours.keys() == other.keys()
        for key, value in other.items():
            assert ours[key] == pytest.approx(value, rel=1e-4, abs=2e-5), key


@torch.no_grad()
def one_by_one(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Per dataset [loss sum, target tokens, correct tokens, tokens, examples], row by row."""
    sums: dict[str, list[float]] = {}
    model.eval()
    for row in rows:
        prompt = tokenizer(row["prompt"]).input_ids
        ids = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token).input_ids
        labels = torch.tensor([-100] * len(prompt) + ids[len(prompt) :])[1:]
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        correct = int((logits.argmax(-1) == labels).sum())
        targets = int((labels != -100).sum())
        figures = [float(loss), targets, correct, len(ids), 1]
        before = sums.get(row["dataset_id"], [0.0] * 5)
        sums[row["dataset_id"]] = [a + b for a, b in zip(before, figures, strict=True)]
    return sums
