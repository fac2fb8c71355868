"""The engine's driver: opens files, hands byte ranges to C++ (or NumPy), turns what went wrong into one line.

Memory is threads x (K + 1) x chunk, whatever the model's size.
"""

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from merit_fast.errors import InputError, MeritFastError
from merit_fast.kernels import dispatch
from merit_fast.kernels.average import FLOAT_DTYPES, delta_gram, weighted_average
from merit_fast.merge.checkpoint import ITEM_BYTES, TensorEntry
from merit_fast.merge.config import MergeConfig
from merit_fast.merge.geometry import Array, cut_pieces, gram_by_tensor
from merit_fast.merge.plan import Segment, Shard

GEOMETRY_CHUNK = 1 << 17  # elements
_ALLOW = "; merge.allow_nonfinite=true writes it all the same"

Advance = Callable[[int], None]  # told how many more elements are done


def write_shard(
    shard: Shard,
    weights: Sequence[float],
    config: MergeConfig,
    path: Path,
    advance: Advance,
    backend: str | None = None,
) -> dict[str, Array]:
    """Averages one output file into ``path`` (created, preallocated, not fsynced).

    With ``config.geometry`` the last input of every segment is the base; it enters the average only if there are as
    many weights as inputs.

    Returns:
        With ``config.geometry``, each tensor's Gram matrix of the other inputs' deltas; else nothing.

    Raises:
        InputError: a value is not finite, an integer tensor differs, an input is shorter than its header says.
        MeritFastError: reading or writing failed, the disk is full.
    """
    files = sorted({entry.file for s in (*shard.segments, *shard.copies) for entry in s.inputs})
    opened: dict[Path, int] = {}
    grams: dict[str, Array] = {}
    try:
        for file in files:
            opened[file] = os.open(file, os.O_RDONLY)
        output = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        opened[path] = output
        os.posix_fallocate(output, 0, shard.num_bytes)
        os.pwrite(output, shard.header, 0)
        if shard.segments:
            chosen = dispatch.choose("merge_files", "cpu", backend)
            average = _average_native if chosen == "cpu" else _average_numpy
            grams = average(shard, weights, config, opened, output, advance)
        for segment in shard.copies:
            _copy_equal(segment, opened, output)
    except OSError as error:
        raise MeritFastError(f"{error.filename or path}: {error.strerror}") from None
    finally:
        for descriptor in opened.values():
            os.close(descriptor)
    return grams


def _average_native(
    shard: Shard,
    weights: Sequence[float],
    config: MergeConfig,
    opened: dict[Path, int],
    output: int,
    advance: Advance,
) -> dict[str, Array]:
    native = dispatch.native_module()
    assert native is not None
    code = {dtype: number for dtype, (number, _) in FLOAT_DTYPES.items()}
    segments = np.array([(s.num_elements, output, s.output_offset, code[s.dtype]) for s in shard.segments], np.int64)
    inputs = np.array([(opened[e.file], e.offset, code[e.dtype]) for s in shard.segments for e in s.inputs], np.int64)
    step = _chunk_elements(shard.segments, config)
    pieces, grams = _pieces(shard, step, config)
    done = np.zeros(1, np.int64)
    with _Watch(done, advance):
        error, segment, element, source, nonfinite = native.merge_files(
            segments, inputs, list(weights), step, config.threads, config.allow_nonfinite, pieces, grams, done,
        )  # fmt: skip
    if nonfinite:
        raise _nonfinite(shard.segments[segment], element, step, opened)
    if error:
        where = shard.segments[segment].inputs[source].file if source >= 0 else "output"
        raise MeritFastError(f"{where}: {os.strerror(error)} while merging {shard.file}")
    return gram_by_tensor(shard.segments, pieces, grams)


