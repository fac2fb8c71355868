"""Routed experts of transformers 5: stacked matrices in one module that gets tokens and routing."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from merit_fast.sketch.capture.layout import Pass, Site
from merit_fast.sketch.divided.places import present

_PROBE_TOKENS = 4


def is_experts(module: nn.Module) -> bool:
    """Whether the module holds stacked experts that compute what ``experts_backward`` derives."""
    parameters = dict(module.named_parameters(recurse=False))
    for local in (_first_name(module), "down_proj"):
        if local not in parameters or parameters[local].dim() != 3:
            return False
    return _agrees(module)


def experts_names(module: nn.Module) -> frozenset[str]:
    """Local names of the parameters in the formula of ``experts_backward``."""
    first = _first_name(module)
    return frozenset({first, f"{first}_bias", "down_proj", "down_proj_bias"})


def experts_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Tensor] | None:
    """Hidden states [N, H], expert ids [N, k] and routing weights [N, k]; None: another call."""
    values = [*args, *kwargs.values()]
    tensors = [value for value in values if isinstance(value, Tensor)]
    ids = [value for value in tensors if not value.is_floating_point()]
    weights = [value for value in tensors[1:] if value.is_floating_point()]
    if (
        len(values) != 3
        or len(ids) != 1
        or len(weights) != 1
        or ids[0].shape != weights[0].shape
        or tensors[0].dim() != 2
    ):
        return None
    return [tensors[0], ids[0], weights[0]]


def experts_backward(
    site: Site, run: Pass, dy: Tensor, states: Tensor, ids: Tensor, weights: Tensor
) -> None:
    """Sketches dW of every expert that got a token; computes the forward again, expert by expert.

        y[n] = sum over k of weights[n, k] * (act(x[n] @ up[ids[n, k]].T) @ down[ids[n, k]].T)

    A stack [E, O, I] is hashed as [E O, I]: expert e has the rows from e O on.
    """
    module = site.module
    example = run.example_of_rows(site, states)
    experts = int(next(iter(module.parameters(recurse=False))).shape[0])
    # By expert, then token, so by example within an expert.
    order = torch.argsort(ids.reshape(-1), stable=True)
    token = order.div(ids.shape[1], rounding_mode="floor")
    cells = ids.reshape(-1)[order] * run.size + example[token]
    counts = torch.bincount(cells, minlength=experts * run.size).view(experts, run.size).cpu()
    start = 0
    with present(module):  # what accelerate offloads is not there in the backward pass
        for expert, stop in enumerate(counts.sum(1).cumsum(0).tolist()):
            if stop > start:
                rows = token[start:stop]
                routed = dy[rows] * weights.reshape(-1)[order[start:stop]].unsqueeze(-1)
                bounds = F.pad(counts[expert].cumsum(0), (1, 0))
                _one_expert(site, run, expert, states[rows], routed, bounds)
            start = stop


def _one_expert(site: Site, run: Pass, expert: int, x: Tensor, dy: Tensor, bounds: Tensor) -> None:
    module = site.module
    name = _first_name(site.module)
    up = getattr(module, name)[expert]
    down = module.down_proj[expert]  # type: ignore[index]
    x = x.to(up.dtype)
    dy = dy.to(up.dtype)
    transposed = getattr(module, "is_transposed", False)
    with torch.autocast(x.device.type, enabled=False):
        inner = x @ (up if transposed else up.T)
        if f"{name}_bias" in module._parameters:
            inner = inner + getattr(module, f"{name}_bias")[expert]
        with torch.enable_grad():
            inner = inner.requires_grad_()
            hidden = _activate(module, inner)
        (d_inner,) = torch.autograd.grad(
            hidden, inner, (dy @ (down.T if transposed else down)).to(hidden.dtype)
        )
    for local, gradient, value in (("down_proj", dy, hidden.detach()), (name, d_inner, x)):
        if full := site.owned.get(local):
            left, right = (value, gradient) if transposed else (gradient, value)
            run.add_product(full, left, right, bounds.to(x.device), part=expert)
        if full := site.owned.get(f"{local}_bias"):  # [E, O]: one row an expert
            segments = torch.repeat_interleave(torch.arange(run.size), bounds.diff()).to(x.device)
            sums = gradient.new_zeros(run.size, gradient.shape[1], dtype=torch.float32)
            sums.index_add_(0, segments, gradient.float())
            run.add_gradients(full, sums.unsqueeze(1), first_row=expert)


def _first_name(module: nn.Module) -> str:
    return "gate_up_proj" if "gate_up_proj" in module._parameters else "up_proj"


def _activate(module: nn.Module, inner: Tensor) -> Tensor:
    if _first_name(module) == "up_proj":
        return module.act_fn(inner)  # type: ignore[operator, no-any-return]
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(inner)  # type: ignore[operator, no-any-return]
    gate, up = inner.chunk(2, dim=-1)
    return module.act_fn(gate) * up  # type: ignore[operator, no-any-return]


@torch.no_grad()
def _agrees(module: nn.Module) -> bool:
    """Whether the module computes y above, found by a trial."""
    if getattr(module, "_is_expert_parallel", False):
        return False
    with present(module):
        return _trial_agrees(module)


def _trial_agrees(module: nn.Module) -> bool:
    first = getattr(module, _first_name(module))
    down = module.down_proj
    transposed = getattr(module, "is_transposed", False)
    width = first.shape[1] if transposed else first.shape[2]
    experts = len(first)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_PROBE_TOKENS, width, generator=generator).to(first.device, first.dtype)
    ids = (torch.arange(2 * _PROBE_TOKENS, device=first.device) % experts).view(-1, 2)[
        :, : min(2, experts)
    ]
    weights = torch.rand(ids.shape, generator=generator).to(first.device, first.dtype)
    try:
        result = type(module).forward(module, x, ids, weights)
    except Exception:  # a foreign module raises anything; it is no such mixture
        return False
    truth = torch.zeros_like(result, dtype=torch.float32)
    for n, k in ((n, k) for n in range(len(ids)) for k in range(ids.shape[1])):
        e = int(ids[n, k])
        inner = x[n : n + 1] @ (first[e] if transposed else first[e].T)
        if f"{_first_name(module)}_bias" in module._parameters:
            inner = inner + getattr(module, f"{_first_name(module)}_bias")[e]
        y = _activate(module, inner) @ (down[e] if transposed else down[e].T)  # type: ignore[index]
        if "down_proj_bias" in module._parameters:
            y = y + module.down_proj_bias[e]  # type: ignore[index]
        truth[n] += (weights[n, k] * y[0]).float()
    distance = (result.float() - truth).norm()
    floor = 1e-3 if first.dtype == torch.float32 else 0.05
    return bool(distance <= floor * truth.norm())
