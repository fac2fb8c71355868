"""How a module's input x and its output's gradient dy become calls of the sketch kernels, kind by kind."""

import copy
import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from merit_fast.kernels.sketch import (
    embedding_grad_sketch,
    flat_sketch,
    linear_grad_sketch,
    matrix_shape,
    vector_grad_sketch,
)
from merit_fast.sketch.capture.layout import Pass, Site

Backward = Callable[..., None]  # (site, run, dy, *inputs)
_local = threading.local()


@dataclass(frozen=True)
class Cover:
    """How one module is covered: which of its inputs are kept, and what its output's gradient does with them."""

    site: Site
    inputs: Callable[[Site, list[Any]], list[Tensor]]
    backward: Backward
    lookup: bool = False  # of an embedding: rows for [1, T] indices are shared by all examples


class Tap(torch.autograd.Function):
    """Identity on ``output``, whose backward pass hands dy and the saved inputs to ``sink(dy, *saved)``.

    The inputs are kept by autograd itself, so checkpointing and offloading treat them as its own.
    The result is no view, so it may be modified in place, and such changes to what others saved are
    still noticed. ``anchor`` requires a gradient, so that with frozen weights the graph begins
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


def cover(site: Site) -> Cover | None:
    """The way to cover a module by hooks; None if only its raw uses of parameters, or a replay, can do it.

    Raises:
        MeritFastError: per-example gradients of such a module do not exist, or are not what a hook
            sees.
    """
    from merit_fast.sketch.capture.experts import experts_backward, experts_inputs, is_experts

    module = site.module
    forward = type(site.module).forward
    if isinstance(module, _BatchNorm) and module.training:
        raise site.refusal("mixes the examples of a batch; call model.eval()")
    if isinstance(module, nn.Embedding) and (
        module.scale_grad_by_freq or module.max_norm is not None
    ):
        raise site.refusal("has scale_grad_by_freq or max_norm, which depend on the whole batch")
    if isinstance(module, nn.Linear) and forward is nn.Linear.forward:
        return Cover(site, _first_input, linear_backward)
    if type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers"):
        return Cover(site, _first_input, conv1d_backward)
    if isinstance(module, nn.Embedding) and forward is nn.Embedding.forward:
        return Cover(site, _first_input, embedding_backward, lookup=True)
    if (
        isinstance(module, nn.Conv2d | nn.Conv3d)
        and module.groups == 1
        and set(module.dilation) == {1}
    ):
        return Cover(site, _first_input, conv_backward)
    if is_experts(site):
        return Cover(site, experts_inputs, experts_backward)
    unit = _unit_of_affine(module)
    if unit is not None:
        epsilon = _epsilon_of_rms_norm(unit)
        return Cover(site, _only_input, functools.partial(affine_backward, unit, epsilon))
    return None


def linear_backward(site: Site, run: Pass, dy: Tensor, x: Tensor) -> None:
    (dy, x), offsets = run.divide(site, dy, x)
    if name := site.owned.get("weight"):
        _linear(run, name, dy, x, offsets)
    _bias(site, run, dy, offsets)


def conv1d_backward(site: Site, run: Pass, dy: Tensor, x: Tensor) -> None:
    """GPT-2's Conv1D: a linear layer whose weight is stored [I, O]."""
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
    """Conv2d and Conv3d: the windows of x, unfolded, times dy. Patch embeddings unfold without a copy."""
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
    places = list(range(2, 2 + dims))
    windows = (
        x.permute(0, *places, 1, *range(2 + dims, 2 + 2 * dims)).flatten(1, dims).flatten(2)
    )  # [B, L, I k...]
    (dy, windows), offsets = run.divide(site, dy.flatten(2).transpose(1, 2), windows)
    if name := site.owned.get("weight"):
        _linear(run, name, dy, windows, offsets)
    _bias(site, run, dy, offsets)


