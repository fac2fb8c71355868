"""The CountSketch's Triton kernels. A program owns one bucket of one example, without atomics.

A program walks the groups of tiles (``_triton_tiles``), forms the 64 x 64 values of its tile in
each and adds them, permuted and signed, to the bucket, which it keeps in registers. Where B * M
programs are few, ``splits`` of them share a bucket; their sums are added in order afterwards.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq, is_cuda

from merit_fast.kernels.sketch._triton_tiles import (
    draw_tile,
    own_program,
    signs,
    tile_of,
    walk,
    write_bucket,
)


@triton.jit
def _permuted(product, x, y):
    """product[i ^ x, j ^ y] for x, y < 8: a swap of two registers and one shuffle.

    Tensor cores (Ampere, Hopper, RTX) leave bits 0-2 of the row and 1-2 of the column in the 32
    lanes, and bit 0 of the column in a register. With the warps' bits lowest in the first axis,
    that is the layout which a gather takes without shared memory. Other products pass through it
    once: 16 KiB written and read.
    """
    # Hopper's warps lie 4 x 1, others' 2 x 2.
    HOPPER: tl.constexpr = cuda_capability_geq(9) and not cuda_capability_geq(10)
    # Six bits of the row, then six of the column.
    bits = tl.reshape(product, (2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2))
    if HOPPER:
        bits = tl.permute(bits, (6, 7, 8, 2, 0, 1, 3, 4, 5, 9, 10, 11))
    else:
        bits = tl.permute(bits, (0, 2, 6, 7, 1, 8, 3, 4, 5, 9, 10, 11))
    even, odd = tl.split(tl.reshape(bits, (64, 32, 2)))
    swap = (y & 1) != 0
    first = tl.where(swap, odd, even)
    second = tl.where(swap, even, odd)
    source = tl.broadcast_to((tl.arange(0, 32) ^ (x * 4 + y // 2))[None, :], (64, 32))
    pairs = tl.join(tl.gather(first, source, 1), tl.gather(second, source, 1))
    bits = tl.reshape(pairs, (2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2))
    if HOPPER:
        bits = tl.permute(bits, (4, 5, 3, 6, 7, 8, 0, 1, 2, 9, 10, 11))
    else:
        bits = tl.permute(bits, (0, 4, 1, 6, 7, 8, 2, 3, 5, 9, 10, 11))
    return tl.reshape(bits, (64, 64))


@triton.jit
def _block(
    dy, x, dy_stride, x_stride, start, tokens, i, j, rows_in, columns_in, VECTORS: tl.constexpr
):
    """dy[:, i].T @ x[:, j] over an example's tokens, in float32."""
    # Ampere and RTX hold operands in registers, and loads by element pass through registers.
    BY_REGISTER: tl.constexpr = is_cuda() and (
        not cuda_capability_geq(9) or cuda_capability_geq(12)
    )
    SLOW: tl.constexpr = dy.dtype.element_ty == tl.float32 or not VECTORS
    TOKENS: tl.constexpr = 16 if SLOW else (32 if BY_REGISTER else 64)
    STAGES: tl.constexpr = (4 if TOKENS == 32 else 3) if VECTORS else 1
    token = tl.arange(0, TOKENS)
    # dy is addressed as its transpose: a transposition after the load would pass through registers.
    a = dy + start * dy_stride + token[None, :] * dy_stride + i[:, None]
    b = x + start * x_stride + token[:, None] * x_stride + j[None, :]
    product = tl.zeros((64, 64), tl.float32)
    for t in tl.range(0, tokens, TOKENS, num_stages=STAGES):
        live = t + token < tokens
        u = tl.load(a, mask=live[None, :] & rows_in[:, None], other=0.0)
        v = tl.load(b, mask=live[:, None] & columns_in[None, :], other=0.0)
        product = tl.dot(u, v, product, input_precision="ieee")
        a += TOKENS * dy_stride
        b += TOKENS * x_stride
    return product


