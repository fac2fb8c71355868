"""A tiny model, its training and exact sketches of ``.grad``, for tests of summed sketches."""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from merit_fast.kernels.sketch import CountSketch, flat_sketch, matrix_shape
from merit_fast.sketch.summed import SummedSketcher

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

SKETCH = CountSketch(4096, seed=7)


def llama(tied: bool = True) -> "LlamaForCausalLM":
    import transformers as t

    config = t.LlamaConfig(
        vocab_size=97,
        hidden_size=36,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(3)
    return t.LlamaForCausalLM(config)


def batch(seed: int, examples: int = 3, length: int = 11) -> dict[str, Tensor]:
    ids = torch.randint(0, 97, (examples, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def summed(model: nn.Module, **options: Any) -> SummedSketcher:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return SummedSketcher(model, SKETCH, parameters, fingerprint="f", **options)


def exact(model: nn.Module, scales: Mapping[str, Tensor] | None = None) -> Tensor:
    """Sketch of the gradients in ``.grad``."""
    out = torch.zeros(1, SKETCH.proj_dim)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad.to_dense().reshape(matrix_shape(parameter.shape))
            gradient = gradient if scales is None else gradient * scales[name]
            flat_sketch(gradient.unsqueeze(0), name, SKETCH, out=out, backend="eager")
    return out


def train(
    model: nn.Module,
    steps: int,
    sketcher: SummedSketcher | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    first: int = 0,
) -> list[float]:
    """Losses of AdamW steps of two passes each: accumulation, clipping, decay."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(first, first + steps):
        for half in range(2):
            loss = model(**batch(10 * step + half)).loss
            loss.backward()
            if sketcher:
                sketcher.update(
                    f"d{half}",
                    count=3,
                    loss_sum=3 * loss.item(),
                    num_target_tokens=30,
                    loss_divisor=3,
                )
            losses.append(loss.item())
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def copy_with_gradient(model: nn.Module, inputs: Mapping[str, Tensor]) -> nn.Module:
    other = copy.deepcopy(model)
    other.zero_grad()
    other(**inputs).loss.backward()
    return other
