"""Tiles of the CountSketch in Triton: which tile a program takes, its hash, and its bucket.

Of every M = proj_dim / 4096 consecutive tiles a bucket gets one: number (bucket - deal) mod M of
its group. Tiles are numbered in 32 bits: a parameter has less than 2^43 entries.
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
def tile_of(key, group, bucket, buckets):
    """The bucket's tile among those numbered group * buckets + 0, 1, ..., buckets - 1."""
    deal = hash_bits(key, group.to(tl.uint64) * 4 + 3) >> 32
    turn = bucket - ((deal * buckets.to(tl.uint64)) >> 32).to(tl.int32)
    return group * buckets + tl.where(turn < 0, turn + buckets, turn)


@triton.jit
def draw_tile(key, tile):
    """Row mask, column mask, row signs, column signs."""
    counter = tile.to(tl.uint64) * 4
    masks = hash_bits(key, counter).to(tl.int32)
    return masks & 63, (masks >> 8) & 63, hash_bits(key, counter + 1), hash_bits(key, counter + 2)


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
def walk(rows, columns, first_row, first_column, across, buckets):
    """Runs of consecutive tiles: first tile, tiles and groups of a run, and steps over all runs.

    A gradient is one run. Where it is much narrower than the parameter, each of its strips of tiles
    is a run, ``across`` tiles after the one before.
    """
    top = first_row // 64
    left = first_column // 64
    strips = (first_row + rows + 63) // 64 - top
    width = (first_column + columns + 63) // 64 - left
    whole = (strips - 1) * across + width
    touched = (width + buckets - 2) // buckets + 1
    touched_whole = (whole + buckets - 2) // buckets + 1
    by_strip = strips * touched < touched_whole
    run = tl.where(by_strip, width, whole)
    touched = tl.where(by_strip, touched, touched_whole)
    return (
        top * across + left,
        run,
        touched,
        tl.where(rows > 0, tl.where(by_strip, strips, 1) * touched, 0),
    )


@triton.jit
def step_of_walk(
    step, key, bucket, first, run, touched, columns, first_row, first_column, across, buckets
):
    """The bucket's tile at a step, whether the gradient has it, and its first row and column."""
    first += step // touched * across
    tile = tile_of(key, first // buckets + step % touched, bucket, buckets)
    strip = tile // across
    column = (tile - strip * across) * 64 - first_column
    inside = (tile >= first) & (tile < first + run) & (column > -64) & (column < columns)
    return tile, inside, strip * 64 - first_row, column


@triton.jit
def write_bucket(out, bucket, buckets, splits, values):
    """Adds to the sketch; with splits, writes to [B, splits, buckets, 64, 64] in program order."""
    lane = tl.arange(0, 64)
    program = tl.program_id(0).to(tl.int64)
    at = out + program * 4096 + lane[:, None] * 64 + lane[None, :]
    tl.store(at, values + tl.load(at, mask=splits == 1, other=0.0))
