"""Short runs of ``FusedAdamW`` for its tests: ragged tensors, gradients set by the step only."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from merit_fast.kernels import dispatch
from merit_fast.kernels.optimizer import FusedAdamW

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = [(3, 7), (1,), (257,), (40, 60), (0,), (1023,)]
SETTINGS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
Run = tuple[Sequence[nn.Parameter], Optimizer]
BACKENDS = ["eager"] + (["cpu"] if dispatch.native_module() is not None else [])
# Every option at least once with every other kind it meets in the kernel.
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("fp32", {}),
    ("fp32", {"moments": "bf16", "average_decay": "mean", "zero_grad": True, "betas": (0.3, 0.9)}),
    ("fp32", {"moments": "int8", "max_norm": 1.0, "average_decay": 0.9}),
    ("fp32", {"moments": "int8", "rounding": "nearest"}),
    ("bf16", {"average_decay": 0.9, "max_norm": 0.1}),
    ("bf16", {"rounding": "nearest", "moments": "bf16"}),
    ("bf16", {"moments": "bf16", "zero_grad": True}),
    ("bf16", {"moments": "int8", "average_decay": "mean"}),
    ("bf16", {"master": "fp32", "moments": "int8", "zero_grad": True}),
    ("bf16", {"master": "split", "average_decay": 0.5, "max_norm": 1.0}),
    ("bf16", {"master": "split", "moments": "bf16", "rounding": "nearest"}),
    ("bf16", {"master": "split8", "moments": "int8", "average_decay": "mean"}),
    ("bf16", {"master": "split8", "rounding": "nearest"}),
]


def make_parameters(dtype: str, gradients: Sequence[Tensor] | None = None) -> list[nn.Parameter]:
    torch.manual_seed(0)
    shapes = SHAPES if gradients is None else [tuple(g.shape) for g in gradients]
    return [nn.Parameter((torch.randn(shape) * 0.02).to(DTYPES[dtype])) for shape in shapes]


def set_gradients(
    parameters: Sequence[nn.Parameter], step: int, gradients: Sequence[Tensor] | None = None
) -> None:
    numbers = torch.Generator().manual_seed(step)
    for k, parameter in enumerate(parameters):
        random = torch.randn(parameter.shape, generator=numbers) * 10.0 ** (k - 2)
        parameter.grad = (random if gradients is None else gradients[k]).to(parameter.dtype)


def train(
    dtype: str,
    steps: int = 3,
    first: int = 0,
    parameters: Sequence[nn.Parameter] | None = None,
    optimizer: Optimizer | None = None,
    gradients: Sequence[Tensor] | None = None,
    make: Callable[..., Optimizer] = FusedAdamW,
    **options: Any,
) -> Run:
    """(parameters, optimizer) after the steps."""
    parameters = parameters or make_parameters(dtype, gradients)
    optimizer = optimizer or make(parameters, **{**SETTINGS, **options})
    for step in range(first, first + steps):
        set_gradients(parameters, step, gradients)
        optimizer.step()
    return parameters, optimizer


def bits(tensor: Tensor) -> Tensor:
    """Comparable to the bit, any NaN as good as another."""
    if not tensor.is_floating_point():
        return tensor
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().masked_fill(tensor.isnan(), 0.5).view(kinds[tensor.itemsize])


def assert_same_run(a: Run, b: Run, exact: bool = True) -> None:
    for x, y in zip(a[0], b[0], strict=True):
        states = a[1].state[x], b[1].state[y]
        assert states[0].keys() == states[1].keys()
        for key in states[0]:
            u, v = (state[key] for state in states)
            assert type(u) is type(v) and getattr(u, "dtype", None) == getattr(v, "dtype", None)
            if torch.is_tensor(u) and exact:
                assert torch.equal(bits(u), bits(v)), key
            elif torch.is_tensor(u) and u.is_floating_point():
                assert_near(u, v)
        if exact:
            assert torch.equal(bits(x), bits(y))
        else:
            assert_near(x, y)


def assert_near(u: Tensor, v: Tensor) -> None:
    """Equal up to the order of a norm's sums: an ulp or two in float32, few ulps if rounded."""
    difference = (u.detach().double() - v.detach().double()).norm()
    assert difference <= (1e-6 if u.dtype == torch.float32 else 1e-3) * v.detach().double().norm()
