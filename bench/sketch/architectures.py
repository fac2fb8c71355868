"""Sketches of every causal language model of transformers, tiny, against a pass per example.

    python -m bench.sketch.architectures [TYPE ...] [--only-failures]

Prints one line per type: fast (formulas, and backward passes per example through single modules),
slow (some parameters take a backward pass per example from the model's outputs), refused, wrong or
not built; the largest error of an example's sketch; seconds of one pass with all checks. Ends with
an error if a type is wrong or refused, or fewer are exact or fast than before.
"""

import argparse
import contextlib
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from merit_fast.errors import MeritFastError
from merit_fast.kernels.sketch import CountSketch, flat_sketch, matrix_shape
from merit_fast.sketch.gradients import GradientSketcher
from merit_fast.sketch.names import named_parameters

SKETCH = CountSketch(4096, seed=7)
VOCABULARY = 97
ROWS = 3
TOKENS = 16
MOST_ENTRIES = 200_000_000
# Of all types, with transformers 5.23; these may only rise.
EXACT_AT_LEAST = 172
FAST_AT_LEAST = 162
LIMIT = 2e-5  # of an example's error: the check's own

# Values of a tiny model by the names that configs have for them.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "lru_width", "attention_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_inner", "n_inner", "ffn_hidden_size"), 64),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "d_ff", "mamba_intermediate"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("head_dim", "kv_channels", "d_kv", "d_head"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("rotary_dim", "rope_head_dim", "mamba_dt_rank", "time_step_rank"), 8),
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}


@dataclass(frozen=True)
class Outcome:
    kind: str  # fast, slow, refused, wrong or not built
    error: float = 0.0
    seconds: float = 0.0
    note: str = ""


# Options that a type needs on top of SIZES, or instead.
OPTIONS: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_n_groups": 1},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1},
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "layer_types": ["mamba", "attention"],
    },
    "zamba2": {"n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 1},
    "xlstm": {"embedding_dim": 32, "num_heads": 4, "vocab_size": VOCABULARY},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2, "topk_group": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "cohere_compass_text": {"layer_types": ["full_attention", "full_attention"]},
    "xmod": {"default_language": "en_XX"},
    "reformer": {"is_decoder": True, "axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 16)},
}


def tiny_config(config: Any) -> Any:
    """Shrinks a config in place, and those inside it."""
    optional = ("pad_token_id", "bos_token_id", "eos_token_id", "head_dim", "num_key_value_heads")
    for key, value in SIZES.items():
        with contextlib.suppress(Exception):  # some configs forbid what they compute
            before = getattr(config, key, None)
            if isinstance(before, int) or (before is None and key in optional):
                setattr(config, key, value)
    with contextlib.suppress(Exception):
        if getattr(config, "kv_lora_rank", None):  # one key head per head
            config.num_key_value_heads = config.num_attention_heads
    for key in ("layer_types", "layers_block_type", "mlp_layer_types"):
        with contextlib.suppress(Exception):
            if isinstance(kinds := getattr(config, key, None), list):
                both = list(dict.fromkeys(kinds))[:2]
                setattr(config, key, (both * 2)[:2])
    for key, value in OPTIONS.get(config.model_type, {}).items():
        setattr(config, key, value)
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            tiny_config(value)
    return config


def build(model_type: str) -> nn.Module:
    """A tiny model of a type, whose norms and biases are not at 1 and 0."""
    import transformers as t

    config = tiny_config(t.AutoConfig.for_model(model_type))
    return from_config(config)


def from_config(config: Any) -> nn.Module:
    import transformers as t

    auto: Any = t.AutoModelForCausalLM
    with torch.device("meta"):
        entries = sum(p.numel() for p in auto.from_config(config).parameters())
    if entries > MOST_ENTRIES:
        raise ValueError(f"{entries:,} parameters")
    torch.manual_seed(0)
    model: nn.Module = auto.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def losses_of(model: nn.Module, ids: Tensor) -> Tensor:
    """[B] summed loss of each row."""
    logits = model(input_ids=ids, use_cache=False).logits.float()
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return loss.view(len(ids), -1).sum(1)


def exact_sketch(model: nn.Module, ids: Tensor) -> Tensor:
    """[1, D] from an ordinary backward pass of one row."""
    model.zero_grad()
    losses_of(model, ids).sum().backward()  # type: ignore[no-untyped-call]
    out = torch.zeros(1, SKETCH.proj_dim)
    for name, parameter in named_parameters(model):
        if parameter.grad is not None:
            gradient = parameter.grad.reshape(1, *matrix_shape(parameter.shape))
            flat_sketch(gradient, name, SKETCH, out=out)
    model.zero_grad()
    return out


def measure(model: nn.Module, tokens: int = TOKENS, rows: int = ROWS) -> Outcome:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    try:
        exact = torch.cat([exact_sketch(model, ids[b : b + 1]) for b in range(rows)])
    except Exception as error:  # the model itself does not run
        return Outcome("not built", note=f"runs not: {one_line(error)}")
    start = time.perf_counter()
    slow: dict[str, str] = {}
    try:
        with GradientSketcher(
            model, SKETCH, uncovered="autograd", notify=warnings.warn
        ) as sketcher:
            losses_of(model, ids).sum().backward()  # type: ignore[no-untyped-call]
            sketches = sketcher.take()
            slow = sketcher.slow_parameters
    except MeritFastError as error:
        return Outcome("refused", note=one_line(error))
    except Exception as error:  # a crash is what this script looks for
        return Outcome("refused", note=f"CRASH {type(error).__name__}: {one_line(error)}")
    seconds = time.perf_counter() - start
    distance = (sketches - exact).norm(dim=1) / exact.norm(dim=1)
    worst = float(distance.max())
    total = len(list(model.parameters()))
    note = f"{len(slow)} of {total}: {' '.join(next(iter(slow.items())))}" if slow else ""
    if not worst <= LIMIT:
        return Outcome("wrong", worst, seconds, note)
    return Outcome("slow" if slow else "fast", worst, seconds, note)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def measure_type(model_type: str) -> Outcome:
    try:
        model = build(model_type)
    except Exception as error:  # no tiny model of this type
        return Outcome("not built", note=one_line(error))
    return measure(model)


def causal_types() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="model types; all if none is given")
    parser.add_argument("--only-failures", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counts = Counter[str]()
    print("| type | sketch | error | seconds | note |\n|---|---|---|---|---|", flush=True)
    for model_type in arguments.types or causal_types():
        outcome = measure_type(model_type)
        counts[outcome.kind] += 1
        if not (arguments.only_failures and outcome.kind in ("fast", "slow")):
            print(
                f"| {model_type} | {outcome.kind} | {outcome.error:.0e} | {outcome.seconds:.2f} | "
                f"{outcome.note[:160]} |",
                flush=True,
            )
    print("\n" + ", ".join(f"{number} {kind}" for kind, number in counts.most_common()))
    if counts["wrong"] or counts["refused"]:
        sys.exit("some types are wrong or refused")
    exact = counts["fast"] + counts["slow"]
    if not arguments.types and (counts["fast"] < FAST_AT_LEAST or exact < EXACT_AT_LEAST):
        sys.exit(f"must be at least {EXACT_AT_LEAST} exact and {FAST_AT_LEAST} fast")


if __name__ == "__main__":
    main()
