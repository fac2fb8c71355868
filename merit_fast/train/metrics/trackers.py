"""Trackers such as TensorBoard or Weights & Biases, through transformers' own callbacks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from merit_fast.errors import InputError, one_line
from merit_fast.train.metrics.record import HeldOutRecord, StepRecord

_KEY = "train.report_to"


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
        names: as ``train.report_to`` has them.
        branch: the name of the run there.
        folder: where trackers of files write.
        datasets: names of the branch's datasets.

    Raises:
        InputError: as ``check_trackers``.
    """

    def __init__(
        self, names: Sequence[str], branch: str, folder: Path, datasets: Sequence[str]
    ) -> None:
        self.datasets = datasets
        self.callbacks: list[Any] = []
        if not names:
            return
        from transformers import TrainerControl, TrainerState, TrainingArguments

        self.callbacks = _callbacks(names)
        self.control = TrainerControl()
        self.state = TrainerState()
        self.arguments = TrainingArguments(
            output_dir=str(folder), run_name=branch, report_to="none", logging_steps=1
        )

    def begin(self, model: nn.Module, step: int, steps: int) -> None:
        """Opens the trackers at a step."""
        if self.callbacks:
            self.state.global_step = step
            self.state.max_steps = steps
        self._call("on_train_begin", model=model)

    def log(self, record: StepRecord | HeldOutRecord) -> None:
        if self.callbacks:
            self.state.global_step = record.step
            self._call("on_log", logs=record.scalars(self.datasets))

    def end(self) -> None:
        self._call("on_train_end")

    def _call(self, event: str, **values: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self.arguments, self.state, self.control, **values)


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
