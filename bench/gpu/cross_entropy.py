"""The head for ``bench.gpu``: losses, statistics of tokens, gradients, forward and backward."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpu.cases import Case, Op, random, with_compiled
from bench.support.dtypes import DTYPES
from merit_fast.kernels.cross_entropy import linear_cross_entropy, linear_token_statistics


def case(
    name: str,
    tokens: int,
    width: int,
    vocabulary: int,
    dtype: str,
    device: torch.device,
    timed: bool = False,
    **options: Any,
) -> Case:
    """One size of the head, with loss options."""
    hidden, weight = (
        random(n, width, dtype=dtype, device=device) / width**0.5 for n in (tokens, vocabulary)
    )
    labels = torch.randint(0, vocabulary, (tokens,), device=device)
    labels[::4] = -100

    def step(backend: str, to: torch.dtype) -> list[Tensor]:
        leaves = [tensor.detach().to(to).requires_grad_() for tensor in (hidden, weight)]
        result = linear_cross_entropy(leaves[0], leaves[1], labels, backend=backend, **options)
        result.loss.backward()  # type: ignore[no-untyped-call]
        return [
            result.loss.detach().view(1),
            result.example_loss.detach(),
            *(leaf.grad for leaf in leaves),
        ]

    def plain(leaf: Tensor, head: Tensor) -> Tensor:
        return F.cross_entropy((leaf @ head.T).float(), labels)

    def peers() -> dict[str, Callable[[], Any]]:
        leaves = [tensor.detach().requires_grad_() for tensor in (hidden, weight)]

        def trained(loss: Callable[..., Tensor]) -> Callable[[], Any]:
            return lambda: torch.autograd.grad(loss(*leaves), leaves)

        return {name: trained(loss) for name, loss in with_compiled("eager", plain).items()}

    return Case(
        name,
        dtype,
        run=lambda backend: step(backend, DTYPES[dtype]),
        truth=lambda: [value.double() for value in step("eager", torch.float64)],
        peers=peers() if timed else {},
        moved_bytes=2 * (hidden.nbytes + weight.nbytes),
        operations=6 * int((labels >= 0).sum()) * width * vocabulary,
    )


def small(device: torch.device) -> Iterator[Case]:
    terms: dict[str, Any] = {"softcap": 3.0, "label_smoothing": 0.1, "z_loss": 1e-3}
    for dtype in DTYPES:
        yield case("N=37 [1003, 45]", 37, 45, 1003, dtype, device)
        yield case("N=37 [1003, 45], all terms", 37, 45, 1003, dtype, device, **terms)
        yield case("one token", 2, 8, 5, dtype, device)


def large(device: torch.device) -> Iterator[Case]:
    for dtype in DTYPES:
        yield case("N=4096 [151936, 896]", 4096, 896, 151936, dtype, device, timed=True)


def statistics_case(
    name: str, tokens: int, width: int, vocabulary: int, dtype: str, device: torch.device
) -> Case:
    """Log-probabilities and entropies of one size of the head, with their gradients."""
    hidden, weight = (
        random(n, width, dtype=dtype, device=device) / width**0.5 for n in (tokens, vocabulary)
    )
    labels = torch.randint(0, vocabulary, (tokens,), device=device)
    labels[::4] = -100

    def step(backend: str, to: torch.dtype) -> list[Tensor]:
        leaves = [tensor.detach().to(to).requires_grad_() for tensor in (hidden, weight)]
        found = linear_token_statistics(
            leaves[0], leaves[1], labels, entropy=True, temperature=0.7, backend=backend
        )
        assert found.entropy is not None
        (found.log_probs + found.entropy).sum().backward()  # type: ignore[no-untyped-call]
        gradients = [leaf.grad for leaf in leaves]
        return [found.log_probs.detach(), found.entropy.detach(), *gradients]

    return Case(
        name,
        dtype,
        run=lambda backend: step(backend, DTYPES[dtype]),
        truth=lambda: [value.double() for value in step("eager", torch.float64)],
        moved_bytes=2 * (hidden.nbytes + weight.nbytes),
        operations=8 * int((labels >= 0).sum()) * width * vocabulary,
    )


def small_statistics(device: torch.device) -> Iterator[Case]:
    for dtype in DTYPES:
        yield statistics_case("N=37 [1003, 45]", 37, 45, 1003, dtype, device)


def large_statistics(device: torch.device) -> Iterator[Case]:
    for dtype in DTYPES:
        yield statistics_case("N=4096 [151936, 896]", 4096, 896, 151936, dtype, device)


STATISTICS = Op(
    "linear_token_statistics", "linear_token_statistics", small_statistics, large_statistics
)
CROSS_ENTROPY = Op("linear_cross_entropy", "linear_cross_entropy", small, large)
