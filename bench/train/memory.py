"""One training step of Qwen2-0.5B's shape in a process of its own: peak memory above the weights.

    python -m bench.train.memory VARIANT [--dtype fp32] [--tokens 512] [--layers 24]

- stock: transformers' loss and torch's fused AdamW, the Trainer's default.
- patched: ``patch_model``.
- fused: ``patch_model`` and ``FusedAdamW``.
- backward: its updates happen in the backward pass, so that gradients do not live together.
- backward-bf16, backward-int8: the same with moments in bf16 or 8 bits.

Two steps are taken, since the first makes the optimizer's states. Prints one line of JSON.
"""

import argparse
import json
import time
from typing import Any

import torch

from merit_fast.data import IGNORED_LABEL
from merit_fast.model import DTYPES, peak_memory_bytes, reset_peak_memory
from merit_fast.patch.model import patch_model

VARIANTS = ("stock", "patched", "fused", "backward", "backward-bf16", "backward-int8")
IGNORED_SHARE = 0.25


def qwen_config(layers: int) -> Any:
    """The configuration of Qwen2-0.5B with so many layers."""
    import transformers

    make: Any = transformers.Qwen2Config  # its type does not know attn_implementation
    return make(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )


def make_optimizer(model: torch.nn.Module, variant: str) -> Any:
    if variant in ("stock", "patched"):
        return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    from merit_fast.kernels.optimizer import FusedAdamW

    kind, _, moments = variant.partition("-")
    optimizer = FusedAdamW(model.parameters(), lr=1e-5, moments=moments or "fp32")
    if kind == "backward":
        optimizer.step_in_backward()
    return optimizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, default=24)
    arguments = parser.parse_args()
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, DTYPES[arguments.dtype]))
    model: Any = Qwen2ForCausalLM(qwen_config(arguments.layers)).train()
    torch.set_default_dtype(default)
    optimizer = make_optimizer(model, arguments.variant)
    if arguments.variant != "stock":
        patch_model(model)
    ids = torch.randint(0, 151936, (1, arguments.tokens))
    labels = ids.masked_fill(torch.rand(ids.shape) < IGNORED_SHARE, IGNORED_LABEL)
    weights = sum(p.numel() * p.itemsize for p in model.parameters())
    reset_peak_memory()
    base = peak_memory_bytes()
    losses = []
    start = time.perf_counter()
    for _ in range(2):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    seconds = (time.perf_counter() - start) / 2
    above = (peak_memory_bytes() - base) / 2**20
    figures = {"above_mib": above, "step_s": seconds, "weights_mib": weights / 2**20}
    print(json.dumps({**figures, **{f"loss_{i}": loss for i, loss in enumerate(losses)}}))


if __name__ == "__main__":
    main()
