"""Operations per token that K-FAC adds, counted from the shapes of a model's layers.

    python -m bench.select.operations [--model PATH] [--max-side 2048]

A plain step takes 2 O I operations for a linear layer's forward pass, as many for the gradient of
its input and for that of its weight; a plain sketch takes the same. Collecting factors leaves out
the last, and adds 2 n^2 for every side n that is kept whole, as does sketching with factors.
Attention, norms and losses are left out on both sides.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from merit_fast.demo import default_cache, prepare_model


def side_operations(sizes: Iterable[int], max_side: int) -> int:
    return sum(2 * size**2 for size in sizes if size <= max_side)


def count(model: nn.Module, max_side: int) -> tuple[int, int]:
    """Operations per token of a plain step, and those that either pass of K-FAC adds."""
    plain = 0
    added = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            plain += 6 * module.weight.numel()
            added += side_operations(module.weight.shape, max_side)
        elif isinstance(module, nn.Embedding):
            added += side_operations([module.embedding_dim], max_side)
    return plain, added


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--max-side", type=int, default=2048)
    arguments = parser.parse_args()
    from transformers import AutoConfig, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    path = arguments.model or prepare_model(default_cache())
    with torch.device("meta"):
        model = auto.from_config(AutoConfig.from_pretrained(path))
    plain, added = count(model, arguments.max_side)
    share = added / plain
    print(
        f"plain step or sketch: {plain / 1e6:.0f} M per token; collecting factors: "
        f"{2 / 3 + share:.2f} of it; sketching with them: {1 + share:.2f}"
    )


if __name__ == "__main__":
    main()