@triton.jit(do_not_specialize=["key", "across", "group_rows", "group_columns", "splits"])
def linear_kernel(
    dy, x, offsets, scale, out, key, dy_stride, x_stride, scale_stride,
    scale_rows, scale_columns, rows, columns, first_row, first_column,
    across, group_rows, group_columns, splits, HAS_SCALE: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """out[b] += sketch(dy[b].T @ x[b]).

    In bf16 a tile and token take 256 bytes, most from L2, and 8192 operations. Bits 3-5 of the
    permutation of rows and columns are in the addresses: 8 neighbours stay neighbours, so that
    loads are asynchronous and 128 bits wide. With all six bits there, elements would come one by
    one and registers spill.
    """
    buckets = group_rows * group_columns
    groups = (across + group_columns - 1) // group_columns
    bucket, split, start, tokens = own_program(offsets, buckets, splits)
    bucket_row = bucket // group_columns
    bucket_column = bucket % group_columns
    key = key.to(tl.uint64)
    top, left, wide, steps = walk(rows, columns, first_row, first_column, group_rows, group_columns)
    lane = tl.arange(0, 64)
    total = tl.zeros((64, 64), tl.float32)
    for step in range(split, steps, splits):
        group_row = top + step // wide
        group_column = left + step % wide
        strip, tile_column = tile_of(
            key, group_row, group_column, groups, bucket_row, bucket_column,
            group_rows, group_columns,
        )  # fmt: skip
        row = strip * 64 - first_row
        column = tile_column * 64 - first_column
        if (row > -64) & (row < rows) & (column > -64) & (column < columns):
            x_mask, y_mask, row_signs, column_signs = draw_tile(
                key, strip, tile_column, group_row, group_column, across, groups
            )
            i = row + tl.max_contiguous(tl.multiple_of(lane ^ (x_mask & 56), 8), 8)
            j = column + tl.max_contiguous(tl.multiple_of(lane ^ (y_mask & 56), 8), 8)
            rows_in = (i >= 0) & (i < rows)
            columns_in = (j >= 0) & (j < columns)
            product = _block(
                dy, x, dy_stride, x_stride, start, tokens, i, j, rows_in, columns_in, VECTORS
            )
            if HAS_SCALE:
                at = scale + i[:, None].to(tl.int64) * scale_stride + j[None, :]
                mask = (rows_in & (i < scale_rows))[:, None]
                mask = mask & (columns_in & (j < scale_columns))[None, :]
                product *= tl.load(at, mask=mask, other=0.0)
            sign = (
                signs(row_signs, lane ^ x_mask)[:, None]
                * signs(column_signs, lane ^ y_mask)[None, :]
            )
            total += sign * _permuted(product, x_mask & 7, y_mask & 7)
    write_bucket(out, bucket, buckets, splits, total)


@triton.jit(do_not_specialize=["key", "across", "group_rows", "group_columns", "splits"])
def rows_kernel(
    gradient, offsets, scale, out, key, stride, scale_stride,
    columns, first_row, first_column, across, group_rows, group_columns, splits,
    HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """out[b] += sketch of the rows of b. Reads each element once.

    The permutation is only in the addresses: a warp's load takes 32 neighbours, in any order, in
    whole sectors.
    """
    buckets = group_rows * group_columns
    groups = (across + group_columns - 1) // group_columns
    bucket, split, start, rows = own_program(offsets, buckets, splits)
    bucket_row = bucket // group_columns
    bucket_column = bucket % group_columns
    key = key.to(tl.uint64)
    top, left, wide, steps = walk(rows, columns, first_row, first_column, group_rows, group_columns)
    lane = tl.arange(0, 64)
    total = tl.zeros((64, 64), tl.float32)
    for step in range(split, steps, splits):
        group_row = top + step // wide
        group_column = left + step % wide
        strip, tile_column = tile_of(
            key, group_row, group_column, groups, bucket_row, bucket_column,
            group_rows, group_columns,
        )  # fmt: skip
        row = strip * 64 - first_row
        column = tile_column * 64 - first_column
        if (row > -64) & (row < rows) & (column > -64) & (column < columns):
            x_mask, y_mask, row_signs, column_signs = draw_tile(
                key, strip, tile_column, group_row, group_column, across, groups
            )
            i = row + (lane ^ x_mask)
            j = column + (lane ^ y_mask)
            mask = ((i >= 0) & (i < rows))[:, None] & ((j >= 0) & (j < columns))[None, :]
            at = gradient + (start + i)[:, None] * stride + j[None, :]
            value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            if HAS_SCALE:
                at = scale + i[:, None].to(tl.int64) * scale_stride + j[None, :]
                value *= tl.load(at, mask=mask, other=0.0)
            sign = (
                signs(row_signs, lane ^ x_mask)[:, None]
                * signs(column_signs, lane ^ y_mask)[None, :]
            )
            total += sign * value
    write_bucket(out, bucket, buckets, splits, total)


@triton.jit(do_not_specialize=["key", "across", "group_rows", "group_columns", "splits"])
def ids_kernel(
    gradient, offsets, row_ids, scale, out, key, stride, scale_stride,
    columns, first_row, first_column, across, group_rows, group_columns, splits,
    HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """out[b] += sketch of rows in any order. Reads each element once, the ids M times.

    Of each group of tiles that it touches, a row has a run of 64 in the bucket if its strip is the
    bucket's: one row in ``group_rows``. 16 runs, each from its own tile, are added at once by a
    product with the matrix of signs that assigns each a row of the bucket: 4096 multiply-adds a
    run, on tensor cores in bf16, where it is exact. A number that is not finite makes NaN of its
    whole column of the bucket.
    """
    WIDE: tl.constexpr = HAS_SCALE or gradient.dtype.element_ty == tl.float32
    ROWS: tl.constexpr = 16
    buckets = group_rows * group_columns
    groups = (across + group_columns - 1) // group_columns
    bucket, split, start, count = own_program(offsets, buckets, splits)
    bucket_row = bucket // group_columns
    bucket_column = bucket % group_columns
    key = key.to(tl.uint64)
    lane = tl.arange(0, 64)
    near = tl.arange(0, ROWS)
    left = first_column // 64 // group_columns
    right = (first_column + columns - 1) // 64 // group_columns + 1
    total = tl.zeros((64, 64), tl.float32)
    for chunk in range(split * ROWS, count, splits * ROWS):
        here = start + chunk + near
        live = chunk + near < count
        row = tl.load(row_ids + here, mask=live, other=0)
        strip = (row // 64).to(tl.int32)
        i = (row % 64).to(tl.int32)
        group_row = strip // group_rows
        for k in tl.range(left, right, num_stages=1):
            taken, tile_column = tile_of(
                key, group_row, k, groups, bucket_row, bucket_column, group_rows, group_columns
            )
            x_mask, y_mask, row_signs, column_signs = draw_tile(
                key, strip, tile_column, group_row, k, across, groups
            )
            source = lane[None, :] ^ y_mask[:, None]
            j = (tile_column * 64 - first_column)[:, None] + source
            inside = (live & (taken == strip))[:, None] & (j >= 0) & (j < columns)
            value = tl.load(gradient + here[:, None] * stride + j, mask=inside, other=0.0).to(
                tl.float32
            )
            if HAS_SCALE:
                at = scale + (row - first_row)[:, None] * scale_stride + j
                value *= tl.load(at, mask=inside, other=0.0)
            value *= signs(column_signs[:, None], source)
            goes = tl.where(
                lane[:, None] == (i ^ x_mask)[None, :], signs(row_signs, i)[None, :], 0.0
            )
            if not WIDE:
                value = value.to(tl.bfloat16)
                goes = goes.to(tl.bfloat16)
            total = tl.dot(goes, value, total, input_precision="ieee")
    write_bucket(out, bucket, buckets, splits, total)


@triton.jit(do_not_specialize=["splits"])
def add_kernel(sums, out, proj_dim, splits, BLOCK: tl.constexpr):
    """out[b] += sums[b, 0] + sums[b, 1] + ..., in this order; sums [B, splits, D]."""
    program = tl.program_id(0).to(tl.int64)
    index = program * BLOCK + tl.arange(0, BLOCK)
    at = sums + program // (proj_dim // BLOCK) * (splits - 1) * proj_dim + index
    total = tl.load(at)
    for _ in range(1, splits):
        at += proj_dim
        total += tl.load(at)
    tl.store(out + index, tl.load(out + index) + total)
