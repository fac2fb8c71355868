"""Trials: a module's own code and ours on the same random inputs, values and gradients compared."""

import contextlib
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from merit_fast.patch.classes import Forward, Maker
from merit_fast.patch.reads import is_config, is_constant, names_used

VIEWS = frozenset(
    {
        "view", "_unsafe_view", "_reshape_alias", "reshape", "t", "transpose", "permute",
        "unsqueeze", "squeeze", "slice", "split", "split_with_sizes", "chunk", "unbind", "select",
        "expand", "as_strided", "alias", "detach", "clone", "contiguous", "_to_copy",
    }
)  # fmt: skip


RUNS = 2  # of each twin in ``foreign_part``


@dataclass(frozen=True)
class Match:
    """The op that computes what a module computes, and how its forward is made."""

    op: str
    maker: Maker
    options: tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """One condition under which a module's own code and ours are compared."""

    dtype: torch.dtype
    training: bool
    scale: float
    leading: tuple[int, ...]


CASES = tuple(
    Case(dtype, training, scale, leading)
    for dtype in (torch.float32, torch.bfloat16)
    for training, scale, leading in (
        (True, 1.0, (3, 7)),
        (False, 1.0, (2, 1, 5)),
        (True, 30.0, (9,)),
        (False, 1e-3, (1, 2, 2, 3)),
    )
)


@contextlib.contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Gives a trial gradients, full precision and random states of its own."""
    states = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with (
            torch.random.fork_rng(devices),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def seed_generator(device: torch.device) -> None:
    """Seeds one device's generator; ``torch.manual_seed`` also queues seeds for all others."""
    torch.default_generator.manual_seed(0)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(0)


def random_tensor(
    *shape: int, seed: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    values = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
    return values.to(device, dtype)


def twin_of(module: nn.Module, training: bool) -> nn.Module:
    """Copies a module without its weights: what is set on the twin leaves the original as it is."""
    twin: nn.Module = object.__new__(type(module))  # FSDP's classes construct something else
    members = dict(vars(module))
    for name, value in members.items():
        if isinstance(value, dict | list | set):
            members[name] = value.copy()
    members["_buffers"] = {
        name: None if buffer is None else buffer.clone() for name, buffer in module._buffers.items()
    }
    members["_modules"] = {
        name: None if child is None else twin_of(child, training)
        for name, child in module._modules.items()
    }
    members["training"] = training
    vars(twin).update(members)
    return twin


def agreement(
    plain: Forward,
    ours: Forward,
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor] = (),
) -> int:
    """Number of elements of the results with the same bits; 0 unless all agree within rounding.

    Gradients of inputs and parameters are compared too.
    """
    try:
        expected, expected_gradients = _results(plain, inputs, parameters)
    except Exception:  # whatever foreign code raises on the trial: it is not what we compute
        return 0
    actual, gradients = _results(ours, inputs, parameters)
    if len(actual) != len(expected):
        return 0
    pairs = [*zip(expected, actual), *zip(expected_gradients, gradients)]  # noqa: B905
    if not all(_agree(theirs, mine) for theirs, mine in pairs):
        return 0
    return sum(int((t == m).sum()) for t, m in zip(expected, actual, strict=True))


def _results(
    function: Forward, inputs: Sequence[Tensor], parameters: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    seed_generator(leaves[0].device)
    results = function(*leaves)
    outputs = [results] if isinstance(results, Tensor) else list(results)
    total = torch.zeros((), device=leaves[0].device)
    for seed, output in enumerate(outputs):
        direction = random_tensor(*output.shape, seed=100 + seed, device=output.device)
        total = total + (output.float() * direction).sum()
    wanted = [*leaves, *parameters]
    gradients = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
    return [output.detach() for output in outputs], list(gradients)


def _agree(theirs: Tensor, ours: Tensor) -> bool:
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    if not theirs.numel():
        return True
    tolerance, floor = (2e-5, 0.1) if theirs.dtype == torch.float32 else (2**-5, 0.5)
    theirs = theirs.float()
    bound = tolerance * (theirs.abs() + floor * theirs.abs().max())
    return bool(((ours.float() - theirs).abs() <= bound).all())


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names of the operations that run, and of those that draw random numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()
        self.random: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket._qualified_op_name.removeprefix("aten::")
        self.names.add(name)
        if torch.Tag.nondeterministic_seeded in function.tags:
            self.random.add(name)
        return function(*args, **(kwargs or {}))


class _Dropouts(TorchFunctionMode):
    """Finds dropout that does nothing now, such as of probability 0 or in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.found = self.found or "dropout" in getattr(function, "__name__", "")
        return function(*args, **(kwargs or {}))


def foreign_operation(
    function: Callable[..., Any], inputs: Sequence[Tensor], known: frozenset[str]
) -> str | None:
    """An operation of ``function`` that is not in ``known``; None if there is none."""
    operations = Operations()
    dropouts = _Dropouts()
    try:
        with dropouts, operations:
            function(*inputs)
    except Exception as error:  # whatever foreign code raises on the trial
        return type(error).__name__
    if dropouts.found:
        return "dropout"
    foreign = sorted(operations.random) or sorted(operations.names - known)
    return foreign[0] if foreign else None


def foreign_part(
    module: nn.Module,
    twins: Sequence[nn.Module],
    x: Tensor,
    known: frozenset[str],
    parts: Sequence[str] = (),
) -> str | None:
    """Find what a module's own forward does, or reads, that none of our forms has; None if nothing.

    ``twins`` stand for the module in evaluation and in training; ``parts`` are what ours reads too.
    """
    for twin in twins:
        plain = functools.partial(type(module).forward, twin)
        name = foreign_operation(plain, [x], known)
        if name is not None:
            return name
        if _changes_itself(twin, functools.partial(plain, x)):
            return "changes itself when it runs"
    for name in sorted(names_used(type(module), "forward") - {"training", *parts}):
        value = getattr(module, name, None)
        if isinstance(value, nn.Module | nn.Parameter) or is_config(value):
            continue
        is_method = callable(value) and name not in vars(module)
        if not is_method and not is_constant(value):  # two modules differ, or a later call
            return f"reads {name}, which is no plain number or word"
    return None


def _changes_itself(module: nn.Module, function: Callable[[], Any]) -> bool:
    """Whether a call of ``function`` changes attributes or buffers of ``module``."""
    members = dict(vars(module))
    containers = {
        name: value.copy()
        for name, value in members.items()
        if isinstance(value, dict | list | set)
    }
    buffers = [buffer.clone() for buffer in module.buffers()]
    function()
    after = vars(module)
    same_members = members.keys() == after.keys() and all(
        members[name] is after[name] for name in members
    )
    same_contents = all(
        len(value) == len(after[name])
        and all(a is b for a, b in zip(_flat(value), _flat(after[name]), strict=True))
        for name, value in containers.items()
        if name in after
    )
    same_buffers = all(torch.equal(a, b) for a, b in zip(buffers, module.buffers(), strict=True))
    return not (same_members and same_contents and same_buffers)


def _flat(container: Any) -> list[Any]:
    if isinstance(container, set):
        return sorted(container, key=id)
    return list(container.values()) if isinstance(container, dict) else container
