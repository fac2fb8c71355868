"""The settings of a run that a minimal configuration of another stack takes over."""

from dataclasses import dataclass
from pathlib import Path

from merit_fast.data.template import PLAIN
from merit_fast.errors import InputError
from merit_fast.pipeline.config import RunConfig


@dataclass(frozen=True)
class Settings:
    """The recipe of a branch, and the model that it starts from."""

    model: str
    output: str
    chat_template: str | None  # path of a Jinja file; None: the tokenizer's own
    max_length: int
    epochs: int
    micro_batch_size: int
    accumulation: int
    learning_rate: float
    final_fraction: float
    warmup_fraction: float
    weight_decay: float
    beta1: float
    beta2: float
    clip_norm: float
    packing: bool
    seed: int

    def trainer_keys(self, num_rows: int) -> dict[str, object]:
        """The recipe under the names of transformers' TrainingArguments.

        Args:
            num_rows: rows of the group, which decide the steps in which the rate rises.
        """
        steps = self.epochs * -(-num_rows // (self.micro_batch_size * self.accumulation))
        return {
            "num_train_epochs": self.epochs,
            "per_device_train_batch_size": self.micro_batch_size,
            "gradient_accumulation_steps": self.accumulation,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": self.final_fraction},
            "warmup_steps": round(self.warmup_fraction * steps),
            "weight_decay": self.weight_decay,
            "adam_beta1": self.beta1,
            "adam_beta2": self.beta2,
            "max_grad_norm": self.clip_norm,
            "bf16": True,
            "seed": self.seed,
        }


def settings_of(config: RunConfig, model: str, output: Path) -> Settings:
    """Takes the settings of a run.

    Args:
        config: the run.
        model: the model from which branches start.
        output: the folder below which the stack saves its models.

    Raises:
        InputError: the run has no chat template, which every stack needs.
    """
    template = config.data.chat_template
    if template == PLAIN:
        raise InputError("data.chat_template: must be a chat template for export, got 'plain'")
    train = config.train
    return Settings(
        model=model,
        output=str(output),
        chat_template=None if template is None else str(Path(template).expanduser().absolute()),
        max_length=config.data.max_length,
        epochs=train.epochs,
        micro_batch_size=max(1, train.batch_size // train.accumulation),
        accumulation=train.accumulation,
        learning_rate=train.learning_rate,
        final_fraction=train.final_fraction,
        warmup_fraction=train.warmup_fraction,
        weight_decay=train.weight_decay,
        beta1=train.beta1,
        beta2=train.beta2,
        clip_norm=train.clip_norm,
        packing=train.packing,
        seed=train.seed,
    )