def _average_numpy(
    shard: Shard,
    weights: Sequence[float],
    config: MergeConfig,
    opened: dict[Path, int],
    output: int,
    advance: Advance,
) -> dict[str, Array]:
    step = _chunk_elements(shard.segments, config)
    for segment in shard.segments:
        for first in range(0, segment.num_elements, step):
            count = min(step, segment.num_elements - first)
            entries = segment.inputs[: len(weights)]
            arrays = [_values(entry, first, count, opened) for entry in entries]
            dtypes = [entry.dtype for entry in entries]
            average = weighted_average(arrays, weights, dtypes=dtypes, out_dtype=segment.dtype, backend="eager")
            if not config.allow_nonfinite and not _finite(average, segment.dtype).all():
                raise _nonfinite(segment, first, step, opened)
            os.pwrite(output, average.tobytes(), segment.output_offset + first * ITEM_BYTES[segment.dtype])
            advance(count)
    pieces, grams = _pieces(shard, step, config)
    for place, (number, first, count) in enumerate(pieces.tolist()):
        entries = shard.segments[number].inputs
        *arrays, base = (_values(entry, first, count, opened) for entry in entries)
        *dtypes, base_dtype = (entry.dtype for entry in entries)
        grams[place] = delta_gram(arrays, base, dtypes=dtypes, base_dtype=base_dtype)
    return gram_by_tensor(shard.segments, pieces, grams)


def _pieces(shard: Shard, step: int, config: MergeConfig) -> tuple[npt.NDArray[np.int64], Array]:
    """The pieces whose Gram matrices are wanted, and where they go: none without ``config.geometry``."""
    if not config.geometry:
        return np.empty((0, 3), np.int64), np.empty((0, 0, 0))
    pieces = cut_pieces(shard.segments, step)
    branches = len(shard.segments[0].inputs) - 1
    return pieces, np.zeros((len(pieces), branches, branches))


def _copy_equal(segment: Segment, opened: dict[Path, int], output: int) -> None:
    length, step = segment.num_elements * ITEM_BYTES[segment.dtype], 1 << 20
    for at in range(0, length, step):
        count = min(step, length - at)
        chunks = [_read(opened[e.file], count, e.offset + at, e) for e in segment.inputs]
        for entry, chunk in zip(segment.inputs, chunks, strict=True):
            if chunk != chunks[0]:
                raise InputError(
                    f"{entry.file}: {entry.name}: a {entry.dtype} tensor cannot be averaged and must equal that of "
                    f"{segment.inputs[0].file}"
                )
        os.pwrite(output, chunks[0], segment.output_offset + at)


def _chunk_elements(segments: Sequence[Segment], config: MergeConfig) -> int:
    if config.geometry:
        return GEOMETRY_CHUNK  # sums are joined chunk by chunk: one size, one result
    widest = max(ITEM_BYTES[dtype] for s in segments for dtype in (s.dtype, *(entry.dtype for entry in s.inputs)))
    return config.chunk_kib * 1024 // widest


def _values(entry: TensorEntry, first: int, count: int, opened: dict[Path, int]) -> np.ndarray:
    """Elements of an input, counted from the start of its segment; bf16 as uint16 bits."""
    item = ITEM_BYTES[entry.dtype]
    data = _read(opened[entry.file], count * item, entry.offset + first * item, entry)
    return np.frombuffer(data, FLOAT_DTYPES[entry.dtype][1])


def _read(descriptor: int, count: int, offset: int, entry: TensorEntry) -> bytes:
    data = os.pread(descriptor, count, offset)
    if len(data) != count:
        raise InputError(f"{entry.file}: {entry.name}: the file ends before its header says")
    return data


def _finite(values: np.ndarray, dtype: str) -> np.ndarray:
    return np.asarray((values & 0x7F80) != 0x7F80 if dtype == "BF16" else np.isfinite(values))


def _nonfinite(segment: Segment, chunk: int, step: int, opened: dict[Path, int]) -> InputError:
    """Finds the first bad element of the chunk, by its tensor and the input it came from."""
    count = min(step, segment.num_elements - chunk)
    for entry in segment.inputs:
        bad = np.flatnonzero(~_finite(_values(entry, chunk, count, opened), entry.dtype))
        if len(bad):
            name = segment.name_at(chunk + int(bad[0]))
            return InputError(f"{entry.file}: {name}: must be finite, holds NaN or infinity{_ALLOW}")
    name = segment.name_at(chunk)
    return InputError(f"{segment.inputs[0].file}: {name}: the average overflows {segment.dtype}{_ALLOW}")


class _Watch:
    """Reports a counter that C++ advances while it holds no GIL."""

    def __init__(self, done: np.ndarray, advance: Advance) -> None:
        self.done, self.advance, self.reported = done, advance, 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "_Watch":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self._report()

    def _run(self) -> None:
        while not self.stop.wait(0.1):
            self._report()

    def _report(self) -> None:
        now = int(self.done[0])
        self.advance(now - self.reported)
        self.reported = now
