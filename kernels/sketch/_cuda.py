"""The linear sketch in CUDA C++ (``sketch_linear.cu``), compiled by NVRTC on first use.

It has not run on a GPU yet, so only ``backend="cuda"`` chooses it. Tests without a GPU cover the
same source on the CPU, launched with the bytes that are packed here; its code for sm_80, sm_90a and
sm_100a; and every call below against a fake driver. The driver itself, races, speed and the
rounding of tensor cores are not tested.
"""

import ctypes
import functools
import importlib
import struct
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merit_fast.errors import BackendUnavailableError, MeritFastError, one_line
from merit_fast.kernels.sketch._target import SketchTarget

OP = "linear_grad_sketch"
TILE = 64
THREADS = 128
# Splits shorten the walks of an example's blocks, up to this many blocks. Their number, and so the
# order of sums, depends only on the parameter and on proj_dim: not on the GPU or on the batch.
SPLIT_BLOCKS = 128
SPLIT_TILES = 4  # fewest tiles of a split, which costs writing and reading a bucket
PARTIAL_BYTES = 64 << 20  # most bytes of the splits' sums; a launch takes as many examples as fit
SOURCE = Path(__file__).with_name("sketch_linear.cu")  # a link to csrc/cuda; a file in a wheel
KERNELS = ("sketch_linear_bf16", "sketch_linear_f32", "add_splits")


@dataclass(frozen=True)
class Job:
    """The struct of this name in the source, 8 bytes a field: addresses, then integers."""

    dy: int
    x: int
    offsets: int
    scale: int
    out: int
    partial: int
    dy_stride: int
    x_stride: int
    scale_stride: int
    rows: int
    columns: int
    first_row: int
    first_column: int
    tiles_across: int
    group_rows: int
    group_columns: int
    first_group_row: int
    first_group_column: int
    groups_across: int
    groups: int
    key: int
    examples: int
    buckets: int
    splits: int
    dy_wide: int
    x_wide: int

    def pack(self) -> bytes:
        return struct.pack("=6Q14qQ5q", *astuple(self))


