"""Trackers such as TensorBoard or Weights & Biases, through transformers' own callbacks."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from merit_fast.errors import InputError, one_line
from merit_fast.train.config import TrainConfig
from merit_fast.train.metrics.record import HeldOutRecord, StepRecord

_KEY = "train.report_to"


class _Package(NamedTuple):
    """A tracker whose callback leaves its run open, and writes into a run that is open already.

    The next branch of the process would write into the run of this one.
    """

    name: str
    open_run: Callable[[Any], Any]  # None: there is none
    end: str


_LEFT_OPEN = (
    _Package("wandb", lambda wandb: wandb.run, "finish"),
    _Package("swanlab", lambda swanlab: swanlab.get_run(), "finish"),
    _Package("comet_ml", lambda comet: comet.get_running_experiment(), "end"),
)


def check_trackers(names: Sequence[str]) -> None:
    """Checks that transformers knows the trackers and that their packages are there.

    Raises:
        InputError: a name is unknown, or its package is not installed.
    """
    if names:
        _callbacks(names)


class Trackers:
    """The trackers of one branch.

    Args:
        config: the recipe; its ``report_to`` names the trackers.
        branch: the name of the run there.
        folder: where trackers of files write.
        datasets: names of the branch's datasets.

    Raises:
        InputError: as ``check_trackers``.
    """

    def __init__(
        self, config: TrainConfig, branch: str, folder: Path, datasets: Sequence[str]
    ) -> None:
        self.datasets = datasets
        self.callbacks: list[Any] = []
        self.model: nn.Module | None = None
        self.opened: list[_Package] = []
        if not config.report_to:
            return
        from transformers import TrainerControl, TrainerState

        self.callbacks = _callbacks(config.report_to)
        self.control = TrainerControl()
        self.state = TrainerState()
        self.arguments = _arguments(config, branch, folder)

    def begin(self, model: nn.Module, step: int, steps: int) -> None:
        """Opens the trackers at a step."""
        if not self.callbacks:
            return
        self.model = model
        self.state.global_step = step
        self.state.max_steps = steps
        self.arguments.max_steps = steps
        self.opened = [package for package in _LEFT_OPEN if _open_run(package) is None]
        self._call("on_train_begin", model=model)

    def log(self, record: StepRecord | HeldOutRecord) -> None:
        if self.callbacks:
            self.state.global_step = record.step
            self._call("on_log", logs=record.scalars(self.datasets))

    def end(self) -> None:
        """Closes the trackers, and the runs that they opened."""
        self._call("on_train_end", model=self.model)
        for package in self.opened:
            if _open_run(package) is not None:
                getattr(sys.modules[package.name], package.end)()

    def _call(self, event: str, **values: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self.arguments, self.state, self.control, **values)


def _open_run(package: _Package) -> Any:
    """The package's open run; None: there is none, or the package is not imported."""
    module = sys.modules.get(package.name)
    return None if module is None else package.open_run(module)


def _arguments(config: TrainConfig, branch: str, folder: Path) -> Any:
    """The recipe as trackers show it, by transformers' names."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder),
        run_name=branch,
        report_to="none",
        logging_steps=1,
        learning_rate=config.learning_rate,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=-(-config.batch_size // config.accumulation),
        gradient_accumulation_steps=config.accumulation,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": config.final_fraction},
        warmup_steps=config.warmup_fraction,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        max_grad_norm=config.clip_norm,
        seed=config.seed,
    )


def _callbacks(names: Sequence[str]) -> list[Any]:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    callbacks = []
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(INTEGRATION_TO_CALLBACK)
            raise InputError(f"{_KEY}: must be among {known}, got {name!r}")
        try:
            callbacks.append(INTEGRATION_TO_CALLBACK[name]())
        except (RuntimeError, ImportError) as error:
            raise InputError(f"{_KEY}: {name} cannot be used here: {one_line(error)}") from None
    return callbacks
