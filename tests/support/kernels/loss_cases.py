"""Batches for the tests of linear + cross-entropy, and all results and gradients of one."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from support import checks
from support.checks import DRAWS, rounding_share
from torch import Tensor

from merit_fast.kernels.cross_entropy import IGNORED_LABEL, linear_cross_entropy

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
    tokens: int = 37,
    width: int = 45,
    vocabulary: int = 1003,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    scale: float = 1.0,
    **options: Any,
) -> Batch:
    labels = torch.randint(0, vocabulary, (tokens,))
    labels[torch.rand(tokens) < 0.25] = IGNORED_LABEL
    hidden = torch.randn(tokens, width).to(dtype)
    weight = (scale * torch.randn(vocabulary, width) / 5).to(dtype)
    return Batch(
        hidden, weight, labels, torch.randn(vocabulary).to(dtype) if bias else None, options
    )


def packed(**options: Any) -> Batch:
    """Four examples, one of them empty, of three datasets, one of them without an example."""
    datasets: dict[str, Any] = dict(
        dataset_ids=torch.tensor([2, 0, 0, 2]),
        num_datasets=3,
        dataset_weights=torch.tensor([0.5, 3, 2]),
    )
    return batch(cu_seqlens=torch.tensor([0, 5, 5, 20, 37]), **datasets, **options)


def everything(
    of: Batch, backend: str | None, dtype: torch.dtype | None = None, frozen: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Results, and gradients of a function of all three losses, by name."""
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
    total.backward()  # type: ignore[no-untyped-call]
    return {
        **result._asdict(),
        **{name: leaf.grad for name, leaf in leaves.items() if name not in frozen},
    }


def assert_never_worse(
    draw: Callable[..., Batch],
    backend: str,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> None:
    """No result or gradient of ``draw(dtype=dtype, **options)`` has more error than eager's.

    In bf16 eager adds a bias before it rounds the logits and we after: several draws then, and a
    share of its error.
    """
    elsewhere = dtype == torch.bfloat16 and bool(options.get("bias"))
    drawn = [
        _three_ways(draw(dtype=dtype, **options), backend) for _ in range(DRAWS if elsewhere else 1)
    ]
    for name in drawn[0]:
        ours, eager, truth = (
            torch.cat(values) for values in zip(*(draws[name] for draws in drawn), strict=True)
        )
        share = rounding_share(len(truth)) if elsewhere else 0.0
        checks.assert_never_worse(ours, eager, truth, share, name)


def _three_ways(of: Batch, backend: str) -> dict[str, list[Tensor]]:
    """Flat results of ours, of eager and of the truth in float64, by name."""
    ours = everything(of, backend)
    eager = everything(of, "eager")
    truth = everything(of, "eager", torch.float64)
    for name in truth:
        assert ours[name].dtype == eager[name].dtype and ours[name].shape == eager[name].shape, name
    return {
        name: [runs[name].detach().flatten() for runs in (ours, eager, truth)] for name in truth
    }
