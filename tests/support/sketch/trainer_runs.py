"""Tiny Trainer runs on rows of two datasets, and exact sketches of their losses, for tests."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from support.paths import ROOT, TESTS
from support.warm import run_together
from torch import Tensor, nn
from torch.nn import functional as F

from merit_fast.kernels.sketch import CountSketch, flat_sketch, matrix_shape

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, Trainer, TrainingArguments

Row = dict[str, Any]

PROJ_DIM = 4096
NAMES = ("alpha", "beta/2")


def llama() -> "LlamaForCausalLM":
    import transformers as t

    config = t.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(1)
    return t.LlamaForCausalLM(config)


def rows(count: int = 8, mixed: bool = False) -> list[Row]:
    """Pairs of rows of one dataset in turn, of lengths 5 and 8, the first token without a label."""
    generator = torch.Generator().manual_seed(0)
    listed = []
    for i in range(count):
        ids = torch.randint(2, 64, (5 + 3 * (i % 2),), generator=generator).tolist()
        name = NAMES[(i if mixed else i // 2) % 2]
        listed.append(
            {"input_ids": ids, "labels": [-100, -100, *ids[2:]], "dataset_id": name, "extra": 1}
        )
    return listed


def pad(features: Sequence[Row]) -> dict[str, Tensor]:
    width = max(len(f["input_ids"]) for f in features)
    assert all("dataset_id" not in f for f in features)  # a user's collator would fail on it
    return {
        key: torch.tensor([f[key] + [fill] * (width - len(f[key])) for f in features])
        for key, fill in (("input_ids", 0), ("labels", -100))
    }


def arguments(directory: Path, **changes: Any) -> "TrainingArguments":
    import transformers as t

    options: dict[str, Any] = dict(
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        train_sampling_strategy="sequential",
        logging_steps=1,
        dataloader_pin_memory=False,
    )
    return t.TrainingArguments(str(directory), **{**options, **changes})


def trainer(
    directory: Path,
    data: Any = None,
    model: nn.Module | None = None,
    held_out: Any = None,
    **changes: Any,
) -> "Trainer":
    import datasets
    import transformers as t

    run = t.Trainer(
        model or llama(),
        arguments(directory, **changes),
        data_collator=pad,
        train_dataset=datasets.Dataset.from_list(rows()) if data is None else data,
        eval_dataset=held_out,
    )
    run.remove_callback(t.PrinterCallback)
    return run


def gradient_sketch(model: nn.Module, features: Sequence[Row]) -> tuple[Tensor, float]:
    """Sketch and value of the summed token loss of some rows, by plain autograd."""
    batch = pad([{key: f[key] for key in ("input_ids", "labels")} for f in features])
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    parameters = dict(model.named_parameters())
    out = torch.zeros(1, PROJ_DIM)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        matrix = gradient.reshape(1, *matrix_shape(parameter.shape))
        flat_sketch(matrix, name, CountSketch(PROJ_DIM), out=out, backend="eager")
    return out[0], float(loss.detach())


def losses(run: "Trainer") -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def run_ranks(script: str, arguments: Sequence[Path], port: int) -> None:
    """Runs a script in two processes of one group; both must end well.

    Args:
        script: its arguments are ``arguments``, then the folders to import from.
        arguments: the folders that it works on.
        port: first of the 2000 ports from which the group takes one.
    """
    command: list[str | os.PathLike[str]] = ["-c", script, *arguments, TESTS, ROOT]
    group = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port + os.getpid() % 2000),
    }
    environments = [
        {**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)
    ]
    ranks = run_together([command] * 2, environments=environments, timeout=300)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
