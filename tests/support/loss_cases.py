"""Batches before a head, for the tests of linear + cross-entropy: what goes in, and all that comes out."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from merit_fast.kernels.cross_entropy import linear_cross_entropy

NAMES = ("loss", "example_loss", "dataset_loss", "dataset_tokens", "hidden", "weight", "bias")


@dataclass(frozen=True)
class Batch:
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def with_options(self, **options: Any) -> "Batch":
        return replace(self, options={**self.options, **options})


def batch(
    tokens=37, width=45, vocabulary=1003, dtype=torch.float32, bias=False, scale=1.0, **options
) -> Batch:
    labels = torch.randint(0, vocabulary, (tokens,))
    labels[torch.rand(tokens) < 0.25] = -100
    hidden, weight = (
        torch.randn(tokens, width).to(dtype),
        (scale * torch.randn(vocabulary, width) / 5).to(dtype),
    )
    return Batch(
        hidden, weight, labels, torch.randn(vocabulary).to(dtype) if bias else None, options
    )


def packed(**options) -> Batch:
    """Four examples, one of them empty, of three datasets, one of them without an example."""
    datasets = dict(
        dataset_ids=torch.tensor([2, 0, 0, 2]),
        num_datasets=3,
        dataset_weights=torch.tensor([0.5, 3, 2]),
    )
    return batch(cu_seqlens=torch.tensor([0, 5, 5, 20, 37]), **datasets, **options)


def everything(
    of: Batch, backend: str | None, dtype: torch.dtype | None = None, frozen: tuple[str, ...] = ()
):
    """By name: the results, and the gradients of a function of all three losses."""
    tensors = {name: getattr(of, name) for name in NAMES[4:] if getattr(of, name) is not None}
    leaves = {
        name: t.detach().to(dtype or t.dtype).requires_grad_(name not in frozen)
        for name, t in tensors.items()
    }
    result = linear_cross_entropy(labels=of.labels, backend=backend, **leaves, **of.options)
    example = torch.linspace(-0.1, 0.3, len(result.example_loss))
    dataset = torch.linspace(0.05, 0.1, len(result.dataset_loss))
    total = (
        result.loss + (result.example_loss * example).sum() + (result.dataset_loss * dataset).sum()
    )
    total.backward()
    return {
        **result._asdict(),
        **{name: leaf.grad for name, leaf in leaves.items() if name not in frozen},
    }


def assert_never_worse(of: Batch, backend: str, floor: float) -> None:
    """Against float64, no result or gradient is further off than eager's, but for ``floor`` of its norm."""
    ours, eager, truth = (
        everything(of, backend),
        everything(of, "eager"),
        everything(of, "eager", torch.float64),
    )
    for name, exact in truth.items():
        exact, norm = exact.detach().double(), exact.detach().double().norm() + 1e-30
        errors = [
            float((result[name].detach().double() - exact).norm() / norm)
            for result in (ours, eager)
        ]
        assert errors[0] <= errors[1] + floor, (
            f"{name}: relative error {errors[0]:.1e}, eager has {errors[1]:.1e}"
        )
        assert ours[name].dtype == eager[name].dtype and ours[name].shape == eager[name].shape
