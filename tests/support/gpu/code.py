"""Compiles Triton launches for GPUs that this machine lacks, and keeps the code on disk.

The store is the checkout's ``.cache/gpu_code``, one file per fingerprint (``fingerprint.py``): a
launch is compiled again only when its source, its types, its options or the compiler change.
"""

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from support.gpu.absent_driver import compiling_for
from support.gpu.fingerprint import fingerprint
from support.gpu.read_code import GpuCode, read
from support.paths import ROOT
from triton import knobs

STORE = ROOT / ".cache" / "gpu_code"


@dataclass(frozen=True)
class GpuLaunch:
    """``kernel[grid](*arguments, **options)``; of tensors only dtype and address matter."""

    name: str
    kernel: Any  # a triton.jit function
    arguments: Sequence[Any]
    options: Mapping[str, Any]

    def fingerprint(self, architecture: int | str) -> str:
        return fingerprint(self.kernel, self.arguments, self.options, architecture)


def compile_launch(
    kernel: Any, arguments: Sequence[Any], options: Mapping[str, Any], architecture: int | str
) -> GpuCode:
    """The code that ``kernel[grid](*arguments, **options)`` runs on ``architecture``.

    Launches nothing. Code of the same fingerprint is read from the store.
    """
    file = STORE / f"{fingerprint(kernel, arguments, options, architecture)}.json"
    if file.exists():
        stored = json.loads(file.read_text())
        return GpuCode(**{**stored, "opcodes": tuple(stored["opcodes"])})
    code = build(kernel, arguments, options, architecture)()
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=file.parent)
    with os.fdopen(descriptor, "w") as text:
        json.dump(asdict(code), text)
    os.replace(name, file)  # another process may read or write the same file
    return code


def build(
    kernel: Any, arguments: Sequence[Any], options: Mapping[str, Any], architecture: int | str
) -> Callable[[], GpuCode]:
    """Compiles a launch, without any store; the call that comes back reads the code."""
    log = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as cache,
        knobs.cache.scope(),
        knobs.compilation.scope(),
        knobs.nvidia.scope(),
        compiling_for(kernel, architecture),
        contextlib.redirect_stdout(log),
    ):
        knobs.cache.dir = cache
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        compiled = kernel.warmup(*arguments, grid=(1,), **options)
    return lambda: read(compiled, log.getvalue())
