"""The sketch's custom ops: rows of a gradient, the product of a linear layer, sums over tokens.

The arguments are those of a ``SketchTarget``. The backend is chosen when the op runs.
"""

import torch
from torch import Tensor

from merit_fast.kernels import dispatch
from merit_fast.kernels.sketch import _eager, _native
from merit_fast.kernels.sketch._target import SketchTarget


@torch.library.custom_op("merit_fast::sketch_rows", mutates_args={"out"})
def sketch_rows(
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


@torch.library.custom_op("merit_fast::sketch_linear", mutates_args={"out"})
def sketch_linear(
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


@torch.library.custom_op("merit_fast::token_sums", mutates_args=())
def token_sums(
    dy: Tensor, x: Tensor | None, offsets: Tensor, epsilon: float | None, backend: str | None
) -> Tensor:
    """[B, C] float32: sums over each example's tokens of dy, or of dy * x.

    With ``epsilon`` the rows of x are divided by their RMS first. On a GPU torch's operations run.
    """
    if dispatch.choose("flat_sketch", dy.device.type, backend) != "cpu":
        return _eager.token_sums(dy, x, offsets, epsilon)
    return _native.token_sums(dy, x, offsets, epsilon)


def _nothing(*arguments: object) -> None:
    """Both sketches return nothing, whatever they are given."""


@token_sums.register_fake
def _(
    dy: Tensor, x: Tensor | None, offsets: Tensor, epsilon: float | None, backend: str | None
) -> Tensor:
    return dy.new_empty(offsets.shape[0] - 1, dy.shape[1], dtype=torch.float32)


sketch_rows.register_fake(_nothing)
sketch_linear.register_fake(_nothing)
