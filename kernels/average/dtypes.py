"""One table of element types, with the name that each place gives them. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merit_fast.kernels.lazy import np
from merit_fast.records import record

if TYPE_CHECKING:
    import numpy


@record
class Dtype:
    """An element type.

    Attributes:
        name: in safetensors.
        num_bytes: size of an element.
        torch_name: attribute of torch, and the value in config.json.
        code: number in the native engine (csrc), None for types that are not averaged.
        storage: name of the NumPy type of the stored bits, for types with a code.
        short: name in options such as ``dtype: bf16``; None: not a choice there.
        is_scaled: whether values are stored codes times a scale.
    """

    name: str
    num_bytes: int
    torch_name: str
    code: int | None = None
    storage: str | None = None
    short: str | None = None
    is_scaled: bool = False

    @property
    def bits(self) -> numpy.dtype:
        """NumPy type that holds an element's bits: ``storage``, else an unsigned integer."""
        return np.dtype(self.storage or f"u{self.num_bytes}")


_TABLE = (
    Dtype("F64", 8, "float64", 3, "float64", "fp64"),
    Dtype("I64", 8, "int64"),
    Dtype("U64", 8, "uint64"),
    Dtype("C64", 8, "complex64"),
    Dtype("F32", 4, "float32", 2, "float32", "fp32"),
    Dtype("I32", 4, "int32"),
    Dtype("U32", 4, "uint32"),
    Dtype("F16", 2, "float16", 1, "float16", "fp16"),
    Dtype("BF16", 2, "bfloat16", 0, "uint16", "bf16"),
    Dtype("I16", 2, "int16"),
    Dtype("U16", 2, "uint16"),
    Dtype("I8", 1, "int8"),
    Dtype("U8", 1, "uint8"),
    Dtype("BOOL", 1, "bool"),
    Dtype("F8_E4M3", 1, "float8_e4m3fn", is_scaled=True),
    Dtype("F8_E5M2", 1, "float8_e5m2", is_scaled=True),
    Dtype("F8_E8M0", 1, "float8_e8m0fnu"),
    Dtype("F8_E4M3FNUZ", 1, "float8_e4m3fnuz"),
    Dtype("F8_E5M2FNUZ", 1, "float8_e5m2fnuz"),
)
DTYPES = {dtype.name: dtype for dtype in _TABLE}
ITEM_BYTES = {dtype.name: dtype.num_bytes for dtype in _TABLE}
# Types that are averaged: name -> (code, name of the NumPy type of the stored bits).
FLOAT_DTYPES: dict[str, tuple[int, str]] = {
    dtype.name: (dtype.code, dtype.storage)
    for dtype in sorted(_TABLE, key=lambda dtype: dtype.code if dtype.code is not None else -1)
    if dtype.code is not None and dtype.storage is not None
}
FP8_DTYPES = tuple(dtype.name for dtype in _TABLE if dtype.is_scaled)
SHORT_NAMES = {short: name for name in FLOAT_DTYPES if (short := DTYPES[name].short) is not None}
# Long names in options, as torch and mergekit spell them -> short names.
SPELLINGS = {DTYPES[name].torch_name: short for short, name in SHORT_NAMES.items()}
