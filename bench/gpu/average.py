"""The weighted average for ``bench.gpu``."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.gpu.cases import Case, Op, random, with_compiled
from bench.support.dtypes import DTYPES
from merit_fast.kernels.average import foreach_weighted_average

WEIGHTS = [0.1, 0.25, -0.3, 0.95]
SIZES = [1, 7, 1023, 1024, 1025, 3201, 0, 33]


def case(name: str, models: list[list[Tensor]], dtype: str, timed: bool = False) -> Case:
    weights = WEIGHTS[: len(models)]

    def rows(to: torch.dtype) -> list[list[Tensor]]:
        return [[tensor.to(to) for tensor in row] for row in zip(*models, strict=True)]

    def total(row: list[Tensor]) -> Tensor:
        terms = [weight * tensor for weight, tensor in zip(weights, row, strict=True)]
        return functools.reduce(torch.add, terms)

    def eager() -> list[Tensor]:
        return [
            total(row).to(first.dtype)
            for row, first in zip(rows(torch.float32), models[0], strict=True)
        ]

    return Case(
        name,
        dtype,
        run=lambda backend: foreach_weighted_average(models, weights, backend=backend),
        truth=lambda: [total(row) for row in rows(torch.float64)],
        peers=with_compiled("eager", eager) if timed else {},
        moved_bytes=sum(tensor.nbytes for tensor in models[0]) * (len(models) + 1),
        operations=sum(tensor.numel() for tensor in models[0]) * 2 * len(models),
    )


def small(device: torch.device) -> Iterator[Case]:
    for dtype in DTYPES:
        models = [[random(n, dtype=dtype, device=device) for n in SIZES] for _ in range(3)]
        yield case("3 models of 8 ragged tensors", models, dtype)
        yield case(
            "off the 16-byte grid", [[t[1:] for t in model if len(t)] for model in models], dtype
        )
    mixed = [
        [random(n, dtype=("fp32", "bf16")[(i + k) % 2], device=device) for i, n in enumerate(SIZES)]
        for k in range(2)
    ]
    yield case("types mixed in one launch", mixed, "mixed")


def large(device: torch.device) -> Iterator[Case]:
    for dtype in DTYPES:
        models = [
            [random(2048, 2048, dtype=dtype, device=device) for _ in range(32)] for _ in range(4)
        ]
        yield case("4 models of 32 x [2048, 2048]", models, dtype, timed=True)


AVERAGE = Op("foreach_weighted_average", "weighted_average", small, large)
