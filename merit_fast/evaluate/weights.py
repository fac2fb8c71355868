"""Compares and mixes checkpoints tensor by tensor: distance from a base, interpolation to it."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from merit_fast.kernels.average import average_arrays
from merit_fast.model import weight_files

_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}


def displacement(checkpoint: Path, base: Path) -> float:
    """|theta - theta_0| between two checkpoints of the same tensors, summed in float64."""
    file_of = {name: file for file in weight_files(checkpoint) for name in _names(file)}
    total = 0.0
    for name, tensor in _tensors(base):
        with safe_open(file_of[name], framework="pt") as opened:
            difference = opened.get_tensor(name).double() - tensor.double()
        total += float(difference.square().sum())
    return float(total**0.5)


def interpolate_towards(model: nn.Module, base: Path, share: float) -> None:
    """Sets theta to (1 - share) theta_0 + share theta in place: WiSE-FT (Wortsman et al. 2022)."""
    state = model.state_dict()
    for name, tensor in _tensors(base):
        mine = state[name]
        if mine.is_floating_point():
            mine.copy_(_average(tensor.to(mine.dtype), mine.detach().cpu(), share))


def _average(base: Tensor, mine: Tensor, share: float) -> Tensor:
    dtype = _NAMES[mine.dtype]
    arrays = [_bits(tensor.contiguous().flatten()) for tensor in (base, mine)]
    average_arrays(
        arrays, [1.0 - share, share], dtypes=[dtype, dtype], out_dtype=dtype, out=arrays[0]
    )
    return base


def _bits(tensor: Tensor):  # type: ignore[no-untyped-def]
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    for file in weight_files(directory):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name)


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())
