"""The sketch's custom ops: rows of a gradient, the product of a linear layer, sums over tokens.

The arguments are those of a ``SketchTarget``. The backend is chosen when the op runs.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from merit_fast.kernels import dispatch
from merit_fast.kernels.sketch import _eager, _native
from merit_fast.kernels.sketch._target import SketchTarget

Result = TypeVar("Result")


def call(op: Callable[..., Result], body: Callable[..., Result], *arguments: Any) -> Result:
    """Runs ``op``; only its ``body`` where nothing of torch would see more of the call.

    A custom op's way through the dispatcher takes more time than a small sketch.
    """
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    if _is_watched(tensors):
        return op(*arguments)
    return body(*arguments)


def _is_watched(tensors: list[Tensor]) -> bool:
    """Whether a compiler, a mode, a transform, a subclass or autograd follows these tensors."""
    return (
        torch.compiler.is_compiling()
        or _get_current_dispatch_mode() is not None
        or torch._C._are_functorch_transforms_active()
        or any(type(value) not in (Tensor, torch.nn.Parameter) for value in tensors)
        or (torch.is_grad_enabled() and any(value.requires_grad for value in tensors))
        or any(value.is_inference() for value in tensors)
    )


def sketch_rows_body(
    gradient: Tensor,
    offsets: Tensor,
    row_ids: Tensor | None,
    first_row: int,
    first_column: int,
    columns: int,
    seed: int,
    name: str,
    scale: Tensor | None,
    out: Tensor,
    backend: str | None,
) -> None:
    key = _eager.hash_key(seed, name)
    target = SketchTarget(offsets, first_row, first_column, columns, key, scale, out)
    chosen = dispatch.choose("flat_sketch", gradient.device.type, backend)
    if chosen == "triton":
        from merit_fast.kernels.sketch import _triton

        _triton.sketch_rows(gradient, row_ids, target)
    elif chosen == "cpu":
        _native.sketch_rows(gradient, row_ids, target)
    else:
        _eager.sketch_rows(gradient, row_ids, target)
    torch.autograd.graph.increment_version(out)


def sketch_linear_body(
    dy: Tensor,
    x: Tensor,
    offsets: Tensor,
    first_row: int,
    first_column: int,
    columns: int,
    seed: int,
    name: str,
    scale: Tensor | None,
    out: Tensor,
    backend: str | None,
) -> None:
    key = _eager.hash_key(seed, name)
    target = SketchTarget(offsets, first_row, first_column, columns, key, scale, out)
    chosen = dispatch.choose("linear_grad_sketch", dy.device.type, backend)
    if chosen == "triton":
        from merit_fast.kernels.sketch import _triton

        _triton.sketch_linear(dy, x, target)
    elif chosen == "cuda":
        from merit_fast.kernels.sketch import _cuda

        _cuda.sketch_linear(dy, x, target)
    elif chosen == "cpu":
        _native.sketch_linear(dy, x, target)
    else:
        _eager.sketch_linear(dy, x, target)
    torch.autograd.graph.increment_version(out)


def token_sums_body(
    dy: Tensor, x: Tensor | None, offsets: Tensor, epsilon: float | None, backend: str | None
) -> Tensor:
    """[B, C] float32: sums over each example's tokens of dy, or of dy * x.

    With ``epsilon`` the rows of x are divided by their RMS first. On a GPU torch's operations run.
    """
    if dispatch.choose("flat_sketch", dy.device.type, backend) != "cpu":
        return _eager.token_sums(dy, x, offsets, epsilon)
    return _native.token_sums(dy, x, offsets, epsilon)


sketch_rows = torch.library.custom_op(
    "merit_fast::sketch_rows", sketch_rows_body, mutates_args={"out"}
)
sketch_linear = torch.library.custom_op(
    "merit_fast::sketch_linear", sketch_linear_body, mutates_args={"out"}
)
token_sums = torch.library.custom_op("merit_fast::token_sums", token_sums_body, mutates_args=())


def run_rows(*arguments: Any) -> None:
    """Runs ``sketch_rows``, as ``call`` explains."""
    call(sketch_rows, sketch_rows_body, *arguments)


def run_linear(*arguments: Any) -> None:
    """Runs ``sketch_linear``, as ``call`` explains."""
    call(sketch_linear, sketch_linear_body, *arguments)


def run_sums(*arguments: Any) -> Tensor:
    """Runs ``token_sums``, as ``call`` explains."""
    sums: Tensor = call(token_sums, token_sums_body, *arguments)
    return sums


def _nothing(*arguments: object) -> None:
    """Both sketches return nothing, whatever they are given."""


@token_sums.register_fake
def _(
    dy: Tensor, x: Tensor | None, offsets: Tensor, epsilon: float | None, backend: str | None
) -> Tensor:
    return dy.new_empty(offsets.shape[0] - 1, dy.shape[1], dtype=torch.float32)


sketch_rows.register_fake(_nothing)
sketch_linear.register_fake(_nothing)
