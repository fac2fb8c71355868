"""The search's Triton kernel in Triton's interpreter; ``test_interpreted.py`` runs these."""

import pytest
import torch
from support.checks import assert_never_worse

from merit_fast.kernels.search import row_products
from merit_fast.kernels.search._triton import COLUMNS, ROWS

SHAPES = [(1, 1, 1), (ROWS + 1, 1, 33), (3, 5, COLUMNS), (2 * ROWS, 4, 2 * COLUMNS + 7)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("n,m,width", SHAPES)
def test_products_are_never_worse_than_pytorchs(n, m, width, dtype):
    rows = torch.randn(n, width).to(dtype)
    vectors = torch.randn(m, width)
    products = row_products(rows, vectors, backend="triton")
    truth = rows.double() @ vectors.double().T
    assert products.shape == (n, m) and products.dtype == torch.float32
    assert_never_worse(products, rows.float() @ vectors.T, truth)


def test_columns_of_a_wider_table_are_read_where_they_lie():
    table = torch.full((5, 64), float("nan")).half()
    table[:, 3:38] = torch.randn(5, 35)
    vectors = torch.randn(3, 35)
    products = row_products(table[:, 3:38], vectors, backend="triton")
    truth = table[:, 3:38].double() @ vectors.double().T
    assert_never_worse(products, table[:, 3:38].float() @ vectors.T, truth)


@pytest.mark.parametrize("n,m,width", [(0, 3, 8), (4, 0, 8), (4, 3, 0)])
def test_nothing_to_multiply_gives_zeros_of_the_shape(n, m, width):
    products = row_products(torch.zeros(n, width), torch.zeros(m, width), backend="triton")
    assert products.shape == (n, m) and not products.any()
