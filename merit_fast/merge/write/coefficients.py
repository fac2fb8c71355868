"""The weight of each model and the factor of each input, for the summary and the model card."""

from collections.abc import Mapping, Sequence
from typing import Any

from merit_fast.merge.config import MergeConfig
from merit_fast.merge.engine.memory import buffer_bytes
from merit_fast.merge.engine.plan import Rule, named_entry
from merit_fast.merge.engine.prepare import Inputs
from merit_fast.merge.read.entries import is_float
from merit_fast.merge.read.folders.left_out import files_left_out
from merit_fast.merge.read.remote import Location


def input_coefficients(inputs: Inputs) -> list[tuple[str, float | None]]:
    """Each input's coefficient; None where it differs between tensors or there is none."""
    combination = inputs.combination
    rules: set[Rule] = set()
    if combination.from_gram is None and not combination.is_by_tower:
        tensors = (tensor for file in inputs.files for tensor in file.tensors)
        entries = (named_entry(tensor) for tensor in tensors if is_float(tensor.inputs[0]))
        for rule in map(combination.rule, entries):
            rules.add(rule)
            if len(rules) > 1 or not isinstance(rule, tuple):
                break
    only = rules.pop() if len(rules) == 1 else None
    paths = combination.paths
    numbers: tuple[float | None, ...] = ()
    if isinstance(only, tuple) and len(only) <= len(paths):
        numbers = only
    filled = (*numbers, *[None] * (len(paths) - len(numbers)))
    return [(str(path), number) for path, number in zip(paths, filled, strict=True)]


def weighed_models(
    models: Sequence[Location], weights: Sequence[float], config: MergeConfig, in_parts: bool
) -> list[tuple[Location, float | None]]:
    """Every model with its weight; None where the method, or each tensor, has its own.

    Args:
        in_parts: layers are stacked, or towers merged apart: no model has one weight.
    """
    by_model = [model.weight for model in config.models]
    shown: list[float | None] = [*weights]
    if in_parts or not config.takes_weights:
        shown = [None] * len(models)
    elif any(weight is not None for weight in by_model):
        shown = [float(weight) if isinstance(weight, (int, float)) else None for weight in by_model]
    return list(zip(models, shown, strict=True))


def input_facts(
    inputs: Inputs, config: MergeConfig, sizes: Mapping[str, int], free: int
) -> dict[str, Any]:
    """JSON-ready facts of the inputs and of the output that they make.

    Args:
        sizes: weight file of the output -> bytes.
        free: free bytes of the disk that gets the output.
    """
    tensors = [tensor for file in inputs.files for tensor in file.tensors]
    return {
        "method": config.method,
        "dtype": inputs.dtypes,
        "vocabulary": inputs.vocabulary.sentence if inputs.vocabulary else None,
        "coefficients": input_coefficients(inputs),
        "form": config.form or "safetensors",
        "shards": len(sizes),
        "tensors": len(tensors),
        "parameters": sum(tensor.num_elements for tensor in tensors),
        "bytes_in": config.method_entry.passes * inputs.bytes_read,
        "bytes_out": sum(sizes.values()),
        "buffer_bytes": buffer_bytes(inputs, config),
        "free_bytes": free,
        "notes": list(inputs.notes),
        "left_out": list(files_left_out(inputs.companions, inputs.files_read())),
        "finished": True,
    }
