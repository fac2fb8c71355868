"""Launches the average's Triton kernel.

The table holds the K weights (bits of float64), then N first blocks, N sizes, N positions in the
list of signatures, and K + 1 rows of N addresses, the last those of the results.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from merit_fast.kernels import _tables
from merit_fast.kernels.average._dtypes import DTYPES
from merit_fast.kernels.average._triton_kernels import average_kernel

BLOCK = 1024  # elements of one program
# Bits of a signature, which ``_triton_kernels`` describes.
ALIGNED = 1
WIDE = 2
# Without contraction, so that the result does not depend on what the compiler fuses.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def average(columns: Sequence[tuple[Sequence[Tensor], Tensor]], weights: Sequence[float]) -> None:
    """Averages each column: K flat contiguous tensors of one length, and the tensor to write.

    Every tensor has at least one element.
    """
    target = columns[0][1]
    table, signatures, blocks = describe(columns, weights)
    table = _tables.on_device_of(target, table)
    arguments = (table, len(columns), len(weights), signatures, BLOCK)
    _tables.launch(average_kernel, blocks, target, arguments, OPTIONS)


def describe(
    columns: Sequence[tuple[Sequence[Tensor], Tensor]], weights: Sequence[float]
) -> tuple[Tensor, tuple[int, ...], int]:
    """The table on the CPU, the signatures that it names, ascending, and the number of blocks."""
    sizes = [len(target) for _, target in columns]
    starts, blocks = _tables.first_blocks(sizes, BLOCK)
    kinds = [signature([*tensors, target]) for tensors, target in columns]
    signatures = tuple(sorted(set(kinds)))
    positions = [signatures.index(kind) for kind in kinds]
    addresses = [
        [tensor.data_ptr() for tensor in (*tensors, target)] for tensors, target in columns
    ]
    rows = [_tables.double_bits(weights), starts, sizes, positions, *zip(*addresses, strict=True)]
    return _tables.table_of(rows), signatures, blocks


def signature(tensors: Sequence[Tensor]) -> int:
    """The signature of the K inputs and, last, the result."""
    value = ALIGNED if all(tensor.data_ptr() % 16 == 0 for tensor in tensors) else 0
    value |= WIDE if torch.float64 in {tensor.dtype for tensor in tensors} else 0
    for k, tensor in enumerate(tensors):
        value |= DTYPES.index(tensor.dtype) << (2 * k + 2)
    return value
