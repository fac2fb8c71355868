"""Sketches of a module's parameters from its input x and its output's gradient dy, kind by kind."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from merit_fast.sketch.capture.convolutions import conv_backward, signal_backward, sketch_bias
from merit_fast.sketch.capture.experts import (
    experts_backward,
    experts_inputs,
    experts_names,
    is_experts,
)
from merit_fast.sketch.capture.layout import Pass, Site
from merit_fast.sketch.capture.norms import epsilon_of_rms_norm, unit_of_affine
from merit_fast.sketch.divided.tensor_parallel import LocalPart, counts_once
from merit_fast.sketch.divided.wrapping import own_forward

_WEIGHT_AND_BIAS = frozenset({"weight", "bias"})
# (site, run, dy, *inputs) adds to ``run``.
Backward = Callable[..., None]


@dataclass(frozen=True)
class Cover:
    """Formula for some parameters of one module.

    Attributes:
        names: local names of the parameters that the formula knows; no others.
        inputs: the tensors to keep of a call's arguments; None for a call of another form.
        backward: sketches from these and the output's gradient.
    """

    names: frozenset[str]
    inputs: Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], list[Tensor] | None]
    backward: Backward


def cover_of(site: Site) -> Cover | None:
    """Chooses the formula for a module that is known to compute it; None for all others.

    A class is known by its own ``forward``, which neither a subclass nor the object may replace.

    Raises:
        MeritFastError: per-example gradients of such a module do not exist.
    """
    module = site.module
    if isinstance(module, _BatchNorm) and module.training:
        raise site.error("mixes the examples of a batch; call model.eval()")
    if isinstance(module, nn.Embedding) and (
        module.scale_grad_by_freq or module.max_norm is not None
    ):
        raise site.error("has scale_grad_by_freq or max_norm, which depend on the whole batch")
    for choose in (
        _linear_cover,
        _embedding_cover,
        _conv_cover,
        _signal_cover,
        _experts_cover,
        _affine_cover,
    ):
        cover = choose(site)
        if cover is not None:
            return cover
    return None


def _linear_cover(site: Site) -> Cover | None:
    module = site.module
    forward = own_forward(module)
    if isinstance(module, nn.Linear) and forward is nn.Linear.forward:
        return Cover(_WEIGHT_AND_BIAS, one_tensor, linear_backward)
    kind = type(module)
    is_conv1d = kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers")
    if is_conv1d and forward is kind.forward:
        return Cover(_WEIGHT_AND_BIAS, one_tensor, conv1d_backward)
    return None


def _embedding_cover(site: Site) -> Cover | None:
    module = site.module
    if not isinstance(module, nn.Embedding) or own_forward(module) is not nn.Embedding.forward:
        return None
    backward = functools.partial(embedding_backward, padding_idx=module.padding_idx)
    return Cover(frozenset({"weight"}), one_tensor, backward)


def _conv_cover(site: Site) -> Cover | None:
    module = site.module
    for kind in (nn.Conv2d, nn.Conv3d):
        if (
            isinstance(module, kind)
            and own_forward(module) is kind.forward
            and type(module)._conv_forward is kind._conv_forward
            and "_conv_forward" not in module.__dict__
            and set(module.dilation) == {1}
            and module.groups == 1
        ):
            return Cover(_WEIGHT_AND_BIAS, _batched_images, conv_backward)
    return None


def _signal_cover(site: Site) -> Cover | None:
    module = site.module
    if (
        not isinstance(module, nn.Conv1d)
        or own_forward(module) is not nn.Conv1d.forward
        or type(module)._conv_forward is not nn.Conv1d._conv_forward
        or "_conv_forward" in module.__dict__
        or module.groups not in (1, module.in_channels)
    ):
        return None
    return Cover(_WEIGHT_AND_BIAS, _batched_images, signal_backward)


def filters_of(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters of depthwise convolutions among a module's children, by local name.

    Mixers read them, and call F.conv1d or a kernel themselves.
    """
    return [
        (f"{name}.{local}", parameter)
        for name, child in module.named_children()
        if isinstance(child, nn.Conv1d) and child.groups == child.in_channels > 1
        if _signal_cover(Site(child, {})) is not None
        for local, parameter in child.named_parameters(recurse=False)
    ]


