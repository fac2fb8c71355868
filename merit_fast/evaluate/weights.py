"""Compares and mixes checkpoints tensor by tensor: distance from a base, interpolation to it."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from merit_fast.kernels.average import average_arrays
from merit_fast.model import is_adapter, load_model, weight_files

_PIECE = 1 << 17  # entries; a piece in float64 stays in a core's cache
_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}


def displacement(checkpoint: Path, base: Path, start: Path | None = None) -> float:
    """|theta - theta_0| between two checkpoints of the same tensors, summed in float64.

    ``start``: the model that the checkpoint belongs to, if it is an adapter.
    """
    if is_adapter(checkpoint):
        return _adapter_displacement(checkpoint, base, start)
    file_of = {name: file for file in weight_files(checkpoint) for name in _names(file)}
    total = 0.0
    for name, tensor in _tensors(base):
        with safe_open(file_of[name], framework="pt") as opened:
            pieces = torch.split(opened.get_tensor(name).flatten(), _PIECE)
        for mine, theirs in zip(pieces, torch.split(tensor.flatten(), _PIECE), strict=True):
            difference = mine.double() - theirs.double()
            total += float(difference.dot(difference))
    return float(total**0.5)


def _adapter_displacement(checkpoint: Path, base: Path, start: Path | None) -> float:
    model = load_model(str(checkpoint), "fp32", None if start is None else str(start))
    ends = {name: parameter.detach() for name, parameter in model.cpu().named_parameters()}
    total = 0.0
    for name, tensor in _tensors_by_name(base, ends):
        if name in ends:
            total += float((ends[name].double() - tensor.double()).square().sum())
    return float(total**0.5)


def _tensors_by_name(base: Path, ends: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The base's parameters by the names in memory; files of some models have other names."""
    if all(name in ends for file in weight_files(base) for name in _names(file)):
        return _tensors(base)
    return iter(load_model(str(base), "fp32").cpu().named_parameters())


class Interpolation:
    """A model whose weights move on the line from a base: WiSE-FT (Wortsman et al. 2022)."""

    def __init__(self, model: nn.Module, base: Path) -> None:
        self.model = model
        self.base = base
        self.ends = {
            name: tensor.detach().cpu().clone()
            for name, tensor in model.state_dict().items()
            if tensor.is_floating_point()
        }

    def set(self, share: float) -> None:
        """Sets the model's weights to (1 - share) theta_0 + share theta."""
        state = self.model.state_dict()
        for name, tensor in self._base_tensors():
            if name in self.ends:
                end = self.ends[name]
                state[name].copy_(_average(tensor.to(end.dtype), end, share))

    def _base_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The base's tensors by the names in memory; files of some models have other names."""
        if all(name in self.ends for file in weight_files(self.base) for name in _names(file)):
            return _tensors(self.base)
        dtype = next(iter(self.ends.values())).dtype
        base = load_model(str(self.base), "fp32" if dtype == torch.float32 else "bf16")
        return iter(base.cpu().state_dict().items())


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
