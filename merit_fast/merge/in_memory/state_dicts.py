"""Merging without an output directory: state dicts that are in memory, or files merged on their way into a model.

torch and transformers are imported when a function is called.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from merit_fast.errors import InputError, one_line
from merit_fast.kernels.average import foreach_weighted_average
from merit_fast.merge.combine.weights import resolve_weights
from merit_fast.merge.config import MergeConfig
from merit_fast.merge.engine.prepare import fit_memory, make_plan, read_inputs
from merit_fast.merge.in_memory.lazy import open_merged
from merit_fast.merge.in_memory.loading import build_model, fit_config, kind_of
from merit_fast.merge.read.remote import Location, as_location
from merit_fast.options.parser import parse
from merit_fast.progress import SilentProgress

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

Weights = Sequence[float] | Literal["tokens", "samples", "uniform"]
_OF_FILES = ("shard_size", "stats", "checksum", "fsync")


def merge_state_dicts(
    state_dicts: "Sequence[Mapping[str, Tensor]]",
    weights: Sequence[float],
    base: "Mapping[str, Tensor] | None" = None,
    scale: float = 1.0,
) -> "dict[str, Tensor]":
    """theta_0 + s (sum_k w_k theta_k - theta_0) of models in memory, on the device where each tensor lies.

    On the CPU the result has the bits of the file merge. On a GPU sums are float32 (see ``weighted_average``) and all
    tensors of a device take one launch. NaN and infinities go their way.

    Args:
        state_dicts: K mappings of the same names. A name's tensors have one shape and lie on one device; float ones
            (bf16, fp16, fp32, fp64) are averaged, all others must be equal and are copied.
        weights: K floats, used as they are.
        base: theta_0, needed where ``scale`` is not 1 and unused where it is.
        scale: s.

    Returns:
        The first mapping's names in its order, new tensors of its dtypes. Names that share a tensor in every input
        share one in the result.

    Raises:
        InputError: names the model (by its place), the tensor and the rule broken.
    """
    import torch

    inputs, coefficients = _with_base(state_dicts, weights, base, scale)
    labels = [f"model {k}" if k < len(state_dicts) else "base" for k in range(len(inputs))]
    merged: dict[str, Tensor] = {}
    averaged: dict[torch.device, list[str]] = {}
    owners: dict[Any, str] = {}  # a tensor's identity in every input -> the first name that has it
    shared: dict[str, str] = {}
    for name in inputs[0]:
        tensors = _same_tensor(name, inputs, labels)
        owner = owners.setdefault(tuple(_identity(tensor) for tensor in tensors), name)
        if owner != name:
            shared[name] = owner
        elif _is_averaged(tensors[0]):
            averaged.setdefault(tensors[0].device, []).append(name)
        else:
            merged[name] = tensors[0].clone()
    for other, label in zip(inputs[1:], labels[1:], strict=True):
        if extra := next((name for name in other if name not in inputs[0]), None):
            raise InputError(f"{label}: {extra}: is not in model 0")
    for names in averaged.values():
        columns = [[model[name] for name in names] for model in inputs]
        merged |= zip(names, foreach_weighted_average(columns, coefficients), strict=True)
    return {name: merged[shared.get(name, name)] for name in inputs[0]}


def load_merged(
    models: Sequence[Location | str],
    /,
    weights: Weights | None = None,
    *,
    base: Location | str | None = None,
    device: "torch.device | str" = "cpu",
    **options: Any,
) -> "PreTrainedModel":
    """The transformers model that ``merge_models`` with the same options would write, merged while it is loaded.

        load_merged(["a", "b"], [3, 1], base="start", method="ties", density=0.2)

    The engine makes each tensor when transformers asks for it, straight into its memory: nothing is written to disk and
    no second copy of the model exists. Beside the model there are the engine's buffers (``max_memory``), on CUDA also
    two pinned buffers of the largest tensor's size, of which one is filled while the other is copied; that path was
    never run on a GPU, its order of steps is tested without one. slerp, multislerp and model_stock read all inputs once
    more beforehand. The CPU computes the weights, so they have the bits of the file merge on every device.

    Args:
        models: K checkpoint directories or fsspec URLs, or LoRA adapters on the base; the first checkpoint, else the
            base, gives config.json, thus the class.
        weights: K numbers, divided by their sum unless ``normalize=False``; "uniform"; "tokens" or "samples" from each
            branch.json. None: "tokens", as on the command line.
        base: theta_0's directory, for methods that need it.
        device: where the model goes. Other than "cpu" it needs accelerate.
        options: fields of ``MergeConfig`` that do not concern output files: method, scale, density, dtype,
            allow_nonfinite, threads, ... (``models`` holds each model's own weight, density, gamma and epsilon).

    Returns:
        The model in evaluation mode, tied weights tied, float tensors in ``dtype``, by default the checkpoints' own.

    Raises:
        InputError: an option is unknown (the nearest is named) or wrong, a directory breaks a rule, tensors disagree, a
            value is not finite, or the model's class does not have the tensors that the checkpoints hold.
    """
    paths = [_location(path) for path in models]
    start = None if base is None else _location(base)
    config = _merge_config(weights, options)
    place = _checked_device(device)
    inputs = read_inputs(paths, resolve_weights(paths, config), start, config)
    config = replace(config, chunk_kib=fit_memory(inputs, config))
    kind = kind_of(inputs.companions)
    plan = make_plan(inputs, config, SilentProgress())
    with open_merged(plan, config, place if place.type == "cuda" else None) as source:
        fit_config(kind, source, inputs.dequantized)
        return build_model(inputs.companions, kind, source, place)


def _location(path: Location | str) -> Location:
    found = as_location(path)
    return found.expanduser() if isinstance(found, Path) else found


def _merge_config(weights: Weights | None, options: Mapping[str, Any]) -> MergeConfig:
    for name in _OF_FILES:
        if name in options:
            raise InputError(f"load_merged: {name}: concerns an output's files, must be absent")
    given = {} if weights is None else {"weights": weights}
    return parse(MergeConfig, {**options, **given}, "load_merged")


def _checked_device(device: "torch.device | str") -> "torch.device":
    import torch

    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device: {one_line(error)}") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device: must be there, got {str(device)!r} where torch finds no GPU")
    if place.type != "cpu" and importlib.util.find_spec("accelerate") is None:
        raise InputError(f"device: {str(device)!r} needs accelerate: pip install accelerate")
    return place


def _with_base(
    models: "Sequence[Mapping[str, Tensor]]",
    weights: Sequence[float],
    base: "Mapping[str, Tensor] | None",
    scale: float,
) -> "tuple[list[Mapping[str, Tensor]], list[float]]":
    """The inputs that take part, the base last, and their coefficients."""
    if not models or len(models) != len(weights):
        raise InputError(
            f"merge: needs one weight for each model, got {len(weights)} for {len(models)} models"
        )
    scaled = [scale * weight for weight in weights]
    if scale == 1.0:
        return list(models), scaled
    if base is None:
        raise InputError(f"merge: scale {scale:g} needs a base model")
    return [*models, base], [*scaled, 1.0 - scale]


def _same_tensor(
    name: str, inputs: "Sequence[Mapping[str, Tensor]]", labels: Sequence[str]
) -> "list[Tensor]":
    """One name's tensors of all inputs, found to agree."""
    import torch

    first = inputs[0][name]
    for model, label in zip(inputs, labels, strict=True):
        if name not in model:
            raise InputError(f"{label}: {name}: is missing, model 0 has it")
        found = model[name]
        if not isinstance(found, torch.Tensor):
            raise InputError(f"{label}: {name}: must be a tensor, got {type(found).__name__}")
        if found.shape != first.shape:
            raise InputError(
                f"{label}: {name}: shape must be {list(first.shape)} as in model 0, got {list(found.shape)}"
            )
        if found.device != first.device:
            raise InputError(
                f"{label}: {name}: must be on {first.device} as in model 0, is on {found.device}"
            )
        if _is_averaged(found) and _is_averaged(first):
            continue
        if found.dtype != first.dtype:
            raise InputError(
                f"{label}: {name}: dtype must be {first.dtype} as in model 0, got {found.dtype}"
            )
        if not torch.equal(found, first):
            raise InputError(
                f"{label}: {name}: a {found.dtype} tensor cannot be averaged and must equal model 0's"
            )
    return [model[name] for model in inputs]


def _is_averaged(tensor: "Tensor") -> bool:
    import torch

    return tensor.dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _identity(tensor: "Tensor") -> tuple[object, ...]:
    """What two names have in common that share a tensor."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()