def _experts_cover(site: Site) -> Cover | None:
    module = site.module
    if own_forward(module) is not type(module).forward or not is_experts(module):
        return None
    return Cover(experts_names(module), experts_inputs, experts_backward)


def _affine_cover(site: Site) -> Cover | None:
    if own_forward(site.module) is not type(site.module).forward:
        return None
    unit = unit_of_affine(site.module)
    if unit is None:
        return None
    epsilon = epsilon_of_rms_norm(unit)
    backward = functools.partial(affine_backward, unit, epsilon)
    return Cover(_WEIGHT_AND_BIAS, _values_to_scale, backward)


def linear_backward(site: Site, run: Pass, dy: Tensor, x: Tensor) -> None:
    """Sketches dy^T x; under tensor parallelism the slice of it that this process has."""
    rows = LocalPart.of(dy)
    columns = LocalPart.of(x)
    is_counted = counts_once(dy) or not (rows.is_whole and columns.is_whole)
    (dy_part, x_part), offsets = run.divide(site, rows.values, columns.values)
    name = site.owned.get("weight")
    if name and is_counted:
        slice_ = (rows.first, columns.first, columns.width)
        run.add_product(name, dy_part, x_part, offsets, place=slice_)
    if counts_once(dy) or not rows.is_whole:
        (dy_whole,), _ = run.divide(site, rows.padded())
        sketch_bias(site, run, dy_whole, offsets)


def conv1d_backward(site: Site, run: Pass, dy: Tensor, x: Tensor) -> None:
    """Sketches GPT-2's Conv1D, a linear layer whose weight is stored [I, O]."""
    (dy, x), offsets = run.divide(site, dy, x)
    if name := site.owned.get("weight"):
        run.add_product(name, x, dy, offsets)
    sketch_bias(site, run, dy, offsets)


def embedding_backward(
    site: Site, run: Pass, dy: Tensor, token_ids: Tensor, padding_idx: int | None = None
) -> None:
    if hasattr(dy, "device_mesh"):
        part = LocalPart.of(dy)
        if part.is_whole and not counts_once(dy):
            return
        dy = part.padded()
        token_ids = LocalPart.of(token_ids).values
    (dy, ids), offsets = run.divide(site, dy, token_ids.unsqueeze(-1))
    ids = ids.squeeze(-1).long()
    if padding_idx is not None:  # torch gives this row no gradient
        dy = dy.masked_fill((ids == padding_idx).unsqueeze(-1), 0.0)
    run.add_lookup(site.owned["weight"], dy, ids, offsets)


def affine_backward(
    unit: nn.Module, epsilon: float | None, site: Site, run: Pass, dy: Tensor, x: Tensor
) -> None:
    """Sketches norms, y = a(w) n(x) + b with a linear: the gradient of w is the sum of dy n(x).

    ``unit`` computes n; the kernel does where n is an RMSNorm of that ``epsilon``.
    """
    if "weight" in site.owned and epsilon is None:
        x = unit.forward(x)
    (dy, x), offsets = run.divide(site, dy, x)
    if name := site.owned.get("weight"):
        run.add_vector(name, dy, offsets, x, epsilon)
    sketch_bias(site, run, dy, offsets)


def one_tensor(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Tensor] | None:
    """The tensor of a call that has no other arguments; None for other calls."""
    values = [*args, *kwargs.values()]
    return values if len(values) == 1 and isinstance(values[0], Tensor) else None


def _batched_images(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Tensor] | None:
    values = one_tensor(module, args, kwargs)
    dims = len(module.kernel_size)  # type: ignore[arg-type]
    return values if values is not None and values[0].dim() == dims + 2 else None


def _values_to_scale(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Tensor] | None:
    """The input [..., C] of a norm over C."""
    values = one_tensor(module, args, kwargs)
    channels = len(module.weight)  # type: ignore[arg-type]
    return values if values is not None and values[0].shape[-1:] == (channels,) else None
