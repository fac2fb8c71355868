"""Rules that a Trainer must keep for ``MeritCallback``, checked when it is attached."""

from typing import Any

from merit_fast.errors import InputError
from merit_fast.integrations.per_dataset.codes import CODES


def check_trainer(trainer: Any, column: str, sketches: bool) -> None:
    """Checks what can be known before the first batch.

    Raises:
        InputError: the Trainer trains in a way that hides datasets, token losses or gradients, or
            by another loss.
    """
    args = trainer.args
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    loading = args.accelerator_config
    is_stream = not hasattr(trainer.train_dataset, "__len__")
    is_dispatched = loading.dispatch_batches or (is_stream and loading.dispatch_batches is None)
    cuts_rows = parallel is not None and (parallel.cp_enabled or parallel.sp_enabled)
    refused = {
        "DataParallel (several GPUs in one process)": args.n_gpu > 1,
        "context or sequence parallelism": cuts_rows,
        "tensor parallelism": parallel is not None and parallel.tp_enabled,
        "batches dispatched to several processes "
        "(accelerator_config.dispatch_batches must be false)": args.world_size > 1
        and is_dispatched,
    }
    if sketches:
        refused |= {
            "sketch_every and FSDP": trainer.is_fsdp_enabled,
            "sketch_every and DeepSpeed": trainer.is_deepspeed_enabled,
            "sketch_every and fp16": args.fp16,
            "sketch_every and packing_strategy='wrapped', where examples attend to one another": (
                getattr(args, "packing", False) and args.packing_strategy == "wrapped"
            ),
        }
    if other := _trl_trainer_of_another_loss(trainer):
        refused[f"TRL's {other}, whose loss is no sum over tokens; SFTTrainer's is"] = True
    for feature, is_used in refused.items():
        if is_used:
            raise InputError(f"MeritCallback: does not work with {feature}")
    if not has_datasets(trainer.train_dataset, column):
        hint = ""
        if getattr(args, "packing", False):
            hint = "; TRL's packing drops it: take merit_fast.integrations.trl.MeritSFTTrainer"
        names = ", ".join(trainer.train_dataset.column_names or ())
        raise InputError(f"train_dataset: {column}: is missing; columns: {names}{hint}")


def _trl_trainer_of_another_loss(trainer: Any) -> str:
    """Name of the TRL class that the trainer is, or comes from; "": SFTTrainer's or not TRL's."""
    names = [cls.__name__ for cls in type(trainer).__mro__ if cls.__module__.startswith("trl.")]
    return "" if not names or "SFTTrainer" in names else names[0]


def has_datasets(rows: Any, column: str) -> bool:
    """Tells whether rows have a dataset; True where only the rows themselves can tell."""
    names = getattr(rows, "column_names", None)
    return names is None or column in names or CODES in names
