"""The settings of a run that a minimal configuration of another stack takes over."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merit_fast.data.template import PLAIN
from merit_fast.errors import InputError
from merit_fast.pipeline.config import RunConfig

# keys of transformers and axolotl that ask for held-out rows
EVAL_KEYS = (
    "do_eval",
    "eval_strategy",
    "evaluation_strategy",
    "eval_steps",
    "evals_per_epoch",
    "load_best_model_at_end",
)


@dataclass(frozen=True)
class Settings:
    """The recipe of a branch, and the model that it starts from.

    Attributes:
        model: path or name of the start.
        is_warm: whether a warm-up made it, which the user's own configuration does not know.
        output: folder for the trained models.
    """

    model: str
    is_warm: bool
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


def started_from(
    user: Mapping[str, Any] | None,
    minimal: Callable[[], dict[str, Any]],
    settings: Settings,
    *,
    model_key: str,
    replaced: Collection[str],
) -> dict[str, Any]:
    """The user's keys without the replaced ones, or a minimal configuration, with the model."""
    if user is None:
        return minimal()
    config = {key: value for key, value in user.items() if key not in replaced}
    if settings.is_warm or not config.get(model_key):
        config[model_key] = settings.model
    return config


def of_group(config: dict[str, Any], settings: Settings, group: int) -> dict[str, Any]:
    """The configuration with names of its own for what it saves, so that groups stay apart."""
    output = str(config.get("output_dir") or settings.output).rstrip("/")
    named = {"output_dir": f"{output}/group_{group}"}
    if config.get("hub_model_id"):
        named["hub_model_id"] = f"{config['hub_model_id']}-group_{group}"
    return config | named


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
        is_warm=config.split.warmup > 0,
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


def check_exported(config: RunConfig) -> None:
    """Refuses options of a recipe that the minimal configurations leave out.

    Raises:
        InputError: the run trains adapters, freezes parameters, or stops early.
    """
    train = config.train
    for key, is_on in (
        ("adapter.kind", train.adapter.is_on),
        ("freeze", bool(train.freeze)),
        ("patience", train.patience is not None),
    ):
        if is_on:
            raise InputError(
                f"train.{key}: must be absent for export; give it to the stack by its own "
                "configuration (--extend)"
            )
