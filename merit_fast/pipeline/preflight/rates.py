"""Seconds for a token: measured by this run's finished branches, else estimated in a second."""

import json
import time
from dataclasses import dataclass

from merit_fast.manifests.io import read_manifest
from merit_fast.manifests.schemas import BranchManifest
from merit_fast.manifests.stages import TRAIN
from merit_fast.pipeline.outputs import Outputs
from merit_fast.units import human_count

_FORWARD_FLOPS = 2  # per parameter and token
_BACKWARD_FLOPS = 4  # per trained parameter and token
_EFFICIENCY = 0.4  # share of the rate of plain products that training reaches
_MATMUL_SIZE = 1024
_MATMUL_S = 0.5


@dataclass(frozen=True)
class Rate:
    """Seconds for a token in training, and where they come from.

    ``forward_share``: part of ``train_s`` that a token takes without its gradient;
    ``sketch_share``: that it takes with the gradient of all weights that are not frozen.
    """

    train_s: float
    source: str
    forward_share: float
    sketch_share: float = 1.0

    @property
    def sketch_s(self) -> float:
        """Seconds to sketch a token's gradient."""
        return self.train_s * self.sketch_share

    @property
    def forward_s(self) -> float:
        """Seconds for a token without its gradient."""
        return self.train_s * self.forward_share


def rate_of(outputs: Outputs, num_parameters: int, num_trained: int) -> Rate:
    """The rate that finished branches of this base measured, else an estimate.

        operations of a token = 2 * parameters (forward) + 4 * trained parameters (backward)

    An adapter's gradients go through all layers, and gradient checkpointing runs them once more:
    2 * parameters each. Two passes add the operations of a backward pass.

    Args:
        outputs: the run's outputs.
        num_parameters: parameters of the base.
        num_trained: those of them that training changes.
    """
    train = outputs.config.train
    forward = _FORWARD_FLOPS * num_parameters
    backward = _BACKWARD_FLOPS * num_trained
    sketch = forward + backward
    if train.adapter.is_on:
        sketch = forward + _BACKWARD_FLOPS * num_parameters
        backward += forward
    if train.gradient_checkpointing:
        backward += forward
    operations = forward + backward * (2 if train.update_in_backward == "two-pass" else 1)
    shares = (forward / operations, sketch / operations)
    seconds = 0.0
    tokens = 0
    for name, record in outputs.records.ledger().outputs.items():
        if record.stage != TRAIN.name:
            continue
        path = outputs.root / name
        if not outputs.records.check(path, record.fingerprint).is_current:
            continue
        timing = path / "timing.json"
        branch = read_manifest(BranchManifest, path / "branch.json")
        if branch.base_fingerprint == outputs.base_fingerprint and timing.is_file():
            seconds += json.loads(timing.read_text())["train_s"]
            tokens += branch.num_tokens * (branch.steps_run or branch.steps) // branch.steps
    if seconds and tokens:
        source = f"measured: this run trained {human_count(tokens)} tokens"
        return Rate(seconds / tokens, source, *shares)
    flops = _matmul_flops(outputs.config.train.dtype)
    frozen = "" if num_trained == num_parameters else f" ({human_count(num_trained)} trained)"
    return Rate(
        operations / (_EFFICIENCY * flops),
        f"estimated from {human_count(num_parameters)} parameters{frozen} and products at "
        f"{human_count(flops)}FLOP/s here",
        *shares,
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