def sketch_linear(dy: Tensor, x: Tensor, target: SketchTarget) -> None:
    """Adds the sketch of dy^T x of each example, times ``scale``, on the current stream.

    Deterministic: the order of sums depends on neither batch nor device.

    Args:
        dy, x: [N, O] and [N, I], bfloat16 (tensor cores) or float32 (no tf32), rows contiguous. If
            one is float32 the other is converted. Loads are 16 bytes wide where the data, the row
            strides, the first row and the first column are multiples of 16 bytes; element by
            element, and slower, elsewhere.

    Raises:
        BackendUnavailableError: no cuda-bindings, or a GPU older than sm_80.
        MeritFastError: NVRTC or the driver fails; the message names the call and its error.
    """
    out = target.out
    if not (dy.shape[1] and x.shape[1] and out.numel()):
        return
    if dy.dtype != x.dtype:
        dy = dy.float()
        x = x.float()
    kernel = "sketch_linear_bf16" if dy.dtype == torch.bfloat16 else "sketch_linear_f32"
    splits = _splits(dy.shape[1], x.shape[1], target)
    examples = target.examples
    partial = None
    if splits > 1:
        examples = min(examples, max(1, PARTIAL_BYTES // (splits * target.proj_dim * 4)))
        partial = torch.empty(
            examples, splits, target.proj_dim, dtype=torch.float32, device=out.device
        )
    for first in range(0, target.examples, examples):
        batch = replace(target, offsets=target.offsets[first:], out=out[first : first + examples])
        job = describe(dy, x, batch, partial)
        launch(kernel, job.examples * job.splits * job.buckets, job.pack(), out.device)
        if splits > 1:
            launch("add_splits", batch.out.numel() // THREADS, job.pack(), out.device)


def describe(dy: Tensor, x: Tensor, target: SketchTarget, partial: Tensor | None) -> Job:
    """The kernels' argument; ``partial`` [>= B, splits, D] takes the sums of the splits, if any."""
    first_group_row, first_group_column, down, across = _groups(dy.shape[1], x.shape[1], target)
    return Job(
        dy=dy.data_ptr(),
        x=x.data_ptr(),
        offsets=target.offsets.data_ptr(),
        scale=0 if target.scale is None else target.scale.data_ptr(),
        out=target.out.data_ptr(),
        partial=0 if partial is None else partial.data_ptr(),
        dy_stride=dy.stride(0),
        x_stride=x.stride(0),
        scale_stride=0 if target.scale is None else target.scale.stride(0),
        rows=dy.shape[1],
        columns=x.shape[1],
        first_row=target.first_row,
        first_column=target.first_column,
        tiles_across=-(-target.columns // TILE),
        group_rows=target.group[0],
        group_columns=target.group[1],
        first_group_row=first_group_row,
        first_group_column=first_group_column,
        groups_across=across,
        groups=down * across,
        key=target.key & 0xFFFFFFFFFFFFFFFF,
        examples=target.examples,
        buckets=target.proj_dim // TILE**2,
        splits=1 if partial is None else partial.shape[1],
        dy_wide=_wide(dy, target.first_row),
        x_wide=_wide(x, target.first_column),
    )


def _groups(rows: int, columns: int, target: SketchTarget) -> tuple[int, int, int, int]:
    """Row and column of the first group that the gradient touches, and how many down and across."""
    p, q = target.group
    top = target.first_row // TILE // p
    left = target.first_column // TILE // q
    below = (target.first_row + rows - 1) // TILE // p + 1
    right = (target.first_column + columns - 1) // TILE // q + 1
    tiles = below * p * (-(-target.columns // TILE) + q)
    if tiles > 1 << 32:
        raise ValueError(
            f"{OP}: backend 'cuda' counts tiles in 32 bits, "
            f"a parameter with tile {tiles} has too many"
        )
    return top, left, below - top, right - left


def _splits(rows: int, columns: int, target: SketchTarget) -> int:
    _, _, down, across = _groups(rows, columns, target)
    most = SPLIT_BLOCKS // (target.proj_dim // TILE**2)
    return max(1, min(down * across // SPLIT_TILES, most))


def _wide(matrix: Tensor, first: int) -> bool:
    """Whether every 16 bytes of a tile's rows begin at a multiple of 16."""
    size = matrix.element_size()
    starts = (matrix.data_ptr(), matrix.stride(0) * size, first * size)
    return all(start % 16 == 0 for start in starts)


def launch(kernel: str, blocks: int, job: bytes, device: torch.device) -> None:
    """Queues ``kernel`` on torch's current stream; the driver copies ``job`` before it returns."""
    driver, _ = bindings()
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
        stream = torch.cuda.current_stream().cuda_stream
        # A thread in which torch has done nothing yet has no context.
        if not int(call(driver, "cuCtxGetCurrent")):
            context = call(driver, "cuDevicePrimaryCtxRetain", call(driver, "cuDeviceGet", index))
            call(driver, "cuCtxSetCurrent", context)
        function = kernels(index)[kernel]
        data = ctypes.create_string_buffer(job, len(job))
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(data))
        shape = (blocks, 1, 1, THREADS, 1, 1, 0)  # grid, block, bytes of dynamic shared memory
        call(
            driver,
            "cuLaunchKernel",
            function,
            *shape,
            driver.CUstream(stream),
            ctypes.addressof(arguments),
            0,
        )


@functools.cache
def kernels(index: int) -> dict[str, Any]:
    """The module's functions, compiled for device ``index`` and loaded into its context."""
    driver, nvrtc = bindings()
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        raise BackendUnavailableError(
            f"{OP}: backend 'cuda' needs a GPU of sm_80 or newer, got sm_{major}{minor}"
        )
    module = call(driver, "cuModuleLoadData", compile_source(nvrtc, f"sm_{major}{minor}"))
    return {name: call(driver, "cuModuleGetFunction", module, name.encode()) for name in KERNELS}


def compile_source(nvrtc: Any, architecture: str) -> bytes:
    """The cubin of the shipped source for one architecture."""
    program = call(
        nvrtc, "nvrtcCreateProgram", SOURCE.read_bytes(), SOURCE.name.encode(), 0, None, None
    )
    try:
        options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
        try:
            call(nvrtc, "nvrtcCompileProgram", program, len(options), options)
        except MeritFastError as error:
            log = _bytes(nvrtc, "ProgramLog", program).rstrip(b"\0").decode(errors="replace")
            raise MeritFastError(
                f"{error} for {architecture}: {one_line(MeritFastError(log))}"
            ) from None
        return _bytes(nvrtc, "CUBIN", program)
    finally:
        call(nvrtc, "nvrtcDestroyProgram", program)


def _bytes(nvrtc: Any, kind: str, program: Any) -> bytes:
    buffer = bytearray(call(nvrtc, f"nvrtcGet{kind}Size", program))
    call(nvrtc, f"nvrtcGet{kind}", program, buffer)
    return bytes(buffer)


def bindings() -> tuple[Any, Any]:
    """cuda.bindings.driver and .nvrtc."""
    try:
        driver = importlib.import_module("cuda.bindings.driver")
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
        return driver, nvrtc
    except ImportError as error:
        raise BackendUnavailableError(
            f"{OP}: backend 'cuda' needs cuda-bindings: {one_line(error)}"
        ) from None


def call(library: Any, name: str, *arguments: Any) -> Any:
    """Calls a function of cuda-bindings; returns the value after its status, if any.

    Raises:
        MeritFastError: the status is not success, or the library behind the bindings is missing.
    """
    try:
        status, *values = getattr(library, name)(*arguments)
    except RuntimeError as error:
        raise MeritFastError(f"{OP}: {name}: {one_line(error)}") from None
    if int(status):
        raise MeritFastError(f"{OP}: {name} failed with {status.name}")
    return values[0] if values else None
