"""One rule for backends: the ``backend=`` argument, then MERIT_FAST_BACKEND, then the device.

A named backend runs, or raises with the reason. Only the automatic choice may fall back to eager:
it logs that once, and ``merit-fast doctor`` shows it. No other module reads that variable or looks
for backends.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Literal

from merit_fast.errors import BackendUnavailableError

Backend = Literal["eager", "cpu", "triton", "cuda"]
BACKENDS: tuple[Backend, ...] = ("eager", "cpu", "triton", "cuda")
BEST_BY_DEVICE: Mapping[str, Backend] = {"cpu": "cpu", "cuda": "triton"}
# Which backends each op has besides eager; `doctor` prints this table.
OPS: Mapping[str, tuple[Backend, ...]] = {
    "weighted_average": ("cpu", "triton"),
    "average_arrays": ("cpu",),
    "merge_files": ("cpu",),
    "flat_sketch": ("cpu", "triton"),
    "linear_grad_sketch": ("cpu", "triton", "cuda"),
    "linear_cross_entropy": ("cpu", "triton"),
    "linear_token_statistics": ("cpu", "triton"),
    "adamw": ("cpu", "triton"),
    "rms_norm": ("cpu", "triton"),
    "add_rms_norm": ("cpu", "triton"),
    "swiglu": ("cpu", "triton"),
    "geglu": ("cpu", "triton"),
    "rope": ("cpu", "triton"),
    "row_products": ("cpu", "triton"),
}

NOT_BUILT = "was not built: install a C++ compiler, then reinstall merit_fast"


def logger() -> Any:
    """The logger of fallbacks; most processes have none to log."""
    import logging

    return logging.getLogger(__name__)


@functools.cache
def native_module() -> ModuleType | None:
    """``merit_fast._C``, or None where it was not built.

    Raises:
        ImportError: MERIT_FAST_SIMD names an ISA level that this processor lacks.
    """
    if importlib.util.find_spec("merit_fast._C") is None:
        return None
    return importlib.import_module("merit_fast._C")


def native() -> Any:
    """``merit_fast._C``.

    Raises:
        BackendUnavailableError: it was not built.
    """
    module = native_module()
    if module is None:
        raise BackendUnavailableError(f"merit_fast._C {NOT_BUILT}")
    return module


def unavailable(op: str, backend: str, device_type: str) -> str | None:
    """Why ``backend`` cannot run ``op`` on this kind of device, or None if it can."""
    if backend == "eager":
        return None
    if backend not in BACKENDS:
        return f"is unknown; backends: {', '.join(BACKENDS)}"
    if backend not in OPS[op]:
        return "has no kernel for this op"
    if backend == "triton":
        return _triton_unavailable(device_type)
    if backend == "cuda":
        return _cuda_unavailable(device_type)
    if device_type != "cpu":
        return f"runs on cpu tensors, got {device_type}"
    if native_module() is None:
        return NOT_BUILT
    return None


def _triton_unavailable(device_type: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "is not installed: pip install 'merit_fast[gpu]'"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type == "cpu" and not interpreted:
        hint = "with TRITON_INTERPRET=1 on cpu tensors, slowly, to test kernels"
        return f"runs on cuda tensors, got cpu ({hint})"
    if device_type not in ("cpu", "cuda"):
        return f"runs on cuda tensors, got {device_type}"
    if device_type == "cuda" and interpreted:
        return "runs on cpu tensors while TRITON_INTERPRET=1, got cuda"
    return None


def _cuda_unavailable(device_type: str) -> str | None:
    if device_type != "cuda":
        return f"runs on cuda tensors, got {device_type}"
    if (
        importlib.util.find_spec("cuda") is None
        or importlib.util.find_spec("cuda.bindings") is None
    ):
        return "needs cuda-bindings: pip install 'merit_fast[gpu]'"
    return None


def asked(requested: str | None) -> str | None:
    """The backend that somebody asked for, by argument or environment."""
    return requested or os.environ.get("MERIT_FAST_BACKEND")


def choose(op: str, device_type: str, requested: str | None) -> str:
    """The backend that runs ``op``.

    Raises:
        BackendUnavailableError: the requested backend (argument or environment) cannot run here.
    """
    if backend := asked(requested):
        if reason := unavailable(op, backend, device_type):
            raise BackendUnavailableError(f"{op}: backend {backend!r} {reason}")
        return backend
    best = BEST_BY_DEVICE.get(device_type, "eager")
    if reason := unavailable(op, best, device_type):
        _log_fallback(op, best, reason)
        return "eager"
    return best


def backend_table(device_type: str = "cpu") -> list[dict[str, Any]]:
    """For each op: the backend the automatic choice takes, and why not each of the others."""
    rows = []
    for op in OPS:
        reasons: dict[str, str | None] = {
            b: unavailable(op, b, device_type) for b in BACKENDS if b != "eager"
        }
        best = BEST_BY_DEVICE.get(device_type, "eager")
        chosen = "eager" if reasons.get(best, "") is not None else best
        rows.append(
            {"op": op, "backend": chosen, "unavailable": {b: r for b, r in reasons.items() if r}}
        )
    return rows


@functools.cache
def _log_fallback(op: str, backend: str, reason: str) -> None:
    logger().warning("%s: backend %r %s; using eager", op, backend, reason)
