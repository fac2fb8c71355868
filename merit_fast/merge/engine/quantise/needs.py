"""Memory and disk that the encoder of quantised tensors needs; imports no encoder."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from merit_fast.merge.engine.plan import Segment
    from merit_fast.merge.engine.quantise.encoding import Encoding

SLAB_BYTES = 8 << 20  # of float64 values that a thread holds at a time
VALUE_BYTES = 8


def scratch_file_bytes(segments: Iterable["Segment"]) -> int:
    """Bytes of the largest nameless file that ``scratch_output`` holds for one of the segments."""
    encoded = (segment.num_elements for segment in segments if segment.encoding)
    return VALUE_BYTES * max(encoded, default=0)


def slab_bytes(encodings: Iterable["Encoding"]) -> int:
    """Bytes that a thread of ``encode_tensor`` holds: a slab's float64 values and its codes."""
    elements = (
        min(max(SLAB_BYTES // VALUE_BYTES, encoding.columns), encoding.rows * encoding.columns)
        for encoding in encodings
    )
    return (VALUE_BYTES + 1) * max(elements, default=0)
