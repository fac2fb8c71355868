"""Merging state dicts that are in memory already. torch is imported when a function is called."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merit_fast.errors import InputError
from merit_fast.kernels.average import average_arrays, foreach_weighted_average
from merit_fast.kernels.average.dtypes import DTYPES, FLOAT_DTYPES, SHORT_NAMES
from merit_fast.merge.combine.combination import combine
from merit_fast.merge.combine.weights import Weights, resolve_weights
from merit_fast.merge.config import FP8_BLOCK, MergeConfig, config_of
from merit_fast.merge.option_names import OptionError, options_named
from merit_fast.merge.read.entries import TensorEntry
from merit_fast.merge.rules.function import FunctionRule, UserFunction
from merit_fast.merge.rules.kinds import WeightedSum
from merit_fast.records import fields

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Options that concern tensors in memory; the others concern files.
_OPTIONS = (
    "weights",
    "normalize",
    "method",
    "scale",
    "parameters",
    "models",
    "dtype",
    "allow_nonfinite",
)


@options_named("python")
def merge_state_dicts(
    models: "Sequence[Mapping[str, Tensor]]",
    /,
    weights: Weights | None = None,
    base: "Mapping[str, Tensor] | None" = None,
    *,
    config: MergeConfig | None = None,
    **options: Any,
) -> "dict[str, Tensor]":
    """Merges models in memory, on each tensor's device, by a weighted sum or a registered method.

        merge_state_dicts([first, second], [3, 1], base=start, scale=0.5)

    On the CPU the result has the bits of the file merge. On a GPU sums are float32 (see
    ``weighted_average``) and all tensors of a device take one launch. In sums NaN and infinities
    propagate. A registered method runs on the CPU.

    Args:
        models: K mappings of the same names. A name's tensors have one shape and one device; float
            ones (bf16, fp16, fp32, fp64) are merged, all others must be equal and are copied.
        weights: K numbers, divided by their sum unless ``normalize=False``, or "uniform", the
            default.
        base: theta_0, for methods that need it, and for linear with a scale.
        config: method and parameters; None: made of ``options``.
        options: method, scale, normalize, parameters, models, dtype, allow_nonfinite.

    Returns:
        The first mapping's names in its order, new tensors in ``dtype``, by default the models'
        own; the base's dtype does not count. Names that share a tensor in every input share one in
        the result.

    Raises:
        InputError: names the model (by its number), the tensor and the broken rule.
    """
    import torch

    config = config_of("merge_state_dicts", config, options, weights)
    _check_config(config)
    labels = [f"model {k}" for k in range(len(models))] + ["base"] * (base is not None)
    inputs = [*models, *([base] if base is not None else [])]
    if not models:
        raise InputError("merge: needs 1 model or more, got 0")
    paths = [Path(label) for label in labels]
    numbers = resolve_weights(paths[: len(models)], config)
    start = paths[-1] if base is not None else None
    combination = combine(paths[: len(models)], numbers, start, config, list(models[0]))
    inputs = inputs[: len(combination.paths)]
    labels = labels[: len(inputs)]
    merged: dict[str, Tensor] = {}
    sums: dict[tuple[torch.device, tuple[float, ...]], list[str]] = {}
    chosen = _torch_dtype(SHORT_NAMES[config.dtype]) if config.dtype else None
    owners: dict[Any, str] = {}  # a tensor's identity in every input -> the first name that has it
    shared: dict[str, str] = {}
    for name in inputs[0]:
        tensors = _same_tensor(name, inputs, labels)
        if chosen is None:
            _check_dtypes(name, tensors[: len(models)], labels)
        owner = owners.setdefault(tuple(_identity(tensor) for tensor in tensors), name)
        if owner != name:
            shared[name] = owner
            continue
        if not _is_averaged(tensors[0]):
            merged[name] = tensors[0].clone()
            continue
        rule: Any = combination.rule(_entry(name, tensors[0]))
        if isinstance(rule, FunctionRule):
            merged[name] = _call(rule, name, tensors, config.allow_nonfinite, chosen)
        else:
            sums.setdefault((tensors[0].device, rule), []).append(name)
    for other, label in zip(inputs[1:], labels[1:], strict=True):
        if extra := next((name for name in other if name not in inputs[0]), None):
            raise InputError(f"{label}: {extra}: is not in model 0")
    for (_, coefficients), names in sums.items():
        columns = [[model[name] for name in names] for model in inputs]
        out = [torch.empty_like(t, dtype=chosen) for t in columns[0]] if chosen else None
        averages = foreach_weighted_average(columns, coefficients, out)
        merged |= zip(names, averages, strict=True)
    return {name: merged[shared.get(name, name)] for name in inputs[0]}


def _check_config(config: MergeConfig) -> None:
    for field in fields(config):
        if field.name not in _OPTIONS and getattr(config, field.name) != field.default:
            raise InputError(
                f"merge_state_dicts: {field.name}: must be absent, models are in memory"
            )
    if config.dtype == FP8_BLOCK:
        raise InputError(f"merge_state_dicts: dtype: {FP8_BLOCK} concerns an output's files")
    if not isinstance(config.method_entry.rule, (WeightedSum, UserFunction)):
        raise InputError(
            "merge_state_dicts: method: must be a weighted sum or a registered method, "
            f"got {config.method}; load_merged merges files by it"
        )
    if config.weights in ("tokens", "samples") and config.takes_weights:
        by_model = any(model.weight is not None for model in config.models)
        if not by_model:
            raise InputError(
                f"merge_state_dicts: weights: must be numbers or uniform, got {config.weights!r}"
            )


def _entry(name: str, tensor: "Tensor") -> TensorEntry:
    """A tensor in memory, as merge rules look at it."""
    num_bytes = tensor.numel() * 8
    return TensorEntry(name, "F64", tuple(tensor.shape), Path(), 0, num_bytes)


def _call(
    rule: FunctionRule,
    name: str,
    tensors: "Sequence[Tensor]",
    allow_nonfinite: bool,
    chosen: "torch.dtype | None",
) -> "Tensor":
    import torch

    first = tensors[0]
    inputs = [
        tensor.detach().to("cpu", torch.float64).reshape(-1).numpy().copy() for tensor in tensors
    ]
    total = rule.combine(name, inputs, allow_nonfinite)
    wanted = chosen or first.dtype
    dtype = next(name for name in FLOAT_DTYPES if _torch_dtype(name) == wanted)
    out = average_arrays([total], [1.0], dtypes=["F64"], out_dtype=dtype, backend="eager")
    return torch.from_numpy(out).view(wanted).reshape(first.shape).to(first.device)


def _same_tensor(
    name: str, inputs: "Sequence[Mapping[str, Tensor]]", labels: Sequence[str]
) -> "list[Tensor]":
    """One name's tensors of all inputs, checked to agree."""
    import torch

    first = inputs[0][name]
    for model, label in zip(inputs, labels, strict=True):
        if name not in model:
            raise InputError(f"{label}: {name}: is missing, model 0 has it")
        tensor = model[name]
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"{label}: {name}: must be a tensor, got {type(tensor).__name__}")
        if tensor.shape != first.shape:
            raise InputError(
                f"{label}: {name}: shape must be {list(first.shape)} as in model 0, got "
                f"{list(tensor.shape)}"
            )
        if tensor.device != first.device:
            raise InputError(
                f"{label}: {name}: must be on {first.device} as in model 0, is on {tensor.device}"
            )
        if _is_averaged(tensor) and _is_averaged(first):
            continue
        if tensor.dtype != first.dtype:
            raise InputError(
                f"{label}: {name}: dtype must be {first.dtype} as in model 0, got {tensor.dtype}"
            )
        if not torch.equal(tensor, first):
            raise InputError(
                f"{label}: {name}: a {tensor.dtype} tensor cannot be averaged and must equal "
                "model 0's"
            )
    return [model[name] for model in inputs]


def _check_dtypes(name: str, models: "Sequence[Tensor]", labels: Sequence[str]) -> None:
    """Raises InputError if the models' tensors of this name differ in dtype."""
    first = models[0].dtype
    for tensor, label in zip(models, labels, strict=False):
        if tensor.dtype != first:
            rule = f"{label}: {name}: dtype must be {first} as in model 0, got {tensor.dtype}"
            raise OptionError(rule, "dtype", "{} chooses one")


def _is_averaged(tensor: "Tensor") -> bool:
    return tensor.dtype in [_torch_dtype(name) for name in FLOAT_DTYPES]


def _torch_dtype(name: str) -> "torch.dtype":
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[name].torch_name)
    return dtype


def _identity(tensor: "Tensor") -> tuple[object, ...]:
    """Facts that are equal for two names that share a tensor."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()
