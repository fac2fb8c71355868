"""Modules whose gradients are easily taken for others: small instances of each kind of fault."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune


class Power(nn.Module):
    """(x * a) ** power, called with more arguments than one tensor."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x: Tensor, power: float = 2) -> Any:
        return (x.abs() + 0.1).mul(self.a) ** power


class Calls(nn.Module):
    """Calls a module with arguments of its own between two linear layers."""

    def __init__(self, inner: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.before = nn.Linear(6, 6)
        self.inner = inner
        self.after = nn.Linear(6, 3)
        self.args = args
        self.kwargs = kwargs

    def forward(self, x: Tensor) -> Any:
        return self.after(self.inner(self.before(x), *self.args, **self.kwargs))


class ScaledNorm(nn.LayerNorm):
    def forward(self, x: Tensor, factor: float = 1.0) -> Any:
        return super().forward(x) * factor


class TwoOwners(nn.Module):
    """The head of BERT's language models: its bias is its linear layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(6, 6)
        self.decoder = nn.Linear(6, 6)
        self.bias = nn.Parameter(torch.randn(6))
        self.decoder.bias = self.bias

    def forward(self, x: Tensor) -> Any:
        return self.decoder(F.gelu(self.dense(x)))


class StandardConv(nn.Conv2d):
    """Standardises its weight."""

    def forward(self, x: Tensor) -> Any:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / (weight.std() + 1e-3), self.bias)


class Pixels(nn.Module):
    """A convolution over the tokens and channels of [B, T, 6], one output channel a time."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Any:
        return self.conv(x.unsqueeze(1)).mean(1)


class ScaleOfChild(nn.Module):
    """Uses a parameter of a recognised module."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.inner.register_parameter("scale", nn.Parameter(torch.rand(6) + 0.5))
        self.before = before

    def forward(self, x: Tensor) -> Any:
        if self.before:
            return self.inner(x * self.inner.get_parameter("scale"))
        return self.inner(x) * self.inner.get_parameter("scale")


class OneScale(nn.Module):
    """A learned scale of shape [1], which a trial with one channel takes for a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.7]))

    def forward(self, x: Tensor) -> Any:
        return x * self.weight


class TimeFirst(nn.Module):
    """A layer that sees [T, B, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Any:
        return self.linear(x.transpose(0, 1)).transpose(0, 1).tanh()


class Positions(nn.Module):
    """Rows of a table looked up for [T], without batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)

    def forward(self, x: Tensor) -> Any:
        return x * self.table(torch.arange(x.shape[1]))


class Chance(nn.Module):
    """Drops values of x * a at random."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Any:
        return F.dropout(x * self.a, 0.5, self.training)


class Counting(nn.Module):
    """Multiplies by the number of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.rand(6) + 0.5)
        self.calls = 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return (x * self.a).tanh() * self.calls


class Recurrent(nn.Module):
    """A module that returns tuples, time first or batch first."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 6, batch_first=batch_first)

    def forward(self, x: Tensor) -> Any:
        if self.lstm.batch_first:
            return self.lstm(x)[0]
        return self.lstm(x.transpose(0, 1))[0].transpose(0, 1)


class Doubling(nn.Linear):
    """A linear layer whose object, not class, has another forward."""

    def __init__(self) -> None:
        super().__init__(6, 6)
        self.__dict__["forward"] = lambda x: F.linear(x, 2 * self.weight, self.bias)


def hooked(module: nn.Module, hook: Callable[..., Any]) -> nn.Module:
    module.register_forward_hook(hook)
    return module


def pruned(module: nn.Module) -> nn.Module:
    prune.random_unstructured(module, "weight", 0.5)  # type: ignore[no-untyped-call]
    return module


ODD: dict[str, Callable[[], nn.Module]] = {
    "keyword-argument": lambda: Calls(Power(), power=3),
    "argument": lambda: Calls(Power(), 3),
    "norm-with-argument": lambda: Calls(ScaledNorm(6), 2.5),
    "two-owners": lambda: Calls(TwoOwners()),
    "convolution-of-its-own": lambda: Calls(Pixels(StandardConv(1, 4, 1))),
    "weight-norm": lambda: Calls(torch.nn.utils.weight_norm(nn.Linear(6, 6))),
    "parametrized": lambda: Calls(parametrizations.weight_norm(nn.Linear(6, 6))),
    "pruned": lambda: Calls(pruned(nn.Linear(6, 6))),
    "scale-of-child-before": lambda: Calls(ScaleOfChild(True)),
    "scale-of-child-after": lambda: Calls(ScaleOfChild(False)),
    "one-scale": lambda: Calls(OneScale()),
    "time-first": lambda: Calls(TimeFirst()),
    "positions": lambda: Calls(Positions()),
    "counting": lambda: Calls(Counting()),
    "lstm": lambda: Calls(Recurrent(True)),
    "lstm-time-first": lambda: Calls(Recurrent(False)),
    "own-forward-of-the-object": lambda: Calls(Doubling()),
    "hook-on-a-linear": lambda: Calls(hooked(nn.Linear(6, 6), lambda m, args, y: 3 * y.tanh())),
    "hook-on-a-norm": lambda: Calls(hooked(nn.LayerNorm(6), lambda m, args, y: 3 * y.tanh())),
}
