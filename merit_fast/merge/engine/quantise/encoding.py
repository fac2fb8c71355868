"""The stored form of a quantised output tensor."""

from merit_fast.kernels.average.dtypes import ITEM_BYTES
from merit_fast.merge.read.entries import DecodedEntry
from merit_fast.merge.read.quantised.codes import CODES, stem_of
from merit_fast.records import record

BLOCK = 128
# Dtypes of scales that are written; 8 bits are E8M0.
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
_CODES = ("F8_E4M3", "F8_E5M2")


@record
class Encoding:
    """8-bit floats with a scale per block: value[i, j] ~ code[i, j] * scale[block of i, j].

    A stack of matrices has ``rows`` rows in each; every matrix has a grid of its own.
    """

    code: str  # name in CODES
    rows: int  # of one matrix
    columns: int
    block_rows: int
    block_columns: int
    scale_name: str
    scale_dtype: str
    scale_shape: tuple[int, ...]

    @property
    def largest(self) -> float:
        """The largest finite value of a code."""
        return max(value for value in CODES[self.code].values if value < float("inf"))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of one matrix's grid of scales."""
        return -(-self.rows // self.block_rows), -(-self.columns // self.block_columns)

    @property
    def scale_bytes(self) -> int:
        """Bytes of a stored scale."""
        return ITEM_BYTES[self.scale_dtype]


def same_encoding(name: str, source: DecodedEntry) -> Encoding | None:
    """The form of an input, for an output tensor of this name; None if it cannot be written."""
    if source.dtype not in _CODES or len(source.scales) != 1 or source.zeros:
        return None
    (grid,) = source.scales
    rest = next(rest for rest, entry in source.parts if entry is grid.entry)
    if grid.entry.dtype not in SCALE_DTYPES or grid.columns or len(source.parts) > 2:
        return None
    return Encoding(
        source.dtype,
        grid.rows,
        source.shape[-1] if source.shape else 1,
        grid.block_rows,
        grid.block_cols,
        stem_of(name) + rest,
        grid.entry.dtype,
        grid.entry.shape,
    )


def block_encoding(name: str, shape: tuple[int, ...], is_power: bool) -> Encoding:
    """E4M3 in blocks of 128 x 128. ``is_power``: scales are E8M0, else float32."""
    rows, columns = shape[-2:]
    grid = (*shape[:-2], -(-rows // BLOCK), -(-columns // BLOCK))
    dtype = "F8_E8M0" if is_power else "F32"
    return Encoding("F8_E4M3", rows, columns, BLOCK, BLOCK, f"{name}_scale_inv", dtype, grid)
