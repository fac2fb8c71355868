"""Merging and reading back, for the tests of the merge."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from merit_fast.merge import MergeConfig, merge_branches
from merit_fast.merge.read.remote import Location
from merit_fast.options.parser import parse
from merit_fast.progress import SilentProgress

WEIGHTS = [0.1, 0.2, 0.3, 0.4]
# Every method that takes two models and a base, with options that change its result.
METHODS: list[dict[str, Any]] = [
    {"method": "linear", "scale": 1.5},
    {"method": "task_arithmetic", "scale": 0.7, "normalize": False},
    {"method": "ties", "density": 0.3},
    {"method": "dare_linear", "density": 0.5},
    {"method": "dare_ties", "density": 0.5, "seed": 7},
    {"method": "breadcrumbs", "density": 0.8, "gamma": 0.1},
    {"method": "breadcrumbs_ties", "density": 0.8, "models": [{"gamma": 0.1}, {"gamma": 0.2}]},
    {"method": "della", "density": 0.5, "epsilon": 0.2},
    {"method": "della_linear", "density": 0.5},
    {"method": "sce", "select_topk": 0.2},
    {"method": "slerp", "t": [0.2, 0.8]},
    {"method": "multislerp"},
    {"method": "model_stock"},
    {"method": "model_stock", "vectors": "row"},
    {"method": "nuslerp"},
    {"method": "nuslerp", "vectors": "column"},
    {"method": "karcher"},
    {"method": "ram"},
    {"method": "ramplus_tl", "epsilon": 0.01, "parameters": {"r": 0.5}},
    {"method": "ties", "density": 0.3, "rescale": True},
]


def config_of(options: Mapping[str, Any]) -> MergeConfig:
    return parse(MergeConfig, options, "test")


def merge(
    models: Sequence[Location],
    weights: Sequence[float],
    out: Path,
    config: MergeConfig | None = None,
    base: Location | None = None,
) -> None:
    out.mkdir()
    merge_branches(models, weights, base, out, config or MergeConfig(), SilentProgress())


def load(directory: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def write(directory: Path, tensors: Mapping[str, Tensor], file: str = "model.safetensors") -> Path:
    """A model directory of one file."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        directory / file,
        {"format": "pt"},
    )
    return directory


def bits(tensor: Tensor) -> NDArray[Any]:
    """[n] the stored bits; one NaN for all."""
    kind: type[Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[tensor.element_size()]
    if tensor.is_floating_point():
        tensor = torch.where(tensor.isnan(), torch.full_like(tensor, float("nan")), tensor)
    flat = tensor.contiguous().reshape(-1)
    return (
        flat.view(getattr(torch, np.dtype(kind).name)).numpy()
        if flat.numel()
        else np.empty(0, kind)
    )
