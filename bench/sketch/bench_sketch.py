"""The CountSketch kernels against torch and against their floors.

One example's gradient at a time unless stated.

End to end: bench/sketch/step.py. MKL, torch's fp32 matrix product, runs at less than half speed on
AMD, so oneDNN's is timed too.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from merit_fast.kernels.sketch import (
    CountSketch,
    embedding_grad_sketch,
    flat_sketch,
    linear_grad_sketch,
)
from merit_fast.kernels.sketch._eager import draw_tiles
from merit_fast.kernels.sketch._target import TILE

ELEMENTS = 1 << 24
WIDTH = 65536


@pytest.fixture(autouse=True)
def _threads_restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def tables(rows: int, columns: int, sketch: CountSketch) -> tuple[torch.Tensor, torch.Tensor]:
    """Precomputes bucket and sign of every entry, which a table-driven sketch gets for free."""
    lane = torch.arange(TILE)
    across = -(-columns // TILE)
    buckets: list[torch.Tensor] = []
    signs: list[torch.Tensor] = []
    for strip in range(-(-rows // TILE)):
        tile = draw_tiles(
            torch.tensor([strip]),
            torch.arange(across),
            across,
            sketch.key("w"),
            sketch.proj_dim // TILE**2,
        )
        row = lane ^ tile.row_mask[:, None]  # [tiles, 64]
        column = lane ^ tile.column_mask[:, None]
        row_bit = tile.row_signs[:, None] >> lane & 1
        column_bit = tile.column_signs[:, None] >> lane & 1
        # [tiles, 64, 64]
        at = (tile.bucket[:, None] * TILE + row)[:, :, None] * TILE + column[:, None]
        sign = 1.0 - 2.0 * (row_bit[:, :, None] ^ column_bit[:, None])
        kept = min(TILE, rows - TILE * strip)
        for strips, values in ((buckets, at), (signs, sign)):
            strips.append(values.transpose(0, 1).reshape(TILE, -1)[:kept, :columns].flatten())
    return torch.cat(buckets), torch.cat(signs)


@pytest.fixture(scope="module")
def flat() -> tuple[torch.Tensor, CountSketch, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    gradient = torch.randn(1, ELEMENTS // 4096, 4096)
    sketch = CountSketch(WIDTH)
    buckets, signs = tables(ELEMENTS // 4096, 4096, sketch)
    return gradient, sketch, buckets, signs


@functools.cache
def scattered(count: int) -> torch.Tensor:
    """Buckets of a CountSketch without tiles, drawn for every entry."""
    return torch.randint(0, WIDTH, (count,))


@functools.cache
def rounded(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.bfloat16()


FLAT: dict[str, Callable[..., Any]] = {
    "flat_sketch": lambda g, sketch, buckets, signs: flat_sketch(g, "w", sketch),
    "flat_sketch of bf16": lambda g, sketch, buckets, signs: flat_sketch(rounded(g), "w", sketch),
    "read floor (sum)": lambda g, sketch, buckets, signs: g.sum(),
    "index_add_ with tables": lambda g, sketch, buckets, signs: torch.zeros(WIDTH).index_add_(
        0, buckets, g.flatten() * signs
    ),
    "index_add_ with scattered tables": lambda g, sketch, buckets, signs: torch.zeros(
        WIDTH
    ).index_add_(0, scattered(len(buckets)), g.flatten() * signs),
    "scatter_add_ with tables": lambda g, sketch, buckets, signs: torch.zeros(WIDTH).scatter_add_(
        0, buckets, g.flatten() * signs
    ),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", FLAT)
def bench_flat_16m(benchmark: Any, flat: Any, name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    expected = FLAT["index_add_ with tables"](*flat)
    assert torch.allclose(FLAT["flat_sketch"](*flat)[0], expected, atol=1e-2)
    benchmark.group = f"flat gradient of 16 M floats to {WIDTH}, {threads} thread(s)"
    benchmark.extra_info["ns_per_element"] = True
    benchmark.pedantic(FLAT[name], args=flat, rounds=7, warmup_rounds=1)


SHAPES = {
    "mlp of SmolLM2": (8, 48, 1536, 576),
    "mlp of the 31M model": (8, 128, 1408, 512),
    "2048 x 2048": (2, 128, 2048, 2048),
    "2048 x 2048, T=512": (2, 512, 2048, 2048),
}


def dw_then_index_add(
    dy: torch.Tensor,
    x: torch.Tensor,
    sketch: CountSketch,
    buckets: torch.Tensor,
    signs: torch.Tensor,
) -> torch.Tensor:
    out = torch.zeros(len(dy), sketch.proj_dim)
    product = torch.bmm(dy.transpose(1, 2), x).flatten(1)
    return out.index_add_(1, buckets, product * signs)


def onednn_product(dy: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
    return [
        torch.ops.mkldnn._linear_pointwise(a.T, b.T, None, "none", [], "")  # a.T @ b
        for a, b in zip(dy, x, strict=True)
    ]


LINEAR: dict[str, Callable[..., Any]] = {
    "linear_grad_sketch": lambda dy, x, s, b, g: linear_grad_sketch(dy, x, "w", s),
    "linear_grad_sketch of bf16": lambda dy, x, s, b, g: linear_grad_sketch(
        rounded(dy), rounded(x), "w", s
    ),
    "dW (bmm) + index_add_": dw_then_index_add,
    "dW only, MKL bmm": lambda dy, x, s, b, g: torch.bmm(dy.transpose(1, 2), x),
    "dW only, oneDNN fp32": lambda dy, x, s, b, g: onednn_product(dy, x),
    "dW only, oneDNN bf16": lambda dy, x, s, b, g: torch.bmm(
        rounded(dy).transpose(1, 2), rounded(x)
    ),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LINEAR)
def bench_linear(benchmark: Any, name: str, shape: str, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    batch, tokens, rows, columns = SHAPES[shape]
    dy = torch.randn(batch, tokens, rows)
    x = torch.randn(batch, tokens, columns)
    sketch = CountSketch(WIDTH)
    arguments = (dy, x, sketch, *tables(rows, columns, sketch))
    expected = dw_then_index_add(*arguments)
    for ours, bound in (("linear_grad_sketch", 1e-4), ("linear_grad_sketch of bf16", 1e-2)):
        assert (LINEAR[ours](*arguments) - expected).norm() < bound * expected.norm()
    benchmark.group = f"sketch of dY^T X, {shape}, B={batch} T={tokens}, {threads} thread(s)"
    benchmark.pedantic(LINEAR[name], args=arguments, rounds=15, warmup_rounds=2)
    rounded.cache_clear()


def dense_embedding(dy: torch.Tensor, ids: torch.Tensor, sketch: CountSketch) -> torch.Tensor:
    """Forms the gradient of the whole table, as torch does, then its flat sketch."""
    weight = torch.zeros(len(dy), 8192, dy.shape[2])
    for b in range(len(dy)):
        weight[b].index_add_(0, ids[b], dy[b])
    return flat_sketch(weight, "w", sketch)


EMBEDDING: dict[str, Callable[..., Any]] = {
    "embedding_grad_sketch": lambda dy, ids, s: embedding_grad_sketch(dy, ids, "w", s),
    "dense gradient, then flat_sketch": dense_embedding,
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", EMBEDDING)
def bench_embedding(benchmark: Any, name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    arguments = torch.randn(8, 128, 512), torch.randint(0, 8192, (8, 128)), CountSketch(WIDTH)
    results = [run(*arguments) for run in EMBEDDING.values()]
    assert (results[0] - results[1]).norm() < 1e-5 * results[1].norm()
    benchmark.group = f"embedding of 8192 rows, B=8 T=128 C=512, {threads} thread(s)"
    benchmark.pedantic(EMBEDDING[name], args=arguments, rounds=15, warmup_rounds=2)
