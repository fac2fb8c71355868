"""Writes the rows of a vocabulary that no model has: means over rows, in float64."""

import os
import shutil
import weakref

import numpy as np

from merit_fast.errors import MeritFastError
from merit_fast.kernels.average._eager import to_float64
from merit_fast.merge.engine.opened import OpenFiles, open_files
from merit_fast.merge.engine.values import Array, values
from merit_fast.merge.read.entries import stored_entries
from merit_fast.merge.vocabulary.assemble import MadeRow, MadeRows

_BLOCK_ELEMENTS = 1 << 18  # sums are joined block by block, so one size gives one result


def write_made(made: MadeRows) -> None:
    """Writes the file of made rows once; it goes when ``made`` does, at the latest at exit.

    Raises:
        MeritFastError: an input cannot be read, or the folder of temporary files not written.
    """
    folder = made.file.parent
    if made.file.exists():
        return
    try:
        folder.mkdir(mode=0o700)
        weakref.finalize(made, shutil.rmtree, folder, ignore_errors=True)
        made.file.write_bytes(bytes(made.num_bytes))
    except OSError as error:
        raise MeritFastError(f"{made.file}: {error.strerror}") from None
    sources = [row.source for row in made.rows if row.source]
    inputs = {stored.file for source in sources for stored in stored_entries(source)}
    with open_files(inputs, None) as opened, made.file.open("r+b") as file:
        for row in made.rows:
            mean = _mean(row, opened)
            os.pwrite(file.fileno(), mean.tobytes(), row.offset)


def _mean(row: MadeRow, files: OpenFiles) -> Array:
    """[n] the mean over the rows of the source."""
    total = np.zeros(row.num_elements)
    if row.source is None or not row.num_elements:
        return total
    count = row.source.shape[0]
    step = max(_BLOCK_ELEMENTS // row.num_elements, 1)
    for first in range(0, count, step):
        rows = min(step, count - first)
        block = values(row.source, first * row.num_elements, rows * row.num_elements, files)
        with np.errstate(all="ignore"):  # the merge itself reports what is not finite
            total = total + to_float64(*block).reshape(rows, row.num_elements).sum(0)
    return np.asarray(total / count)
