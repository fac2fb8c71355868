"""Tensors of a merge that the engine makes in memory when a model that is being loaded asks for them."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Lock
from typing import TYPE_CHECKING

from merit_fast.errors import MeritFastError
from merit_fast.merge.config import MergeConfig
from merit_fast.merge.engine.driver import input_files, merge_tensor
from merit_fast.merge.engine.opened import OpenFiles, open_files
from merit_fast.merge.engine.plan import Plan, plan_alone

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# safetensors' names -> torch's
_TORCH_DTYPES = {
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{"BF16": "bfloat16", "BOOL": "bool", "C64": "complex64"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"},
    **{"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"},
}


class Staging:
    """The way to a GPU: of two pinned buffers one is filled while the other is copied, each by a thread of its own."""

    def __init__(self, num_bytes: int, device: "torch.device") -> None:
        """``num_bytes``: of a buffer, which holds the largest tensor whole."""
        import torch

        self.device = device
        self._free: SimpleQueue[Tensor] = SimpleQueue()
        for _ in range(2):
            self._free.put(
                torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
            )

    def through(
        self, shape: tuple[int, ...], dtype: "torch.dtype", fill: "Callable[[Tensor], None]"
    ) -> "Tensor":
        """A new tensor on the device with what ``fill`` writes; waits for a buffer."""
        buffer = self._free.get()
        try:
            host = buffer[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            fill(host)
            return self.copy(host)
        finally:
            self._free.put(buffer)

    def copy(self, host: "Tensor") -> "Tensor":
        """Onto the device; whole on return, so that the buffer is free."""
        return host.to(self.device, copy=True)


class MergedTensors:
    """The tensors of a plan, each made when it is asked for. Any thread may ask; the engine makes one at a time."""

    def __init__(
        self, plan: Plan, config: MergeConfig, opened: OpenFiles, staging: Staging | None
    ) -> None:
        self.tensors = {tensor.name: tensor for file in plan.files for tensor in file.tensors}
        self.error: MeritFastError | None = None  # the first that a thread met
        self._segments = plan_alone(plan)
        self._config, self._opened, self._staging = config, opened, staging
        self._engine = Lock()

    def state_dict(self) -> "dict[str, LazyTensor]":
        return {name: LazyTensor(self, name) for name in self.tensors}

    def dtype(self, name: str) -> "torch.dtype":
        import torch

        found: torch.dtype = getattr(torch, _TORCH_DTYPES[self.tensors[name].dtype])
        return found

    def read(self, name: str) -> "Tensor":
        """On the GPU with staging, else on the CPU.

        Raises:
            InputError, MeritFastError: see ``merge_tensor``.
        """
        import torch

        shape, dtype = self.tensors[name].shape, self.dtype(name)
        if name not in self._segments:  # it has no elements
            return torch.empty(shape, dtype=dtype)
        if self._staging is not None:
            return self._staging.through(shape, dtype, lambda host: self._make(name, host))
        result = torch.empty(shape, dtype=dtype)
        self._make(name, result)
        return result

    def _make(self, name: str, result: "Tensor") -> None:
        with (
            self._engine
        ):  # it has threads of its own, and one set of buffers is what max_memory bounds
            merge_tensor(self._segments[name], self._config, self._opened, result.data_ptr())


class LazyTensor:
    """What transformers takes for a tensor still in its file: ``[...]`` makes it, once it is wanted."""

    def __init__(self, source: MergedTensors, name: str) -> None:
        self.source, self.name = source, name

    def __getitem__(self, everything: object) -> "Tensor":
        try:
            return self.source.read(self.name)
        except MeritFastError as error:  # transformers may bury it in a report of its own
            self.source.error = self.source.error or error
            raise
        except OSError as error:
            file = self.source.tensors[self.name].inputs[0].file
            self.source.error = self.source.error or MeritFastError(
                f"{file}: {self.name}: {error.strerror}"
            )
            raise

    @property
    def dtype(self) -> "torch.dtype":
        return self.source.dtype(self.name)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point


@contextmanager
def open_merged(
    plan: Plan, config: MergeConfig, staged: "torch.device | None"
) -> Iterator[MergedTensors]:
    """The plan's tensors while its inputs are open; on the CPU, or by way of ``Staging`` on the device ``staged``.

    Raises:
        MeritFastError: an input cannot be opened.
    """
    tensors = [tensor for file in plan.files for tensor in file.tensors]
    staging = Staging(max(tensor.num_bytes for tensor in tensors), staged) if staged else None
    segments = [segment for shard in plan.shards for segment in (*shard.segments, *shard.copies)]
    with open_files(input_files(segments), None) as opened:
        yield MergedTensors(plan, config, opened, staging)
