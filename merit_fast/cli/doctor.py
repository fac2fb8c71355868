"""Diagnoses this machine: versions, ISA level, the backend of every op and why not another.

A command that would run on compiled kernels tells in one line that they are not there: pip hides
the build's message.
"""

import os
import sys
from typing import TYPE_CHECKING, Any

from merit_fast.kernels import dispatch

if TYPE_CHECKING:
    import logging

FIX = "install g++ 11 or newer, then in the clone: pip install --force-reinstall --no-deps ."
_WITHOUT_KERNELS = ("init", "data", "status", "clean", "report", "verify", "doctor")


def tell_missing_native(command: str) -> None:
    """Prints a line to standard error if the command would run on the compiled kernels.

    The line takes the place of one warning for every op.
    """
    if command in _WITHOUT_KERNELS or dispatch.native_module() is not None:
        return
    text = "the compiled CPU kernels are not part of this install; everything runs, but slower"
    print(f"note: {text}. To have them, {FIX}", file=sys.stderr)
    dispatch.logger().addFilter(_is_another_reason)


def _is_another_reason(record: "logging.LogRecord") -> bool:
    return dispatch.NOT_BUILT not in record.getMessage()


# The variables that change what runs or how fast.
_VARIABLES = ("MERIT_FAST_", "OMP_", "KMP_", "GOMP_", "MKL_NUM", "OPENBLAS_NUM")


def diagnose() -> dict[str, Any]:
    """JSON-ready facts. Imports torch (to see a GPU) but no transformers."""
    import platform

    import torch

    from merit_fast.manifests.io import tool_versions

    native = dispatch.native_module()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "versions": {"python": platform.python_version(), **tool_versions()},
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        },
        "native": {
            "built": native is not None,
            "simd_level": native.simd_level() if native else None,
        },
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "environment": {
            key: value for key, value in sorted(os.environ.items()) if key.startswith(_VARIABLES)
        },
        "ops": dispatch.backend_table("cpu"),
    }


def print_diagnosis(diagnosis: dict[str, Any]) -> None:
    """Prints a diagnosis for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(
        "  ".join(f"{name} {version}" for name, version in diagnosis["versions"].items()),
        highlight=False,
    )
    machine = diagnosis["machine"]
    native = diagnosis["native"]
    console.print(
        f"{machine['processor']}, {machine['cores']} cores, "
        f"torch uses {machine['torch_threads']} threads"
    )
    state = f"built, ISA level {native['simd_level']}" if native["built"] else f"not built; {FIX}"
    console.print(f"native kernels: {state}; device: {diagnosis['device']}")
    for key, value in diagnosis["environment"].items():
        console.print(f"{key}={value}")
    table = Table("op", "backend on cpu", "why not the others")
    for row in diagnosis["ops"]:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in row["unavailable"].items())
        table.add_row(row["op"], row["backend"], reasons)
    console.print(table)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            )
    except (OSError, StopIteration):
        import platform

        return platform.processor() or platform.machine()
