"""Which block of a matrix each stored scale belongs to, from shapes and the config's blocks."""

import math
from collections.abc import Sequence

from merit_fast.merge.read.entries import Grid, TensorEntry

Block = tuple[int, int]
_SMALL_BLOCKS = ((1, 32), (1, 16))  # of the microscaling formats, next to blocks that configs name
_USUAL_BLOCK = (128, 128)


def scale_code(entry: TensorEntry) -> str:
    """Kind of the stored numbers in CODES; "" for plain floats."""
    codes = {"U8": "F8_E8M0", "F8_E8M0": "F8_E8M0", "F8_E4M3": "F8_E4M3", "I8": "I8"}
    return codes.get(entry.dtype, "")


def find_grid(
    scale: TensorEntry,
    shape: Sequence[int],
    blocks: Sequence[Block] = (),
    only: Block | None = None,
    is_told: bool = False,
) -> Grid | str:
    """The grid of a tensor's scales, or the reason why the shapes do not fit.

    Args:
        scale: one number; one for each matrix of a stack, for each row, for each column; or a grid
            of blocks, the last of which may be cut.
        shape: of the tensor, its last two dimensions are a matrix.
        blocks: shapes of likely blocks, the first that fits counts.
        only: the shape of a block that the format fixes.
        is_told: whether a config names the blocks, so that no others may be.
    """
    columns = shape[-1] if shape else 1
    lead = tuple(shape[:-2])
    rows = shape[-2] if len(shape) > 1 else 1
    all_rows = math.prod(lead) * rows
    if scale.num_elements == 1:
        return _grid(scale, all_rows, (1, 1), (max(all_rows, 1), max(columns, 1)))
    sizes = scale.shape
    choices = [(rows, sizes[len(lead) :])] if sizes[: len(lead)] == lead else []
    choices += [(all_rows, sizes)] if lead else []
    reason = "must have one scale, one per row or one per block"
    for matrix_rows, rest in choices:
        grid_shape = _matrix_shape(rest)
        if grid_shape is None:
            continue
        block = _block(matrix_rows, columns, grid_shape, blocks, only, is_told)
        if isinstance(block, tuple):
            return _grid(scale, matrix_rows, grid_shape, block)
        reason = block or reason
    return reason


def _grid(scale: TensorEntry, rows: int, shape: tuple[int, int], block: Block) -> Grid:
    return Grid(scale, scale_code(scale), max(rows, 1), shape, *block)


def _matrix_shape(sizes: tuple[int, ...]) -> tuple[int, int] | None:
    if len(sizes) == 4 and sizes[1] == sizes[3] == 1:  # ModelOpt keeps a 1 after each dimension
        return sizes[0], sizes[2]
    return (*sizes, 1, 1)[:2] if len(sizes) <= 2 else None  # type: ignore[return-value]


def _block(
    rows: int,
    columns: int,
    grid: tuple[int, int],
    blocks: Sequence[Block],
    only: Block | None,
    is_told: bool,
) -> Block | str:
    """The block's shape; "" or a reason if there is none."""

    def fits(block: Block) -> bool:
        return (-(-rows // block[0]), -(-columns // block[1])) == grid

    if only is not None:
        return only if fits(only) else ""
    whole = {(1, 1): (rows, columns), (rows, 1): (1, columns), (1, columns): (rows, 1)}
    if grid in whole:
        return whole[grid]
    for block in (*blocks, *_SMALL_BLOCKS):
        if fits(block):
            return block
    is_even = all(grid) and rows % grid[0] == 0 and columns % grid[1] == 0
    if is_told or not is_even:
        return ""
    even = (rows // grid[0], columns // grid[1])
    if fits(_USUAL_BLOCK) and even != _USUAL_BLOCK:
        return (
            f"may have blocks of {list(even)} or {list(_USUAL_BLOCK)}: weight_block_size in "
            "config.json must tell; one per block"
        )
    return even
