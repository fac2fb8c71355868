"""The sketch's Triton kernels in Triton's interpreter; ``test_interpreted.py`` runs these."""

import pytest
import torch
import triton
import triton.language as tl
from support.checks import FLOOR

from merit_fast.kernels.sketch import (
    CountSketch,
    _eager,
    _triton,
    _triton_kernels,
    embedding_grad_sketch,
    flat_sketch,
    linear_grad_sketch,
    vector_grad_sketch,
)

KEY = -0x123456789ABCDEF
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# Buckets, rows, columns, (first row, first column, the parameter's columns), tokens of the examples.
CASES = {
    "one tile": (1, 64, 64, (0, 0, 64), [64]),
    "one entry": (2, 1, 1, (0, 0, 1), [1, 3]),
    "ragged": (3, 70, 37, (0, 0, 37), [33, 1, 100]),
    "tokens that fill no block": (1, 32, 16, (0, 0, 16), [15, 16, 17, 65]),
    "examples without tokens": (3, 40, 100, (0, 0, 100), [0, 5, 0]),
    "no tokens at all": (2, 40, 100, (0, 0, 100), [0, 0]),
    "more buckets than tiles": (11, 65, 130, (0, 0, 130), [9]),
    "shard from a tile's border": (3, 64, 192, (128, 256, 1000), [5]),
    "shard that begins in a tile": (3, 100, 80, (37, 91, 200), [5, 6]),
    "shard that begins on the grid of vectors": (3, 101, 81, (16, 48, 200), [5, 6]),
    "narrow shard, strip by strip": (2, 150, 100, (0, 64, 4096), [3]),
    "narrow shard, few groups": (16, 150, 100, (0, 64, 2048), [3]),
    "last columns of the parameter": (5, 64, 72, (64, 128, 200), [3]),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    buckets, rows, columns, place, tokens = request.param
    return buckets, rows, columns, place, torch.tensor([0, *tokens]).cumsum(0)


def integers(*shape, dtype=torch.float32):
    return torch.randint(-4, 5, shape).to(dtype)


def assert_equal_to_eager(op, arguments, batch, buckets, key=KEY, scale=None):
    """Exactly, and on top of what was there."""
    before = integers(batch, buckets * 4096)
    expected, result = before.clone(), before.clone()
    getattr(_eager, op)(*arguments, key, expected, scale)
    getattr(_triton, op)(*arguments, key, result, scale)
    assert torch.equal(result, expected)
    return result - before


@DTYPES
def test_linear_is_the_reference_exactly(case, dtype):
    buckets, rows, columns, place, offsets = case
    dy, x = integers(offsets[-1], rows, dtype=dtype), integers(offsets[-1], columns, dtype=dtype)
    scale = integers(rows, columns) if dtype == torch.bfloat16 else None
    assert_equal_to_eager(
        "sketch_linear", (dy, x, offsets, place), len(offsets) - 1, buckets, scale=scale
    )


@DTYPES
def test_rows_are_the_reference_exactly(case, dtype):
    buckets, _, columns, place, offsets = case
    gradient = integers(offsets[-1], columns, dtype=dtype)
    arguments = (gradient, offsets, None, place)
    scale = integers(int(offsets.diff().max()), columns) if dtype == torch.bfloat16 else None
    assert_equal_to_eager("sketch_rows", arguments, len(offsets) - 1, buckets, scale=scale)


@DTYPES
def test_rows_by_id_are_the_reference_exactly(case, dtype):
    buckets, rows, columns, (_, *place), offsets = case
    gradient, ids = (
        integers(offsets[-1], columns, dtype=dtype),
        torch.randint(0, rows, (int(offsets[-1]),)),
    )
    arguments = (gradient, offsets, ids, (0, *place))
    scale = integers(rows, columns) if dtype == torch.bfloat16 else None
    assert_equal_to_eager("sketch_rows", arguments, len(offsets) - 1, buckets, scale=scale)


@DTYPES
@pytest.mark.parametrize("scaled", [False, True])
def test_every_dtype_with_a_scale_and_without(scaled, dtype):
    dy, x, offsets = (
        integers(20, 70, dtype=dtype),
        integers(20, 130, dtype=dtype),
        torch.tensor([0, 7, 20]),
    )
    scale = integers(70, 130) if scaled else None
    assert_equal_to_eager("sketch_linear", (dy, x, offsets, (0, 0, 130)), 2, 3, scale=scale)
    for ids in (None, torch.randint(0, 70, (20,))):
        assert_equal_to_eager("sketch_rows", (x, offsets, ids, (0, 0, 130)), 2, 3, scale=scale)


@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_the_hash_is_of_64_bits(key):
    @triton.jit
    def kernel(counters, out, key, N: tl.constexpr):
        at = tl.arange(0, N)
        bits = _triton_kernels._hash(key.to(tl.uint64), tl.load(counters + at).to(tl.uint64))
        tl.store(out + at, bits.to(tl.int64, bitcast=True))

    counters = torch.tensor([0, 1, 2**31, 2**32 + 5, 2**40, 2**62, -1, -2])
    out = torch.empty_like(counters)
    kernel[(1,)](counters, out, key, len(counters))
    assert torch.equal(out, _eager.hash_counters(counters, key))
    gradient = integers(3, 70)
    assert_equal_to_eager(
        "sketch_rows", (gradient, torch.tensor([0, 3]), None, (0, 0, 70)), 1, 2, key=key
    )


def test_far_into_a_parameter():
    """Tile numbers of a stack of experts, of which 32 bits hold the number but not the counter, four times that."""
    dy, x, offsets = integers(3, 70), integers(3, 70), torch.tensor([0, 3])
    place = (64 * 2**22, 64 * 200, 64 * 256)  # tile 2^30
    whole = assert_equal_to_eager("sketch_linear", (dy, x, offsets, place), 1, 2)
    product = dy.T @ x
    rows = assert_equal_to_eager("sketch_rows", (product, torch.tensor([0, 70]), None, place), 1, 2)
    ids = place[0] + torch.arange(70)
    by_id = assert_equal_to_eager(
        "sketch_rows", (product, torch.tensor([0, 70]), ids, (0, *place[1:])), 1, 2
    )
    assert torch.equal(rows, whole) and torch.equal(by_id, whole)


@pytest.mark.parametrize("buckets,steps", [(2, 3 * 2), (64, 4)])
def test_a_narrow_shard_is_not_searched_for_among_all_tiles(buckets, steps):
    """3 x 2 tiles of 3 x 64: two groups for each strip of tiles, or the four groups that 130 tiles touch."""

    @triton.jit
    def kernel(out, rows, columns, first_row, first_column, across, buckets):
        first, run, touched, steps = _triton_kernels._walk(
            rows, columns, first_row, first_column, across, buckets
        )
        tl.store(out, steps)

    out = torch.zeros(1, dtype=torch.int64)
    kernel[(1,)](out, 150, 100, 0, 64, 64, buckets)
    assert out.item() == steps


def launches(monkeypatch):
    """The programs of each launch from now on, by kernel."""
    seen = []
    for name in ("linear_kernel", "rows_kernel", "ids_kernel", "add_kernel"):
        kernel = getattr(_triton, name)

        class Counted:
            def __init__(self, name, kernel):
                self.name, self.kernel = name, kernel

            def __getitem__(self, grid):
                seen.append((self.name, *grid))
                return self.kernel[grid]

        monkeypatch.setattr(_triton, name, Counted(name, kernel))
    return seen


def test_splits_share_a_bucket_and_their_sums_are_added(monkeypatch):
    """The sums lie in memory that tests fill with NaN: what a program did not write would show."""
    seen = launches(monkeypatch)
    offsets = torch.tensor([0, 3, 7])
    assert_equal_to_eager(
        "sketch_linear", (integers(7, 256), integers(7, 256), offsets, (0, 0, 256)), 2, 1
    )
    assert_equal_to_eager(
        "sketch_rows", (integers(512, 256), offsets * 73, None, (0, 0, 256)), 2, 1
    )
    ids = torch.randint(0, 300, (1024,))
    assert_equal_to_eager(
        "sketch_rows", (integers(1024, 40), torch.tensor([0, 1024]), ids, (0, 0, 40)), 1, 1
    )
    add, add_two = (("add_kernel", batch * 4096 // _triton.ADD_BLOCK) for batch in (1, 2))
    assert seen == [
        ("linear_kernel", 2 * 8),
        add_two,
        ("rows_kernel", 2 * 2),
        add_two,
        ("ids_kernel", 2),
        add,
    ]


def test_as_many_programs_as_fill_a_gpu_and_no_more(monkeypatch):
    seen = launches(monkeypatch)
    monkeypatch.setattr(_triton, "PROGRAMS", 12)
    offsets = torch.tensor([0, 3, 7])
    assert_equal_to_eager(
        "sketch_linear", (integers(7, 256), integers(7, 192), offsets, (0, 0, 192)), 2, 1
    )
    assert seen == [("linear_kernel", 12), ("add_kernel", 2 * 4096 // _triton.ADD_BLOCK)]


@DTYPES
def test_an_example_never_reads_its_neighbours(dtype):
    dy, x, offsets = (
        integers(90, 70, dtype=dtype),
        integers(90, 70, dtype=dtype),
        torch.tensor([0, 33, 34, 90]),
    )
    for values in (dy, x):
        values[:33] = values[34:] = float("nan")
    out = torch.zeros(3, 2 * 4096)
    _triton.sketch_linear(dy, x, offsets, (0, 0, 70), KEY, out)
    assert out[[0, 2]].isnan().any(1).all() and not out[1].isnan().any()
    for ids in (None, torch.randint(0, 300, (90,))):
        out = torch.zeros(3, 2 * 4096)
        _triton.sketch_rows(dy, offsets, ids, (0, 0, 70), KEY, out)
        assert out[[0, 2]].isnan().any(1).all() and not out[1].isnan().any()


@DTYPES
def test_views_of_wider_matrices_are_read_where_they_lie(dtype):
    wide, offsets = integers(12, 300, dtype=dtype), torch.tensor([0, 5, 12])
    for dy, x in (
        (wide[:, 16:116], wide[:, 208:]),
        (wide[:, 3:67], wide[:, 100:164]),
        (wide[:1, :64].expand(12, 64), wide[:, :80]),
    ):
        assert_equal_to_eager("sketch_linear", (dy, x, offsets, (0, 0, x.shape[1])), 2, 3)
        assert_equal_to_eager("sketch_rows", (x, offsets, None, (0, 0, x.shape[1])), 2, 3)
    scale = integers(70, 300)[:, 10:90]
    assert_equal_to_eager(
        "sketch_linear", (wide[:, :70], wide[:, :80], offsets, (0, 0, 80)), 2, 3, scale=scale
    )


def test_products_of_two_dtypes():
    dy, x, offsets = integers(9, 64, dtype=torch.bfloat16), integers(9, 80), torch.tensor([0, 9])
    assert_equal_to_eager("sketch_linear", (dy, x, offsets, (0, 0, 80)), 1, 3)
    assert_equal_to_eager("sketch_linear", (x, dy, offsets, (0, 0, 64)), 1, 3)


@pytest.mark.parametrize("cut_rows,cut_columns", [(64, 128), (48, 16), (37, 91)])
def test_parts_of_a_parameter_add_up(cut_rows, cut_columns):
    dy, x, offsets = integers(9, 100), integers(9, 200), torch.tensor([0, 4, 9])
    whole, parts = torch.zeros(2, 3 * 4096), torch.zeros(2, 3 * 4096)
    _triton.sketch_linear(dy, x, offsets, (0, 0, 200), KEY, whole)
    for row, rows in ((0, dy[:, :cut_rows]), (cut_rows, dy[:, cut_rows:])):
        for column, columns in ((0, x[:, :cut_columns]), (cut_columns, x[:, cut_columns:])):
            _triton.sketch_linear(rows, columns, offsets, (row, column, 200), KEY, parts)
    assert torch.equal(parts, whole) and whole.any()


@DTYPES
@pytest.mark.parametrize("op", ["linear", "rows", "ids"])
def test_it_is_never_worse_than_eager(op, dtype):
    """Against float64, of the same rounded inputs; the floor is what the order of sums may add."""
    offsets, place = torch.tensor([0, 60, 250]), (0, 0, 150)
    a, b = torch.randn(250, 192).to(dtype), torch.randn(250, 150).to(dtype)
    ids = torch.randint(0, 100, (250,)) if op == "ids" else None
    results = {}
    for name, module in (("eager", _eager), ("triton", _triton)):
        results[name] = torch.zeros(2, 4096)
        if op == "linear":
            module.sketch_linear(a, b, offsets, place, KEY, results[name], None)
        else:
            module.sketch_rows(b, offsets, ids, place, KEY, results[name], None)
    truth = torch.zeros(2, 4096, dtype=torch.float64)
    for i, (start, stop) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        rows = torch.arange(stop - start) if ids is None else ids[start:stop]
        values = b[start:stop].double()
        if op == "linear":
            rows, values = torch.arange(192), a[start:stop].double().T @ values
        _eager._add_rows(values, rows, 0, 150, KEY, truth[i])
    error = {
        name: (result.double() - truth).norm() / truth.norm() for name, result in results.items()
    }
    assert error["triton"] <= error["eager"] + FLOOR[torch.float32], error


def test_the_public_functions_by_name(monkeypatch):
    sketch, calls = CountSketch(2 * 4096, 1), launches(monkeypatch)
    dy, x, ids = integers(2, 7, 40), integers(2, 7, 70), torch.randint(0, 90, (2, 7))
    lengths = torch.tensor([0, 9, 14])
    for call in (
        lambda backend: flat_sketch(dy, "w", sketch, backend=backend),
        lambda backend: vector_grad_sketch(dy, "w", sketch, x=dy, backend=backend),
        lambda backend: embedding_grad_sketch(dy, ids, "w", sketch, backend=backend),
        lambda backend: linear_grad_sketch(dy, x, "w", sketch, backend=backend),
        lambda backend: linear_grad_sketch(
            dy.flatten(0, 1),
            x.flatten(0, 1),
            "w",
            sketch,
            cu_seqlens=lengths,
            scale=integers(40, 70),
            backend=backend,
        ),
    ):
        torch.manual_seed(3)
        expected = call("eager")
        torch.manual_seed(3)
        assert torch.equal(call("triton"), expected) and expected.any()
    names = [name for name, _ in calls]
    assert names == ["rows_kernel", "rows_kernel", "ids_kernel", "linear_kernel", "linear_kernel"]
