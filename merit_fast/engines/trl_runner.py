"""Trains one branch with TRL's SFTTrainer, from the configuration that ``trl sft`` reads.

    python -m merit_fast.engines.trl_runner CONFIG.yml

It differs from ``trl sft`` in three points: our kernels are in the model, the Trainer's state is
saved at the end, and the run resumes from ``resume_from_checkpoint``.
"""

from __future__ import annotations

import sys
from typing import Any

from transformers import TrainerCallback

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
    from trl import SFTTrainer, get_dataset, get_peft_config, get_quantization_config
    from trl.scripts.sft import make_parser

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
    rows = get_dataset(datasets)
    trainer = SFTTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=rows[script.dataset_train_split],
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
        callbacks=[PatchCallback()],
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    trainer.save_state()


if __name__ == "__main__":
    train(sys.argv[1])
