"""Precision in which models run: bf16 where this machine multiplies it fast."""

from pathlib import Path
from typing import Literal

Dtype = Literal["auto", "bf16", "fp32"]
SettledDtype = Literal["bf16", "fp32"]
DTYPES: dict[SettledDtype, str] = {"bf16": "bfloat16", "fp32": "float32"}  # names in torch


def settle_dtype(dtype: Dtype) -> SettledDtype:
    """Replaces "auto" by bf16 where this machine multiplies it fast, and by fp32 elsewhere.

    On a CPU without bf16 instructions, bf16 products take hundreds of times as long as fp32
    products (measured with AVX2).
    """
    if dtype != "auto":
        return dtype
    fast = _cpu_multiplies_bf16(Path("/proc/cpuinfo")) or _gpu_multiplies_bf16()
    return "bf16" if fast else "fp32"


def _cpu_multiplies_bf16(cpuinfo: Path) -> bool:
    """Whether the CPU lists bf16 instructions; a run that is up to date imports no torch to ask."""
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    lines = (line for line in text.splitlines() if line.startswith(("flags", "Features")))
    flags = next(lines, "").split()
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def _gpu_multiplies_bf16() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
