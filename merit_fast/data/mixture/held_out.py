"""Holds out a share of a dataset's rows by their content, where it has no held-out file."""

import numpy as np
from numpy.typing import NDArray

_BITS = 64


def holds_out(keys: NDArray[np.bytes_], share: float) -> NDArray[np.bool_]:
    """[n] whether each row is held out.

    It depends on the row's conversation only: equal conversations are on one side, in any file and
    format, and a row that is added moves no other.

        held out = first 8 bytes of the conversation's key / 2^64 < share

    Args:
        keys: [n] S16, the keys of conversations.
        share: between 0 and 1.
    """
    padded = np.ascontiguousarray(keys).astype("S16")
    numbers = np.frombuffer(padded.tobytes(), ">u8")[::2]
    return numbers < np.uint64(int(share * 2**_BITS))
