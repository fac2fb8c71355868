"""Gradients of any module's parameters: a backward pass per example, through that module only.

The module runs once, with whatever arguments, random numbers and state it has. Its parameters stand
in for the model's during the call, so a pass from its outputs ends at them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from merit_fast.sketch.capture.layout import Pass, Site
from merit_fast.sketch.capture.taps import ExtraPass, entered, masked


def slot_of(module: nn.Module, local: str) -> tuple[dict[str, nn.Parameter | None], str]:
    """The dictionary that holds a parameter of a module, or of its child ("conv1d.weight")."""
    child, _, key = local.rpartition(".")
    return module.get_submodule(child)._parameters, key


@contextmanager
def replaced(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Lets the module see other values as its parameters."""
    slots = [(*slot_of(module, local), value) for local, value in values.items()]
    before = [parameters[key] for parameters, key, _ in slots]
    for parameters, key, value in slots:
        parameters[key] = value  # type: ignore[assignment]  # a view of the parameter
    try:
        yield
    finally:
        for (parameters, key, _), kept in zip(slots, before, strict=True):
            parameters[key] = kept


def local_backward(
    site: Site,
    targets: Sequence[Pass],
    run: Pass,
    outputs: Sequence[Tensor],
    stand_ins: Mapping[str, Tensor],
    dys: Sequence[Tensor | None],
) -> None:
    """Adds sketches of the gradients of ``stand_ins`` (local name -> parameter) to ``targets``."""
    wanted = {local: value for local, value in stand_ins.items() if local in site.owned}
    pairs = [(y, dy) for y, dy in zip(outputs, dys, strict=True) if dy is not None]
    pairs = [(y, dy) for y, dy in pairs if y.requires_grad]
    if not wanted or not pairs:
        return
    parts = [run.parts(site, dy) for _, dy in pairs]
    for example in range(run.size):
        grads = [dy for _, dy in pairs]
        if run.is_divided:
            indices = [part[example] for part in parts]
            if not any(bool(dy[i].any()) for dy, i in zip(grads, indices, strict=True)):
                continue
            grads = [masked(dy, i) for dy, i in zip(grads, indices, strict=True)]
        with entered(ExtraPass(run)):
            found = torch.autograd.grad(
                [y for y, _ in pairs],
                list(wanted.values()),
                grads,
                retain_graph=True,
                allow_unused=True,
            )
        for local, gradient in zip(wanted, found, strict=True):
            for target in targets if gradient is not None else ():
                target.add(site.owned[local], example, gradient)
