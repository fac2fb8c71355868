"""One object that tells a Trainer's datasets apart: losses, tokens, sketches and branch.json.

trainer = Trainer(model, args, train_dataset=rows, ...)   # or TRL's SFTTrainer
MeritCallback().attach(trainer)
trainer.train()
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from merit_fast.errors import InputError, MeritFastError
from merit_fast.integrations.per_dataset.checks import check_trainer
from merit_fast.integrations.per_dataset.codes import take_datasets
from merit_fast.integrations.per_dataset.loaders import wrap_loaders
from merit_fast.integrations.per_dataset.losses import (
    TokenWatch,
    called_model,
    shifted_labels,
)
from merit_fast.integrations.per_dataset.outputs import write_outputs
from merit_fast.integrations.per_dataset.run_sketches import RunSketches
from merit_fast.integrations.per_dataset.sums import (
    Counts,
    Sums,
    add_sums,
    batch_sums,
    figures,
    over_ranks,
    read_counts,
)
from merit_fast.kernels.sketch import CountSketch
from merit_fast.model import model_fingerprint, resolve_model

__all__ = ["MeritCallback"]

logger = logging.getLogger(__name__)


class MeritCallback(TrainerCallback):  # type: ignore[misc]
    """Tells losses, accuracies and tokens per dataset, and writes branch.json with every save.

    Batches stay as the Trainer makes them: mixed, padded, padding-free or packed. The Trainer's own
    ``log`` gets ``merit/loss/NAME`` and ``merit/accuracy/NAME``, means over the target tokens since
    the last log, and ``merit/tokens/NAME``, the target tokens trained on so far. An evaluation gets
    ``eval_merit/loss/NAME`` and so on, of rows that tell their dataset; rows that a distributed
    sampler repeats count twice. Losses are plain -log p(label), whatever loss is trained.

    Each save holds branch.json, with the target tokens really trained on, epochs counted, and
    dataset_counts.json, from which a resumed run continues to count. With
    ``load_best_model_at_end`` they are those of the best checkpoint.

    With ``sketch_every=N``, every N-th micro-batch is sketched as well, exactly: its examples run
    once more, by dataset and without their neighbours. That is one more forward and backward pass
    over its tokens: 1/N of the training time. The states lie in ``sketches/`` of each checkpoint
    and of the output, as those of ``SketchCallback``; training gives the same bits.

    Args:
        column: column of the rows with the dataset's name, a str or int. Packed rows have
            ``merit_codes`` instead (``merit_fast.integrations.trl``).
        names: names of the datasets that packed rows number; None: their numbers.
        start: directory or hub id of the model that training starts from; None: the path that the
            model was loaded from.
        sketch_every: 0, or N to sketch every N-th micro-batch.
        proj_dim: width of the CountSketch.
        seed: seed of its hash.
        parameters: "all", "blocks" or a regular expression (``select_parameters``).
        blocks: blocks of each dataset's state.

    Attributes:
        counts: sums per dataset of this rank, over the whole training.

    Raises:
        InputError: rows without the column, a start that is no model, context, sequence or tensor
            parallelism, DataParallel, a trainer of TRL but SFTTrainer. Raised by ``attach`` or with
            the first batch.
    """

    def __init__(
        self,
        column: str = "dataset_id",
        names: Sequence[str] | None = None,
        start: str | Path | None = None,
        sketch_every: int = 0,
        proj_dim: int = 65536,
        seed: int = 0,
        parameters: str = "all",
        blocks: int = 8,
    ) -> None:
        self.column = column
        self.names = names
        self.start = start
        self._sketches = RunSketches(sketch_every, CountSketch(proj_dim, seed), parameters, blocks)
        self.counts: Sums = {}
        self._trainer: Any = None
        self._watch = TokenWatch()
        self._window: Sums = {}
        self._evaluated: Sums = {}
        self._final: Counts | None = None  # of all ranks, at the end of training
        self._final_step = 0
        self._fingerprint = ""
        self._resume: Any = None
        self._micro_batches = 0

    def attach(self, trainer: Any) -> "MeritCallback":
        """Adds itself to ``trainer``, transformers' Trainer or a subclass; returns itself."""
        if self._trainer is not None:
            raise MeritFastError("MeritCallback: is attached already; take one for each Trainer")
        check_trainer(trainer, self.column, self._sketches.every > 0)
        self._fingerprint = self._start_fingerprint(trainer.model)
        self._trainer = trainer
        wrap_loaders(trainer, self.column)
        self._wrap_steps(trainer)
        self._wrap_outputs(trainer)
        trainer.add_callback(self)
        return self

    def _start_fingerprint(self, model: Any) -> str:
        start = self.start or getattr(model.config, "name_or_path", "")
        if not start:
            raise InputError(
                "MeritCallback: start: must be the directory or hub id of the model that training "
                "starts from: this model was not loaded from one"
            )
        return model_fingerprint(resolve_model(str(start)))

    def _wrap_steps(self, trainer: Any) -> None:
        plain_step = trainer.training_step
        plain_prediction = trainer.prediction_step

        def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            datasets = take_datasets(inputs, self.names)
            if datasets is None:
                raise InputError(f"train_dataset: {self.column}: is missing in a batch")
            labels = shifted_labels(inputs)
            self._sketches.see(self._micro_batches, inputs, datasets)
            self._micro_batches += 1
            with self._watch.watching(called_model(trainer.model, model), labels):
                loss = plain_step(model, inputs, *args, **kwargs)
            sums = batch_sums(datasets, labels, self._watch.values())
            add_sums(self.counts, sums)
            add_sums(self._window, sums)
            return loss

        def prediction_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            datasets = take_datasets(inputs, self.names)
            if datasets is None:
                return plain_prediction(model, inputs, *args, **kwargs)
            labels = shifted_labels(inputs)
            with self._watch.watching(called_model(trainer.model, model), labels):
                result = plain_prediction(model, inputs, *args, **kwargs)
            add_sums(self._evaluated, batch_sums(datasets, labels, self._watch.values()))
            return result

        trainer.training_step = training_step
        trainer.prediction_step = prediction_step

    def _wrap_outputs(self, trainer: Any) -> None:
        plain_train = trainer.train
        plain_log = trainer.log
        plain_loop = trainer.evaluation_loop
        plain_save = trainer.save_model

        def train(resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
            self._resume = resume_from_checkpoint
            return plain_train(resume_from_checkpoint, *args, **kwargs)

        def log(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if "loss" in logs:  # a step's, neither an evaluation's nor the summary
                logs.update(self._step_figures())
            plain_log(logs, *args, **kwargs)

        def evaluation_loop(*args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
            self._evaluated = {}
            output = plain_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            output.metrics.update(
                figures(over_ranks(self._evaluated), f"{metric_key_prefix}_merit/")
            )
            return output

        def save_model(output_dir: Any = None, _internal_call: bool = False) -> None:
            plain_save(output_dir, _internal_call)
            folder = Path(output_dir or trainer.args.output_dir)
            if not _internal_call:
                self.write_files(folder)
            elif folder.name == f"checkpoint-{trainer.state.global_step}":
                self._write_checkpoint(folder)

        trainer.train = train
        trainer.log = log
        trainer.evaluation_loop = evaluation_loop
        trainer.save_model = save_model

    def _step_figures(self) -> dict[str, float]:
        """Means since the last log, and the tokens so far, of all ranks."""
        logged = figures(over_ranks(self._window), "merit/")
        for name, value in over_ranks(self.counts).items():
            logged[f"merit/tokens/{name}"] = value.num_target_tokens
        self._window = {}
        return logged

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if self._trainer is None:
            raise MeritFastError(
                "MeritCallback: give it the Trainer by attach(trainer); callbacks see no batch"
            )
        if state.is_hyper_param_search:
            raise MeritFastError("MeritCallback: does not work with a hyperparameter search")
        if self._trainer.model_init is not None:  # it has made a new model, of no token yet
            self.counts = {}
            self._micro_batches = 0
        checkpoint = self._checkpoint(args) if state.global_step else None
        if checkpoint is not None:
            counts = read_counts(checkpoint)
            self._fingerprint = counts.start_fingerprint
            self._micro_batches = counts.num_micro_batches
            self.counts = counts.sums if args.process_index == 0 else {}
        self._final = None
        self._window = {}
        self._sketches.begin(model, checkpoint, args.process_index)

    def _checkpoint(self, args: Any) -> Path:
        """The checkpoint that this run resumes from."""
        if self._resume is True:
            return Path(get_last_checkpoint(args.output_dir))  # type: ignore[no-untyped-call]
        return Path(self._resume)

    def _write_checkpoint(self, folder: Path) -> None:
        """Writes a checkpoint's files before its trainer_state.json, which makes it whole.

        So no kill leaves a whole checkpoint whose tokens are not known.
        """
        args = self._trainer.args
        state = self._trainer.state
        counts = self._counts_of_ranks()
        if args.process_index == 0:
            write_outputs(folder, counts, state.global_step, args.seed)
        self._sketches.write(folder, args.process_index)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._final = self._counts_of_ranks()
        self._final_step = state.global_step
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._final = read_counts(Path(state.best_model_checkpoint))
            self._final_step = state.best_global_step
        self._sketches.write(Path(args.output_dir), args.process_index)

    def _counts_of_ranks(self) -> Counts:
        return Counts(over_ranks(self.counts), self._fingerprint, self._micro_batches)

    def write_files(self, folder: Path) -> None:
        """Writes the counts next to a model that somebody saved; asks no other rank.

        ``save_model`` of the Trainer calls it.
        """
        args = self._trainer.args
        counts = self._final
        steps = self._final_step
        if counts is None and args.world_size == 1:
            counts = self._counts_of_ranks()
            steps = self._trainer.state.global_step
        if counts is None:
            logger.warning(
                "%s: gets no branch.json: several processes train, so that the tokens of all are "
                "known in checkpoints and after training only",
                folder,
            )
        elif args.process_index == 0:
            write_outputs(folder, counts, steps, args.seed)
