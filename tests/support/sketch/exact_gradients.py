"""Tiny models from config, ragged examples, and sketches of their exact gradients.

The exact gradients take a backward pass per example.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from merit_fast.data import Example, collate
from merit_fast.kernels.sketch import CountSketch, flat_sketch, matrix_shape
from merit_fast.model import target_losses
from merit_fast.sketch.gradients import GradientSketcher
from merit_fast.sketch.names import named_parameters

SKETCH = CountSketch(4096, seed=7)
SIZES: dict[str, Any] = dict(
    vocab_size=97, hidden_size=36, intermediate_size=52, num_hidden_layers=2
)
MOE: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20)


def tiny(architecture: str, tied: bool = False) -> nn.Module:
    import transformers as t

    heads: dict[str, Any] = dict(
        num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=tied
    )
    configs: dict[str, Callable[[], t.PreTrainedConfig]] = {
        "llama": lambda: t.LlamaConfig(**SIZES, **heads, attention_bias=True),
        "qwen2": lambda: t.Qwen2Config(**SIZES, **heads),
        "qwen3": lambda: t.Qwen3Config(**SIZES, **heads, head_dim=12),
        "gemma": lambda: t.GemmaConfig(**SIZES, **heads, head_dim=12),
        "gemma2": lambda: t.Gemma2Config(**SIZES, **heads, head_dim=12),
        "gemma3": lambda: t.Gemma3TextConfig(**SIZES, **heads, head_dim=12),
        "phi3": lambda: t.Phi3Config(**SIZES, **heads, pad_token_id=0),
        "opt": lambda: t.OPTConfig(
            vocab_size=97, hidden_size=36, ffn_dim=52, num_hidden_layers=2, num_attention_heads=3,
            max_position_embeddings=64, word_embed_proj_dim=36, tie_word_embeddings=tied,
        ),
        "gpt2": lambda: t.GPT2Config(
            vocab_size=97, n_embd=36, n_layer=2, n_head=3, n_positions=64, tie_word_embeddings=tied
        ),
        "neox": lambda: t.GPTNeoXConfig(**SIZES, num_attention_heads=3, tie_word_embeddings=tied),
        "mixtral": lambda: t.MixtralConfig(
            **SIZES, **heads, num_local_experts=4, num_experts_per_tok=2
        ),
        "qwen2-moe": lambda: t.Qwen2MoeConfig(
            **SIZES, **heads, **MOE, shared_expert_intermediate_size=28
        ),
        "qwen3-moe": lambda: t.Qwen3MoeConfig(  # type: ignore[call-arg]  # head_dim is an extra key
            **SIZES, **heads, **MOE, head_dim=12, norm_topk_prob=True
        ),
    }  # fmt: skip
    config = configs[architecture]()
    config.pad_token_id = 0
    torch.manual_seed(0)
    auto: Any = t.AutoModelForCausalLM
    model: nn.Module = auto.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms at 1 and biases at 0 would hide a wrong formula
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "expert" in name or "gate.weight" in name:
                parameter.mul_(4)  # routing that differs from token to token, experts that count
    return model


def ragged_examples(lengths: Sequence[int] = (9, 14, 5), vocabulary: int = 97) -> list[Example]:
    """Examples with ids from 0 on.

    The padding token (0 in these models) occurs in the text too, as the end token does in chats.
    """
    generator = torch.Generator().manual_seed(4)
    examples = []
    for length in lengths:
        ids = torch.randint(0, vocabulary, (length,), generator=generator).int().numpy()
        ids[1] = 0
        labels = ids.copy()
        labels[: length // 2] = -100
        examples.append(Example(ids, labels))
    return examples


def summed_loss(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    return target_losses(model, collate(examples, [0] * len(examples), 0)).loss.sum()


def hook_sketches(model: nn.Module, examples: Sequence[Example], **options: Any) -> Tensor:
    with GradientSketcher(model, SKETCH, **options) as sketcher:
        summed_loss(model, examples).backward()  # type: ignore[no-untyped-call]
        return sketcher.take()


def example_loss(model: nn.Module, example: Example) -> Tensor:
    """Summed loss of one unpadded example, without any of the package's own code."""
    ids, labels = (torch.tensor(values).long() for values in (example.input_ids, example.labels))
    logits = model(input_ids=ids[None], use_cache=False).logits
    return F.cross_entropy(logits[0, :-1].float(), labels[1:], ignore_index=-100, reduction="sum")


def exact_sketches(
    model: nn.Module, examples: Sequence[Example], names: Collection[str] | None = None
) -> Tensor:
    """Flat sketches of every gradient (of ``names``), by a backward pass per unpadded example."""
    return torch.cat(
        [sketch_of_loss(model, partial(example_loss, model, e), names) for e in examples]
    )


def sketch_of_loss(
    model: nn.Module, loss: Callable[[], Tensor], names: Collection[str] | None = None
) -> Tensor:
    """[1, D] sketch of the gradient that the backward pass of ``loss()`` leaves in the model."""
    model.zero_grad()
    loss().backward()  # type: ignore[no-untyped-call]
    out = torch.zeros(1, SKETCH.proj_dim)
    for name, parameter in named_parameters(model):
        if parameter.grad is not None and (names is None or name in names):
            gradient = parameter.grad.float().view(1, *matrix_shape(parameter.shape))
            flat_sketch(gradient, name, SKETCH, out=out, backend="eager")
    model.zero_grad()
    return out
