"""The state that an optimizer keeps for a parameter: new, or adopted from a loaded one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merit_fast.kernels.optimizer import _eager
from merit_fast.kernels.optimizer._eager import flat

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


@torch.no_grad()
def new_state(parameter: Tensor, options: Options) -> dict[str, Any]:
    """A state with torch's keys, from which torch's AdamW can resume, and ours.

    8-bit moments are flat, in memory order.
    """
    state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
    for name, code in (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8)):
        if options.moments == "int8":
            state[name] = torch.zeros(parameter.numel(), dtype=code, device=parameter.device)
            blocks = -(-parameter.numel() // _eager.BLOCK)
            state[f"{name}_scale"] = torch.zeros(
                blocks, dtype=torch.float32, device=parameter.device
            )
        else:
            state[name] = torch.zeros_like(parameter, dtype=DTYPES[options.moments])
    if parameter.dtype == torch.bfloat16 and options.master == "fp32":
        state["master"] = torch.empty_like(parameter, dtype=torch.float32).copy_(parameter)
    elif parameter.dtype == torch.bfloat16 and options.master in LOW_BITS:
        state["low_bits"] = torch.zeros_like(parameter, dtype=LOW_BITS[options.master])
    if options.average_decay is not None:
        state["average"] = torch.zeros_like(parameter, dtype=torch.float32)
        state["num_averaged"] = 0
    return state


@torch.no_grad()
def adopted(parameter: Tensor, saved: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """A loaded state in the dtypes and layout of ``new_state``; missing entries are new.

    Raises:
        ValueError: it holds a master of the other kind, or tensors of another size.
    """
    state = new_state(parameter, options)
    if not saved:
        return {}
    state["step"].fill_(float(saved["step"]))
    for name in ("exp_avg", "exp_avg_sq"):
        _adopt_moment(parameter, saved, state, name)
    if "low_bits" in state and "low_bits" in saved:
        kinds = saved["low_bits"].dtype, state["low_bits"].dtype
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"FusedAdamW: the loaded low_bits are {kinds[0]}, "
                f"master={options.master!r} needs {kinds[1]}"
            )
    for name, other in (("master", "low_bits"), ("low_bits", "master")):
        if name in state and name in saved:
            state[name] = _moved(parameter, saved[name], state[name].dtype, name)
        elif name in state and other in saved:
            raise ValueError(
                f"FusedAdamW: the loaded state keeps {other!r}, "
                f"master={options.master!r} needs {name!r}"
            )
    if "average" in state and "average" in saved:
        state["average"] = _moved(parameter, saved["average"], torch.float32, "average")
        state["num_averaged"] = int(saved["num_averaged"])
    return state


def _adopt_moment(
    parameter: Tensor, saved: Mapping[str, Any], state: dict[str, Any], name: str
) -> None:
    value = saved[name]
    second = name == "exp_avg_sq"
    scale = f"{name}_scale"
    if scale in saved and scale in state:
        if saved[scale].shape != state[scale].shape:
            raise ValueError(
                f"FusedAdamW: loaded {scale} must be {list(state[scale].shape)}, "
                f"is {list(saved[scale].shape)}"
            )
        state[name] = value.to(state[name].dtype).to(parameter.device)
        state[scale] = saved[scale].to(parameter.device, torch.float32)
        return
    if scale in saved:
        plain = torch.empty_like(parameter, dtype=torch.float32)
        flat(plain).copy_(_eager.decoded(value, saved[scale].float(), second=second))
        value = plain
    if scale in state:
        plain = torch.empty_like(parameter, dtype=torch.float32).copy_(value)
        _eager.encode(flat(plain), state[name], state[scale], second=second, bits=None)
    else:
        state[name] = _moved(parameter, value, state[name].dtype, name)


def _moved(parameter: Tensor, value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if value.shape != parameter.shape:
        raise ValueError(
            f"FusedAdamW: loaded {name} must be {list(parameter.shape)}, is {list(value.shape)}"
        )
    return in_layout_of(parameter, value.to(device=parameter.device, dtype=dtype))
