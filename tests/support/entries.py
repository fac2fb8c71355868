"""Random entries of every form that nest, with their values by NumPy's own indexing."""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from merit_fast.kernels.average.dtypes import ITEM_BYTES
from merit_fast.merge.read.entries import (
    AssembledEntry,
    ChangedEntry,
    DecodedEntry,
    Grid,
    LowRank,
    Part,
    TensorEntry,
    value_dtype,
)

TORCH = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Known:
    """An entry and its values in float64."""

    entry: TensorEntry
    values: np.ndarray


def fields_of(entry: TensorEntry) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in TensorEntry.__dataclass_fields__}


class RandomEntries:
    """Makes entries out of files in a folder."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.rng = np.random.default_rng(seed)
        self._numbers = itertools.count()

    def shape(self) -> tuple[int, ...]:
        dims = int(self.rng.integers(1, 4))
        return tuple(int(size) for size in self.rng.integers(1, 9, dims))

    def plain(self, shape: tuple[int, ...], dtype: str = "") -> Known:
        """Bytes of a file, behind some others, as torch stores them."""
        dtype = dtype or str(self.rng.choice(["BF16", "F16", "F32", "F64"]))
        number = next(self._numbers)
        tensor = torch.from_numpy(self.rng.standard_normal(shape)).to(TORCH[dtype])
        data = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        before = int(self.rng.integers(0, 9)) * ITEM_BYTES[dtype]
        file = self.folder / f"{number}.bin"
        file.write_bytes(b"\xff" * before + data)
        entry = TensorEntry(f"t{number}", dtype, shape, file, before, len(data))
        return Known(entry, tensor.double().numpy())

    def decoded(self, shape: tuple[int, ...]) -> Known:
        """8-bit codes of a matrix with a scale per block, some of which are cut."""
        codes = self.plain(shape, str(self.rng.choice(["F8_E4M3", "F8_E5M2"])))
        rows, cols = (int(size) for size in self.rng.integers(1, 5, 2))
        scales = self.plain((-(-shape[0] // rows), -(-shape[1] // cols)), "F32")
        factors = scales.values.repeat(rows, 0)[: shape[0]].repeat(cols, 1)[:, : shape[1]]
        grid = Grid(scales.entry, "", shape[0], scales.values.shape, rows, cols)
        stored = fields_of(codes.entry)
        entry = DecodedEntry(**stored, codes=codes.entry, scales=(grid,))
        return Known(entry, codes.values * factors)

    def changed(self, depth: int, shape: tuple[int, ...]) -> Known:
        """A matrix with one or two low-rank changes."""
        source = self.any(depth, shape)
        values = source.values.copy()
        changes = []
        for _ in range(int(self.rng.integers(1, 3))):
            a, b = self.plain((2, values.shape[1]), "F32"), self.plain((values.shape[0], 2), "F32")
            changes.append(LowRank(source.entry.name, a.entry, b.entry, 0.5, False))
            values += 0.5 * (b.values @ a.values)
        entry = ChangedEntry(**fields_of(source.entry), source=source.entry, changes=tuple(changes))
        return Known(entry, values)

    def assembled(self, depth: int, shape: tuple[int, ...] | None = None) -> Known:
        """A tensor cut into boxes along a random axis; each comes from somewhere in a source."""
        shape = shape or self.shape()
        axis = int(self.rng.integers(0, len(shape)))
        cuts = sorted({0, shape[axis], *map(int, self.rng.integers(0, shape[axis] + 1, 2))})
        values = np.empty(shape)
        parts = []
        interleaved = shape[axis] % 2 == 0 and bool(self.rng.integers(0, 2))
        boxes = [(k, shape[axis] // 2, 2) for k in range(2)] if interleaved else []
        boxes = boxes or [(low, high - low, 1) for low, high in itertools.pairwise(cuts)]
        for low, count, step in self.rng.permutation(np.array(boxes)).tolist():
            offsets = [low if d == axis else 0 for d in range(len(shape))]
            sizes = [count if d == axis else size for d, size in enumerate(shape)]
            steps = [step if d == axis else 1 for d in range(len(shape))]
            source, start, strides, box = self._view(depth, sizes)
            place = tuple(
                slice(offset, offset + size * by, by)
                for offset, size, by in zip(offsets, sizes, steps, strict=True)
            )
            values[place] = box
            given = () if step == 1 else tuple(steps)
            part = Part(source.entry, tuple(offsets), tuple(sizes), start, strides, given)
            parts.append(part)
        dtypes = {value_dtype(part.source) for part in parts}
        dtype = dtypes.pop() if len(dtypes) == 1 else "F64"
        first = parts[0].source
        num_bytes = sum(part.source.num_bytes for part in parts)
        name = f"whole{next(self._numbers)}"
        entry = AssembledEntry(name, dtype, shape, first.file, 0, num_bytes, tuple(parts))
        return Known(entry, values)

    def _view(self, depth: int, sizes: list[int]) -> tuple[Known, int, tuple[int, ...], np.ndarray]:
        """A box of these sizes in a larger source, its axes in any order, some reversed."""
        order = self.rng.permutation(len(sizes)).tolist()
        room = [sizes[d] + int(self.rng.integers(0, 3)) for d in order]
        source = self.any(depth, tuple(room))
        flat_strides = [math.prod(room[d + 1 :]) for d in range(len(room))]
        start = 0
        strides = [0] * len(sizes)
        index = []
        for place, d in enumerate(order):
            low = int(self.rng.integers(0, room[place] - sizes[d] + 1))
            is_reversed = bool(self.rng.integers(0, 4) == 0)
            strides[d] = flat_strides[place] * (-1 if is_reversed else 1)
            start += flat_strides[place] * (low + sizes[d] - 1 if is_reversed else low)
            run = np.arange(low, low + sizes[d])
            index.append(run[::-1] if is_reversed else run)
        box = source.values.reshape(room)[np.ix_(*index)].transpose(np.argsort(order))
        return source, start, tuple(strides), box

    def any(self, depth: int, shape: tuple[int, ...] | None = None) -> Known:
        """An entry that nests at most ``depth`` deep; of this shape, if one is given."""
        shape = shape or self.shape()
        is_matrix = len(shape) == 2
        forms = ["plain", "boxes", "boxes", *(["codes", "changes"] if is_matrix else [])]
        form = self.rng.choice(forms) if depth else "plain"
        if form == "boxes":
            return self.assembled(depth - 1, shape)
        if form == "codes":
            return self.decoded(shape)
        return self.changed(depth - 1, shape) if form == "changes" else self.plain(shape)
