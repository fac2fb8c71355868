"""The CountSketch's Triton kernels. A program owns one bucket of one example, so that nothing is added atomically.

Of every M = proj_dim / 4096 consecutive tiles a bucket gets one: number (bucket - deal) mod M of its group. A program
walks its groups, forms the 64 x 64 values of that one tile and adds them, permuted and signed, to the bucket, which it
keeps in registers. Where B * M programs are few, ``splits`` of them share a bucket; their sums are added in order
afterwards. Tiles are numbered in 32 bits: a parameter has less than 2^43 entries.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq, is_cuda


@triton.jit
def _hash(key, counter):
    z = key + (counter + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _tile_of(key, group, bucket, buckets):
    """The one of the tiles group * buckets + 0, 1, ..., buckets - 1 that belongs to ``bucket``."""
    deal = _hash(key, group.to(tl.uint64) * 4 + 3) >> 32
    turn = bucket - ((deal * buckets.to(tl.uint64)) >> 32).to(tl.int32)
    return group * buckets + tl.where(turn < 0, turn + buckets, turn)


@triton.jit
def _draw(key, tile):
    """Row mask, column mask, row signs, column signs."""
    counter = tile.to(tl.uint64) * 4
    masks = _hash(key, counter).to(tl.int32)
    return masks & 63, (masks >> 8) & 63, _hash(key, counter + 1), _hash(key, counter + 2)


@triton.jit
def _signs(bits, places):
    return 1.0 - 2.0 * ((bits >> places.to(tl.uint64)) & 1).to(tl.float32)


@triton.jit
def _program(offsets, buckets, splits):
    """Whose sum this program takes, and where the rows of its example begin and how many they are."""
    program = tl.program_id(0)
    example = program // (buckets * splits)
    start = tl.load(offsets + example)
    return (
        program % buckets,
        program // buckets % splits,
        start,
        (tl.load(offsets + example + 1) - start).to(tl.int32),
    )


@triton.jit
def _walk(rows, columns, first_row, first_column, across, buckets):
    """A part as runs of consecutive tiles: the first tile, tiles of a run, groups that it touches, steps in all.

    The part is one run; where it is much narrower than the parameter, each of its strips of tiles is one, ``across``
    tiles after the one before.
    """
    top, left = first_row // 64, first_column // 64
    strips = (first_row + rows + 63) // 64 - top
    width = (first_column + columns + 63) // 64 - left
    whole = (strips - 1) * across + width
    touched, touched_whole = (
        (width + buckets - 2) // buckets + 1,
        (whole + buckets - 2) // buckets + 1,
    )
    by_strip = strips * touched < touched_whole
    run, touched = tl.where(by_strip, width, whole), tl.where(by_strip, touched, touched_whole)
    return (
        top * across + left,
        run,
        touched,
        tl.where(rows > 0, tl.where(by_strip, strips, 1) * touched, 0),
    )


@triton.jit
def _step(
    step, key, bucket, first, run, touched, columns, first_row, first_column, across, buckets
):
    """The bucket's tile at a step, whether it is of the part, and the part's row and column where it begins."""
    first += step // touched * across
    tile = _tile_of(key, first // buckets + step % touched, bucket, buckets)
    strip = tile // across
    column = (tile - strip * across) * 64 - first_column
    inside = (tile >= first) & (tile < first + run) & (column > -64) & (column < columns)
    return tile, inside, strip * 64 - first_row, column


@triton.jit
def _write(out, bucket, buckets, splits, values):
    """Added to the sketch; with splits, a sum of its own in [B, splits, buckets, 64, 64], the programs' order."""
    lane = tl.arange(0, 64)
    program = tl.program_id(0).to(tl.int64)
    at = out + program * 4096 + lane[:, None] * 64 + lane[None, :]
    tl.store(at, values + tl.load(at, mask=splits == 1, other=0.0))


