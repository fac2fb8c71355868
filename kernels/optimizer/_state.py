"""The options of an optimizer and the state that it keeps for a parameter."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merit_fast.kernels.optimizer import _eager
from merit_fast.kernels.optimizer._eager import flat
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

    All tensors but the step and the scales have the parameter's shape and its order of elements in
    memory; 8-bit moments form blocks in that order. Scales of a DTensor [R, ...] are [R, blocks of
    a row]; all its state but the step has its mesh and placements.
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
        state[name] = zeros(code if codes else plain)
        if codes and sharded:
            blocks = parameter.shape[1:].numel() // _eager.BLOCK
            scale = torch.zeros((part.shape[0], blocks), device=part.device)
            shape = (parameter.shape[0], blocks)
            state[f"{name}_scale"] = places.wrapped(parameter, scale, shape)
        elif codes:
            blocks = -(-part.numel() // _eager.BLOCK)
            state[f"{name}_scale"] = torch.zeros(blocks, device=part.device)
    if parameter.dtype == torch.bfloat16 and options.master == "fp32":
        state["master"] = places.like(parameter, part.to(torch.float32, copy=True))
    elif parameter.dtype == torch.bfloat16 and options.master in LOW_BITS:
        state["low_bits"] = zeros(LOW_BITS[options.master])
    if options.average_decay is not None:
        state["average"] = zeros(torch.float32)
        state["num_averaged"] = 0
    return state


def refit(parameter: Tensor, state: dict[str, Any], options: Options) -> None:
    """Brings a state into the order of elements that a parameter has now, and gives it a master.

    Someone may have given it other ``data``, as ``model.to(memory_format=...)`` and
    ``model.bfloat16()`` do. Kernels take elements in memory order: an old order would mix them up.

    Raises:
        ValueError: the data has another shape or is on another device.
    """
    part = places.local(parameter)
    moment = places.local(state["exp_avg"])
    if moment.shape != part.shape or moment.device != part.device:
        raise ValueError(
            f"FusedAdamW: a parameter's data is of shape {list(part.shape)} on {part.device}, its "
            f"state of shape {list(moment.shape)} on {moment.device}: the data was replaced after "
            "the first step; make a new optimizer"
        )
    needs_master = part.dtype == torch.bfloat16 and options.master != "none"
    if needs_master and not state.keys() & {"master", "low_bits"}:
        fresh = new_state(parameter, options)
        state.update({name: fresh[name] for name in ("master", "low_bits") if name in fresh})
    if moment.stride() == part.stride() or places.is_sharded(parameter):
        return
    if moment.stride() == torch.empty_like(part, device="meta").stride():  # the data has gaps
        return
    _reorder(part.detach(), state)


@torch.no_grad()
def _reorder(part: Tensor, state: dict[str, Any]) -> None:
    """Puts the elements of a state in the order of those of a parameter."""
    for name in ("exp_avg", "exp_avg_sq", "master", "low_bits", "average"):
        if f"{name}_scale" in state:
            scale = state[f"{name}_scale"]
            values = decoded_moment(state[name], scale, name)
            state[name] = encoded_moment(part, values, scale, name)
        elif name in state:
            state[name] = in_layout_of(part, state[name])


def decoded_moment(codes: Tensor, scale: Tensor, name: str) -> Tensor:
    """8-bit moments as float32, in the same order of elements."""
    values = torch.empty_like(codes, dtype=torch.float32)
    second = name == "exp_avg_sq"
    flat(values).copy_(_eager.decoded(flat(codes), scale.float().view(-1), second=second))
    return values


def second_moments(state: Mapping[str, Any]) -> Tensor:
    """Adam's second moments of a parameter, decoded if they are ours of 8 bits."""
    moments: Tensor = state["exp_avg_sq"]
    scale = state.get("exp_avg_sq_scale")
    if scale is None:
        return moments
    return decoded_moment(places.whole(moments), places.whole(scale), "exp_avg_sq")


def encoded_moment(parameter: Tensor, values: Tensor, scale: Tensor, name: str) -> Tensor:
    """8-bit codes in the parameter's order of elements; writes their scales."""
    second = name == "exp_avg_sq"
    codes = torch.empty_like(parameter, dtype=torch.uint8 if second else torch.int8)
    values = in_layout_of(parameter, values)
    _eager.encode(flat(values), flat(codes), scale, second=second, bits=None)
    return codes