def affine_backward(
    unit: nn.Module, epsilon: float | None, site: Site, run: Pass, dy: Tensor, x: Tensor
) -> None:
    """Norms, y = a(w) n(x) + b with a linear: the gradient of w is the sum of dy n(x).

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


def is_replaying() -> bool:
    """Whether this thread runs a module again for its gradients: its hooks keep still."""
    return getattr(_local, "replaying", False)


def replay_backward(site: Site, run: Pass, dy: Tensor, x: Tensor) -> None:
    """Any module that maps [B, ...] to [B, ...]: run again for each example, with its weights unfrozen."""
    twin = _twin(site.module, {local: p.detach().clone() for local, p in _own(site.module).items()})
    wanted = [twin.get_parameter(local).requires_grad_() for local in site.owned]
    sums = [p.new_zeros(run.size, *p.shape, requires_grad=False) for p in wanted]
    for i, (one_x, one_dy) in enumerate(
        zip(run.examples(site, x), run.examples(site, dy), strict=True)
    ):
        _local.replaying = True
        try:
            with torch.enable_grad():
                output = twin.forward(one_x)
        finally:
            _local.replaying = False
        gradients = torch.autograd.grad(output, wanted, one_dy, allow_unused=True)
        for total, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                total[i] = gradient
    for name, gradient in zip(site.owned.values(), sums, strict=True):
        rows = gradient.view(run.size, *matrix_shape(gradient.shape[1:]))
        flat_sketch(rows, name, run.sketch, scale=run.scales.get(name), out=run.out(dy.device))


class RawUses(TorchFunctionMode):
    """Taps F.linear and F.embedding where a module calls them with its own parameters, as routers of experts do."""

    def __init__(self, site: Site, tap: Callable[..., Tensor]) -> None:
        super().__init__()
        self.site = site
        self.tap = tap
        self.names = {
            id(p): site.owned[local]
            for local, p in _own(site.module).items()
            if local in site.owned
        }
        self.seen: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func not in (F.linear, F.embedding) or len(args) < 2:
            return result
        x, weight, *rest = args
        bias = (rest[0] if rest else kwargs.get("bias")) if func is F.linear else None
        owned = {"weight": self.names.get(id(weight)), "bias": self.names.get(id(bias))}
        found = {local: name for local, name in owned.items() if name is not None}
        if not found:
            return result
        self.seen.update(found.values())
        part = Site(self.site.module, found, self.site.tower)
        if func is F.linear:
            return self.tap(Cover(part, _first_input, linear_backward), result, [x])
        padding = rest[0] if rest else kwargs.get("padding_idx")
        backward = functools.partial(embedding_backward, padding_idx=padding)
        return self.tap(Cover(part, _first_input, backward, lookup=True), result, [x])


def _linear(run: Pass, name: str, dy: Tensor, x: Tensor, offsets: Tensor | None) -> None:
    linear_grad_sketch(dy, x, name, run.sketch, **_options(run, name, dy, offsets))


def _bias(site: Site, run: Pass, dy: Tensor, offsets: Tensor | None) -> None:
    if name := site.owned.get("bias"):
        vector_grad_sketch(dy, name, run.sketch, **_options(run, name, dy, offsets))


def _options(run: Pass, name: str, dy: Tensor, offsets: Tensor | None) -> dict[str, Any]:
    return {"cu_seqlens": offsets, "scale": run.scales.get(name), "out": run.out(dy.device)}


def _first_input(site: Site, values: list[Any]) -> list[Tensor]:
    if not values or not isinstance(values[0], Tensor):
        raise site.refusal("is not called with a tensor")
    return [values[0]]


def _only_input(site: Site, values: list[Any]) -> list[Tensor]:
    tensors = [value for value in values if isinstance(value, Tensor)]
    if len(tensors) != 1:
        raise site.refusal(f"maps {len(tensors)} tensors, not one")
    return tensors


def _unit_of_affine(module: nn.Module) -> nn.Module | None:
    """For y = a(w) n(x) + b, found by trying: the module with such w, 0 or 1, and b = 0 that it returns n(x)."""
    own = _own(module)
    if set(own) not in ({"weight"}, {"weight", "bias"}) or any(p.dim() != 1 for p in own.values()):
        return None
    weight = own["weight"]
    generator = torch.Generator().manual_seed(0)
    x, w = (
        torch.randn(shape, generator=generator, dtype=torch.float32).to(weight.device)
        for shape in ((3, 2, len(weight)), weight.shape)
    )
    zero = torch.zeros_like(w)
    others = {local: zero for local in own if local != "weight"}
    try:
        low, high, at = (
            _twin(module, {"weight": v, **others}).forward(x) for v in (zero, zero + 1, w)
        )
        shifted = _twin(module, {"weight": w, **{local: w for local in others}}).forward(x)
        for value, result in ((1.0, high), (0.0, low)):
            bias = w if others else 0.0
            if torch.allclose(at - low, w * result, atol=1e-4) and torch.allclose(
                shifted, at + bias, atol=1e-4
            ):
                units = {"weight": torch.full_like(weight, value, requires_grad=False)}
                return _twin(
                    module, {**units, **{local: torch.zeros_like(own[local]) for local in others}}
                )
    except (
        Exception
    ):  # whatever a foreign module raises on the trial: it is no norm over its last dimension
        return None
    return None


def _epsilon_of_rms_norm(unit: nn.Module) -> float | None:
    """If unit(x) is x * rsqrt(mean(x ** 2, -1) + epsilon), found by trying: epsilon."""
    epsilon = getattr(unit, "variance_epsilon", getattr(unit, "eps", None))
    if not isinstance(epsilon, float):
        return None
    weight = unit.get_parameter("weight")
    x = torch.randn(4, 3, len(weight), generator=torch.Generator().manual_seed(1)).to(weight.device)
    x *= torch.tensor([1e3, 1.0, 1e-2, epsilon**0.5], device=x.device).view(
        4, 1, 1
    )  # the last tells epsilons apart
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    exact = _twin(unit, {local: parameter.float() for local, parameter in _own(unit).items()})
    return epsilon if torch.allclose(exact.forward(x), expected, rtol=1e-4, atol=1e-6) else None


def _twin(module: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """The same module, with other values for its own parameters."""
    twin = copy.copy(module)
    twin._parameters = {
        **module._parameters,
        **{k: nn.Parameter(v, False) for k, v in values.items()},
    }
    twin.__dict__.pop("forward", None)
    return twin


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))
