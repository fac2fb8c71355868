"""Places of tensors: the CUDA device on which Triton launches, addresses for native code."""

import contextlib

import torch
from torch import Tensor


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's GPU the current one; does nothing for tensors on the CPU."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def address(tensor: Tensor | None) -> int:
    """The tensor's address, or 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()
