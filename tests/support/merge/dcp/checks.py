"""What torch was given, against what it or the merge gives back."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

import torch
from support.merge.dcp.tensors import SEEDS, whole_tensors
from support.paths import ROOT
from torch import Tensor


def run_ranks(*arguments: object) -> None:
    """Runs ``support.merge.dcp.ranks`` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "support.merge.dcp.ranks"]
    result = subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]


def mean(tensors: Sequence[Tensor]) -> Tensor:
    """The mean in float64, rounded once; integers as they are."""
    if not tensors[0].is_floating_point():
        return tensors[0]
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor in tensors:
        total += tensor.double()
    return (total / len(tensors)).to(tensors[0].dtype)


def expected_grid() -> dict[str, Tensor]:
    wholes = [whole_tensors(seed) for seed in SEEDS.values()]
    return {name: mean([whole[name] for whole in wholes]) for name in wholes[0]}


def assert_same(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        assert torch.equal(got[name], tensor), name
