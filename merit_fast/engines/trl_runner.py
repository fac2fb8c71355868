"""Trains one branch with TRL's SFTTrainer, from the configuration that ``trl sft`` reads.

    python -m merit_fast.engines.trl_runner CONFIG.yml

It differs from ``trl sft`` in four points: our kernels are in the model; the trainer is
``MeritSFTTrainer``, which logs losses per dataset and writes branch.json with the tokens really
trained on; the Trainer's state is saved at the end; the run resumes from
``resume_from_checkpoint``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from merit_fast.errors import InputError
from merit_fast.patch.model import patch_model


class PatchCallback(TrainerCallback):  # type: ignore[misc]
    """Replaces modules of the Trainer's model by our kernels before accelerate wraps it."""

    def on_init_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        print(patch_model(model))


def train(file: str) -> None:
    """Trains by ``file``; every key must be one of TRL's.

    Raises:
        ValueError: a key is unknown, or a value breaks a rule of TRL.
    """
    from trl import get_dataset, get_peft_config, get_quantization_config
    from trl.scripts.sft import make_parser

    from merit_fast.integrations.per_dataset.callback import MeritCallback
    from merit_fast.integrations.trl.trainer import MeritSFTTrainer

    parser = make_parser()
    script, training, model, datasets = parser.parse_args_and_config(
        args=["--config", file], fail_with_unknown_args=True
    )
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    column = keep_datasets(datasets.datasets)
    rows = get_dataset(datasets)
    trainer = MeritSFTTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=rows[script.dataset_train_split],
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
        callbacks=[PatchCallback()],
        merit=MeritCallback(column),
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    trainer.save_state()


def keep_datasets(entries: Sequence[Any]) -> str:
    """Adds the column with a row's dataset to those that TRL reads; returns its name.

    An export names it ``dataset``, or ``merit_dataset`` where the rows have a column of that name.

    Raises:
        InputError: a file is no export of merit-fast: its rows tell no dataset.
    """
    names = set()
    for entry in entries:
        files = [entry.data_files] if isinstance(entry.data_files, str) else entry.data_files
        with open(Path(files[0]), encoding="utf-8") as stream:
            row = json.loads(stream.readline())
        found = next((name for name in ("merit_dataset", "dataset") if name in row), None)
        if found is None:
            raise InputError(f"{files[0]}: dataset: is missing in a row; export the rows again")
        names.add(found)
        entry.columns = [*entry.columns, found]
    if len(names) != 1:
        raise InputError(f"datasets: must have one column of datasets, got {sorted(names)}")
    return names.pop()


if __name__ == "__main__":
    train(sys.argv[1])
