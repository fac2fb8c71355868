"""Tiny models of a config's architecture: all sizes small, all its other choices kept."""

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from merit_fast.patch.classes import own_class
from merit_fast.patch.reads import is_config

VOCABULARY = 97
_HEAD = 8
_MOST_ENTRIES = 20_000_000

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
    **dict.fromkeys(("head_dim", "kv_channels", "d_kv", "d_head"), _HEAD),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), _HEAD),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), _HEAD),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("rotary_dim", "rope_head_dim", "mamba_dt_rank", "time_step_rank"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}

# Options that a type needs on top of SIZES, or instead.
_OPTIONS: dict[str, dict[str, Any]] = {
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


def shrink_config(config: Any) -> Any:
    """Shrinks a config in place, and those inside it."""
    _shrink_sizes(config)
    for key in ("layer_types", "layers_block_type", "mlp_layer_types"):
        with contextlib.suppress(Exception):
            if isinstance(kinds := getattr(config, key, None), list):
                both = list(dict.fromkeys(kinds))[:2]
                setattr(config, key, (both * 2)[:2])
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(getattr(config, key, None), dict):
            _shrink_rope(getattr(config, key))
    for key, value in _OPTIONS.get(config.model_type, {}).items():
        setattr(config, key, value)
    for value in list(vars(config).values()):
        if is_config(value):
            shrink_config(value)
    return config


def _shrink_sizes(config: Any) -> None:
    optional = ("pad_token_id", "bos_token_id", "eos_token_id", "head_dim", "num_key_value_heads")
    for key, value in SIZES.items():
        with contextlib.suppress(Exception):  # some configs forbid what they compute
            before = getattr(config, key, None)
            if isinstance(before, int) or (before is None and key in optional):
                setattr(config, key, value)
    with contextlib.suppress(Exception):
        if getattr(config, "kv_lora_rank", None):  # one key head per head
            config.num_key_value_heads = config.num_attention_heads


def _shrink_rope(options: dict[str, Any]) -> None:
    """Fits lists that have an entry for each pair of a head's numbers to small heads."""
    pairs = int(_HEAD * options.get("partial_rotary_factor", 1.0)) // 2
    for key, value in options.items():
        if isinstance(value, dict):
            _shrink_rope(value)
        elif key == "mrope_section":
            options[key] = [pairs - 2, 1, 1] if pairs > 2 else [pairs, 0, 0]
        elif key in ("long_factor", "short_factor"):
            options[key] = value[:pairs]


def shrunken_model(model: nn.Module, device: torch.device) -> nn.Module | str:
    """A tiny fp32 model of the same class and config; a reason if there is none."""
    from transformers import PreTrainedModel

    cls: Any = own_class(type(model))
    config = getattr(model, "config", None)
    if not issubclass(cls, PreTrainedModel) or config is None:
        return "it has no config of transformers"
    try:
        config = shrink_config(copy.deepcopy(config))
        if "flash" in str(config._attn_implementation):
            config._attn_implementation = "eager"
        with _quiet():
            with torch.device("meta"):
                entries = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
            if entries > _MOST_ENTRIES:
                return f"its config shrinks to {entries:,} parameters only"
            with torch.device("cpu"):
                tiny: nn.Module = cls(config)
    except Exception as error:  # whatever foreign code raises about sizes that it does not expect
        return f"its config cannot be shrunk ({type(error).__name__})"
    tiny = tiny.float().to(device)
    with torch.no_grad():
        for parameter in tiny.parameters():
            if parameter.dim() == 1:  # norms and biases that are not at 1 and 0
                parameter.add_(0.1 * torch.randn_like(parameter))
    return tiny


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what transformers says about a tiny model from the user."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
