"""Sketches of every dataset's gradient while the transformers Trainer trains.

    trainer = Trainer(model, args, train_dataset=rows, ...)
    SketchCallback(proj_dim=65536).attach(trainer)
    trainer.train()

Each row has a `dataset_id`; each batch holds rows of one dataset. Training gives the same bits as
without the callback. The states lie in ``output_dir/sketches`` at the end and in every checkpoint,
one ``NAME.safetensors`` each; a resumed run continues from the checkpoint's.
"""

import logging
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from merit_fast.errors import InputError, MeritFastError
from merit_fast.integrations.sketch_files import read_states, sum_over_ranks, write_states
from merit_fast.kernels.sketch import CountSketch
from merit_fast.manifests.sketch_state import SketchState
from merit_fast.sketch.selection import select_parameters
from merit_fast.sketch.summed import SummedSketcher

__all__ = ["FOLDER", "SketchCallback", "batches_of_one_dataset", "read_states", "write_states"]

FOLDER = "sketches"

logger = logging.getLogger(__name__)


class SketchCallback(TrainerCallback):  # type: ignore[misc]
    """Sketches the addition of each backward pass of a Trainer to the gradients, by dataset.

    A Trainer shows its callbacks no batch. ``attach`` therefore wraps three of its public methods.
    ``get_train_dataloader``: the column of ids survives ``remove_unused_columns`` and never reaches
    collator or model; evaluation is as before. ``training_step``: one backward pass and one batch,
    under gradient accumulation too. ``train``: removes the hooks after an exception.

    An example's loss is the sum over its target tokens, whatever the Trainer divides by. A custom
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
            context parallelism; a batch of several datasets. Raised by ``attach`` or with the first
            batch.
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
        self._resume: Any = None

    def attach(self, trainer: Trainer) -> "SketchCallback":
        """Adds itself to ``trainer``; returns itself."""
        if self._attached:
            raise MeritFastError("SketchCallback: is attached already; take one for each Trainer")
        _check_trainer(trainer, self.column)
        self._attached = True
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
            trainer._set_signature_columns_if_needed()
            columns = trainer._signature_columns
            collator = trainer.data_collator
            trainer._signature_columns = [*columns, self.column]
            trainer.data_collator = _CollatorWithIds(collator, self.column)
            try:
                return plain_loader()
            finally:
                trainer._signature_columns = columns
                trainer.data_collator = collator

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
            fingerprint=fingerprint,
        )
        self.sketcher.restore(kept if args.process_index == 0 else {})
        self.sketcher.__enter__()

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


def batches_of_one_dataset(ids: Sequence[Hashable], batch_size: int, seed: int = 0) -> list[int]:
    """Orders rows into shuffled batches of ``batch_size`` rows of one dataset each.

        rows = rows.select(batches_of_one_dataset(rows["dataset_id"], 8))

    Train on them with ``train_sampling_strategy="sequential"``. Leaves out the rows that fill no
    batch, fewer than ``batch_size`` per dataset, and logs their number.
    """
    generator = random.Random(seed)
    batches = []
    by_dataset: dict[Hashable, list[int]] = {}
    for row, dataset in enumerate(ids):
        by_dataset.setdefault(dataset, []).append(row)
    for rows in by_dataset.values():
        generator.shuffle(rows)
        batches += [
            rows[i : i + batch_size] for i in range(0, len(rows) - batch_size + 1, batch_size)
        ]
    generator.shuffle(batches)
    order = [row for batch in batches for row in batch]
    if len(order) < len(ids):
        logger.warning(
            "%d of %d rows fill no batch of one dataset and are left out",
            len(ids) - len(order),
            len(ids),
        )
    return order


class _CollatorWithIds:
    """Hides the ids from a collator and adds them to its batch; workers can load the class."""

    def __init__(self, collator: Callable[[list[Any]], Any], column: str) -> None:
        self.collator = collator
        self.column = column

    def __call__(self, rows: list[Any]) -> Any:
        ids = []
        for row in rows:
            if not isinstance(row, Mapping) or self.column not in row:
                raise InputError(
                    f"train_dataset: {self.column}: is missing in a row; every row must say its "
                    "dataset"
                )
            value = row[self.column]
            ids.append(str(value.item() if isinstance(value, Tensor) else value))
        if len(set(ids)) > 1:
            raise InputError(
                f"train_dataset: {self.column}: a batch must be of one dataset, got "
                f"{', '.join(sorted(set(ids))[:3])}; "
                "take per_device_train_batch_size=1, or rows ordered by batches_of_one_dataset"
            )
        batch = self.collator(
            [{key: value for key, value in row.items() if key != self.column} for row in rows]
        )
        batch[self.column] = ids
        return batch


def _check_trainer(trainer: Any, column: str) -> None:
    args = trainer.args
    dataset = trainer.train_dataset
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    scaled_loss = getattr(trainer, "loss_is_scaled_for_ga", None) is not None
    split_model = parallel is not None and (parallel.tp_enabled or parallel.cp_enabled)
    dispatched = args.world_size > 1 and not hasattr(dataset, "__len__")
    dispatched = dispatched and args.accelerator_config.dispatch_batches is not False
    refused = {
        # TRL packs examples of several datasets in one row and drops their ids.
        "packing": getattr(args, "packing", False),
        "fp16": args.fp16,  # its loss scale changes during training; bf16 has none
        "a Trainer that sets loss_is_scaled_for_ga": scaled_loss,
        "DataParallel (several GPUs in one process)": args.n_gpu > 1,
        "FSDP": trainer.is_fsdp_enabled,
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "tensor or context parallelism": split_model,
        "an iterable dataset dispatched to several processes "
        "(accelerator_config.dispatch_batches must be false)": dispatched,
    }
    for feature, is_used in refused.items():
        if is_used:
            raise InputError(f"SketchCallback: does not work with {feature}")
    names = getattr(dataset, "column_names", None)
    if names is not None and column not in names:
        raise InputError(f"train_dataset: {column}: is missing; columns: {', '.join(names)}")


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
