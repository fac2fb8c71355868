"""Inner products of stored rows with vectors: right, whatever the shapes, types and places."""

import pytest
import torch
from support.checks import assert_never_worse, run_at_level

from merit_fast.kernels.search import row_products

BACKENDS = ["eager", "cpu"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = [
    (1, 1, 1),
    (3, 2, 31),
    (5, 1, 32),
    (9, 3, 33),
    (70, 5, 127),
    (17, 17, 200),
    (130, 1, 4097),
]
EMPTY = [(0, 3, 8), (4, 0, 8), (4, 3, 0)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n,m,width", SHAPES)
def test_products_are_never_worse_than_pytorchs(n, m, width, dtype, backend):
    rows = torch.randn(n, width).to(dtype)
    vectors = torch.randn(m, width)
    products = row_products(rows, vectors, backend=backend)
    assert products.shape == (n, m) and products.dtype == torch.float32
    truth = rows.double() @ vectors.double().T
    assert_never_worse(products, rows.float() @ vectors.T, truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n,m,width", EMPTY)
def test_nothing_to_multiply_gives_zeros_of_the_shape(n, m, width, backend):
    products = row_products(torch.zeros(n, width), torch.zeros(m, width), backend=backend)
    assert products.shape == (n, m) and not products.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_columns_of_a_wider_table_are_read_where_they_lie(dtype, backend):
    table = torch.randn(7, 50).to(dtype)
    vectors = torch.randn(40, 3).T
    products = row_products(table[:, 3:43], vectors, backend=backend)
    truth = table[:, 3:43].double() @ vectors.double().T
    assert_never_worse(products, table[:, 3:43].float() @ vectors.T, truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_in_a_memory_mapped_file_are_read(tmp_path, backend):
    rows = torch.randn(20, 64).half()
    (tmp_path / "rows").write_bytes(rows.numpy().tobytes())
    mapped = torch.from_file(str(tmp_path / "rows"), size=rows.numel(), dtype=torch.float16)
    vectors = torch.randn(2, 64)
    products = row_products(mapped.view(20, 64), vectors, backend=backend)
    assert torch.equal(products, row_products(rows, vectors, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_rows_that_are_not_finite_have_such_products(backend):
    rows = torch.randn(6, 40).half()
    rows[1, 39] = float("nan")
    rows[4, 0] = float("inf")
    finite = row_products(rows, torch.randn(3, 40), backend=backend).isfinite()
    assert finite.all(1).tolist() == [True, False, True, True, False, True]
    assert not finite[[1, 4]].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_op_passes_opcheck_and_compiles_whole(backend):
    from merit_fast.kernels.search import _ops

    rows = torch.randn(5, 20).half()
    vectors = torch.randn(2, 20)
    torch.library.opcheck(_ops.row_products, (rows, vectors, backend))
    compiled = torch.compile(row_products, fullgraph=True, backend="aot_eager")
    assert torch.equal(
        compiled(rows, vectors, backend=backend), row_products(rows, vectors, backend=backend)
    )


def test_threads_and_the_number_of_rows_and_vectors_change_no_bit():
    rows = torch.randn(300, 1100).half()
    vectors = torch.randn(11, 1100)
    threads = torch.get_num_threads()
    whole = row_products(rows, vectors, backend="cpu")
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(row_products(rows, vectors, backend="cpu"), whole)
    finally:
        torch.set_num_threads(threads)
    for first in (0, 3, 296):
        part = row_products(rows[first : first + 7], vectors, backend="cpu")
        assert torch.equal(part, whole[first : first + 7])
    for v in range(11):
        one = row_products(rows, vectors[v : v + 1], backend="cpu")
        assert torch.equal(one[:, 0], whole[:, v])


LEVEL_SCRIPT = """
import hashlib, torch
from merit_fast.kernels.search import row_products
torch.manual_seed(0)
bits = b""
for dtype in (torch.float16, torch.bfloat16, torch.float32):
    rows = torch.randn(21, 2075).to(dtype)
    rows[1] *= 2.0**-16  # denormal in float16
    bits += row_products(rows, torch.randn(6, 2075), backend="cpu").numpy().tobytes()
print(hashlib.sha256(bits).hexdigest())
"""


def test_every_isa_level_gives_the_same_bits(native_levels):
    digests = {level: run_at_level(LEVEL_SCRIPT, level) for level in native_levels}
    assert len(set(digests.values())) == 1, digests


def test_memory_behind_the_rows_is_not_read():
    """Whatever follows the last column, NaN too, leaves the products as they are."""
    table = torch.full((5, 64), float("nan")).half()
    table[:, :35] = torch.randn(5, 35)
    vectors = torch.randn(5, 35)
    products = row_products(table[:, :35], vectors, backend="cpu")
    assert torch.equal(products, row_products(table[:, :35].contiguous(), vectors, backend="cpu"))
    assert products.isfinite().all()


ROWS = torch.zeros(4, 8).half()
VECTORS = torch.zeros(3, 8)


@pytest.mark.parametrize(
    "rows,vectors,error,message",
    [
        (ROWS[0], VECTORS, ValueError, r"must be \[n, D\] and \[m, D\], got \[8\], \[3, 8\]"),
        (ROWS, VECTORS[0], ValueError, r"got \[4, 8\], \[8\]"),
        (ROWS, VECTORS[:, :7], ValueError, r"got \[4, 8\], \[3, 7\]"),
        (
            ROWS.double(),
            VECTORS,
            TypeError,
            "rows: dtype must be one of float16, bfloat16, float32",
        ),
        (ROWS, VECTORS.half(), TypeError, "vectors: dtype must be float32, got torch.float16"),
        (ROWS, VECTORS.to("meta"), ValueError, "vectors must be on cpu, as rows, got meta"),
        (ROWS.T, torch.zeros(1, 4), ValueError, r"stride 1 along D\), got strides \[1, 8\]"),
    ],
)
def test_bad_arguments_are_named(rows, vectors, error, message):
    with pytest.raises(error, match=message):
        row_products(rows, vectors)
