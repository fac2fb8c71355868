"""Fingerprints of GPU launches: equal fingerprints mean equal code and equal figures.

A fingerprint covers the kernel, every function it calls, every constant it names, the arguments'
types and alignments, the options, the target, the version of Triton, and the module that reads the
code. Comments, docstrings and the place of a function in its file are left out.
"""

import ast
import functools
import hashlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import triton
from support.gpu import read_code
from support.gpu.absent_driver import compiling_for
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.language.core import constexpr
from triton.runtime.jit import DependenciesFinder, JITCallable


class _References(DependenciesFinder):  # type: ignore[misc]  # triton has no types
    """Collects the functions and constants that a kernel names, by Triton's own rules."""

    def __init__(self, function: JITCallable) -> None:
        nonlocals = inspect.getclosurevars(function.fn).nonlocals
        name = function.__name__
        super().__init__(name, function.__globals__, nonlocals, function.src)
        self.functions: list[JITCallable] = []
        self.constants: list[str] = []

    def _update_hash(self, func: JITCallable) -> None:
        self.functions.append(func)

    def record_reference(self, val: Any, var_dict: Any = None, name: str | None = None) -> None:
        if isinstance(val, constexpr):
            self.constants.append(repr(val))
        super().record_reference(val, var_dict, name)


@functools.cache
def source_of(function: JITCallable) -> str:
    """A kernel's source and that of all it calls, without comments and docstrings."""
    texts: dict[str, str] = {}
    waiting = [function]
    while waiting:
        callee = waiting.pop()
        name = f"{callee.__module__}.{callee.__qualname__}"
        if name in texts:
            continue
        tree = callee.parse()
        references = _References(callee)
        references.visit(tree)
        values = [repr(value) for value, _ in references.used_global_vals.values()]
        noinline = getattr(callee, "noinline", None)
        parts = [plain_source(tree), *references.constants, *values, repr(noinline)]
        texts[name] = "\n".join(parts)
        waiting += references.functions
    return "\n\n".join(texts[name] for name in sorted(texts))


def plain_source(tree: ast.Module) -> str:
    """Source without comments and docstrings, in one way of writing."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            continue
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


@functools.cache
def reader() -> str:
    """Source of the module that turns compiled code into figures."""
    return plain_source(ast.parse(inspect.getsource(read_code)))


def fingerprint(
    kernel: Any, arguments: Sequence[Any], options: Mapping[str, Any], architecture: int | str
) -> str:
    """Sixteen hexadecimal digits; nothing is compiled."""
    with compiling_for(kernel, architecture):
        _, _, _, backend, binder = kernel.device_caches[0]
        bound, specialization, rest = binder(*arguments, **options)
        _, signature, constants, attributes = kernel._pack_args(
            backend, dict(options), bound, specialization, rest
        )
    values = {
        path: source_of(value) if isinstance(value, JITCallable) else repr(value)
        for path, value in constants.items()
    }
    parts = [
        triton.__version__,
        architecture,
        kernel.__name__,
        source_of(kernel),
        reader(),
        list(signature.values()),
        sorted(values.items()),
        sorted(attributes.items()),
        sorted(options.items()),
        sorted(get_cache_invalidating_env_vars().items()),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
