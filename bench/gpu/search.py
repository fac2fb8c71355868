"""The search's products for ``bench.gpu``, against float64."""

from collections.abc import Iterator

import torch

from bench.gpu.cases import Case, Op, random, with_compiled
from bench.support.dtypes import DTYPES
from merit_fast.kernels.search import row_products


def products(
    n: int, m: int, width: int, dtype: str, device: torch.device, timed: bool = False
) -> Case:
    rows = random(n, width, dtype=dtype, device=device)
    vectors = torch.randn(m, width, device=device)
    narrow = vectors.T.to(rows.dtype)
    return Case(
        f"[{n}, {width}], {m} vectors",
        dtype,
        run=lambda backend: [row_products(rows, vectors, backend=backend)],
        truth=lambda: [rows.double() @ vectors.double().T],
        peers=with_compiled("eager, in the rows' dtype", lambda: rows @ narrow) if timed else {},
        moved_bytes=rows.nbytes + vectors.nbytes + 4 * n * m,
        operations=2 * n * m * width,
    )


def small(device: torch.device) -> Iterator[Case]:
    for dtype in DTYPES:
        for n, m, width in ((1, 1, 1), (37, 3, 1003), (70, 9, 512)):
            yield products(n, m, width, dtype, device)


def large(device: torch.device) -> Iterator[Case]:
    for dtype in DTYPES:
        for m in (1, 8):
            yield products(100_000, m, 8192, dtype, device, timed=True)


SEARCH = Op("row_products", "row_products", small, large)
