"""The cases that an op brings to ``bench.gpu``, as in average.py and sketch.py."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.support.dtypes import DTYPES


@dataclass(frozen=True)
class Case:
    """One call of an op. Its tensors are on the requested device, so that tests use a CPU.

    Attributes:
        run: backend name -> the results.
        truth: the results in float64, by other code than the op's.
        peers: baselines by name: eager, torch.compile, liger-kernel where it has a counterpart.
        moved_bytes: bytes that every implementation moves: each input and result once.
        operations: floating-point operations of every implementation, two for a product.
    """

    name: str
    dtype: str
    run: Callable[[str], Sequence[Tensor]]
    truth: Callable[[], Sequence[Tensor]]
    peers: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    moved_bytes: int = 0
    operations: int = 0


@dataclass(frozen=True)
class Op:
    """An op with its cases, small ones to check and large ones to time as well."""

    name: str
    row: str  # of dispatch.OPS, which says what backends it has
    small: Callable[[torch.device], Iterator[Case]]  # odd sizes, only checked
    large: Callable[[torch.device], Iterator[Case]]  # checked, then timed


def random(*shape: int, dtype: str, device: torch.device) -> Tensor:
    return torch.randn(*shape, device=device).to(DTYPES[dtype])


def with_compiled(name: str, function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """A peer, and the same function under torch.compile."""
    return {name: function, "torch.compile": torch.compile(function, dynamic=False)}
