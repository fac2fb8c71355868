"""Seconds for a token: measured by this run's finished branches, else estimated in a second."""

import json
import time
from dataclasses import dataclass

from merit_fast.manifests.io import read_manifest
from merit_fast.manifests.schemas import BranchManifest
from merit_fast.manifests.stages import TRAIN
from merit_fast.pipeline.outputs import Outputs
from merit_fast.units import human_count

_TRAIN_FLOPS = 6  # per parameter and token: forward and backward
_EFFICIENCY = 0.4  # share of the rate of plain products that training reaches
_MATMUL_SIZE = 1024
_MATMUL_S = 0.5


@dataclass(frozen=True)
class Rate:
    """Seconds for a token in training, and where they come from."""

    train_s: float
    source: str

    @property
    def sketch_s(self) -> float:
        """Seconds to sketch a token's gradient: about those of training."""
        return self.train_s

    @property
    def forward_s(self) -> float:
        """Seconds for a token without its gradient: a third of those of training."""
        return self.train_s / 3


def rate_of(outputs: Outputs, num_parameters: int) -> Rate:
    """The rate that finished branches of this base measured, else an estimate."""
    seconds = 0.0
    tokens = 0
    for name, record in outputs.records.ledger().outputs.items():
        timing = outputs.root / name / "timing.json"
        if record.stage != TRAIN.name or not timing.is_file():
            continue
        branch = read_manifest(BranchManifest, timing.with_name("branch.json"))
        if branch.base_fingerprint == outputs.base_fingerprint:
            seconds += json.loads(timing.read_text())["train_s"]
            tokens += branch.num_tokens
    if seconds and tokens:
        return Rate(seconds / tokens, f"measured: this run trained {human_count(tokens)} tokens")
    flops = _matmul_flops(outputs.config.train.dtype)
    train_s = _TRAIN_FLOPS * num_parameters / (_EFFICIENCY * flops)
    return Rate(
        train_s,
        f"estimated from {human_count(num_parameters)} parameters and products at "
        f"{human_count(flops)}FLOP/s here",
    )


def _matmul_flops(dtype: str) -> float:
    """Floating-point operations a second of square products of this dtype."""
    import torch

    from merit_fast.model import DTYPES, settle_dtype

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = getattr(torch, DTYPES[settle_dtype(dtype)])  # type: ignore[arg-type]
    size = _MATMUL_SIZE
    matrix = torch.ones(size, size, dtype=kind, device=device)
    _ = (matrix @ matrix)[0, 0].item()
    count = 0
    start = time.perf_counter()
    while time.perf_counter() - start < _MATMUL_S:
        _ = (matrix @ matrix)[0, 0].item()
        count += 1
    return 2.0 * size**3 * count / (time.perf_counter() - start)
