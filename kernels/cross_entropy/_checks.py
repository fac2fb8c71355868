"""Checks of shapes, dtypes and options; backends check values (``_eager.check_values``)."""

import torch
from torch import Tensor

from merit_fast.kernels.cross_entropy._eager import OP
from merit_fast.kernels.sketch import CountSketch

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def checked_offsets(labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[B + 1] int64: example b has the tokens offsets[b]..offsets[b + 1] - 1."""
    if cu_seqlens is None:
        tokens = 1 if labels.dim() == 1 else labels.shape[1]
        return torch.arange(labels.shape[0] + 1, device=labels.device) * tokens
    is_integer = cu_seqlens.dtype in (torch.int64, torch.int32)
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or not is_integer:
        raise ValueError(
            f"{OP}: cu_seqlens must be int64 [B + 1], "
            f"got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    return cu_seqlens.to(labels.device, torch.int64).contiguous()


def check_head(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    if hidden.dim() not in (2, 3) or hidden.dtype not in DTYPES:
        raise ValueError(
            f"{OP}: hidden must be [N, H] or [B, T, H] of float32 or bfloat16, "
            f"got {hidden.dtype} {list(hidden.shape)}"
        )
    fits = weight.dim() == 2 and weight.shape[0] and weight.shape[1] == hidden.shape[-1]
    if not fits or weight.dtype != hidden.dtype:
        raise ValueError(
            f"{OP}: weight must be {hidden.dtype} [V, {hidden.shape[-1]}] as hidden is, "
            f"got {weight.dtype} {list(weight.shape)}"
        )
    if labels.shape != hidden.shape[:-1] or labels.dtype != torch.int64:
        raise ValueError(
            f"{OP}: labels must be int64 {list(hidden.shape[:-1])}, "
            f"got {labels.dtype} {list(labels.shape)}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(
            f"{OP}: bias must be {weight.dtype} [{len(weight)}], "
            f"got {bias.dtype} {list(bias.shape)}"
        )


def check_datasets(
    examples: int, ids: Tensor | None, num_datasets: int | None, weights: Tensor | None
) -> None:
    if ids is None:
        if weights is not None or num_datasets is not None:
            raise ValueError(f"{OP}: num_datasets and dataset_weights need dataset_ids, got None")
        return
    if ids.dtype != torch.int64 or ids.dim() != 1 or ids.shape[0] != examples:
        raise ValueError(
            f"{OP}: dataset_ids must be int64 [{examples}], got {ids.dtype} {list(ids.shape)}"
        )
    if num_datasets is None or num_datasets < 1:
        raise ValueError(
            f"{OP}: num_datasets must be positive with dataset_ids, got {num_datasets}"
        )
    if weights is not None and (
        weights.shape != (num_datasets,) or not weights.dtype.is_floating_point
    ):
        raise ValueError(
            f"{OP}: dataset_weights must be float32 [{num_datasets}], "
            f"got {weights.dtype} {list(weights.shape)}"
        )


def check_terms(
    reduction: str, label_smoothing: float, softcap: float | None, z_loss: float
) -> None:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{OP}: reduction must be 'mean' or 'sum', got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{OP}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{OP}: softcap must be positive, got {softcap}")
    if not z_loss >= 0:
        raise ValueError(f"{OP}: z_loss must not be negative, got {z_loss}")


def check_sketch(
    examples: int, sketch: CountSketch | None, name: str | None, out: Tensor | None
) -> None:
    if sketch is None and name is None and out is None:
        return
    if sketch is None or name is None or out is None:
        raise ValueError(
            f"{OP}: sketch, sketch_name and sketch_out go together, got {sketch}, {name}, {out}"
        )
    shape = (examples, sketch.proj_dim)
    if out.shape != shape or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(
            f"{OP}: sketch_out must be contiguous float32 {list(shape)}, "
            f"got {out.dtype} {list(out.shape)}"
        )
