"""Gradients of any module, one example at a time: it runs again with its weights unfrozen."""

import threading

import torch
from torch import Tensor

from merit_fast.kernels.sketch import flat_sketch, matrix_shape
from merit_fast.sketch.capture.layout import Pass, Site
from merit_fast.sketch.capture.twins import own_parameters, twin_of

_local = threading.local()


def is_replaying() -> bool:
    """Whether this thread replays a module; hooks then stay inactive."""
    return getattr(_local, "replaying", False)


def replay_backward(site: Site, run: Pass, dy: Tensor, x: Tensor) -> None:
    """Sketches any module that maps [B, ...] to [B, ...].

    The module runs again per example, with its weights unfrozen.
    """
    parameters = own_parameters(site.module)
    twin = twin_of(site.module, {local: p.detach().clone() for local, p in parameters.items()})
    wanted = [twin.get_parameter(local).requires_grad_() for local in site.owned]
    sums = [p.new_zeros(run.size, *p.shape, requires_grad=False) for p in wanted]
    pairs = zip(run.examples(site, x), run.examples(site, dy), strict=True)
    for i, (example_x, example_dy) in enumerate(pairs):
        _local.replaying = True
        try:
            with torch.enable_grad():
                output = twin.forward(example_x)
        finally:
            _local.replaying = False
        gradients = torch.autograd.grad(output, wanted, example_dy, allow_unused=True)
        for total, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                total[i] = gradient
    for name, gradient in zip(site.owned.values(), sums, strict=True):
        rows = gradient.view(run.size, *matrix_shape(gradient.shape[1:]))
        flat_sketch(rows, name, run.sketch, scale=run.scales.get(name), out=run.out(dy.device))
