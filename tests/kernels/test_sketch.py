"""The CountSketch kernels: one definition on every backend and ISA level, whatever the shapes, parts and batches."""

import pytest
import torch
from support.checks import assert_close, run_at_level

from merit_fast.kernels.sketch import (
    CountSketch,
    embedding_grad_sketch,
    flat_sketch,
    linear_grad_sketch,
    matrix_shape,
    vector_grad_sketch,
)
from merit_fast.kernels.sketch._eager import hash_counters

BACKENDS = ["cpu", "eager"]
SKETCH = CountSketch(proj_dim=3 * 4096, seed=3)  # three buckets: no power of two
SHAPES = [(3, 5, 64), (2, 70, 37), (1, 1, 5), (2, 13, 130), (2, 1, 1), (1, 129, 200)]


def slow_sketch(gradient, name, sketch, first_row=0, first_column=0, columns=None):
    """The definition read aloud: one tile at a time, its draws in Python integers."""
    batch, rows, width = gradient.shape
    across = -(-(columns or width) // 64)
    buckets, mask, key = sketch.proj_dim // 4096, (1 << 64) - 1, sketch.key(name) & (1 << 64) - 1

    def h(counter):
        z = key + (counter + 1) * 0x9E3779B97F4A7C15 & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        return z ^ z >> 31

    out = torch.zeros(batch, buckets, 64, 64, dtype=torch.float64)
    for r in range(first_row, first_row + rows):
        for c in range(first_column, first_column + width):
            tile = r // 64 * across + c // 64
            bucket = (tile + ((h(4 * (tile // buckets) + 3) >> 32) * buckets >> 32)) % buckets
            x, y = h(4 * tile) & 63, h(4 * tile) >> 8 & 63
            minus = h(4 * tile + 1) >> r % 64 & 1 ^ h(4 * tile + 2) >> c % 64 & 1
            value = gradient[:, r - first_row, c - first_column].double()
            out[:, bucket, r % 64 ^ x, c % 64 ^ y] += (1 - 2 * minus) * value
    return out.flatten(1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_flat_sketch_is_the_definition(shape, dtype, backend):
    gradient = torch.randint(-8, 9, shape).to(dtype)  # integers: sums are exact in any order
    result = flat_sketch(gradient, "layer.weight", SKETCH, backend=backend)
    assert torch.equal(result.double(), slow_sketch(gradient, "layer.weight", SKETCH))


def test_hash_is_pinned():
    """A change of any of these bits is a new hash version: old sketches would add to new ones unnoticed."""
    assert CountSketch(4096, seed=0).key("w") == KEY
    assert hash_counters(torch.tensor([0, 1, 2**40]), 12345).tolist() == HASHES
    sketch = flat_sketch(torch.arange(1.0, 9.0).view(1, 2, 4), "w", CountSketch(8192, 1))
    assert {int(i): float(sketch[0, i]) for i in sketch[0].nonzero()} == ENTRIES


KEY = 1433922861218710169
HASHES = [2454886589211414944, 3778200017661327597, 7128148681715144737]
ENTRIES = {
    7444: 3.0,
    7445: 4.0,
    7446: -1.0,
    7447: 2.0,
    7508: -7.0,
    7509: -8.0,
    7510: 5.0,
    7511: -6.0,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row,column", [(6, 0), (64, 0), (0, 33), (0, 64), (70, 100)])
def test_parts_of_a_parameter_add_up(row, column, backend):
    """Whatever the cut: a tensor-parallel shard, one of several fused matrices, a chunk of rows."""
    gradient = torch.randint(-8, 9, (2, 90, 150)).float()
    out = torch.zeros(2, SKETCH.proj_dim)
    for rows in (slice(0, row), slice(row, 90)):
        for columns in (slice(0, column), slice(column, 150)):
            part = gradient[:, rows, columns]  # strided: read where it lies
            place = dict(first_row=rows.start, first_column=columns.start, columns=150)
            assert flat_sketch(part, "w", SKETCH, **place, out=out, backend=backend) is out
    assert torch.equal(out, flat_sketch(gradient, "w", SKETCH, backend=backend))


LINEAR = [
    (5, 7, 37),
    (11, 64, 128),
    (1, 1, 1),
    (300, 13, 80),
    (3, 70, 64),
    (601, 40, 33),
    (0, 5, 6),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtypes", ["float32 float32", "bfloat16 bfloat16", "float32 bfloat16", "float16 float16"]
)
@pytest.mark.parametrize("tokens,rows,columns", LINEAR)
def test_linear_grad_sketch_is_the_sketch_of_the_product(tokens, rows, columns, dtypes, backend):
    left, right = (getattr(torch, dtype) for dtype in dtypes.split())
    dy = torch.randint(-4, 5, (3, tokens, rows)).to(left)
    x = torch.randint(-4, 5, (3, tokens, columns)).to(right)
    product = torch.einsum("bto,bti->boi", dy.float(), x.float())
    expected = flat_sketch(product, "w", SKETCH, backend="eager")
    assert torch.equal(linear_grad_sketch(dy, x, "w", SKETCH, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row,column", [(64, 128), (35, 77)])
def test_the_product_of_a_shard_goes_where_the_whole_would_put_it(row, column, backend):
    dy, x = torch.randint(-4, 5, (2, 9, 70)).float(), torch.randint(-4, 5, (2, 9, 100)).float()
    place = dict(first_row=row, first_column=column, columns=column + 120)
    whole = torch.zeros(2, row + 70, column + 120)
    whole[:, row:, column : column + 100] = torch.einsum("bto,bti->boi", dy, x)
    result = linear_grad_sketch(dy, x, "w", SKETCH, **place, backend=backend)
    assert torch.equal(result, flat_sketch(whole, "w", SKETCH, backend="eager"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_are_examples(backend):
    bounds = torch.tensor([0, 5, 5, 270, 300])  # one is empty
    dy, x = torch.randint(-4, 5, (300, 20)).bfloat16(), torch.randint(-4, 5, (300, 30)).bfloat16()
    ids = torch.randint(0, 40, (300,))
    options = dict(cu_seqlens=bounds, backend=backend)
    packed = [
        linear_grad_sketch(dy, x, "w", SKETCH, **options),
        embedding_grad_sketch(dy, ids, "w", SKETCH, **options),
        vector_grad_sketch(dy, "w", SKETCH, **options),
        vector_grad_sketch(dy, "w", SKETCH, x=2 * dy, **options),
    ]
    for b, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        one_dy, one_x, one_ids = dy[None, start:stop], x[None, start:stop], ids[None, start:stop]
        alone = [
            linear_grad_sketch(one_dy, one_x, "w", SKETCH, backend=backend),
            embedding_grad_sketch(one_dy, one_ids, "w", SKETCH, backend=backend),
            vector_grad_sketch(one_dy, "w", SKETCH, backend=backend),
            vector_grad_sketch(one_dy, "w", SKETCH, x=2 * one_dy, backend=backend),
        ]
        assert all(torch.equal(all_[b], one[0]) for all_, one in zip(packed, alone, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_multiplies_the_gradient(backend):
    dy, x = torch.randint(-4, 5, (2, 9, 70)).float(), torch.randint(-4, 5, (2, 9, 100)).float()
    scale = torch.randint(1, 5, (70, 100)).float()
    product = torch.einsum("bto,bti->boi", dy, x)
    options = dict(first_row=10, first_column=20, columns=130)
    expected = flat_sketch(product * scale, "w", SKETCH, **options, backend="eager")
    assert torch.equal(
        flat_sketch(product, "w", SKETCH, **options, scale=scale, backend=backend), expected
    )
    assert torch.equal(
        linear_grad_sketch(dy, x, "w", SKETCH, **options, scale=scale, backend=backend), expected
    )
    ids, rows = torch.randint(0, 70, (2, 9)), torch.zeros(2, 70, 100)
    for b in range(2):
        rows[b].index_add_(0, ids[b], x[b])
    expected = flat_sketch(rows * scale, "w", SKETCH, backend="eager")
    assert torch.equal(
        embedding_grad_sketch(x, ids, "w", SKETCH, scale=scale, backend=backend), expected
    )


def test_eager_products_in_chunks_of_rows_are_the_same(monkeypatch):
    from merit_fast.kernels.sketch import _eager

    dy, x = torch.randint(-4, 5, (2, 5, 37)).float(), torch.randint(-4, 5, (2, 5, 20)).float()
    whole = linear_grad_sketch(dy, x, "w", SKETCH, backend="eager")
    monkeypatch.setattr(_eager, "_CHUNK_ELEMENTS", 500)
    assert torch.equal(linear_grad_sketch(dy, x, "w", SKETCH, backend="eager"), whole)
    assert torch.equal(
        flat_sketch(torch.einsum("bto,bti->boi", dy, x), "w", SKETCH, backend="eager"), whole
    )


LEVEL_ERRORS = """
import torch
from merit_fast.kernels.sketch import *
torch.manual_seed(0)
sketch, errors = CountSketch(4096), []
for dtype in (torch.float32, torch.bfloat16):
    dy, x = torch.randn(2, 700, 50).to(dtype), torch.randn(2, 700, 70).to(dtype)
    dw = torch.einsum("bto,bti->boi", dy.double(), x.double())
    truth = flat_sketch(dw.float(), "w", sketch, backend="eager").double()
    rounding = flat_sketch((dw - dw.float()).float(), "w", sketch, backend="eager").double()
    mine = linear_grad_sketch(dy, x, "w", sketch).double()
    errors.append(float((mine - truth - rounding).norm() / truth.norm()))
    eager = flat_sketch(torch.bmm(dy.transpose(1, 2), x), "w", sketch, backend="eager").double()
    errors.append(float((eager - truth - rounding).norm() / truth.norm()))
print(*errors)
"""


def test_on_every_isa_level_products_are_no_worse_than_eager_ones(native_levels):
    for level in native_levels:
        fp32, eager_fp32, bf16, eager_bf16 = map(float, run_at_level(LEVEL_ERRORS, level).split())
        assert fp32 <= eager_fp32 + 3e-7, level
        assert bf16 <= 3e-7 < eager_bf16, (
            level
        )  # products of bf16 are exact in fp32; eager rounds dW to bf16


ISA_SCRIPT = """
import hashlib, torch
from merit_fast.kernels.sketch import *
torch.manual_seed(0)
g = torch.randn(2, 9, 100)
dy, x = torch.randint(-3, 4, (2, 301, 19)), torch.randint(-3, 4, (2, 301, 83))
s = CountSketch(8192, 7)
out = [flat_sketch(g, "w", s), flat_sketch(g.bfloat16(), "w", s), flat_sketch(g, "w", s, scale=g[0].abs())]
types = [(a, b) for a in (torch.float32, torch.bfloat16) for b in (a, torch.float32)]
out += [linear_grad_sketch(dy.to(a), x.to(b), "w", s) for a, b in types]
print(hashlib.sha256(b"".join(o.numpy().tobytes() for o in out)).hexdigest())
"""


def test_every_isa_level_gives_the_same_bits_where_sums_are_exact_or_in_order(native_levels):
    digests = {level: run_at_level(ISA_SCRIPT, level) for level in native_levels}
    assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize("backend", BACKENDS)
def test_embedding_grad_sketch_adds_rows_by_token(backend):
    token_ids = torch.tensor([[3, 1, 3, 0], [2, 2, 2, 2]])
    dy = torch.randint(-4, 5, (2, 4, 20)).float()
    weight = torch.zeros(2, 5, 20)
    for b in range(2):
        weight[b].index_add_(0, token_ids[b], dy[b])
    expected = flat_sketch(weight, "embed", SKETCH, backend=backend)
    assert torch.equal(
        embedding_grad_sketch(dy, token_ids, "embed", SKETCH, backend=backend), expected
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtypes", ["float32 float32", "bfloat16 bfloat16", "bfloat16 float32", "float32 bfloat16"]
)
@pytest.mark.parametrize("tokens,columns", [(1, 1), (70, 37), (33, 64), (0, 5), (300, 200)])
def test_vector_grad_sketch_sums_over_tokens(tokens, columns, dtypes, backend):
    left, right = (getattr(torch, dtype) for dtype in dtypes.split())
    dy, x = torch.randn(3, tokens, columns).to(left), torch.randn(3, tokens, columns).to(right)
    normal = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-3)
    cases = [
        (dy.double(), {}),
        (dy.double() * x.double(), {"x": x}),
        (dy.double() * normal, {"x": x, "epsilon": 1e-3}),
    ]
    for products, options in cases:
        truth = flat_sketch(products.sum(1), "w", SKETCH, backend="eager")
        result = vector_grad_sketch(dy, "w", SKETCH, **options, backend=backend)
        size = (
            flat_sketch(products.abs().sum(1), "w", SKETCH, backend="eager").abs().max()
            if tokens
            else 0
        )
        assert (
            result - truth
        ).abs().max() <= 3e-7 * size  # of what is summed, not of what is left of it


def test_a_strided_dy_is_summed_where_it_lies():
    whole = torch.randn(2, 9, 50)
    part = whole[..., 10:30]
    assert torch.equal(
        vector_grad_sketch(part, "w", SKETCH), vector_grad_sketch(part.contiguous(), "w", SKETCH)
    )


def test_nearby_seeds_and_names_are_unrelated():
    gradient = torch.randn(1, 200, 256)
    keys = [(0, "a"), (1, "a"), (2, "a"), (0, "b")]
    sketches = torch.cat(
        [flat_sketch(gradient, name, CountSketch(4096, seed)) for seed, name in keys]
    )
    cosines = torch.nn.functional.normalize(sketches) @ torch.nn.functional.normalize(sketches).T
    assert (cosines - torch.eye(len(keys))).abs().max() < 5 / 4096**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_batching_and_order_change_no_bit(dtype):
    dy, x, sketch = (
        torch.randn(3, 40, 100).to(dtype),
        torch.randn(3, 40, 210).to(dtype),
        CountSketch(5 * 4096),
    )

    def both(rows):
        return torch.cat(
            [flat_sketch(x[rows], "w", sketch), linear_grad_sketch(dy[rows], x[rows], "w", sketch)],
            1,
        )

    whole, threads = both([0, 1, 2]), torch.get_num_threads()
    assert torch.equal(whole, torch.cat([both([b]) for b in range(3)]))
    assert torch.equal(whole.flip(0), both([2, 1, 0]))
    try:
        for count in (1, 2, 4, 7):  # more than there are buckets, too
            torch.set_num_threads(count)
            assert torch.equal(whole, both([0, 1, 2]))
    finally:
        torch.set_num_threads(threads)


def test_custom_ops_pass_opcheck():
    from merit_fast.kernels.sketch import _ops

    out, offsets = torch.zeros(2, 4096), torch.tensor([0, 3, 5])
    torch.library.opcheck(
        _ops.sketch_rows, (torch.randn(5, 20), offsets, None, 0, 0, 20, 7, "w", None, out, "cpu")
    )
    arguments = (torch.randn(5, 4), torch.randn(5, 16), offsets, 0, 0, 16, 7, "w", None, out, "cpu")
    torch.library.opcheck(_ops.sketch_linear, arguments)
    torch.library.opcheck(
        _ops.token_sums, (torch.randn(5, 4), torch.randn(5, 4), offsets, 1e-6, "cpu")
    )


def test_the_public_functions_compile_whole():
    dy, x, ids = torch.randn(2, 5, 6), torch.randn(2, 5, 7), torch.randint(0, 9, (2, 5))

    def sketches(dy, x, ids):
        out = linear_grad_sketch(dy, x, "w", SKETCH)
        flat_sketch(x, "v", SKETCH, out=out)
        vector_grad_sketch(dy, "b", SKETCH, x=dy, out=out)
        return embedding_grad_sketch(dy, ids, "e", SKETCH, out=out)

    compiled = torch.compile(sketches, fullgraph=True, backend="aot_eager")
    assert_close(compiled(dy, x, ids), sketches(dy, x, ids))


@pytest.mark.parametrize(
    "shape,expected",
    [((), (1, 1)), ((5,), (1, 5)), ((4, 3), (4, 3)), ((2, 4, 3), (8, 3)), ((8, 3, 2, 2), (8, 12))],
)
def test_matrix_shape(shape, expected):
    assert matrix_shape(shape) == expected


ZEROS = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda s: flat_sketch(torch.zeros(2, 3, 4, 5), "w", s), r"must be \[B, R, C\]"),
        (lambda s: flat_sketch(ZEROS, "w", s, row_ids=torch.zeros(2, 2).long()), "row_ids"),
        (lambda s: flat_sketch(ZEROS, "w", s, out=torch.zeros(2, 8)), "out must be"),
        (
            lambda s: flat_sketch(ZEROS, "w", s, first_column=1, columns=4),
            "does not lie in a parameter of 4 columns",
        ),
        (
            lambda s: flat_sketch(ZEROS, "w", s, scale=torch.ones(4, 3)),
            r"scale must be float32 \[3, 4\]",
        ),
        (lambda s: linear_grad_sketch(ZEROS, torch.zeros(2, 2, 4), "w", s), "dy and x must be"),
        (
            lambda s: linear_grad_sketch(
                ZEROS[0], ZEROS[0], "w", s, cu_seqlens=torch.tensor([0, 4])
            ),
            "at most 3",
        ),
        (
            lambda s: linear_grad_sketch(
                ZEROS[0], ZEROS[0], "w", s, cu_seqlens=torch.tensor([0, 2, 1])
            ),
            "must rise",
        ),
        (
            lambda s: linear_grad_sketch(ZEROS[0], ZEROS[0], "w", s, cu_seqlens=torch.zeros(2)),
            "must be int64",
        ),
        (
            lambda s: embedding_grad_sketch(ZEROS, torch.zeros(2, 2).long(), "w", s),
            "token_ids must be",
        ),
        (lambda s: vector_grad_sketch(ZEROS, "w", s, x=ZEROS[:1]), "x must be as dy"),
        (lambda s: CountSketch(100), "multiple of 4096"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(CountSketch(4096))
