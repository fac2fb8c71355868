"""Diagonal preconditioning of gradients by Adam's second moments: ``normalize="adam"``."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from merit_fast.errors import InputError, MeritFastError, one_line, show
from merit_fast.kernels.optimizer import second_moments
from merit_fast.kernels.sketch import matrix_shape
from merit_fast.sketch.names import canonical_name, named_parameters


def requested_scales(
    model: nn.Module,
    normalize: str | None,
    optimizer: Any,
    names: Iterable[str],
    allowed: str = "None or 'adam'",
) -> dict[str, Tensor]:
    """Scales that ``normalize`` asks for: ``adam_scales`` for "adam", no scale for None.

    Args:
        allowed: the values of ``normalize``, in words, for the error.

    Raises:
        InputError: another ``normalize``, or an optimizer without it.
        MeritFastError: as ``adam_scales``.
    """
    if normalize not in (None, "adam"):
        raise InputError(f"normalize: must be {allowed}, got {show(normalize)}")
    if (normalize is None) != (optimizer is None):
        raise InputError("optimizer: must be given with normalize='adam', and only then")
    return adam_scales(model, optimizer, names) if normalize else {}


def adam_scales(model: nn.Module, optimizer: Any, names: Iterable[str]) -> dict[str, Tensor]:
    """Factors of the gradient's entries in ``torch.optim.Adam`` and ``AdamW`` at their state.

        scale = 1 / (sqrt(v / (1 - beta2 ** step)) + eps)

    with v = exp_avg_sq, or max_exp_avg_sq with amsgrad; ``FusedAdamW``'s 8-bit codes are decoded.

    A sketch of ``scale * g`` is linear in g, so means over examples, blocks and ranks stay sums.
    LESS (Xia et al. 2024, arXiv 2402.04333) instead puts every example through Adam's whole update,
    whose moments include the example's own gradient. That is not linear in g, so its mean over
    examples is no function of the mean gradient.

    An entry that never had a gradient (the embedding of a token not seen) has scale 1 / eps and
    would outweigh all others: take an optimizer that has seen the data, or leave embeddings out.

    Args:
        model: the model whose parameters ``optimizer`` holds.
        optimizer: an Adam or AdamW that has stepped, any variant (fused, foreach, capturable), or a
            wrapper with its ``state`` and ``param_groups``.
        names: parameters of ``model``.

    Returns:
        Scales by name, float32 in the shape that is hashed (``matrix_shape``), on the moments'
        device.

    Raises:
        MeritFastError: the model or the optimizer lacks a parameter, or it has no second moments;
            the message names it.
    """
    parameters = dict(named_parameters(model, remove_duplicate=False))
    groups = {
        id(parameter): group for group in optimizer.param_groups for parameter in group["params"]
    }
    scales = {}
    for name in names:
        if name not in parameters:
            raise MeritFastError(f"adam_scales: the model has no parameter {name}")
        parameter = parameters[name]
        if id(parameter) not in groups:
            raise MeritFastError(f"adam_scales: parameter {name} is not among the optimizer's")
        group = groups[id(parameter)]
        scales[name] = _scale(name, parameter, group, optimizer.state.get(parameter, {}))
    return scales


def adam_scales_of_checkpoint(
    model: nn.Module, directory: str | Path, names: Iterable[str]
) -> dict[str, Tensor]:
    """``adam_scales`` from ``optimizer.pt`` of a Trainer's checkpoint, read without pickled code.

    The file numbers the parameters: first those with weight decay, then the others, each in the
    model's order. The same parameters must be trainable in ``model`` as in the run.

    Raises:
        InputError: the file is absent or broken, or numbers other parameters than ``model``'s.
        MeritFastError: as ``adam_scales``.
    """
    from transformers import Trainer

    file = Path(directory) / "optimizer.pt"
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        saved_groups = saved["param_groups"]
        moments = saved["state"]
    except Exception as error:  # the reader raises many kinds; all mean that it cannot be read
        raise InputError(f"{file}: is not an optimizer's state ({one_line(error)})") from None
    # The method uses no attribute of the Trainer.
    names_of_decayed = Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    decayed = set(names_of_decayed)
    trainable = [
        (name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad
    ]
    ordered = sorted(trainable, key=lambda item: item[0] not in decayed)
    numbers = [(number, group) for group in saved_groups for number in group["params"]]
    if len(numbers) != len(ordered):
        raise InputError(
            f"{file}: must hold the model's {len(ordered)} trainable parameters, got {len(numbers)}"
        )
    by_name = {
        canonical_name(name): (p, group, number)
        for (name, p), (number, group) in zip(ordered, numbers, strict=True)
    }
    scales = {}
    for name in names:
        if name not in by_name:
            raise MeritFastError(f"adam_scales: the model has no trainable parameter {name}")
        parameter, group, number = by_name[name]
        scales[name] = _scale(name, parameter, group, moments.get(number, {}))
    return scales


def _scale(
    name: str, parameter: nn.Parameter, group: Mapping[str, Any], state: Mapping[str, Any]
) -> Tensor:
    if "betas" not in group or "eps" not in group:
        raise MeritFastError(f"adam_scales: parameter {name} is not optimized by Adam or AdamW")
    key = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
    if key not in state or "step" not in state:
        raise MeritFastError(
            f"adam_scales: parameter {name} has no second moments yet: "
            "the optimizer never stepped it"
        )
    moments = state[key] if group.get("amsgrad") else second_moments(state)
    if moments.shape != parameter.shape:
        raise MeritFastError(
            f"adam_scales: parameter {name} is {list(parameter.shape)}, its second moments "
            f"{list(moments.shape)}"
        )
    correction = 1.0 - float(group["betas"][1]) ** float(state["step"])
    scale: Tensor = (
        (moments.detach().float() / correction).sqrt_().add_(float(group["eps"])).reciprocal_()
    )
    divided: Any = scale  # a DTensor where FSDP2 divides the optimizer's states
    scale = divided.full_tensor() if hasattr(divided, "full_tensor") else scale
    return scale.reshape(matrix_shape(parameter.shape)).contiguous()
