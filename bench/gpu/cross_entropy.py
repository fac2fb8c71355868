"""The head for ``bench.gpu``: losses, statistics of tokens, gradients, forward and backward."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpu.cases import Case, Op, random, with_compiled
from bench.support.dtypes import DTYPES
from merit_fast.kernels.cross_entropy import linear_cross_entropy, linear_token_statistics

TEMPERATURE = 0.7


def plain_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """The loss of each token, from all logits of those that have a label."""
    kept = labels >= 0
    logits = hidden[kept] @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    token = F.cross_entropy(logits, labels[kept], reduction="none", label_smoothing=label_smoothing)
    token = token + z_loss * logits.logsumexp(-1) ** 2
    return token.new_zeros(len(labels)).masked_scatter(kept, token)


def plain_statistics(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy at TEMPERATURE of each token with a label, from all logits."""
    kept = labels >= 0
    logits = hidden[kept] @ weight.T
    wide = logits if logits.dtype == torch.float64 else logits.float()
    log_p = (wide / TEMPERATURE).log_softmax(-1)
    log_probs = log_p.gather(1, labels[kept][:, None]).squeeze(1)
    zeros = log_p.new_zeros(len(labels))
    entropy = -(log_p.exp() * log_p).sum(-1)
    return zeros.masked_scatter(kept, log_probs), zeros.masked_scatter(kept, entropy)


def trained(loss: Callable[..., Tensor], *tensors: Tensor) -> dict[str, Callable[[], Any]]:
    """Peers that take the gradients of a loss: in eager PyTorch and compiled."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]

    def gradients(of: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(of(*leaves), leaves)

    return {name: gradients(of) for name, of in with_compiled("eager", loss).items()}


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

    def truth() -> list[Tensor]:
        leaves = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
        token = plain_losses(leaves[0], leaves[1], labels, **options)
        loss = token.sum() / (labels >= 0).sum()
        return [loss.detach().view(1), token.detach(), *torch.autograd.grad(loss, leaves)]

    def plain(leaf: Tensor, head: Tensor) -> Tensor:
        return F.cross_entropy((leaf @ head.T).float(), labels)

    return Case(
        name,
        dtype,
        run=lambda backend: step(backend, DTYPES[dtype]),
        truth=truth,
        peers=trained(plain, hidden, weight) if timed else {},
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
    name: str,
    tokens: int,
    width: int,
    vocabulary: int,
    dtype: str,
    device: torch.device,
    timed: bool = False,
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
            leaves[0], leaves[1], labels, entropy=True, temperature=TEMPERATURE, backend=backend
        )
        assert found.entropy is not None
        (found.log_probs + found.entropy).sum().backward()  # type: ignore[no-untyped-call]
        gradients = [leaf.grad for leaf in leaves]
        return [found.log_probs.detach(), found.entropy.detach(), *gradients]

    def truth() -> list[Tensor]:
        leaves = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
        values = plain_statistics(leaves[0], leaves[1], labels)
        gradients = torch.autograd.grad(torch.stack(values).sum(), leaves)
        return [*(value.detach() for value in values), *gradients]

    def plain(leaf: Tensor, head: Tensor) -> Tensor:
        log_probs, entropy = plain_statistics(leaf, head, labels)
        return (log_probs + entropy).sum()

    return Case(
        name,
        dtype,
        run=lambda backend: step(backend, DTYPES[dtype]),
        truth=truth,
        peers=trained(plain, hidden, weight) if timed else {},
        moved_bytes=2 * (hidden.nbytes + weight.nbytes),
        operations=6 * int((labels >= 0).sum()) * width * vocabulary,
    )


def small_statistics(device: torch.device) -> Iterator[Case]:
    for dtype in DTYPES:
        yield statistics_case("N=37 [1003, 45]", 37, 45, 1003, dtype, device)


def large_statistics(device: torch.device) -> Iterator[Case]:
    for dtype in DTYPES:
        yield statistics_case("N=4096 [151936, 896]", 4096, 896, 151936, dtype, device, timed=True)


STATISTICS = Op(
    "linear_token_statistics", "linear_token_statistics", small_statistics, large_statistics
)
CROSS_ENTROPY = Op("linear_cross_entropy", "linear_cross_entropy", small, large)
