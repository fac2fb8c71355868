"""Rules that a Trainer must keep for ``SketchCallback``, checked when it is attached."""

from typing import Any

from merit_fast.errors import InputError


def check_trainer(trainer: Any, column: str) -> None:
    """Checks what can be known before the first batch.

    Raises:
        InputError: the Trainer trains in a way that hides gradients or datasets from sketches.
    """
    args = trainer.args
    dataset = trainer.train_dataset
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    scaled_loss = getattr(trainer, "loss_is_scaled_for_ga", None) is not None
    split_model = parallel is not None and (parallel.tp_enabled or parallel.cp_enabled)
    loading = args.accelerator_config
    is_stream = not hasattr(dataset, "__len__")
    dispatched = loading.dispatch_batches or (is_stream and loading.dispatch_batches is None)
    refused = {
        # TRL packs examples of several datasets in one row and drops their ids.
        "packing; MeritCallback(sketch_every=N) sketches packed batches": getattr(
            args, "packing", False
        ),
        "fp16": args.fp16,  # its loss scale changes during training; bf16 has none
        "a Trainer that sets loss_is_scaled_for_ga": scaled_loss,
        "DataParallel (several GPUs in one process)": args.n_gpu > 1,
        "FSDP": trainer.is_fsdp_enabled,
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "tensor or context parallelism": split_model,
        "batches dispatched to several processes "
        "(accelerator_config.dispatch_batches must be false)": args.world_size > 1 and dispatched,
        "accelerator_config.split_batches": args.world_size > 1 and loading.split_batches,
    }
    for feature, is_used in refused.items():
        if is_used:
            raise InputError(f"SketchCallback: does not work with {feature}")
    names = getattr(dataset, "column_names", None)
    if names is not None and column not in names:
        raise InputError(f"train_dataset: {column}: is missing; columns: {', '.join(names)}")
