"""The CountSketch kernels against torch and against their floors. One example's gradient a time unless stated."""

import functools

import pytest
import torch

from merit_fast.kernels.sketch import CountSketch, flat_sketch, linear_grad_sketch
from merit_fast.kernels.sketch._eager import hash_blocks

ELEMENTS = 1 << 24
WIDTH = 65536


def tables(rows: int, columns: int, sketch: CountSketch) -> tuple[torch.Tensor, torch.Tensor]:
    """Bucket and sign of every entry, precomputed: what a table-driven sketch may assume for free."""
    block = torch.arange(rows * columns // 16)
    h = hash_blocks(block, sketch.key("w")).unsqueeze(-1)
    lane = torch.arange(16) ^ h >> 16 & 15
    bucket = (h >> 32 & 0xFFFFFFFF) * (sketch.proj_dim // 16) >> 32
    sign = 1.0 - 2.0 * ((h & 0xFFFFFFFF) >> lane & 1)
    return (bucket * 16 + lane).flatten(), sign.flatten()


@pytest.fixture(scope="module")
def flat():
    torch.manual_seed(0)
    gradient, sketch = torch.randn(1, ELEMENTS // 4096, 4096), CountSketch(WIDTH)
    buckets, signs = tables(ELEMENTS // 4096, 4096, sketch)
    return gradient, sketch, buckets, signs


@functools.cache
def scattered(count: int) -> torch.Tensor:
    """Buckets of a CountSketch that is not blocked: every entry its own."""
    return torch.randint(0, WIDTH, (count,))


FLAT = {
    "flat_sketch": lambda g, sketch, buckets, signs: flat_sketch(g, "w", sketch),
    "read floor (sum)": lambda g, sketch, buckets, signs: g.sum(),
    "index_add_ with tables": lambda g, sketch, buckets, signs: torch.zeros(WIDTH).index_add_(
        0, buckets, g.flatten() * signs
    ),
    "index_add_ with scattered tables": lambda g, sketch, buckets, signs: torch.zeros(WIDTH).index_add_(
        0, scattered(len(buckets)), g.flatten() * signs
    ),
    "scatter_add_ with tables": lambda g, sketch, buckets, signs: torch.zeros(WIDTH).scatter_add_(
        0, buckets, g.flatten() * signs
    ),
}


@pytest.mark.parametrize("threads", [1])
@pytest.mark.parametrize("name", FLAT)
def bench_flat_16m(benchmark, flat, name, threads):
    torch.set_num_threads(threads)
    expected = FLAT["index_add_ with tables"](*flat)
    assert torch.allclose(FLAT["flat_sketch"](*flat)[0], expected, atol=1e-2)
    benchmark.group = f"flat gradient of 16 M floats to {WIDTH}, {threads} thread"
    benchmark.extra_info["ns_per_element"] = True
    benchmark.pedantic(FLAT[name], args=flat, rounds=7, warmup_rounds=1)


SHAPES = {"mlp of SmolLM2": (8, 48, 1536, 576), "2048 x 2048": (2, 128, 2048, 2048)}


def dw_then_index_add(dy, x, sketch, buckets, signs):
    out = torch.zeros(len(dy), sketch.proj_dim)
    product = torch.bmm(dy.transpose(1, 2), x).flatten(1)
    return out.index_add_(1, buckets, product * signs)


def onednn_product(dy, x):
    return [
        torch.ops.mkldnn._linear_pointwise(a.T.contiguous(), b.T.contiguous(), None, "none", [], "")
        for a, b in zip(dy, x, strict=True)
    ]


LINEAR = {
    "linear_grad_sketch": lambda dy, x, s, b, g: linear_grad_sketch(dy, x, "w", s),
    "dW (bmm) + index_add_": dw_then_index_add,
    "dW alone, MKL bmm": lambda dy, x, s, b, g: torch.bmm(dy.transpose(1, 2), x),
    "dW alone, oneDNN fp32": lambda dy, x, s, b, g: onednn_product(dy, x),
    "dW alone, oneDNN bf16": lambda dy, x, s, b, g: torch.bmm(dy.bfloat16().transpose(1, 2), x.bfloat16()),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LINEAR)
def bench_linear(benchmark, name, shape, threads):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    batch, tokens, rows, columns = SHAPES[shape]
    dy, x = torch.randn(batch, tokens, rows), torch.randn(batch, tokens, columns)
    sketch = CountSketch(WIDTH)
    arguments = (dy, x, sketch, *tables(rows, columns, sketch))
    expected = dw_then_index_add(*arguments)
    assert (linear_grad_sketch(dy, x, "w", sketch) - expected).norm() < 1e-4 * expected.norm()
    benchmark.group = f"sketch of dY^T X, {shape}, B={batch} T={tokens}, {threads} thread(s)"
    benchmark.pedantic(LINEAR[name], args=arguments, rounds=15, warmup_rounds=2)
