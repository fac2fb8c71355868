"""Trains one branch with TRL's SFTTrainer, from the configuration that ``trl sft`` reads.

    python -m merit_fast.engines.trl_runner CONFIG.yml COLUMN

It differs from ``trl sft`` in four points: our kernels are in the model, the rows' COLUMN names
their dataset, so that losses per dataset and branch.json come out, the Trainer's state is saved at
the end, and the run resumes from ``resume_from_checkpoint``.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from transformers import TrainerCallback

from merit_fast.integrations import MeritCallback
from merit_fast.integrations.trl import MeritSFTTrainer
from merit_fast.patch.model import patch_model


class PatchCallback(TrainerCallback):  # type: ignore[misc]
    """Replaces modules of the Trainer's model by our kernels before accelerate wraps it."""

    def on_init_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        print(patch_model(model))


def train(file: str, column: str) -> None:
    """Trains by ``file``; every key must be one of TRL's.

    Raises:
        ValueError: a key is unknown, or a value breaks a rule of TRL.
    """
    trl: Any = importlib.import_module("trl")
    parser: Any = importlib.import_module("trl.scripts.sft").make_parser()
    script, training, model, datasets = parser.parse_args_and_config(
        args=["--config", file], fail_with_unknown_args=True
    )
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    rows = trl.get_dataset(datasets)[script.dataset_train_split]
    trainer = MeritSFTTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=rows,
        quantization_config=trl.get_quantization_config(model),
        peft_config=trl.get_peft_config(model),
        callbacks=[PatchCallback()],
        merit=MeritCallback(column=column, start=model.model_name_or_path),
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    trainer.save_state()


if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2])
