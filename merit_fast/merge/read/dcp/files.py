"""The safetensors files of an output whose first model has none."""

from collections.abc import Iterable

from merit_fast.kernels.average.dtypes import ITEM_BYTES
from merit_fast.merge.read.checkpoint import SINGLE_FILE
from merit_fast.merge.read.entries import TensorEntry

_FILE_BYTES = 5 << 30  # as transformers cuts them


def output_files(entries: Iterable[TensorEntry]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Safetensors files for an output: tensors in order, at most 5 GB each."""
    groups: list[list[str]] = [[]]
    size = 0
    for entry in entries:
        num_bytes = ITEM_BYTES[entry.dtype] * entry.num_elements
        if groups[-1] and size + num_bytes > _FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(entry.name)
        size += num_bytes
    if len(groups) == 1:
        return ((SINGLE_FILE, tuple(groups[0])),)
    count = len(groups)
    return tuple(
        (f"model-{i:05d}-of-{count:05d}.safetensors", tuple(group))
        for i, group in enumerate(groups, 1)
    )
