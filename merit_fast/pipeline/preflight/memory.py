"""Memory that training needs, from the recipe and the headers of the base."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from merit_fast.kernels.average.dtypes import ITEM_BYTES, SHORT_NAMES
from merit_fast.model import settle_dtype
from merit_fast.model.memory import available_memory_bytes
from merit_fast.pipeline.preflight.base import num_parameters, num_trained_parameters
from merit_fast.train.config import TrainConfig
from merit_fast.train.parallel.world import local_size
from merit_fast.units import human_bytes

# of a trained parameter: two moments, and the master of a bf16 weight or its upper bits
_MOMENTS = {"adamw": 8, "adamw-8bit": 2}
_MASTER = {"adamw": 4, "adamw-8bit": 1}
_ROOM = 1.1  # memory of training with activations over that without


def training_bytes(base: Path, train: TrainConfig) -> int:
    """Bytes of weights, gradients, masters and moments of a branch in training.

        parameters * weight + trained * (weight + gradient + moments + master)

    An adapter's weights are float32 and come on top of the base's. With ``update_in_backward`` few
    gradients are in memory; with ``base: 4bit`` a weight of the base takes half a byte.
    """
    item = ITEM_BYTES[SHORT_NAMES[settle_dtype(train.dtype)]]
    parameters = num_parameters(base)
    trained = num_trained_parameters(base, train)
    own = 4 if train.adapter.is_on else item
    each = _MOMENTS[train.optimizer] + (_MASTER[train.optimizer] if own < 4 else 0)
    each += 0 if train.update_in_backward else own
    if train.adapter.is_on:
        frozen = parameters // 2 if train.adapter.base == "4bit" else parameters * item
        return frozen + trained * (own + each)
    return parameters * item + trained * each


def settle_shard(
    base: Path, train: TrainConfig, note: Callable[[str], None]
) -> Literal["none", "full"]:
    """The value of ``train.shard`` that "auto" stands for, by the memory of this machine.

    It is "full" where whole models would not fit: 1.1 times ``training_bytes``, for each process on
    this machine, or for the busiest GPU. Updates in the backward pass need "full" in any case.

    Args:
        base: folder of the base.
        train: the recipe; several processes train it.
        note: gets the reason in one line.
    """
    import torch

    needed = training_bytes(base, train) * local_size()
    available = available_memory_bytes()
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        needed = training_bytes(base, train) * -(-local_size() // gpus)
        available = min(torch.cuda.mem_get_info(gpu)[0] for gpu in range(gpus))
    is_full = needed * _ROOM > available or train.update_in_backward is not None
    shard: Literal["none", "full"] = "full" if is_full else "none"
    note(
        f"train.shard auto is {shard}: whole models need {human_bytes(needed)} here, "
        f"{human_bytes(available)} are available"
    )
    return shard


def describe_memory(base: Path, train: TrainConfig) -> str:
    """The memory of training as a note of the forecast."""
    whole = human_bytes(training_bytes(base, train))
    text = f"training needs {whole} for weights, gradients, masters and moments, and activations"
    if train.shard == "none":
        return text
    if train.shard == "auto":
        text += "; where that does not fit"
    whole_parts = "the whole of one layer and of the head"
    if train.adapter.is_on:
        whole_parts += ", and the whole adapter"
    joint = "," if train.shard == "auto" else ";"
    return f"{text}{joint} each of N processes needs the N-th part of it, and {whole_parts}"
