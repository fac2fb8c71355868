"""Methods that thin deltas: cases, their tensors, and short ways to merge."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from support.merge.merges import load, merge, write
from torch import Tensor

from merit_fast.merge import MergeConfig

DTYPES: dict[str, tuple[list[torch.dtype], str | None]] = {
    "bf16": ([torch.bfloat16] * 4, None),
    "fp16": ([torch.float16] * 4, None),
    "fp32": ([torch.float32] * 4, None),
    "fp64": ([torch.float64] * 4, None),
    "mixed": ([torch.bfloat16, torch.float32, torch.float16, torch.bfloat16], "fp32"),
    "mixed with fp64": ([torch.float16, torch.float64, torch.bfloat16, torch.float32], "bf16"),
}


def tensors(k: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Branch k of three, or the base (3): random values and values chosen to hurt."""
    generator = torch.Generator().manual_seed(k)
    info = torch.finfo(dtype)

    def choose(numbers: Sequence[float], *shape: int) -> Tensor:
        values = torch.tensor(numbers, dtype=torch.float64)
        return values[torch.randint(len(values), shape, generator=generator)].to(dtype)

    return {
        "random": torch.randn(37, 29, generator=generator).to(dtype),
        "all equal": torch.full((5, 64), float(k), dtype=dtype),
        "few values": choose([-1.0, 0.0, 1.0], 300),
        "cancelling": torch.full((70,), (1.0, -1.0, 0.0, 0.0)[k], dtype=dtype),
        "signed zeros": choose([0.0, -0.0], 65),
        "denormals": choose(
            [info.smallest_normal / 8, -info.smallest_normal, info.smallest_normal / 2, 0.0], 4, 33
        ),
        "largest": choose([info.max, -info.max, info.max / 3, 0.0], 128)
        / (4 if dtype == torch.float64 else 1),
        "wide range": (torch.randn(200, generator=generator, dtype=torch.float64) * 3)
        .exp()
        .clamp(max=6e4)
        .to(dtype),
        "single": torch.randn(1, generator=generator).to(dtype),
        "scalar": torch.randn((), generator=generator).to(dtype),
        "column": torch.randn(40, 1, generator=generator).to(dtype),
        "cube": torch.randn(3, 4, 50, generator=generator).to(dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
        "unmoved": torch.linspace(-2, 2, 90).to(dtype) + (k == 1),
    }


def models_of(
    dtypes: Sequence[torch.dtype], directory: Path
) -> tuple[list[Path], Path, list[dict[str, Tensor]]]:
    """(directories of the branches, that of the base, tensors of each)"""
    loaded = [tensors(k, dtype) for k, dtype in enumerate(dtypes)]
    paths = [write(directory / f"m{k}", tensors) for k, tensors in enumerate(loaded)]
    return paths[:-1], paths[-1], loaded


# ---- what the formulas mean
def one(
    tmp_path: Path,
    models: Sequence[Tensor],
    base: Tensor,
    weights: Sequence[float] | None = None,
    /,
    **options: Any,
) -> Tensor:
    """Merges single tensors named "w"."""
    write(tmp_path / "base", {"w": base})
    paths = [write(tmp_path / f"m{k}", {"w": model}) for k, model in enumerate(models)]
    number = len(list(tmp_path.glob("out*")))
    out = tmp_path / f"out{number}"
    merge(
        paths,
        weights or [1 / len(models)] * len(models),
        out,
        MergeConfig(**options),
        tmp_path / "base",
    )
    return load(out)["w"]