@triton.jit
def _permuted(product, x, y):
    """product[i ^ x, j ^ y] for x, y < 8: a swap of two registers and one shuffle.

    Of a product of tensor cores (Ampere, Hopper, RTX) the 32 lanes hold bits 0-2 of the row and 1-2 of the column, a
    register bit 0 of the column. With the warps' bits lowest in the first axis, that is the layout a gather wants, and
    nothing passes through shared memory; products of other kinds do once, 16 KiB written and read.
    """
    HOPPER: tl.constexpr = cuda_capability_geq(9) and not cuda_capability_geq(
        10
    )  # its warps lie 4 x 1, others' 2 x 2
    bits = tl.reshape(
        product, (2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2)
    )  # of the row, then of the column
    if HOPPER:
        bits = tl.permute(bits, (6, 7, 8, 2, 0, 1, 3, 4, 5, 9, 10, 11))
    else:
        bits = tl.permute(bits, (0, 2, 6, 7, 1, 8, 3, 4, 5, 9, 10, 11))
    even, odd = tl.split(tl.reshape(bits, (64, 32, 2)))
    swap = (y & 1) != 0
    even, odd = tl.where(swap, odd, even), tl.where(swap, even, odd)
    source = tl.broadcast_to((tl.arange(0, 32) ^ (x * 4 + y // 2))[None, :], (64, 32))
    pairs = tl.join(tl.gather(even, source, 1), tl.gather(odd, source, 1))
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
    # Ampere and RTX hold operands in registers, and what is loaded by element passes through them.
    BY_REGISTER: tl.constexpr = is_cuda() and (
        not cuda_capability_geq(9) or cuda_capability_geq(12)
    )
    SLOW: tl.constexpr = dy.dtype.element_ty == tl.float32 or not VECTORS
    TOKENS: tl.constexpr = 16 if SLOW else (32 if BY_REGISTER else 64)
    STAGES: tl.constexpr = (4 if TOKENS == 32 else 3) if VECTORS else 1
    token = tl.arange(0, TOKENS)
    # dy is addressed as its transpose: transposed after the load it would pass through registers.
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


@triton.jit(do_not_specialize=["key", "across", "buckets", "splits"])
def linear_kernel(
    dy, x, offsets, scale, out, key, dy_stride, x_stride, scale_stride, scale_rows, scale_columns, rows, columns,
    first_row, first_column, across, buckets, splits, HAS_SCALE: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """out[b] += sketch(dy[b].T @ x[b]). In bf16 a tile and token take 256 bytes, most from L2, and 8192 operations.

    Bits 3-5 of the permutation of rows and columns are in the addresses: 8 neighbours stay neighbours, so that loads
    are asynchronous and 128 bits wide. With all six there, elements would come one by one and registers spill.
    """
    bucket, split, start, tokens = _program(offsets, buckets, splits)
    key = key.to(tl.uint64)
    first, run, touched, steps = _walk(rows, columns, first_row, first_column, across, buckets)
    lane = tl.arange(0, 64)
    total = tl.zeros((64, 64), tl.float32)
    for step in range(split, steps, splits):
        tile, inside, row, column = _step(
            step,
            key,
            bucket,
            first,
            run,
            touched,
            columns,
            first_row,
            first_column,
            across,
            buckets,
        )
        if inside:
            x_mask, y_mask, row_signs, column_signs = _draw(key, tile)
            i = row + tl.max_contiguous(tl.multiple_of(lane ^ (x_mask & 56), 8), 8)
            j = column + tl.max_contiguous(tl.multiple_of(lane ^ (y_mask & 56), 8), 8)
            rows_in, columns_in = (i >= 0) & (i < rows), (j >= 0) & (j < columns)
            product = _block(
                dy, x, dy_stride, x_stride, start, tokens, i, j, rows_in, columns_in, VECTORS
            )
            if HAS_SCALE:
                at = scale + i[:, None].to(tl.int64) * scale_stride + j[None, :]
                mask = (rows_in & (i < scale_rows))[:, None] & (columns_in & (j < scale_columns))[
                    None, :
                ]
                product *= tl.load(at, mask=mask, other=0.0)
            sign = (
                _signs(row_signs, lane ^ x_mask)[:, None]
                * _signs(column_signs, lane ^ y_mask)[None, :]
            )
            total += sign * _permuted(product, x_mask & 7, y_mask & 7)
    _write(out, bucket, buckets, splits, total)


@triton.jit(do_not_specialize=["key", "across", "buckets", "splits"])
def rows_kernel(
    gradient, offsets, scale, out, key, stride, scale_stride, columns, first_row, first_column, across, buckets, splits,
    HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """out[b] += sketch of the rows of b. Reads each element once.

    The permutation is in the addresses alone: a warp's load takes 32 neighbours, in whatever order, in whole sectors.
    """
    bucket, split, start, rows = _program(offsets, buckets, splits)
    key = key.to(tl.uint64)
    first, run, touched, steps = _walk(rows, columns, first_row, first_column, across, buckets)
    lane = tl.arange(0, 64)
    total = tl.zeros((64, 64), tl.float32)
    for step in range(split, steps, splits):
        tile, inside, row, column = _step(
            step,
            key,
            bucket,
            first,
            run,
            touched,
            columns,
            first_row,
            first_column,
            across,
            buckets,
        )
        if inside:
            x_mask, y_mask, row_signs, column_signs = _draw(key, tile)
            i, j = row + (lane ^ x_mask), column + (lane ^ y_mask)
            mask = ((i >= 0) & (i < rows))[:, None] & ((j >= 0) & (j < columns))[None, :]
            at = gradient + (start + i)[:, None] * stride + j[None, :]
            value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            if HAS_SCALE:
                at = scale + i[:, None].to(tl.int64) * scale_stride + j[None, :]
                value *= tl.load(at, mask=mask, other=0.0)
            sign = (
                _signs(row_signs, lane ^ x_mask)[:, None]
                * _signs(column_signs, lane ^ y_mask)[None, :]
            )
            total += sign * value
    _write(out, bucket, buckets, splits, total)


@triton.jit(do_not_specialize=["key", "across", "buckets", "splits"])
def ids_kernel(
    gradient, offsets, row_ids, scale, out, key, stride, scale_stride, columns, first_row, first_column, across,
    buckets, splits, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """out[b] += sketch of rows in any order. Reads each element once, the ids M times.

    Every row has a run of 64 in the bucket for each group of tiles that it touches. 16 rows are added at once, each
    run from its own tile: their product with the matrix of signs that says which row of the bucket each goes to. That
    is 4096 multiply-adds a run, on tensor cores in bf16, where it is exact. With more buckets than tiles across, most
    runs are empty. A number that is not finite makes NaN of its whole column of the bucket.
    """
    WIDE: tl.constexpr = HAS_SCALE or gradient.dtype.element_ty == tl.float32
    ROWS: tl.constexpr = 16
    bucket, split, start, count = _program(offsets, buckets, splits)
    key = key.to(tl.uint64)
    lane, near = tl.arange(0, 64), tl.arange(0, ROWS)
    left = first_column // 64
    width = (first_column + columns + 63) // 64 - left
    total = tl.zeros((64, 64), tl.float32)
    for chunk in range(split * ROWS, count, splits * ROWS):
        here = start + chunk + near
        live = chunk + near < count
        row = tl.load(row_ids + here, mask=live, other=0)
        strip = (row // 64).to(tl.int32)
        first = strip * across + left
        for k in tl.range(0, (width + buckets - 2) // buckets + 1, num_stages=1):
            tile = _tile_of(key, first // buckets + k, bucket, buckets)
            x_mask, y_mask, row_signs, column_signs = _draw(key, tile)
            i = (row % 64).to(tl.int32)
            source = lane[None, :] ^ y_mask[:, None]
            j = ((tile - strip * across) * 64 - first_column)[:, None] + source
            inside = (
                (live & (tile >= first) & (tile < first + width))[:, None]
                & (j >= 0)
                & (j < columns)
            )
            value = tl.load(gradient + here[:, None] * stride + j, mask=inside, other=0.0).to(
                tl.float32
            )
            if HAS_SCALE:
                at = scale + (row - first_row)[:, None] * scale_stride + j
                value *= tl.load(at, mask=inside, other=0.0)
            value *= _signs(column_signs[:, None], source)
            goes = tl.where(
                lane[:, None] == (i ^ x_mask)[None, :], _signs(row_signs, i)[None, :], 0.0
            )
            if not WIDE:
                value, goes = value.to(tl.bfloat16), goes.to(tl.bfloat16)
            total = tl.dot(goes, value, total, input_precision="ieee")
    _write(out, bucket, buckets, splits, total)


@triton.jit(do_not_specialize=["splits"])
def add_kernel(parts, out, proj_dim, splits, BLOCK: tl.constexpr):
    """out[b] += parts[b, 0] + parts[b, 1] + ..., in this order; parts [B, splits, D]."""
    program = tl.program_id(0).to(tl.int64)
    place = program * BLOCK + tl.arange(0, BLOCK)
    at = parts + program // (proj_dim // BLOCK) * (splits - 1) * proj_dim + place
    total = tl.load(at)
    for _ in range(1, splits):
        at += proj_dim
        total += tl.load(at)
    tl.store(out + place, tl.load(out + place) + total)
