"""Whole tensors of joined adapters: modules_to_save, biases, rows of embeddings."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from merit_fast.errors import InputError
from merit_fast.kernels.average._eager import to_float64
from merit_fast.kernels.average.dtypes import FLOAT_DTYPES
from merit_fast.merge.engine.layout import StoredTensor
from merit_fast.merge.engine.opened import OpenFiles
from merit_fast.merge.lora.files import Array, Group
from merit_fast.merge.read.adapters.adapter import Adapter
from merit_fast.merge.read.adapters.tied import same_values
from merit_fast.merge.read.entries import TensorEntry

_OF_BASE = ".base_layer.weight"  # the base's own embedding or head, which PEFT saves with LoRA's
Coefficients = Callable[[str, TensorEntry], tuple[float, ...]]


class WholeSums:
    """Sums of the tensors that adapters hold whole; they need all adapters and a sum of 1.

    Without that the base's own values take part, which are not there.
    """

    def __init__(self, adapters: Sequence[Adapter], coefficients: Coefficients) -> None:
        tables = [
            {entry.name: entry for entry in (*a.parts.whole.values(), *a.parts.rows.values())}
            for a in adapters
        ]
        self.names = list(dict.fromkeys(name for table in tables for name in table))
        self._entries: dict[str, list[TensorEntry]] = {}
        self._factors: dict[str, tuple[float, ...]] = {}
        for name in self.names:
            entries = [table[name] for table in tables if name in table]
            if name.endswith(_OF_BASE):
                _check_one_base(name, entries)
                entries = entries[:1]
                factors: tuple[float, ...] = (1.0,)
            else:
                factors = coefficients(name.removesuffix(".weight"), entries[0])
                self._check(name, entries, len(adapters), factors)
            self._entries[name] = entries
            self._factors[name] = factors

    def planned(self) -> Iterator[StoredTensor]:
        for name, entries in self._entries.items():
            yield StoredTensor(name, entries[0].dtype, entries[0].shape)

    def groups(self, files: OpenFiles) -> Iterator[Group]:
        for planned in self.planned():
            yield [planned], partial(self._sum, planned.name, files)

    def _sum(self, name: str, files: OpenFiles) -> list[Array]:
        entries = self._entries[name]
        total = np.zeros(entries[0].num_elements)
        for factor, entry in zip(self._factors[name], entries, strict=True):
            bits = files.read(entry, 0, entry.num_elements)
            values = np.frombuffer(bits, FLOAT_DTYPES[entry.dtype][1])
            total += factor * to_float64(values, entry.dtype)
        return [total]

    def _check(
        self, name: str, entries: Sequence[TensorEntry], count: int, factors: Sequence[float]
    ) -> None:
        first = entries[0]
        where = f"{first.file}: {name}"
        if len(entries) < count or abs(sum(factors) - 1.0) > 1e-9:
            reason = (
                "not every adapter holds it" if len(entries) < count else "weights must sum to 1"
            )
            raise InputError(
                f"{where}: is a whole tensor, and {reason}: merge the adapters with their base"
            )
        for entry in entries:
            if (entry.dtype, entry.shape) != (first.dtype, first.shape):
                raise InputError(
                    f"{entry.file}: {name}: must be {first.dtype} {list(first.shape)} as in "
                    f"{first.file}, got {entry.dtype} {list(entry.shape)}"
                )
            if entry.dtype not in FLOAT_DTYPES:
                raise InputError(f"{entry.file}: {name}: must be of a float dtype")


def _check_one_base(name: str, entries: Sequence[TensorEntry]) -> None:
    for entry in entries[1:]:
        if not same_values(entries[0], entry):
            raise InputError(
                f"{entry.file}: {name}: differs from {entries[0].file}: adapters of different "
                "bases cannot be joined"
            )
