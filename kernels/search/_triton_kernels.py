"""The search's Triton kernel. A program owns a block of rows and a few vectors, without atomics."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
import triton
import triton.language as tl


@triton.jit
def row_products_kernel(
    rows, vectors, out, count, num_vectors, width, stride,
    ROWS: tl.constexpr, VECTORS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[r, v] = sum over c of rows[r, c] * vectors[v, c].

    The programs of a block of rows follow one another, so that all but the first find it in L2. A
    thread keeps the sums of its columns apart until the row ends.
    """
    program = tl.program_id(0).to(tl.int64)
    groups = tl.cdiv(num_vectors, VECTORS)
    row = program // groups * ROWS + tl.arange(0, ROWS)
    vector = program % groups * VECTORS + tl.arange(0, VECTORS)
    row_in = row < count
    vector_in = vector < num_vectors
    column = tl.arange(0, COLUMNS)
    a = rows + row[:, None] * stride + column[None, :]
    b = vectors + vector[:, None] * width + column[None, :]
    sums = tl.zeros((ROWS, VECTORS, COLUMNS), tl.float32)
    for first in range(0, width, COLUMNS):
        inside = first + column < width
        x = tl.load(a, mask=row_in[:, None] & inside[None, :], other=0.0).to(tl.float32)
        y = tl.load(b, mask=vector_in[:, None] & inside[None, :], other=0.0)
        sums += x[:, None, :] * y[None, :, :]
        a += COLUMNS
        b += COLUMNS
    at = out + row[:, None] * num_vectors + vector[None, :]
    tl.store(at, tl.sum(sums, 2), mask=row_in[:, None] & vector_in[None, :])
