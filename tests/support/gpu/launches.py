"""Launches of every Triton kernel, which the gate compiles for GPUs that are not here."""

from collections.abc import Sequence

import torch
from support.gpu import (
    launches_cross_entropy,
    launches_layers,
    launches_optimizer,
    launches_search,
    launches_sketch,
)
from support.gpu.code import GpuLaunch

from merit_fast.kernels.average import _triton, _triton_kernels
from merit_fast.kernels.average._dtypes import DTYPES

BF16, F16, F32, F64 = DTYPES
# One column per kind of tensors that meet in a launch: the dtypes (the last the result's) and a
# shift in elements.
AVERAGES = {
    "4 bf16": [([BF16] * 5, 0)],
    "16 bf16": [([BF16] * 17, 0)],
    "4 fp32": [([F32] * 5, 0)],
    "4 fp64": [([F64] * 5, 0)],
    "4 of mixed kinds": [
        ([BF16] * 5, 0),
        ([F32] * 5, 0),
        ([BF16, F16, F32, F64, BF16], 0),
        ([BF16] * 5, 1),
    ],
}


def launches() -> list[GpuLaunch]:
    averages = [average(name, columns) for name, columns in AVERAGES.items()]
    # bf16 rows times a float32 scale: what sm_100 would multiply in tf32.
    scaled = launches_sketch.rows(
        "sketch of rows by id, bf16, scaled", BF16, by_id=True, scaled=True
    )
    families = (
        launches_cross_entropy,
        launches_layers,
        launches_optimizer,
        launches_search,
    )
    training = [launch for family in families for launch in family.launches()]
    return [*averages, *launches_sketch.launches(), scaled, *training]


def average(name: str, columns: Sequence[tuple[Sequence[torch.dtype], int]]) -> GpuLaunch:
    tensors = [
        [torch.zeros(3000 + shift, dtype=d)[shift:] for d in dtypes] for dtypes, shift in columns
    ]
    count = len(columns[0][0]) - 1
    table, signatures, _ = _triton.describe(
        [(row[:-1], row[-1]) for row in tensors], [1 / count] * count
    )
    arguments = (table, len(columns), count, signatures, _triton.BLOCK)
    return GpuLaunch(
        f"average of {name}", _triton_kernels.average_kernel, arguments, _triton.OPTIONS
    )
