"""Models and gradients that every process makes alike, and their wrappers."""

from collections.abc import Iterable
from typing import Any

import torch
from support.kernels.optimizer_runs import bits
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from merit_fast.kernels.optimizer import FusedAdamW

WIDTH = 256  # a row is a block of 8-bit moments


class Rows(nn.Module):
    """Weights of 5 rows (3 and 2 on two ranks), 1 row (one rank has none) and 3 elements."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, 5, bias=False, dtype=dtype)
        self.second = nn.Linear(5, 3, dtype=dtype)
        self.third = nn.Linear(3, 1, dtype=dtype)

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.third(self.second(self.first(rows).tanh()))
        return out


def loss_of(model: nn.Module, step: int, part: int, parts: int) -> Any:
    """Mean of one part of a step's 8 rows, divided by the number of parts."""
    numbers = torch.Generator().manual_seed(step)
    rows = torch.randn(8, WIDTH, generator=numbers).chunk(parts)[part]
    return model(rows).square().mean() * 5  # Any: backward() of a Tensor has no types


def sharded(model: Any, mesh: DeviceMesh) -> Any:
    for layer in (model.first, model.second, model.third):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def set_gradients(parameters: Iterable[Any], step: int, scale: float = 1.0) -> None:
    """Sets the same whole gradients for plain parameters and for DTensors."""
    numbers = torch.Generator().manual_seed(step)
    for parameter in parameters:
        whole = (torch.randn(parameter.shape, generator=numbers) * scale).to(parameter.dtype)
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            whole = distribute_tensor(whole, mesh, parameter.placements, src_data_rank=None)
        parameter.grad = whole


def whole(tensor: Any) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor.detach()  # type: ignore[no-any-return]
    sent: Any = tensor.detach().to(torch.int32) if tensor.dtype == torch.int16 else tensor.detach()
    gathered: Tensor = sent.full_tensor()  # gloo has no int16
    return gathered.to(tensor.dtype)


def assert_same_bits(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(bits(whole(a)), bits(whole(b))), (a.shape, whole(a), whole(b))


def assert_near(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(whole(a), whole(b), rtol=1e-5, atol=1e-6), (whole(a), whole(b))


def assert_same_states(ours: FusedAdamW, theirs: FusedAdamW) -> None:
    """Every state of the second, whole, against that of the first."""
    pairs = zip(ours.members(), theirs.members(), strict=True)
    for a, b in ((ours.state[x.parameter], theirs.state[y.parameter]) for x, y in pairs):
        assert a.keys() == b.keys()
        for key in a:
            if torch.is_tensor(a[key]):
                assert torch.equal(bits(whole(a[key])), bits(whole(b[key]).view_as(a[key]))), key
            else:
                assert a[key] == b[key], key
