"""The whole tensors that the ranks of ``ranks.py`` shard and write."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

SEEDS = {"1": 0, "2": 1}
# One letter per dimension of a mesh of 2 by 2; see ``ranks.distributed``.
PLACEMENTS = {
    "grid": "01",
    "columns": "r1",
    "strided": "00",
    "transposed": "-",
    "rows.bf16": "0r",
    "rows.f16": "0r",
    "rows.f64": "r0",
    "counts": "0r",
    "mask": "01",
    "zero": "-",
    "empty": "-",
    "tiny": "00",
    "cube": "10",
}


def whole_tensors(seed: int) -> dict[str, Tensor]:
    """Ragged shapes, every kind of dtype. Integers and masks are the same for all seeds."""
    made = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=made)

    return {
        "grid": random(7, 5),
        "columns": random(4, 9),
        "strided": random(11, 3),
        "transposed": random(5, 6).T,
        "rows.bf16": random(13, 6).bfloat16(),
        "rows.f16": random(5, 4).half(),
        "rows.f64": random(9, 2).double(),
        "counts": torch.arange(10).reshape(5, 2),
        "mask": torch.arange(12).reshape(3, 4) % 3 == 0,
        "zero": random(),
        "empty": torch.zeros(0, 4),
        "tiny": random(1, 3),
        "cube": random(3, 5, 4),
    }


def tiny_llama(seed: int) -> "LlamaForCausalLM":
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).bfloat16()
