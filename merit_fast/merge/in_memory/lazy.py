"""Tensors of a merge that the engine makes in memory when a loading model asks for them."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Lock
from typing import TYPE_CHECKING

from merit_fast.errors import MeritFastError
from merit_fast.kernels.average.dtypes import DTYPES
from merit_fast.merge.config import MergeConfig
from merit_fast.merge.engine.driver import input_files, merge_tensor
from merit_fast.merge.engine.opened import OpenFiles, open_files
from merit_fast.merge.engine.plan import Plan, plan_alone

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Staging:
    """Copies tensors to a GPU: one of two pinned buffers is filled while the other is copied."""

    def __init__(self, num_bytes: int, device: "torch.device") -> None:
        """``num_bytes``: size of a buffer, which holds the largest tensor."""
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
    """Tensors of a plan, made on demand and one after the other. Any thread may ask."""

    def __init__(
        self, plan: Plan, config: MergeConfig, opened: OpenFiles, staging: Staging | None
    ) -> None:
        self.tensors = {tensor.name: tensor for file in plan.files for tensor in file.tensors}
        self.error: MeritFastError | None = None  # the first that a thread met
        self._segments = plan_alone(plan)
        self._config = config
        self._opened = opened
        self._staging = staging
        self._engine = Lock()

    def state_dict(self) -> "dict[str, LazyTensor]":
        return {name: LazyTensor(self, name) for name in self.tensors}

    def dtype(self, name: str) -> "torch.dtype":
        import torch

        dtype: torch.dtype = getattr(torch, DTYPES[self.tensors[name].dtype].torch_name)
        return dtype

    def read(self, name: str) -> "Tensor":
        """Makes a tensor, on the GPU with staging, else on the CPU.

        Raises:
            InputError, MeritFastError: see ``merge_tensor``.
        """
        import torch

        shape = self.tensors[name].shape
        dtype = self.dtype(name)
        if name not in self._segments:  # it has no elements
            return torch.empty(shape, dtype=dtype)
        if self._staging is not None:
            return self._staging.through(shape, dtype, lambda host: self._make(name, host))
        result = torch.empty(shape, dtype=dtype)
        self._make(name, result)
        return result

    def _make(self, name: str, result: "Tensor") -> None:
        # The engine has threads of its own, and max_memory bounds one set of buffers.
        with self._engine:
            merge_tensor(self._segments[name], self._config, self._opened, result.data_ptr())


class LazyTensor:
    """A tensor that transformers treats as still in its file: ``[...]`` makes it."""

    def __init__(self, source: MergedTensors, name: str) -> None:
        self.source = source
        self.name = name

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
    """Opens the inputs and yields the plan's tensors, on the CPU or on the device ``staged``.

    Raises:
        MeritFastError: an input cannot be opened.
    """
    tensors = [tensor for file in plan.files for tensor in file.tensors]
    staging = Staging(max(tensor.num_bytes for tensor in tensors), staged) if staged else None
    segments = [segment for shard in plan.shards for segment in (*shard.segments, *shard.copies)]
    with open_files(input_files(segments), None) as opened:
        yield MergedTensors(plan, config, opened, staging)
