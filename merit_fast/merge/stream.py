"""The engine's driver: opens files, hands byte ranges to C++ (or NumPy), turns what went wrong into one line.

Memory is threads x (K + 1) x chunk, whatever the model's size.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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

GRAM_CHUNK = 1 << 17  # elements; sums are joined chunk by chunk, so one size gives one result
_ALLOW = "; merge.allow_nonfinite=true writes it all the same"

Advance = Callable[[int], None]  # told how many more elements are done


def write_shard(
    shard: Shard, config: MergeConfig, path: Path, advance: Advance, backend: str | None = None
) -> dict[str, Array]:
    """Combines one output file into ``path`` (created, preallocated, not fsynced) by its segments' coefficients.

    Returns:
        With ``config.geometry``, each tensor's Gram matrix of the deltas from its last input, the base; else nothing.

    Raises:
        InputError: a value is not finite, an integer tensor differs, an input is shorter than its header says.
        MeritFastError: reading or writing failed, the disk is full.
    """
    with _opened(shard, path) as opened:
        output = opened[path]
        os.posix_fallocate(output, 0, shard.num_bytes)
        os.pwrite(output, shard.header, 0)
        job = _Job.of(shard, config, opened, output, config.geometry, from_base=config.geometry)
        grams = _run(job, advance, backend)
        for segment in shard.copies:
            _copy_equal(segment, opened, output)
    return grams


def gram_shard(
    shard: Shard, config: MergeConfig, from_base: bool, advance: Advance, backend: str | None = None
) -> dict[str, Array]:
    """Reads one shard of every input and writes nothing: each float tensor's Gram matrix.

    Args:
        shard: of a plan without coefficients.
        from_base: the last input is the base and taken off the others; else all inputs count, from zero.

    Raises:
        as ``write_shard``.
    """
    with _opened(shard, None) as opened:
        return _run(_Job.of(shard, config, opened, -1, True, from_base), advance, backend)


@dataclass(frozen=True)
class _Job:
    """One pass over a shard: open files, chunk size, and the pieces whose Gram matrices are wanted."""

    shard: Shard
    config: MergeConfig
    opened: dict[Path, int]
    output: int
    step: int  # elements of a chunk
    pieces: npt.NDArray[np.int64]  # [P, 3]
    grams: Array  # [P, branches, branches], filled by the pass
    from_base: bool

    @classmethod
    def of(
        cls,
        shard: Shard,
        config: MergeConfig,
        opened: dict[Path, int],
        output: int,
        takes_gram: bool,
        from_base: bool,
    ) -> "_Job":
        if not takes_gram or not shard.segments:
            step = _chunk_elements(shard.segments, config)
            return cls(shard, config, opened, output, step, np.empty((0, 3), np.int64), np.empty((0, 0, 0)), False)
        pieces = cut_pieces(shard.segments, GRAM_CHUNK)
        branches = len(shard.segments[0].inputs) - int(from_base)
        grams = np.zeros((len(pieces), branches, branches))
        return cls(shard, config, opened, output, GRAM_CHUNK, pieces, grams, from_base)


@contextmanager
def _opened(shard: Shard, output: Path | None) -> Iterator[dict[Path, int]]:
    opened: dict[Path, int] = {}
    try:
        for file in sorted({entry.file for s in (*shard.segments, *shard.copies) for entry in s.inputs}):
            opened[file] = os.open(file, os.O_RDONLY)
        if output is not None:
            opened[output] = os.open(output, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        yield opened
    except OSError as error:
        raise MeritFastError(f"{error.filename or output or shard.file}: {error.strerror}") from None
    finally:
        for descriptor in opened.values():
            os.close(descriptor)


def _run(job: _Job, advance: Advance, backend: str | None) -> dict[str, Array]:
    if job.shard.segments:
        native = dispatch.choose("merge_files", "cpu", backend) == "cpu"
        (_run_native if native else _run_numpy)(job, advance)
    return gram_by_tensor(job.shard.segments, job.pieces, job.grams)


def _run_native(job: _Job, advance: Advance) -> None:
    native = dispatch.native_module()
    assert native is not None
    wanted, opened, config = job.shard.segments, job.opened, job.config
    code = {dtype: number for dtype, (number, _) in FLOAT_DTYPES.items()}
    segments = np.array([(s.num_elements, job.output, s.output_offset, code[s.dtype]) for s in wanted], np.int64)
    inputs = np.array([(opened[e.file], e.offset, code[e.dtype]) for s in wanted for e in s.inputs], np.int64)
    weights = np.array([s.coefficients for s in wanted], np.float64)
    done = np.zeros(1, np.int64)
    with _Watch(done, advance):
        error, segment, element, source, nonfinite = native.merge_files(
            segments, inputs, weights, job.step, config.threads, config.allow_nonfinite,
            job.pieces, job.grams, job.from_base, done,
        )  # fmt: skip
    if nonfinite:
        raise _nonfinite(wanted[segment], element, job)
    if error:
        where = wanted[segment].inputs[source].file if source >= 0 else "output"
        raise MeritFastError(f"{where}: {os.strerror(error)} while merging {job.shard.file}")


def _run_numpy(job: _Job, advance: Advance) -> None:
    for segment in job.shard.segments:
        entries = segment.inputs[: len(segment.coefficients)]
        dtypes = [entry.dtype for entry in entries]
        for first in range(0, segment.num_elements if entries else 0, job.step):
            count = min(job.step, segment.num_elements - first)
            arrays = [_values(entry, first, count, job.opened) for entry in entries]
            average = weighted_average(
                arrays, segment.coefficients, dtypes=dtypes, out_dtype=segment.dtype, backend="eager"
            )
            if not job.config.allow_nonfinite and not _finite(average, segment.dtype).all():
                raise _nonfinite(segment, first, job)
            os.pwrite(job.output, average.tobytes(), segment.output_offset + first * ITEM_BYTES[segment.dtype])
            advance(count)
    branches = job.grams.shape[1]
    for place, (number, first, count) in enumerate(job.pieces.tolist()):
        entries = job.shard.segments[number].inputs
        values = [_values(entry, first, count, job.opened) for entry in entries]
        base, base_dtype = (values[branches], entries[branches].dtype) if job.from_base else (np.zeros(count), "F64")
        dtypes = [entry.dtype for entry in entries[:branches]]
        job.grams[place] = delta_gram(values[:branches], base, dtypes=dtypes, base_dtype=base_dtype)


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
    if not segments:
        return 1
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


def _nonfinite(segment: Segment, chunk: int, job: _Job) -> InputError:
    """Finds the first bad element of the chunk, by its tensor and the input it came from."""
    count = min(job.step, segment.num_elements - chunk)
    for entry in segment.inputs:
        bad = np.flatnonzero(~_finite(_values(entry, chunk, count, job.opened), entry.dtype))
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
