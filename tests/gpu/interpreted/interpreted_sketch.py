"""The sketch's Triton kernels in Triton's interpreter, bit for bit against the reference.

``test_interpreted.py`` runs these.
"""

import pytest
import torch
from support.checks import FLOOR
from support.gpu.sketch_runs import CASES, DTYPES, KEY, assert_equal_to_eager, integers, target_of

from merit_fast.kernels.sketch import _eager, _triton


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    buckets, rows, columns, place, tokens = request.param
    return buckets, rows, columns, place, torch.tensor([0, *tokens]).cumsum(0)


@DTYPES
def test_linear_is_the_reference_exactly(case, dtype):
    buckets, rows, columns, place, offsets = case
    dy = integers(offsets[-1], rows, dtype=dtype)
    x = integers(offsets[-1], columns, dtype=dtype)
    scale = integers(rows, columns) if dtype == torch.bfloat16 else None
    assert_equal_to_eager("sketch_linear", (dy, x), offsets, place, buckets, scale=scale)


@DTYPES
def test_rows_are_the_reference_exactly(case, dtype):
    buckets, _, columns, place, offsets = case
    gradient = integers(offsets[-1], columns, dtype=dtype)
    scale = integers(int(offsets.diff().max()), columns) if dtype == torch.bfloat16 else None
    assert_equal_to_eager("sketch_rows", (gradient, None), offsets, place, buckets, scale=scale)


@DTYPES
def test_rows_by_id_are_the_reference_exactly(case, dtype):
    buckets, rows, columns, (_, *columns_of_place), offsets = case
    gradient = integers(offsets[-1], columns, dtype=dtype)
    ids = torch.randint(0, rows, (int(offsets[-1]),))
    place = (0, *columns_of_place)
    scale = integers(rows, columns) if dtype == torch.bfloat16 else None
    assert_equal_to_eager("sketch_rows", (gradient, ids), offsets, place, buckets, scale=scale)


@DTYPES
@pytest.mark.parametrize("scaled", [False, True])
def test_every_dtype_with_a_scale_and_without(scaled, dtype):
    dy = integers(20, 70, dtype=dtype)
    x = integers(20, 130, dtype=dtype)
    offsets = torch.tensor([0, 7, 20])
    scale = integers(70, 130) if scaled else None
    assert_equal_to_eager("sketch_linear", (dy, x), offsets, (0, 0, 130), 3, scale=scale)
    for ids in (None, torch.randint(0, 70, (20,))):
        assert_equal_to_eager("sketch_rows", (x, ids), offsets, (0, 0, 130), 3, scale=scale)


def test_far_into_a_parameter():
    """Tile numbers of many experts: 32 bits hold the number, but not the counter, 4 times that."""
    dy = integers(3, 70)
    x = integers(3, 70)
    place = (64 * 2**22, 64 * 200, 64 * 256)  # tile 2^30
    whole = assert_equal_to_eager("sketch_linear", (dy, x), torch.tensor([0, 3]), place, 2)
    product = dy.T @ x
    offsets = torch.tensor([0, 70])
    rows = assert_equal_to_eager("sketch_rows", (product, None), offsets, place, 2)
    ids = place[0] + torch.arange(70)
    by_id = assert_equal_to_eager("sketch_rows", (product, ids), offsets, (0, *place[1:]), 2)
    assert torch.equal(rows, whole) and torch.equal(by_id, whole)


@DTYPES
def test_an_example_never_reads_its_neighbours(dtype):
    dy = integers(90, 70, dtype=dtype)
    x = integers(90, 70, dtype=dtype)
    offsets = torch.tensor([0, 33, 34, 90])
    for values in (dy, x):
        values[:33] = values[34:] = float("nan")
    out = torch.zeros(3, 2 * 4096)
    _triton.sketch_linear(dy, x, target_of(offsets, (0, 0, 70), out))
    assert out[[0, 2]].isnan().any(1).all() and not out[1].isnan().any()
    for ids in (None, torch.randint(0, 300, (90,))):
        out = torch.zeros(3, 2 * 4096)
        _triton.sketch_rows(dy, ids, target_of(offsets, (0, 0, 70), out))
        assert out[[0, 2]].isnan().any(1).all() and not out[1].isnan().any()


@DTYPES
def test_views_of_wider_matrices_are_read_where_they_lie(dtype):
    wide = integers(12, 300, dtype=dtype)
    offsets = torch.tensor([0, 5, 12])
    for dy, x in (
        (wide[:, 16:116], wide[:, 208:]),
        (wide[:, 3:67], wide[:, 100:164]),
        (wide[:1, :64].expand(12, 64), wide[:, :80]),
    ):
        place = (0, 0, x.shape[1])
        assert_equal_to_eager("sketch_linear", (dy, x), offsets, place, 3)
        assert_equal_to_eager("sketch_rows", (x, None), offsets, place, 3)
    matrices = (wide[:, :70], wide[:, :80])
    scale = integers(70, 300)[:, 10:90]
    assert_equal_to_eager("sketch_linear", matrices, offsets, (0, 0, 80), 3, scale=scale)


def test_products_of_two_dtypes():
    dy = integers(9, 64, dtype=torch.bfloat16)
    x = integers(9, 80)
    offsets = torch.tensor([0, 9])
    assert_equal_to_eager("sketch_linear", (dy, x), offsets, (0, 0, 80), 3)
    assert_equal_to_eager("sketch_linear", (x, dy), offsets, (0, 0, 64), 3)


@pytest.mark.parametrize("cut_rows,cut_columns", [(64, 128), (48, 16), (37, 91)])
def test_parts_of_a_parameter_add_up(cut_rows, cut_columns):
    dy = integers(9, 100)
    x = integers(9, 200)
    offsets = torch.tensor([0, 4, 9])
    whole = torch.zeros(2, 3 * 4096)
    parts = torch.zeros(2, 3 * 4096)
    _triton.sketch_linear(dy, x, target_of(offsets, (0, 0, 200), whole))
    for row, rows in ((0, dy[:, :cut_rows]), (cut_rows, dy[:, cut_rows:])):
        for column, columns in ((0, x[:, :cut_columns]), (cut_columns, x[:, cut_columns:])):
            _triton.sketch_linear(rows, columns, target_of(offsets, (row, column, 200), parts))
    assert torch.equal(parts, whole) and whole.any()


@DTYPES
@pytest.mark.parametrize("op", ["linear", "rows", "ids"])
def test_it_is_never_worse_than_eager(op, dtype):
    """Against float64, of the same rounded inputs; the floor allows for the order of sums."""
    offsets = torch.tensor([0, 60, 250])
    a = torch.randn(250, 192).to(dtype)
    b = torch.randn(250, 150).to(dtype)
    ids = torch.randint(0, 100, (250,)) if op == "ids" else None
    results = {}
    for name, module in (("eager", _eager), ("triton", _triton)):
        results[name] = torch.zeros(2, 4096)
        target = target_of(offsets, (0, 0, 150), results[name])
        if op == "linear":
            module.sketch_linear(a, b, target)
        else:
            module.sketch_rows(b, ids, target)
    truth = torch.zeros(2, 4096, dtype=torch.float64)
    for i, (start, stop) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        rows = torch.arange(stop - start) if ids is None else ids[start:stop]
        values = b[start:stop].double()
        if op == "linear":
            rows = torch.arange(192)
            values = a[start:stop].double().T @ values
        _eager._add_rows(values, rows, 0, 150, KEY, truth[i])
    error = {
        name: (result.double() - truth).norm() / truth.norm() for name, result in results.items()
    }
    assert error["triton"] <= error["eager"] + FLOOR[torch.float32], error
