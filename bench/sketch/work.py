"""Models, batches and steps that the sketch's benchmarks share.

Peers' environments read this file too: it imports torch at the top, transformers and merit_fast
only inside functions.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PROJ_DIM = 65536
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SMALL = dict(
    hidden_size=512,
    num_hidden_layers=8,
    intermediate_size=1408,
    num_attention_heads=8,
    vocab_size=8192,
)
QUICK = dict(
    hidden_size=72,
    num_hidden_layers=2,
    intermediate_size=100,
    num_attention_heads=4,
    vocab_size=400,
)


@dataclass
class Work:
    """A model and its input: ``losses`` returns one mean loss for each of ``batch`` examples."""

    model: nn.Module
    losses: Callable[[], Tensor]
    batch: int
    ids: Tensor | None = None
    optimizer: torch.optim.Optimizer | None = None


Step = Callable[[], Tensor | None]


def small_model(dtype: str, quick: bool = False, **changes: Any) -> nn.Module:
    """Qwen2's shape with 30.95 M parameters (``quick``: 0.2 M), untied, random."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {**(QUICK if quick else SMALL), **changes}
    config = Qwen2Config(**sizes, num_key_value_heads=2, tie_word_embeddings=False, use_cache=False)
    model: nn.Module = Qwen2ForCausalLM(config)
    return model.to(DTYPES[dtype]).train()


def moe_model(dtype: str, quick: bool = False) -> nn.Module:
    """Qwen3-MoE's shape with 45.6 M parameters: 2 of 8 experts a token, untied, random."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = QUICK if quick else {**SMALL, "num_hidden_layers": 4}
    head = {"head_dim": sizes["hidden_size"] // sizes["num_attention_heads"]}
    width = 48 if quick else 704  # an expert's: half of the dense layer's, two of them run
    config = Qwen3MoeConfig(
        **sizes,
        **head,
        moe_intermediate_size=width,
        num_experts=8,
        num_experts_per_tok=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model: nn.Module = Qwen3MoeForCausalLM(config)
    return model.to(DTYPES[dtype]).train()


def token_work(model: nn.Module, batch: int, tokens: int) -> Work:
    generator = torch.Generator().manual_seed(1)
    vocabulary: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
    ids = torch.randint(0, vocabulary, (batch, tokens), generator=generator)
    return Work(model, lambda: mean_losses(model(input_ids=ids).logits, ids), batch, ids)


def mean_losses(logits: Tensor, ids: Tensor) -> Tensor:
    losses = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    return losses.view(len(ids), -1).mean(1)


@contextlib.contextmanager
def plain(work: Work) -> Iterator[Step]:
    """Yields a forward and backward pass with every weight's gradient, as a training step has."""
    yield functools.partial(_backward, work)


@contextlib.contextmanager
def frozen(work: Work) -> Iterator[Step]:
    """Yields the floor of a per-example sketch: gradients of activations only."""
    flags = [(parameter, parameter.requires_grad) for parameter in work.model.parameters()]
    embedding: nn.Module = work.model.get_input_embeddings()  # type: ignore[operator]
    handles = [
        embedding.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    ]
    for module in work.model.modules():
        # With a frozen weight and strided input torch copies the weight once per example.
        if isinstance(module, nn.Linear):
            handles.append(
                module.register_forward_pre_hook(
                    lambda module, args: (args[0].contiguous(), *args[1:])
                )
            )
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield functools.partial(_backward, work)
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def sketched(work: Work) -> Iterator[Step]:
    """Yields every example's sketch of all parameters: [B, D].

    Passes of this kind have run already, as in all but the first of a run.
    """
    with _sketcher(work, "never") as step:
        step()
        yield step


@contextlib.contextmanager
def sketched_first(work: Work) -> Iterator[Step]:
    """Yields a sketched step whose first pass compares itself with autograd."""
    with _sketcher(work, "first") as step:
        yield step


@contextlib.contextmanager
def _sketcher(work: Work, check: Literal["first", "never"]) -> Iterator[Step]:
    from merit_fast import sketch_gradients

    with sketch_gradients(work.model, PROJ_DIM, check=check) as sketcher:

        def step() -> Tensor:
            _backward(work)
            sketches: Tensor = sketcher.update(["all"] * work.batch)
            return sketches

        yield step


@contextlib.contextmanager
def training(work: Work) -> Iterator[Step]:
    """Yields a training step: plain, then AdamW with its moments in place."""
    optimizer = _optimizer(work)

    def step() -> None:
        _backward(work)
        optimizer.step()

    yield step


@contextlib.contextmanager
def training_sketched(work: Work) -> Iterator[Step]:
    """Yields a training step inside ``sketch_sums``: [1, D]."""
    from merit_fast import sketch_sums

    optimizer = _optimizer(work)
    with sketch_sums(work.model, PROJ_DIM) as sketcher:

        def step() -> Tensor:
            _backward(work)
            sketch: Tensor = sketcher.update(["all"] * work.batch)
            optimizer.step()
            return sketch

        yield step


def _backward(work: Work) -> None:
    work.losses().sum().backward()  # type: ignore[no-untyped-call]


def _optimizer(work: Work) -> torch.optim.Optimizer:
    """Makes one optimizer for all rounds; at so small a rate weights and losses stay."""
    if work.optimizer is None:
        work.optimizer = torch.optim.AdamW(work.model.parameters(), lr=1e-9, weight_decay=0.0)
        _backward(work)
        work.optimizer.step()
        work.model.zero_grad()
    return work.optimizer


@contextlib.contextmanager
def onednn(work: Work) -> Iterator[None]:
    """Runs linear layers by oneDNN, forward and backward; torch's fp32 product is slow on AMD.

    A layer keeps its own forward: a sketch knows it by that.
    """
    original = F.linear
    F.linear = _onednn_layer
    try:
        yield
    finally:
        F.linear = original


def _onednn_layer(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    result: Tensor = _OneDnnProduct.apply(input, weight)  # type: ignore[no-untyped-call]
    return result if bias is None else result + bias


class _OneDnnProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = onednn_linear(dy, weight.T) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            dw = onednn_linear(dy.flatten(0, -2).T, x.flatten(0, -2).T)
        return dx, dw


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Computes x @ weight.T."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return result


def timed(step: Step) -> dict[str, float]:
    """Measures wall seconds, and CPU seconds of all threads."""
    wall = time.perf_counter()
    cpu = time.process_time()
    step()
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def rotated(items: Sequence[Any], number: int) -> list[Any]:
    start = number % len(items)
    return [*items[start:], *items[:start]]


def exact_gradients(work: Work, example: int) -> dict[str, Tensor]:
    """Gradient of every parameter for one example, by an ordinary backward pass."""
    work.model.zero_grad()
    work.losses()[example].backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in work.model.named_parameters() if p.grad is not None}
    work.model.zero_grad()
    return gradients


def relative_error(actual: Tensor, truth: Tensor) -> float:
    return float((actual.double() - truth.double()).norm() / truth.double().norm())
