"""The sketches for ``bench.gpu``, against the definition in kernels/sketch/__init__.py."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.gpu.cases import Case, Op, random, with_compiled
from bench.support.dtypes import DTYPES
from merit_fast.kernels.sketch import (
    CountSketch,
    embedding_grad_sketch,
    flat_sketch,
    linear_grad_sketch,
)
from merit_fast.kernels.sketch._eager import hash_counters

SLICE: dict[str, Any] = {
    "first_row": 61,
    "first_column": 33,
    "columns": 250,
}  # no edge lies on a tile's edge


def tables(
    rows: int, columns: int, sketch: CountSketch, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Position (int64) and sign (float32) of every entry of "w" [R, C], by definition."""
    buckets = sketch.proj_dim // 4096
    p = max(n for n in range(1, buckets + 1) if n * n <= buckets and buckets % n == 0)
    q = buckets // p
    key = sketch.key("w")
    row = torch.arange(rows, device=device)[:, None]
    column = torch.arange(columns, device=device)
    across = -(-columns // 64)
    strip = row // 64
    left = column // 64
    group = strip // p * -(-across // q) + left // q
    deal = hash_counters(8 * group + 3, key)
    row_turn = (deal >> 32 & 0xFFFFFFFF) * p >> 32
    column_turn = (deal & 0xFFFFFFFF) * q >> 32
    tile = strip * across + left
    masks = hash_counters(8 * tile, key)
    x = hash_counters(8 * (strip * -(-across // q) + left // q) + 4, key) & 56 | masks & 7
    y = hash_counters(8 * (strip // p * across + left) + 5, key) & 56 | masks >> 8 & 7
    row_sign = hash_counters(8 * tile + 1, key) >> row % 64
    column_sign = hash_counters(8 * tile + 2, key) >> column % 64
    bucket = (strip + row_turn) % p * q + (left + column_turn) % q
    at = (bucket * 64 + (row % 64 ^ x)) * 64 + (column % 64 ^ y)
    return at, 1.0 - 2.0 * ((row_sign ^ column_sign) & 1)


def by_definition(
    gradients: Sequence[Tensor] | Tensor,
    sketch: CountSketch,
    first_row: int = 0,
    first_column: int = 0,
    columns: int | None = None,
    scale: Tensor | None = None,
) -> list[Tensor]:
    """Sketches float64 gradients [R, C], slices of "w", into one [B, D]."""
    rows, width = gradients[0].shape
    at, sign = tables(
        first_row + rows, columns or first_column + width, sketch, gradients[0].device
    )
    at, sign = (table[first_row:, first_column : first_column + width] for table in (at, sign))
    if scale is not None:
        sign = sign * scale.double()
    out = torch.zeros(len(gradients), sketch.proj_dim, dtype=torch.float64, device=at.device)
    for b, gradient in enumerate(gradients):
        out[b].index_add_(0, at.flatten(), (sign * gradient).flatten())
    return [out]


def by_tables(
    gradient: Callable[[], Tensor],
    rows: int,
    columns: int,
    sketch: CountSketch,
    device: torch.device,
) -> dict[str, Callable[[], Any]]:
    """The usual sketch: tables of positions and signs, a stored gradient [B, R, C], atomic sums."""
    at, sign = tables(rows, columns, sketch, device)

    def eager() -> Tensor:
        values = (gradient() * sign).flatten(1)
        return torch.zeros(len(values), sketch.proj_dim, device=device).index_add_(
            1, at.flatten(), values
        )

    return with_compiled("eager, tables", eager)


def flat(
    name: str, gradient: Tensor, width: int, dtype: str, timed: bool = False, **options: Any
) -> Case:
    sketch = CountSketch(width, 1)
    batch, rows, columns = gradient.shape

    def truth() -> list[Tensor]:
        if "row_ids" not in options:
            return by_definition(gradient.double(), sketch, **options)
        ids = options["row_ids"]
        whole = torch.zeros(
            batch, int(ids.max()) + 1, columns, dtype=torch.float64, device=gradient.device
        )
        for b in range(batch):
            whole[b].index_add_(0, ids[b], gradient[b].double())
        return by_definition(whole, sketch)

    return Case(
        f"{name}, D={width}",
        dtype,
        run=lambda backend: [flat_sketch(gradient, "w", sketch, backend=backend, **options)],
        truth=truth,
        peers=by_tables(lambda: gradient, rows, columns, sketch, gradient.device) if timed else {},
        moved_bytes=gradient.nbytes + 4 * batch * width,
        operations=gradient.numel(),
    )


def flat_small(device: torch.device) -> Iterator[Case]:
    for dtype in DTYPES:
        for width in (4096, 12288, 65536):
            yield flat("[3, 70, 130]", random(3, 70, 130, dtype=dtype, device=device), width, dtype)
        yield flat("one entry", random(1, 1, 1, dtype=dtype, device=device), 4096, dtype)
        sliced = random(2, 67, 90, dtype=dtype, device=device)
        yield flat("a part", sliced, 8192, dtype, **SLICE)
        yield flat(
            "rows by number",
            sliced,
            8192,
            dtype,
            row_ids=torch.randint(0, 300, (2, 67), device=device),
        )
        yield flat("scaled", sliced, 8192, dtype, scale=torch.rand(67, 90, device=device))


def flat_large(device: torch.device) -> Iterator[Case]:
    for dtype in DTYPES:
        yield flat(
            "[1, 8192, 8192]",
            random(1, 8192, 8192, dtype=dtype, device=device),
            65536,
            dtype,
            timed=True,
        )


def linear(
    name: str, dy: Tensor, x: Tensor, width: int, dtype: str, timed: bool = False, **options: Any
) -> Case:
    """The sketch of dyᵀ x; dy and x are [B, T, ...], with ``cu_seqlens`` [N, ...]."""
    sketch = CountSketch(width, 1)
    rows = dy.shape[-1]
    columns = x.shape[-1]
    position = {key: value for key, value in options.items() if key != "cu_seqlens"}
    lengths = options["cu_seqlens"].diff().tolist() if "cu_seqlens" in options else None

    def truth() -> list[Tensor]:
        pairs = zip(
            *(list(v) if lengths is None else torch.split(v, lengths) for v in (dy, x)), strict=True
        )
        return by_definition([a.double().T @ b.double() for a, b in pairs], sketch, **position)

    def product() -> Tensor:
        return torch.bmm(dy.transpose(1, 2), x)

    tabled = by_tables(product, rows, columns, sketch, dy.device) if timed else {}
    examples = len(dy) if lengths is None else len(lengths)
    return Case(
        f"{name}, D={width}",
        dtype,
        run=lambda backend: [linear_grad_sketch(dy, x, "w", sketch, backend=backend, **options)],
        truth=truth,
        peers={"dW only (bmm)": product, **tabled} if timed else {},
        moved_bytes=dy.nbytes + x.nbytes + 4 * examples * width,
        operations=2 * dy.numel() * columns,
    )


def linear_small(device: torch.device) -> Iterator[Case]:
    for dtype, (left, right) in {
        **{name: (name, name) for name in DTYPES},
        "mixed": ("bf16", "fp32"),
    }.items():
        for shape in ((3, 37, 70, 130), (2, 97, 128, 192), (1, 1, 1, 1)):
            dy = random(*shape[:3], dtype=left, device=device)
            x = random(*shape[:2], shape[3], dtype=right, device=device)
            yield linear("B={} T={} [{}, {}]".format(*shape), dy, x, 12288, dtype)
        dy = random(90, 67, dtype=left, device=device)
        x = random(90, 90, dtype=right, device=device)
        offsets = torch.tensor([0, 17, 17, 18, 90], device=device)
        yield linear("packed, one example empty", dy, x, 65536, dtype, cu_seqlens=offsets)
        dy = dy.view(2, 45, 67)
        x = x.view(2, 45, 90)
        yield linear("a part", dy, x, 8192, dtype, **SLICE)
        yield linear("scaled", dy, x, 8192, dtype, scale=torch.rand(67, 90, device=device))


def linear_large(device: torch.device) -> Iterator[Case]:
    for dtype in DTYPES:
        dy, x = (random(8, 512, 4096, dtype=dtype, device=device) for _ in range(2))
        yield linear("B=8 T=512 [4096, 4096]", dy, x, 65536, dtype, timed=True)


def embedding(
    name: str,
    dy: Tensor,
    ids: Tensor,
    rows: int,
    width: int,
    dtype: str,
    timed: bool = False,
    scale: Tensor | None = None,
) -> Case:
    sketch = CountSketch(width, 1)
    batch = len(dy)
    columns = dy.shape[-1]

    def truth() -> list[Tensor]:
        whole = torch.zeros(batch, rows, columns, dtype=torch.float64, device=dy.device)
        for b in range(batch):
            whole[b].index_add_(0, ids[b], dy[b].double())
        return by_definition(whole, sketch, scale=scale)

    def peers() -> dict[str, Callable[[], Any]]:
        at, sign = tables(rows, columns, sketch, dy.device)

        def eager() -> Tensor:
            offset = width * torch.arange(batch, device=dy.device)[:, None, None]
            positions = at[ids] + offset
            values = dy * sign[ids]
            return torch.zeros(batch * width, device=dy.device).index_add_(
                0, positions.flatten(), values.flatten()
            )

        return with_compiled("eager, tables", eager)

    return Case(
        f"{name}, D={width}",
        dtype,
        run=lambda backend: [
            embedding_grad_sketch(dy, ids, "w", sketch, scale=scale, backend=backend)
        ],
        truth=truth,
        peers=peers() if timed else {},
        moved_bytes=dy.nbytes + ids.nbytes + 4 * batch * width,
        operations=dy.numel(),
    )


def embedding_small(device: torch.device) -> Iterator[Case]:
    for dtype in DTYPES:
        for batch, tokens, columns in ((1, 1, 1), (2, 97, 128), (3, 37, 70)):
            dy = random(batch, tokens, columns, dtype=dtype, device=device)
            ids = torch.randint(0, 150, (batch, tokens), device=device)  # some more than once
            yield embedding(f"B={batch} T={tokens} [150, {columns}]", dy, ids, 150, 12288, dtype)
        scale = torch.rand(150, columns, device=device)
        yield embedding("scaled", dy, ids, 150, 12288, dtype, scale=scale)


def embedding_large(device: torch.device) -> Iterator[Case]:
    for dtype in DTYPES:
        dy = random(8, 512, 2048, dtype=dtype, device=device)
        ids = torch.randint(0, 32000, (8, 512), device=device)
        yield embedding("B=8 T=512 [32000, 2048]", dy, ids, 32000, 65536, dtype, timed=True)


SKETCHES = [
    Op("flat_sketch", "flat_sketch", flat_small, flat_large),
    Op("linear_grad_sketch", "linear_grad_sketch", linear_small, linear_large),
    Op("embedding_grad_sketch", "flat_sketch", embedding_small, embedding_large),
]
