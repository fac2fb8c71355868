"""Writes an adapter's directory as PEFT does: config and weights, tensor after tensor."""

import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from merit_fast.errors import InputError
from merit_fast.kernels.average import average_arrays
from merit_fast.manifests.atomic import write_text
from merit_fast.merge.engine.layout import StoredTensor, header_of
from merit_fast.merge.engine.values import finite
from merit_fast.merge.read.adapters.folder import ADAPTER_CONFIG
from merit_fast.merge.read.checkpoint import ADAPTER_FILE

Array = npt.NDArray[np.float64]


Group = tuple[Sequence[StoredTensor], Callable[[], Sequence[Array]]]


def write_weights(directory: Path, groups: Iterable[Group], advance: Callable[[int], None]) -> None:
    """Writes adapter_model.safetensors; only one group's values are in memory at a time.

    Args:
        directory: the output.
        groups: tensors, and a function that gives their values in float64.
        advance: receives the number of tensors that are done.

    Raises:
        InputError: a value is not finite in the output's dtype.
    """
    listed = list(groups)
    part = directory / f"{ADAPTER_FILE}.part"
    with open(part, "wb") as opened:
        opened.write(header_of(planned for tensors, _ in listed for planned in tensors))
        for tensors, values in listed:
            for planned, array in zip(tensors, values(), strict=True):
                if array.size != math.prod(planned.shape):
                    raise AssertionError(f"{planned.name}: {array.shape} is not {planned.shape}")
                opened.write(_rounded(planned, array))
            advance(len(tensors))
    os.replace(part, directory / ADAPTER_FILE)


def spool_weights(directory: Path, tensors: Iterable[tuple[StoredTensor, Iterable[Array]]]) -> int:
    """Writes adapter_model.safetensors of tensors whose shapes are known only when they are made.

    Args:
        directory: the output; holds the data a second time until the header is known.
        tensors: each with its values in float64, in runs of elements.

    Returns:
        the number of elements.

    Raises:
        InputError: a value is not finite in the output's dtype.
    """
    data = directory / f"{ADAPTER_FILE}.data.part"
    part = directory / f"{ADAPTER_FILE}.part"
    planned = []
    with open(data, "wb") as opened:
        for tensor, runs in tensors:
            planned.append(tensor)
            for run in runs:
                opened.write(_rounded(tensor, run))
    with open(data, "rb") as spooled, open(part, "wb") as opened:
        opened.write(header_of(planned))
        shutil.copyfileobj(spooled, opened, 1 << 20)
    data.unlink()
    os.replace(part, directory / ADAPTER_FILE)
    return sum(math.prod(tensor.shape) for tensor in planned)


def write_config(directory: Path, values: Mapping[str, Any]) -> None:
    """Writes adapter_config.json with sorted keys, as PEFT does."""
    text = json.dumps(dict(sorted(values.items())), indent=2)
    write_text(directory / ADAPTER_CONFIG, text + "\n")


def rank_keys(ranks: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """r, lora_alpha and their patterns for modules of these ranks and scalings.

    The most common rank and alpha are the defaults. A pattern fits exactly one module.

    Args:
        ranks: (rank, scaling) by module.
    """
    alphas = {module: scaling * rank for module, (rank, scaling) in ranks.items()}
    r = _most_common(rank for rank, _ in ranks.values())
    alpha = _most_common(alphas.values())
    return {
        "r": r,
        "lora_alpha": _plain(alpha),
        "use_rslora": False,
        "rank_pattern": {
            _exactly(module): rank for module, (rank, _) in ranks.items() if rank != r
        },
        "alpha_pattern": {
            _exactly(module): _plain(value) for module, value in alphas.items() if value != alpha
        },
    }


def _exactly(module: str) -> str:
    return f"^{re.escape(module)}"


def _plain(number: float) -> float | int:
    return int(number) if float(number).is_integer() else float(number)


def _most_common(numbers: Iterable[float]) -> Any:
    counts = Counter(numbers)
    return max(counts, key=lambda number: (counts[number], number)) if counts else 1


def _rounded(planned: StoredTensor, array: Array) -> bytes:
    """Bytes of elements of a tensor, rounded once."""
    flat = np.ascontiguousarray(array, np.float64).ravel()
    out = average_arrays([flat], [1.0], dtypes=["F64"], out_dtype=planned.dtype, backend="eager")
    if not finite(out, planned.dtype).all():
        raise InputError(f"{planned.name}: must be finite in {planned.dtype}; check the inputs")
    return out.tobytes()
