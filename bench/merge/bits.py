"""Counts the elements of merged bf16 checkpoints that differ from the fp64 sum rounded once.

Merges of other methods are compared with each other.
"""

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.merge.checkpoints import Tensor, read_headers
from bench.merge.rows import Setup, merge_command, mergekit_command
from bench.support.measure import run_child

PIECE = 1 << 22
WEIGHTS = {
    "equal": (1.0, 1.0, 1.0, 1.0),
    "0.1 0.2 0.3 0.4": (0.1, 0.2, 0.3, 0.4),
    "12345 77777 31415 27182": (12345.0, 77777.0, 31415.0, 27182.0),
}
LEVELS = ("generic", "avx2", "avx512")
# SIMD level, threads, chunk: every level with every thread count, then other chunks
ENGINES = [
    *((level, threads, 512) for level in LEVELS for threads in (1, 2, 4)),
    *((None, 2, k) for k in (64, 4096)),
]


def to_fp64(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def round_once(values: np.ndarray) -> np.ndarray:
    """Rounds fp64 to bf16 (as uint16), to nearest even, without a second rounding in fp32.

    Values must be finite.     fp32 on the way errs only where it lands on the middle between two
    bf16 values: there the part that fp32 dropped decides.
    """
    near = values.astype(np.float32)
    bits = near.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & np.uint32(1))) >> 16
    middle = np.flatnonzero((bits & np.uint32(0xFFFF)) == 0x8000)
    dropped = np.abs(values[middle]) - np.abs(near[middle].astype(np.float64))
    truncated = bits[middle] >> 16
    rounded[middle] = np.where(
        dropped > 0, truncated + 1, np.where(dropped < 0, truncated, rounded[middle])
    )
    return rounded.astype(np.uint16)


def pieces(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """(start, count) of a tensor's elements, at most ``PIECE`` at a time."""
    total = math.prod(tensor.shape)
    return ((start, min(PIECE, total - start)) for start in range(0, total, PIECE))


def write_reference(models: Sequence[Path], weights: Sequence[float], file: Path) -> None:
    """The fp64 weighted mean rounded once, all tensors in name order, as raw bf16."""
    headers = [read_headers(model) for model in models]
    shares = [weight / sum(weights) for weight in weights]
    with open(file, "wb") as stream:
        for name in sorted(headers[0]):
            for start, count in pieces(headers[0][name]):
                total = np.zeros(count)
                for share, header in zip(shares, headers, strict=True):
                    total += share * to_fp64(header[name].read(start, count))
                stream.write(round_once(total).tobytes())


def differing(first: Path, second: Path) -> int:
    """Elements of different bits; a side is a model directory or a file of ``write_reference``."""
    header = read_headers(first if first.is_dir() else second)
    sides = [_in_name_order(path, header) for path in (first, second)]
    if any(side.keys() != header.keys() for side in sides):
        raise ValueError(f"{first} and {second} hold different tensors")
    return sum(
        int(
            np.count_nonzero(sides[0][name].read(start, count) != sides[1][name].read(start, count))
        )
        for name in header
        for start, count in pieces(header[name])
    )


def _in_name_order(path: Path, header: dict[str, Tensor]) -> dict[str, Tensor]:
    if path.is_dir():
        return read_headers(path)
    tensors = {}
    offset = 0
    for name in sorted(header):
        tensors[name] = dataclasses.replace(header[name], file=path, offset=offset)
        offset += header[name].num_bytes
    return tensors


def count_all(setup: Setup, note: Callable[[str], None]) -> dict[str, Any]:
    """Differing elements of every engine setting, of mergekit, and of kept outputs.

    A value is a count, or an error in words.
    """
    counts: dict[str, Any] = {}
    reference = setup.scratch / "reference.bf16"
    for words, weights in WEIGHTS.items():
        note(f"bits: fp64 reference, weights {words}")
        write_reference(setup.models, weights, reference)
        engines = ENGINES if words == "equal" else [(None, 2, 512)]
        for level, threads, chunk in engines:
            setting = f"{level or 'default level'}, {threads} threads, chunks of {chunk} KiB"
            label = f"merit-fast, {setting}, weights {words}"
            flags = ["--threads", str(threads), "--chunk-kib", str(chunk)]
            environment = {"MERIT_FAST_SIMD": level} if level else {}
            command = merge_command(setup, flags=flags, weights=weights)
            counts[label] = _run_and_compare(setup, command, environment, reference)
        if setup.mergekit:
            command = mergekit_command(setup, "linear", setup.models, weights)
            counts[f"mergekit, weights {words}"] = _run_and_compare(
                setup, command, setup.offline, reference
            )
    reference.unlink()
    for method in ("ties", "slerp"):
        ours, theirs = (setup.scratch / f"kept-{method}-{side}" for side in ("command", "mergekit"))
        if ours.exists() and theirs.exists():
            note(f"bits: {method}, merit-fast against mergekit")
            counts[f"{method}, merit-fast against mergekit"] = differing(ours, theirs)
            shutil.rmtree(ours)
            shutil.rmtree(theirs)
    return counts


def _run_and_compare(
    setup: Setup, command: Sequence[str | Path], environment: dict[str, str], reference: Path
) -> int | str:
    shutil.rmtree(setup.out, ignore_errors=True)
    result = run_child(command, environment, setup.scratch)
    if "error" in result:
        return str(result["error"])
    count = differing(setup.out, reference)
    shutil.rmtree(setup.out)
    os.sync()
    return count
