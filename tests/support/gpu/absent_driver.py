"""A stand-in for the driver of a GPU that this machine lacks, so that Triton compiles for it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

WAVE = 64  # threads that an AMD data-centre GPU runs in step
WARP = 32  # threads that an NVIDIA GPU runs in step


class _AbsentDriver:
    """Enough of a driver to bind a launch's arguments and to compile for ``target``."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def compiling_for(kernel: Any, architecture: int | str) -> Iterator[None]:
    """Makes Triton bind ``kernel`` for an architecture: 90 is NVIDIA's sm_90, "gfx942" AMD's."""
    is_nvidia = isinstance(architecture, int)
    target = GPUTarget("cuda" if is_nvidia else "hip", architecture, WARP if is_nvidia else WAVE)
    driver_before = driver._active
    driver.set_active(_AbsentDriver(target))
    try:
        kernel.device_caches.clear()
        yield
    finally:
        kernel.device_caches.clear()
        driver._active = driver_before
