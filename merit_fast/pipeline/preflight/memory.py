"""Memory that training needs, from the recipe and the headers of the base."""

from pathlib import Path

from merit_fast.kernels.average.dtypes import ITEM_BYTES, SHORT_NAMES
from merit_fast.model import settle_dtype
from merit_fast.pipeline.preflight.base import num_parameters, num_trained_parameters
from merit_fast.train.config import TrainConfig
from merit_fast.units import human_bytes

# of a trained parameter: two moments, and the master of a bf16 weight or its upper bits
_MOMENTS = {"adamw": 8, "adamw-8bit": 2}
_MASTER = {"adamw": 4, "adamw-8bit": 1}


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


def describe_memory(base: Path, train: TrainConfig) -> str:
    """The memory of training as a note of the forecast."""
    whole = human_bytes(training_bytes(base, train))
    text = f"training needs {whole} for weights, gradients, masters and moments, and activations"
    if train.shard == "none":
        return text
    whole_parts = "the whole of one layer and of the head"
    if train.adapter.is_on:
        whole_parts += ", and the whole adapter"
    return f"{text}; each of N processes needs the N-th part of it, and {whole_parts}"
