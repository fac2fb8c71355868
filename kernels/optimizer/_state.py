"""The options of an optimizer and the state that it keeps for a parameter."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merit_fast.kernels.optimizer import _eager
from merit_fast.kernels.optimizer._sharding import places

CHOICES = {
    "rounding": ("stochastic", "nearest"),
    "master": ("none", "fp32", "split", "split8"),
    "moments": ("fp32", "bf16", "int8"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOW_BITS = {"split": torch.int16, "split8": torch.int8}  # of a master


@dataclass(frozen=True)
class Options:
    """Options of all parameters, which never change; see ``FusedAdamW``."""

    rounding: str
    master: str
    moments: str
    average_decay: float | str | None
    max_norm: float
    zero_grad: bool
    seed: int
    backend: str | None
    skip_nonfinite: bool = False

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"FusedAdamW: {name} must be one of {', '.join(allowed)}, "
                    f"got {getattr(self, name)!r}"
                )
        decay = self.average_decay
        if not (
            decay is None or decay == "mean" or (isinstance(decay, float | int) and 0 <= decay < 1)
        ):
            raise ValueError(
                "FusedAdamW: average_decay must be None, 'mean' or from 0 to below 1, "
                f"got {decay!r}"
            )
        if not self.max_norm >= 0:
            raise ValueError(f"FusedAdamW: max_norm must be at least 0, got {self.max_norm}")

    def average_weight(self, before: int) -> float:
        """The newest weight's share in an average of ``before`` + 1 weights."""
        if before == 0:
            return 1.0
        if self.average_decay == "mean":
            return 1 / (before + 1)
        return 1.0 - float(self.average_decay or 0.0)


def is_dense(tensor: Tensor) -> bool:
    """Whether every place in its memory is one element."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def in_layout_of(parameter: Tensor, tensor: Tensor) -> Tensor:
    """``tensor``, or a copy whose elements lie in the order of a dense copy of ``parameter``."""
    if tensor.is_contiguous() and parameter.is_contiguous():
        return tensor
    if tensor.stride() == parameter.stride() and is_dense(parameter):
        return tensor
    like = torch.empty_like(parameter, dtype=tensor.dtype)
    return tensor if tensor.stride() == like.stride() else like.copy_(tensor)


def keeps_codes(parameter: Tensor, options: Options) -> bool:
    """Whether its moments are 8-bit codes.

    A DTensor's rows must be whole blocks, so that no mesh of row shards parts a block; others keep
    float32 moments on every mesh.

    Raises:
        ValueError: a DTensor with 8-bit moments is sharded by anything but rows.
    """
    if options.moments != "int8":
        return False
    if not places.is_sharded(parameter):
        return True
    if parameter.dim() < 2 or parameter.shape[1:].numel() % _eager.BLOCK:
        return False
    for placement in parameter.placements:  # type: ignore[attr-defined]
        if not (placement.is_replicate() or placement.is_shard(0)):
            raise ValueError(
                'FusedAdamW: moments="int8" needs DTensors that are sharded by rows, got '
                f"{placement} of a parameter of shape {list(parameter.shape)}"
            )
    return True


@torch.no_grad()
def new_state(parameter: Tensor, options: Options) -> dict[str, Any]:
    """A state with torch's keys, from which torch's AdamW can resume, and ours.

    8-bit moments are flat, in memory order. Those of a DTensor have its shape [R, ...], and their
    scales are [R, blocks of a row]; all its state but the step has its mesh and placements.
    """
    part = places.local(parameter.detach())
    sharded = places.is_sharded(parameter)
    if sharded:
        part = part.contiguous()

    def zeros(dtype: torch.dtype) -> Tensor:
        return places.like(parameter, torch.zeros_like(part, dtype=dtype))

    state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
    codes = keeps_codes(parameter, options)
    plain = DTYPES["fp32" if options.moments == "int8" else options.moments]
    for name, code in (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8)):
        if codes and sharded:
            state[name] = zeros(code)
            blocks = parameter.shape[1:].numel() // _eager.BLOCK
            scale = torch.zeros((part.shape[0], blocks), device=part.device)
            shape = (parameter.shape[0], blocks)
            state[f"{name}_scale"] = places.wrapped(parameter, scale, shape)
        elif codes:
            state[name] = torch.zeros(part.numel(), dtype=code, device=part.device)
            blocks = -(-part.numel() // _eager.BLOCK)
            state[f"{name}_scale"] = torch.zeros(blocks, device=part.device)
        else:
            state[name] = zeros(plain)
    if parameter.dtype == torch.bfloat16 and options.master == "fp32":
        state["master"] = places.like(parameter, part.to(torch.float32, copy=True))
    elif parameter.dtype == torch.bfloat16 and options.master in LOW_BITS:
        state["low_bits"] = zeros(LOW_BITS[options.master])
    if options.average_decay is not None:
        state["average"] = zeros(torch.float32)
        state["num_averaged"] = 0
    return state
