"""Tiles of the CountSketch in Triton: which tile a program takes, its hash, and its bucket.

Of every group of tiles, ``group_rows`` x ``group_columns`` of them, a bucket gets one. Tiles are
numbered in 32 bits: a parameter has less than 2^43 entries.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
import triton
import triton.language as tl


@triton.jit
def hash_bits(key, counter):
    """h(counter) of the definition: SplitMix64."""
    z = key + (counter + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def tile_of(
    key, group_row, group_column, groups, bucket_row, bucket_column, group_rows, group_columns
):
    """The bucket's tile in a group: its strips of rows and of columns in the parameter."""
    deal = hash_bits(key, (group_row * groups + group_column).to(tl.uint64) * 8 + 3)
    row_turn = ((deal >> 32) * group_rows.to(tl.uint64)) >> 32
    column_turn = ((deal & 0xFFFFFFFF) * group_columns.to(tl.uint64)) >> 32
    row = bucket_row - row_turn.to(tl.int32)
    column = bucket_column - column_turn.to(tl.int32)
    row += tl.where(row < 0, group_rows, 0)
    column += tl.where(column < 0, group_columns, 0)
    return group_row * group_rows + row, group_column * group_columns + column


@triton.jit
def draw_tile(key, strip, left, group_row, group_column, across, groups):
    """Row mask, column mask, row signs, column signs of a tile and its group."""
    counter = (strip * across + left).to(tl.uint64) * 8
    of_rows = (strip * groups + group_column).to(tl.uint64) * 8
    of_columns = (group_row * across + left).to(tl.uint64) * 8
    masks = hash_bits(key, counter).to(tl.int32)
    x = (hash_bits(key, of_rows + 4).to(tl.int32) & 56) | (masks & 7)
    y = (hash_bits(key, of_columns + 5).to(tl.int32) & 56) | ((masks >> 8) & 7)
    return x, y, hash_bits(key, counter + 1), hash_bits(key, counter + 2)


@triton.jit
def signs(bits, index):
    """1 or -1 by the bits numbered ``index``."""
    return 1.0 - 2.0 * ((bits >> index.to(tl.uint64)) & 1).to(tl.float32)


@triton.jit
def own_program(offsets, buckets, splits):
    """The program's bucket and split, and the first row and row count of its example."""
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
def walk(rows, columns, first_row, first_column, group_rows, group_columns):
    """The groups that a gradient touches: the first's place, groups across, and their number."""
    top = first_row // 64 // group_rows
    left = first_column // 64 // group_columns
    below = (first_row + rows - 1) // 64 // group_rows + 1
    right = (first_column + columns - 1) // 64 // group_columns + 1
    return top, left, right - left, tl.where(rows > 0, (below - top) * (right - left), 0)


@triton.jit
def write_bucket(out, bucket, buckets, splits, values):
    """Adds to the sketch; with splits, writes to [B, splits, buckets, 64, 64] in program order."""
    lane = tl.arange(0, 64)
    program = tl.program_id(0).to(tl.int64)
    at = out + program * 4096 + lane[:, None] * 64 + lane[None, :]
    tl.store(at, values + tl.load(at, mask=splits == 1, other=0.0))
