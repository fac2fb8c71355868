"""The variants of bench.train.step: the Trainer, the Trainer with our kernels, our loop."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from merit_fast.data import Example
from merit_fast.patch.model import patch_model
from merit_fast.train.config import TrainConfig

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Work:
    """The model, and the rows of every step."""

    model: str
    examples: Sequence[Example]  # in the order of the steps
    batch_size: int
    padding: int

    @property
    def steps(self) -> int:
        return len(self.examples) // self.batch_size

    def batch(self, step: int) -> Sequence[Example]:
        return self.examples[step * self.batch_size : (step + 1) * self.batch_size]


@dataclass
class Run:
    """Loss, wall and CPU seconds of every step."""

    losses: list[float]
    wall_s: list[float]
    cpu_s: list[float]


def recipe(work: Work, **changes: Any) -> TrainConfig:
    """The settings of both sides: AdamW(0.9, 0.98), one learning rate, clipping to norm 1."""
    options: dict[str, Any] = {"warmup_fraction": 0.0, "final_fraction": 1.0, **changes}
    return TrainConfig(
        learning_rate=LEARNING_RATE, batch_size=work.batch_size, dtype="fp32", **options
    )


def trainer(work: Work, folder: Path, patched: bool) -> Run:
    """transformers' Trainer by default: padding collator, SDPA, fused AdamW, the model's loss."""
    import logging

    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    logging.getLogger("transformers").setLevel(logging.ERROR)
    run = Run([], [], [])

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = time.perf_counter(), time.process_time()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            run.wall_s.append(time.perf_counter() - self.start[0])
            run.cpu_s.append(time.process_time() - self.start[1])

        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any
        ) -> None:
            if "loss" in logs:
                run.losses.append(logs["loss"])

    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32)
    if patched:
        patch_model(model)
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=work.batch_size,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta2=0.98,
        max_grad_norm=1.0,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        dataloader_num_workers=0,
    )
    rows = [{"input_ids": e.input_ids.tolist(), "labels": e.labels.tolist()} for e in work.examples]
    collator = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(work.model), padding=True)
    Trainer(
        model, arguments, train_dataset=rows, data_collator=collator, callbacks=[Clock()]
    ).train()
    return run


def ours(work: Work, **changes: Any) -> Run:
    """The loop of ``merit-fast train``."""
    from merit_fast.train.optimizer import MasterAdamW
    from merit_fast.train.prepare import prepare_model
    from merit_fast.train.resume import Position
    from merit_fast.train.step import train_step
    from merit_fast.train.steps import micro_batches

    config = recipe(work, **changes)
    trained = prepare_model(work.model, config)
    optimizer = MasterAdamW(trained.model, config)
    run = Run([], [], [])
    position = Position()
    for step in range(work.steps):
        wall = time.perf_counter()
        cpu = time.process_time()
        batches = micro_batches([([e], [0]) for e in work.batch(step)], 1, work.padding)
        position, _ = train_step(
            trained, optimizer, batches, ("rows",), work.steps, config, position
        )
        run.wall_s.append(time.perf_counter() - wall)
        run.cpu_s.append(time.process_time() - cpu)
    run.losses = list(position.losses)
    return run


VARIANTS: dict[str, Callable[[Work, Path], Run]] = {
    "Trainer": lambda work, folder: trainer(work, folder, patched=False),
    "Trainer + patch_model": lambda work, folder: trainer(work, folder, patched=True),
    "train, kernels eager": lambda work, folder: ours(work, kernels="eager"),
    "train": lambda work, folder: ours(work),
    "train, packing": lambda work, folder: ours(work, packing=True),
}
