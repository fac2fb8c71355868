"""Sketches of a module's parameters from its input x and its output's gradient dy, kind by kind."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from merit_fast.kernels.sketch import (
    embedding_grad_sketch,
    linear_grad_sketch,
    vector_grad_sketch,
)
from merit_fast.sketch.capture.experts import experts_backward, experts_inputs, is_experts
from merit_fast.sketch.capture.layout import Pass, Site
from merit_fast.sketch.capture.norms import epsilon_of_rms_norm, unit_of_affine
from merit_fast.sketch.capture.replay import replay_backward

Backward = Callable[..., None]  # (site, run, dy, *inputs)


@dataclass(frozen=True)
class Cover:
    """Cover of one module: the inputs to keep, and the backward function that sketches."""

    site: Site
    inputs: Callable[[Site, list[Any]], list[Tensor]]
    backward: Backward
    lookup: bool = False  # an embedding: all examples share the rows for [1, T] indices


class Tap(torch.autograd.Function):
    """Identity on ``output`` whose backward pass calls ``sink(dy, *saved inputs)``.

    Autograd itself keeps the inputs, so checkpointing and offloading treat them as its own. The
    result is no view, so it may be modified in place, and autograd still notices such changes to
    saved tensors. ``anchor`` requires a gradient, so that with frozen weights the graph begins
    here.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, output: Tensor, sink: Callable[..., None], *inputs: Tensor
    ) -> Tensor:
        ctx.sink = sink
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        return output.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        if dy is not None:
            ctx.sink(dy, *inputs)
        return (None, dy if ctx.needs_input_grad[1] else None, None, *(None for _ in inputs))


def cover_of(site: Site) -> Cover | None:
    """Chooses the cover of a module; None if only taps of raw uses, or a replay, can cover it.

    Raises:
        MeritFastError: per-example gradients of such a module do not exist, or are not what a hook
            sees.
    """
    module = site.module
    forward = type(site.module).forward
    if isinstance(module, _BatchNorm) and module.training:
        raise site.refusal("mixes the examples of a batch; call model.eval()")
    if isinstance(module, nn.Embedding) and (
        module.scale_grad_by_freq or module.max_norm is not None
    ):
        raise site.refusal("has scale_grad_by_freq or max_norm, which depend on the whole batch")
    if isinstance(module, nn.Linear) and forward is nn.Linear.forward:
        return Cover(site, first_input, linear_backward)
    if type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers"):
        return Cover(site, first_input, conv1d_backward)
    if isinstance(module, nn.Embedding) and forward is nn.Embedding.forward:
        return Cover(site, first_input, embedding_backward, lookup=True)
    plain_conv = isinstance(module, nn.Conv2d | nn.Conv3d) and set(module.dilation) == {1}
    if plain_conv and module.groups == 1:
        return Cover(site, first_input, conv_backward)
    if is_experts(site):
        return Cover(site, experts_inputs, experts_backward)
    unit = unit_of_affine(module)
    if unit is not None:
        epsilon = epsilon_of_rms_norm(unit)
        return Cover(site, _only_input, functools.partial(affine_backward, unit, epsilon))
    return None


def linear_backward(site: Site, run: Pass, dy: Tensor, x: Tensor) -> None:
    (dy, x), offsets = run.divide(site, dy, x)
    if name := site.owned.get("weight"):
        _linear(run, name, dy, x, offsets)
    _bias(site, run, dy, offsets)


def conv1d_backward(site: Site, run: Pass, dy: Tensor, x: Tensor) -> None:
    """Sketches GPT-2's Conv1D, a linear layer whose weight is stored [I, O]."""
    (dy, x), offsets = run.divide(site, dy, x)
    if name := site.owned.get("weight"):
        _linear(run, name, x, dy, offsets)
    _bias(site, run, dy, offsets)


def embedding_backward(
    site: Site, run: Pass, dy: Tensor, token_ids: Tensor, padding_idx: int | None = None
) -> None:
    padding_idx = getattr(site.module, "padding_idx", padding_idx)
    (dy, ids), offsets = run.divide(site, dy, token_ids.unsqueeze(-1))
    ids = ids.squeeze(-1).long()
    if padding_idx is not None:  # torch gives this row no gradient
        dy = dy.masked_fill((ids == padding_idx).unsqueeze(-1), 0.0)
    name = site.name
    out = run.out(dy.device)
    scale = run.scales.get(name)
    embedding_grad_sketch(dy, ids, name, run.sketch, cu_seqlens=offsets, scale=scale, out=out)


def conv_backward(site: Site, run: Pass, dy: Tensor, x: Tensor) -> None:
    """Sketches Conv2d and Conv3d: the unfolded windows of x times dy.

    Patch embeddings unfold without a copy.
    """
    module = site.module
    assert isinstance(module, _ConvNd)
    dims = len(module.kernel_size)
    if x.dim() != dims + 2:
        raise site.refusal(f"sees an input without batch dimension, {list(x.shape)}")
    if any(module._reversed_padding_repeated_twice):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    for i in range(dims):
        x = x.unfold(2 + i, module.kernel_size[i], module.stride[i])
    positions = list(range(2, 2 + dims))
    x = x.permute(0, *positions, 1, *range(2 + dims, 2 + 2 * dims))
    windows = x.flatten(1, dims).flatten(2)  # [B, L, I k...]
    (dy, windows), offsets = run.divide(site, dy.flatten(2).transpose(1, 2), windows)
    if name := site.owned.get("weight"):
        _linear(run, name, dy, windows, offsets)
    _bias(site, run, dy, offsets)


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
        vector_grad_sketch(
            dy, name, run.sketch, x=x, epsilon=epsilon, **_options(run, name, dy, offsets)
        )
    _bias(site, run, dy, offsets)


def replay(site: Site) -> Cover:
    return Cover(site, _only_input, replay_backward)


def _linear(run: Pass, name: str, dy: Tensor, x: Tensor, offsets: Tensor | None) -> None:
    linear_grad_sketch(dy, x, name, run.sketch, **_options(run, name, dy, offsets))


def _bias(site: Site, run: Pass, dy: Tensor, offsets: Tensor | None) -> None:
    if name := site.owned.get("bias"):
        vector_grad_sketch(dy, name, run.sketch, **_options(run, name, dy, offsets))


def _options(run: Pass, name: str, dy: Tensor, offsets: Tensor | None) -> dict[str, Any]:
    return {"cu_seqlens": offsets, "scale": run.scales.get(name), "out": run.out(dy.device)}


def first_input(site: Site, values: list[Any]) -> list[Tensor]:
    if not values or not isinstance(values[0], Tensor):
        raise site.refusal("is not called with a tensor")
    return [values[0]]


def _only_input(site: Site, values: list[Any]) -> list[Tensor]:
    tensors = [value for value in values if isinstance(value, Tensor)]
    if len(tensors) != 1:
        raise site.refusal(f"maps {len(tensors)} tensors, not one")
    return tensors
