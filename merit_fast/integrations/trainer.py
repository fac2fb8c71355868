"""Sketches of every dataset's gradient while the transformers Trainer trains.

    trainer = Trainer(model, args, train_dataset=rows, ...)
    SketchCallback(proj_dim=65536).attach(trainer)
    trainer.train()

Each row has a `dataset_id`. ``attach`` makes every batch rows of one dataset; beyond that order,
training gives the same bits as without the callback. The states lie in ``output_dir/sketches`` at
the end and in every checkpoint, one ``NAME.safetensors`` each; a resumed run continues from the
checkpoint's.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from merit_fast.errors import InputError, MeritFastError
from merit_fast.integrations.one_dataset import (
    CollatorWithIds,
    OneDatasetBatches,
    batches_of_one_dataset,
    regroup,
)
from merit_fast.integrations.sketch_files import read_states, sum_over_ranks, write_states
from merit_fast.integrations.trainer_checks import check_trainer
from merit_fast.kernels.sketch import CountSketch
from merit_fast.manifests.sketch_state import SketchState
from merit_fast.sketch.selection import select_parameters
from merit_fast.sketch.summed import SummedSketcher

__all__ = [
    "FOLDER",
    "OneDatasetBatches",
    "SketchCallback",
    "batches_of_one_dataset",
    "read_states",
    "write_states",
]

FOLDER = "sketches"

logger = logging.getLogger(__name__)


class SketchCallback(TrainerCallback):  # type: ignore[misc]
    """Sketches the addition of each backward pass of a Trainer to the gradients, by dataset.

    A Trainer shows its callbacks no batch. ``attach`` therefore wraps three of its public methods.
    ``get_train_dataloader``: its batches become rows of one dataset each, shuffled by the Trainer's
    seed and the epoch (``OneDatasetBatches``); the column of ids survives ``remove_unused_columns``
    and never reaches collator or model; evaluation is as before. ``training_step``: one backward
    pass and one batch, under gradient accumulation too. ``train``: removes the hooks after an
    exception.

    Every row is seen in each epoch. A dataset's last batch may be smaller, so an epoch may have a
    batch more per dataset than without the callback.

    An example's loss is the sum over its target tokens, whatever the Trainer divides by: the states
    have weight "tokens". A custom
    ``compute_loss_func`` must divide by ``num_items_in_batch``, as transformers requires.

    Args:
        proj_dim: width of the CountSketch.
        seed: seed of its hash.
        parameters: "all", "blocks" or a regular expression (``select_parameters``).
        column: column of the rows with the dataset's id, a str or int.
        blocks: blocks of each dataset's state, for standard errors.
        scales: as for ``SummedSketcher``, for example ``adam_scales_of_checkpoint(...)``.

    Attributes:
        sketcher: None before training begins. Its ``state`` is this rank's; the files hold the sum
            over ranks.

    Raises:
        InputError: rows without the column; packing, fp16, DataParallel, FSDP, DeepSpeed, tensor or
            context parallelism; a batch of several datasets; a sampler of the Trainer's own class.
            Raised by ``attach`` or with the first batch.
    """

    def __init__(
        self,
        proj_dim: int = 65536,
        seed: int = 0,
        parameters: str = "all",
        column: str = "dataset_id",
        blocks: int = 8,
        scales: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.sketch = CountSketch(proj_dim, seed)
        self.parameters = parameters
        self.column = column
        self.blocks = blocks
        self.scales = scales
        self.sketcher: SummedSketcher | None = None
        self._attached = False
        self._regroups = True
        self._batches: OneDatasetBatches | None = None
        self._epoch = 0
        self._resume: Any = None

    def attach(
        self, trainer: Trainer, sampler: Literal["one dataset", "as given"] = "one dataset"
    ) -> "SketchCallback":
        """Adds itself to ``trainer``; returns itself.

        Args:
            trainer: transformers' Trainer or a subclass, such as TRL's SFTTrainer.
            sampler: "one dataset" regroups the rows into batches of one dataset and so changes the
                order of training. "as given" keeps the Trainer's batches; each must then be of one
                dataset. A stream of rows keeps its batches in any case.
        """
        if self._attached:
            raise MeritFastError("SketchCallback: is attached already; take one for each Trainer")
        if sampler not in ("one dataset", "as given"):
            raise InputError(f"sampler: must be 'one dataset' or 'as given', got {sampler!r}")
        check_trainer(trainer, self.column)
        self._attached = True
        self._regroups = sampler == "one dataset"
        self._wrap(trainer)
        trainer.add_callback(self)
        return self

    def _wrap(self, trainer: Any) -> None:
        plain_train = trainer.train
        plain_loader = trainer.get_train_dataloader
        plain_step = trainer.training_step

        def train(resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
            self._resume = resume_from_checkpoint
            try:
                return plain_train(resume_from_checkpoint, *args, **kwargs)
            finally:
                self._close()

        def get_train_dataloader() -> Any:
            with _ids_kept(trainer, self.column), self._regrouped(trainer):
                return plain_loader()

        def training_step(model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            ids = inputs.pop(self.column)
            tokens = _target_tokens(inputs)
            self._running().discard()
            loss = plain_step(model, inputs, num_items_in_batch)
            divisor = _loss_divisor(trainer, tokens, num_items_in_batch)
            self._running().update(
                ids, len(ids), float(loss) * divisor, tokens, loss_divisor=divisor
            )
            return loss

        trainer.train = train
        trainer.get_train_dataloader = get_train_dataloader
        trainer.training_step = training_step

    @contextmanager
    def _regrouped(self, trainer: Any) -> Iterator[None]:
        """Regroups the loader that the Trainer makes within the block, before it is sharded."""
        self._batches = None
        rows = trainer.train_dataset
        is_stream = isinstance(rows, IterableDataset) or not hasattr(rows, "__len__")
        if is_stream or not self._regroups:
            yield
            return
        accelerator = trainer.accelerator
        plain_prepare = accelerator.prepare

        def prepare(loader: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(loader, DataLoader):
                seed = (
                    trainer.args.seed if trainer.args.data_seed is None else trainer.args.data_seed
                )
                loader = regroup(loader, self.column, seed, accelerator.num_processes)
                self._batches = loader.batch_sampler
            return plain_prepare(loader, *args, **kwargs)

        accelerator.prepare = prepare
        try:
            yield
        finally:
            del accelerator.prepare
        if self._batches is None:
            raise InputError(
                f"SketchCallback: {type(trainer).__name__}.get_train_dataloader does not give a "
                "DataLoader to accelerator.prepare; attach(trainer, sampler='as given') keeps its "
                "batches"
            )

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if not self._attached:
            raise MeritFastError(
                "SketchCallback: give it the Trainer by attach(trainer); callbacks see no batch"
            )
        if state.is_hyper_param_search:
            raise MeritFastError("SketchCallback: does not work with a hyperparameter search")
        self._close()  # a first try with too large a batch (auto_find_batch_size)
        kept: dict[Any, SketchState] = self._kept(args) if state.global_step else {}
        fingerprint = next(
            (s.identity.model_fingerprint.split(": ", 1)[-1] for s in kept.values()), None
        )
        self.sketcher = SummedSketcher(
            model,
            self.sketch,
            select_parameters(model, self.parameters),
            self.scales,
            blocks=self.blocks,
            weight="tokens",
            fingerprint=fingerprint,
        )
        self.sketcher.restore(kept if args.process_index == 0 else {})
        self.sketcher.__enter__()
        if self._batches is not None:
            updates = math.ceil(len(kwargs["train_dataloader"]) / args.gradient_accumulation_steps)
            self._epoch = state.global_step // updates

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Within a resumed epoch, two wrappers of accelerate may keep the Trainer from telling it.
        if self._batches is not None:
            self._batches.set_epoch(self._epoch)
            self._epoch += 1

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write(Path(args.output_dir) / f"checkpoint-{state.global_step}", args)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write(Path(args.output_dir), args)
        self._close()

    def _running(self) -> SummedSketcher:
        assert self.sketcher is not None  # on_train_begin comes before every step
        return self.sketcher

    def _close(self) -> None:
        if self.sketcher is not None:
            self.sketcher.__exit__(None, None, None)

    def _kept(self, args: Any) -> dict[Any, SketchState]:
        checkpoint = self._resume
        if checkpoint is True:
            checkpoint = get_last_checkpoint(args.output_dir)  # type: ignore[no-untyped-call]
        folder = Path(checkpoint) / FOLDER
        if not folder.is_dir():
            logger.warning("%s: is missing: the sketches begin at this step", folder)
            return {}
        return dict(read_states(folder))

    def _write(self, directory: Path, args: Any) -> None:
        states = sum_over_ranks(self._running().state)
        if args.process_index == 0:
            write_states(directory / FOLDER, states)


@contextmanager
def _ids_kept(trainer: Any, column: str) -> Iterator[None]:
    """Lets the column of ids through to the batches of a loader that is made within the block."""
    trainer._set_signature_columns_if_needed()
    columns = trainer._signature_columns
    collator = trainer.data_collator
    trainer._signature_columns = [*columns, column]
    trainer.data_collator = CollatorWithIds(collator, column)
    try:
        yield
    finally:
        trainer._signature_columns = columns
        trainer.data_collator = collator


def _target_tokens(inputs: Mapping[str, Any]) -> int:
    """Number of predicted labels: from the second position on, but all of ``shift_labels``."""
    if "shift_labels" in inputs:
        return int((inputs["shift_labels"] != -100).sum())
    if "labels" not in inputs:
        raise InputError(
            "train_dataset: labels: are missing in a batch; "
            "sketches need the loss of a causal model"
        )
    return int((inputs["labels"][..., 1:] != -100).sum())


def _loss_divisor(trainer: Any, tokens: int, num_items_in_batch: Any) -> float:
    """Divisor of the sum of the batch's token losses, on this rank, before the backward pass."""
    if num_items_in_batch is None:
        return float(tokens * trainer.current_gradient_accumulation_steps)
    ranks = trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1
    return float(num_items_in_batch) / ranks
