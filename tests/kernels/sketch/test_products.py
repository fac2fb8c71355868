"""Sketches of products and of sums over tokens equal those of the gradients, on every backend."""

import pytest
import torch
from support.kernels.sketch_cases import BACKENDS, SKETCH

from merit_fast.kernels.sketch import (
    CountSketch,
    embedding_grad_sketch,
    flat_sketch,
    linear_grad_sketch,
    matrix_shape,
    vector_grad_sketch,
)

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
    dy = torch.randint(-4, 5, (2, 9, 70)).float()
    x = torch.randint(-4, 5, (2, 9, 100)).float()
    options = dict(first_row=row, first_column=column, columns=column + 120)
    whole = torch.zeros(2, row + 70, column + 120)
    whole[:, row:, column : column + 100] = torch.einsum("bto,bti->boi", dy, x)
    result = linear_grad_sketch(dy, x, "w", SKETCH, **options, backend=backend)
    assert torch.equal(result, flat_sketch(whole, "w", SKETCH, backend="eager"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 31, 127, 129, 255, 257])
@pytest.mark.parametrize(
    "rows,columns,row,column", [(300, 600, 0, 0), (8, 530, 0, 70), (530, 9, 70, 5)]
)
def test_any_number_of_tiles_and_tokens_adds_up_in_a_bucket(
    rows, columns, row, column, tokens, dtype
):
    sketch = CountSketch(4 * 4096)
    dy = torch.randint(-4, 5, (2, tokens, rows)).to(dtype)
    x = torch.randint(-4, 5, (2, tokens, columns)).to(dtype)
    place = dict(first_row=row, first_column=column, columns=column + columns + 3)
    product = torch.einsum("bto,bti->boi", dy.float(), x.float())
    expected = flat_sketch(product, "w", sketch, **place, backend="eager")
    assert torch.equal(linear_grad_sketch(dy, x, "w", sketch, **place), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_next_to_a_matrix_of_odd_width_are_not_read(dtype):
    wide = torch.full((2, 5, 300), torch.nan).to(dtype)
    wide[:, :, 37:200] = torch.randint(-4, 5, (2, 5, 163)).to(dtype)
    inside = wide[:, :, 37:200]
    result = linear_grad_sketch(inside, inside, "w", SKETCH, first_row=30, first_column=77)
    copy = inside.clone()
    product = torch.einsum("bto,bti->boi", copy.float(), copy.float())
    options = dict(first_row=30, first_column=77, backend="eager")
    assert torch.equal(result, flat_sketch(product, "w", SKETCH, **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_are_examples(backend):
    bounds = torch.tensor([0, 5, 5, 270, 300])  # one is empty
    dy = torch.randint(-4, 5, (300, 20)).bfloat16()
    x = torch.randint(-4, 5, (300, 30)).bfloat16()
    ids = torch.randint(0, 40, (300,))
    options = dict(cu_seqlens=bounds, backend=backend)
    packed = [
        linear_grad_sketch(dy, x, "w", SKETCH, **options),
        embedding_grad_sketch(dy, ids, "w", SKETCH, **options),
        vector_grad_sketch(dy, "w", SKETCH, **options),
        vector_grad_sketch(dy, "w", SKETCH, x=2 * dy, **options),
    ]
    for b, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        one_dy = dy[None, start:stop]
        one_x = x[None, start:stop]
        one_ids = ids[None, start:stop]
        single = [
            linear_grad_sketch(one_dy, one_x, "w", SKETCH, backend=backend),
            embedding_grad_sketch(one_dy, one_ids, "w", SKETCH, backend=backend),
            vector_grad_sketch(one_dy, "w", SKETCH, backend=backend),
            vector_grad_sketch(one_dy, "w", SKETCH, x=2 * one_dy, backend=backend),
        ]
        assert all(
            torch.equal(whole[b], each[0]) for whole, each in zip(packed, single, strict=True)
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_multiplies_the_gradient(backend):
    dy = torch.randint(-4, 5, (2, 9, 70)).float()
    x = torch.randint(-4, 5, (2, 9, 100)).float()
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
    ids = torch.randint(0, 70, (2, 9))
    rows = torch.zeros(2, 70, 100)
    for b in range(2):
        rows[b].index_add_(0, ids[b], x[b])
    expected = flat_sketch(rows * scale, "w", SKETCH, backend="eager")
    assert torch.equal(
        embedding_grad_sketch(x, ids, "w", SKETCH, scale=scale, backend=backend), expected
    )


def test_eager_products_in_chunks_of_rows_are_the_same(monkeypatch):
    from merit_fast.kernels.sketch import _eager

    dy = torch.randint(-4, 5, (2, 5, 37)).float()
    x = torch.randint(-4, 5, (2, 5, 20)).float()
    whole = linear_grad_sketch(dy, x, "w", SKETCH, backend="eager")
    monkeypatch.setattr(_eager, "_CHUNK_ELEMENTS", 500)
    assert torch.equal(linear_grad_sketch(dy, x, "w", SKETCH, backend="eager"), whole)
    assert torch.equal(
        flat_sketch(torch.einsum("bto,bti->boi", dy, x), "w", SKETCH, backend="eager"), whole
    )


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
    dy = torch.randn(3, tokens, columns).to(left)
    x = torch.randn(3, tokens, columns).to(right)
    normal = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-3)
    cases = [
        (dy.double(), {}),
        (dy.double() * x.double(), {"x": x}),
        (dy.double() * normal, {"x": x, "epsilon": 1e-3}),
    ]
    for products, options in cases:
        folded = products.sum(1).view(3, *matrix_shape([columns]))
        truth = flat_sketch(folded, "w", SKETCH, backend="eager")
        result = vector_grad_sketch(dy, "w", SKETCH, **options, backend=backend)
        terms = products.abs().sum(1).view_as(folded)
        size = flat_sketch(terms, "w", SKETCH, backend="eager").abs().max() if tokens else 0
        # Relative to the terms: their sum may be much smaller.
        assert (result - truth).abs().max() <= 3e-7 * size


def test_a_strided_dy_is_summed_where_it_lies():
    whole = torch.randn(2, 9, 50)
    columns = whole[..., 10:30]
    assert torch.equal(
        vector_grad_sketch(columns, "w", SKETCH),
        vector_grad_sketch(columns.contiguous(), "w", SKETCH),
    )
