"""Triton's interpreter for CPU tests, made right for bfloat16 (triton 3.7.1).

NumPy has no bfloat16, so the interpreter holds its bits as uint16. Without this repair it silently
casts float32 by cutting bits off, adds the bits of two numbers and multiplies matrices to garbage.
Interpreted and compiled functions cannot live in one process: ``run_interpreted`` starts another,
which loads this module as a pytest plugin, so that it is repaired before a kernel is defined.

These still raise: exp and atomic_add of bf16, None as a pointer, inline assembly.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from support.paths import TESTS


def run_interpreted(report: Path) -> str:
    """Runs the files interpreted_*.py in a process of its own; returns the text that it prints.

    Writes pytest's XML report, whatever the outcome.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = f"{TESTS}:{os.environ.get('PYTHONPATH', '')}"
    files = sorted((TESTS / "gpu" / "interpreted").glob("interpreted_*.py"))
    plugins = ["-p", "no:xdist", "-p", "support.gpu.triton_interp"]
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", *plugins]
    result = subprocess.run(
        [*command, f"--junitxml={report}", *files],
        env=environment,
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
    )
    return result.stdout + result.stderr


def pytest_configure() -> None:
    repair()


def repair() -> None:
    """Makes casts round to nearest even and operators on bf16 compute in float32."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    convert, binary, dot, implicit = (
        interpreter._convert_float,
        builder.binary_op,
        builder.create_dot,
        interpreter._implicit_cvt,
    )
    nearest = (None, interpreter._ir.ROUNDING_MODE.RTNE)

    def is_bf16(value: Any) -> bool:
        return bool(value.dtype.scalar == tl.bfloat16)

    def convert_float(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.bfloat16, tl.float32):
            return widen(values)
        if (source, target) == (tl.float32, tl.bfloat16) and rounding in nearest:
            return narrow(np.ascontiguousarray(values).view(np.float32))
        return convert(values, source, target, rounding)

    def binary_op(self: Any, a: Any, b: Any, op: Callable[..., Any]) -> Any:
        if is_bf16(a):
            return handle(narrow(op(widen(a.data), widen(b.data))), tl.bfloat16)
        return binary(self, a, b, op)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(
            self, *(handle(widen(x.data), tl.float32) if is_bf16(x) else x for x in (a, b)), *rest
        )

    def implicit_cvt(value: Any) -> Any:
        if isinstance(value, float):
            return tl.tensor(handle(np.array([value], np.float32), tl.float32), tl.float32)
        return implicit(value)

    interpreter._convert_float = convert_float
    interpreter._implicit_cvt = implicit_cvt
    builder.binary_op, builder.create_dot = binary_op, create_dot


def widen(bits: ArrayLike) -> NDArray[np.float32]:
    """bf16 bits as float32."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(values: ArrayLike) -> NDArray[np.uint16]:
    """float32 to bf16 bits, to nearest even; one NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))
