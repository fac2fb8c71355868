"""The CUDA device on which Triton launches its kernels."""

import contextlib

import torch
from torch import Tensor


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's GPU the current one; does nothing for tensors on the CPU."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()
