"""Checks of shapes, dtypes and options; backends check values (``_eager.check_values``)."""

import math

import torch
from torch import Tensor

from merit_fast.errors import BackendUnavailableError
from merit_fast.kernels import dispatch
from merit_fast.kernels.cross_entropy._arguments import VocabularyShard
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


def check_head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    op: str = OP,
    may_be_empty: bool = False,
) -> None:
    _refuse_distributed(op, hidden=hidden, weight=weight, bias=bias)
    check_devices(op, hidden, weight=weight, labels=labels, bias=bias)
    if hidden.dim() not in (2, 3) or hidden.dtype not in DTYPES:
        raise ValueError(
            f"{op}: hidden must be [N, H] or [B, T, H] of float32 or bfloat16, "
            f"got {hidden.dtype} {list(hidden.shape)}"
        )
    fits = weight.dim() == 2 and weight.shape[1] == hidden.shape[-1]
    if not fits or not (may_be_empty or weight.shape[0]) or weight.dtype != hidden.dtype:
        raise ValueError(
            f"{op}: weight must be {hidden.dtype} [V, {hidden.shape[-1]}] as hidden is, "
            f"got {weight.dtype} {list(weight.shape)}"
        )
    if labels.shape != hidden.shape[:-1] or labels.dtype != torch.int64:
        raise ValueError(
            f"{op}: labels must be int64 {list(hidden.shape[:-1])}, "
            f"got {labels.dtype} {list(labels.shape)}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(
            f"{op}: bias must be {weight.dtype} [{len(weight)}], "
            f"got {bias.dtype} {list(bias.shape)}"
        )


def check_devices(op: str, hidden: Tensor, **tensors: Tensor | None) -> None:
    """Raises ValueError unless all are on hidden's device: kernels take addresses on trust.

    Weights on the meta device, as offloading leaves them, would otherwise be read as zeros.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"{op}: {name} must be on hidden's device, {hidden.device}, got {tensor.device}"
            )


def _refuse_distributed(op: str, **tensors: Tensor | None) -> None:
    """Raises ValueError for a DTensor: it may lie elsewhere, and its gradient be a sum of ranks."""
    for name, tensor in tensors.items():
        if tensor is not None and hasattr(tensor, "placements"):
            raise ValueError(
                f"{op}: {name} must be a plain tensor, got a DTensor of {list(tensor.placements)}: "
                f"call it where FSDP has gathered the parameter, or pass {name}.to_local() and "
                "vocabulary="
            )


def check_vocabulary(op: str, weight: Tensor, shard: VocabularyShard | None) -> None:
    if shard is None:
        return
    last = shard.first_row + weight.shape[0]
    if shard.first_row < 0 or last > shard.num_rows:
        raise ValueError(
            f"{op}: vocabulary must hold the rows of weight, got first_row {shard.first_row}, "
            f"{weight.shape[0]} rows and num_rows {shard.num_rows}"
        )


def check_form(op: str, softcap: float | None, scale: float, temperature: float) -> None:
    _check_softcap(op, softcap)
    if not math.isfinite(scale):
        raise ValueError(f"{op}: scale must be finite, got {scale}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature must be positive, got {temperature}")


def _check_softcap(op: str, softcap: float | None) -> None:
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{op}: softcap must be positive and finite, got {softcap}")


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
    _check_softcap(OP, softcap)
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"{OP}: z_loss must be finite and not negative, got {z_loss}")


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


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def chosen_backend(
    op: str, device_type: str, dtype: torch.dtype, backend: str | None, sharded: bool
) -> str:
    """The backend that runs ``op``; float64 takes eager, a part of the vocabulary never does."""
    eager_only = dtype == torch.float64
    chosen = "eager" if eager_only and backend is None else None
    chosen = chosen or dispatch.choose(op, device_type, backend)
    if eager_only and chosen != "eager":
        raise ValueError(
            f"{op}: only the eager backend computes in float64, got backend {backend!r}"
        )
    if sharded and chosen == "eager":
        raise BackendUnavailableError(
            f"{op}: backend 'eager' computes no part of a vocabulary; it was chosen for {dtype} "
            f"tensors on {device_type}"
        )
    return chosen


def wants_gradients(*leaves: Tensor | None) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(
        leaf is not None and leaf.requires_grad for leaf in leaves
    )


def refuse_sketch(vocabulary: VocabularyShard | None) -> None:
    """Raises ValueError where the gradient of the head is not this call's to sketch."""
    if vocabulary is not None:
        raise ValueError(f"{OP}: sketch and vocabulary do not go together")
    if torch._C._are_functorch_transforms_active():  # type: ignore[attr-defined]
        raise ValueError(f"{OP}: sketch_out is no value of a function: not under torch.func")
