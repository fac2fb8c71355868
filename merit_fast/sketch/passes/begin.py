"""The examples of one forward pass, and the kind of call that it is."""

from collections.abc import Collection, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from merit_fast.errors import MeritFastError
from merit_fast.kernels.sketch import CountSketch, matrix_shape
from merit_fast.sketch.capture.layout import Pass
from merit_fast.sketch.precondition import FactorSums, Preconditioner


def source_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input whose first dimension is the batch."""
    values = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args, *kwargs.values()]
    source = next((value for value in values if isinstance(value, Tensor)), None)
    if source is None or source.dim() < 1:
        raise MeritFastError(
            "sketch_gradients: the model must be called with a tensor that begins with the batch"
        )
    return source


def begin_pass(
    sketch: CountSketch,
    preconditioner: Preconditioner,
    part_of: Mapping[str, str],
    source: Tensor,
    cu_seqlens: Tensor | None,
) -> Pass:
    size = len(source)
    tokens = source.shape[1] if source.dim() > 1 else 1
    if cu_seqlens is not None:
        steps = cu_seqlens.diff()
        if (
            size != 1
            or int(cu_seqlens[0]) != 0
            or int(cu_seqlens[-1]) != tokens
            or bool((steps < 1).any())
        ):
            raise MeritFastError(
                "sketch_gradients: cu_seqlens must rise from 0 to N of an input [1, N], "
                f"got {cu_seqlens.tolist()} for {list(source.shape)}"
            )
        size = len(steps)
        cu_seqlens = cu_seqlens.to(source.device, torch.int64)
    ids = source if not source.is_floating_point() else None
    return Pass(sketch, preconditioner, size, tokens, cu_seqlens, ids, part_of=part_of)


def collect_moments(
    run: Pass, parameters: Mapping[str, nn.Parameter], max_side: int, is_sketched: bool
) -> None:
    """Lets a pass collect the second moments of its gradients, and sketch them or not."""
    shapes = {name: matrix_shape(parameter.shape) for name, parameter in parameters.items()}
    run.collect = FactorSums(shapes, max_side)
    run.collect.examples = run.size
    run.is_sketched = is_sketched


def sizes_of(model: nn.Module) -> frozenset[int]:
    """Sizes that other axes may have: those of the weights, and numbers of the config."""
    sizes = {size for parameter in model.parameters() for size in parameter.shape}
    config = getattr(model, "config", None)
    values = vars(config).values() if config is not None else ()
    sizes.update(value for value in values if type(value) is int)
    return frozenset(sizes)


def kind_of_call(
    model: nn.Module,
    run: Pass,
    sizes: Collection[int],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Hashable:
    """What decides, next to the weights, which code runs and how its values may be divided.

    These are the arguments that are not None, train or eval, and which sizes are equal: where B = T
    or B T is the size of another axis, rows may be taken for examples by coincidence.
    """
    named = [*enumerate(args), *sorted(kwargs.items())]
    arguments = tuple(
        (key, value.dim() if isinstance(value, Tensor) else type(value).__name__)
        for key, value in named
        if value is not None
    )
    pattern = (
        run.size == 1,
        run.tokens == 1,
        run.size == run.tokens,
        run.size if run.size in sizes else 0,
        run.size * run.tokens if run.size * run.tokens in sizes else 0,
        run.cu_seqlens is not None,
    )
    device = run.input_ids.device.type if run.input_ids is not None else "cpu"
    return arguments, model.training, torch.is_autocast_enabled(device), pattern
