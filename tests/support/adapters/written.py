"""Adapters that the installed PEFT writes, and what PEFT's own merge makes of them."""

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

SHARED = dict(max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
TEXT = dict(
    vocab_size=53,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    **SHARED,
)
MOE = dict(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=20, decoder_sparse_step=1)
GPT2 = dict(vocab_size=53, n_embd=24, n_layer=2, n_head=4, n_positions=64)
WHISPER = dict(
    vocab_size=53,
    d_model=24,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=30,
    decoder_ffn_dim=30,
    num_mel_bins=10,
    max_source_positions=20,
    max_target_positions=20,
    decoder_start_token_id=1,
    **{key: value for key, value in SHARED.items() if key != "max_position_embeddings"},
)
# name -> (class, config class, options)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**TEXT, "tie_word_embeddings": False}),
    "llama tied": ("LlamaForCausalLM", "LlamaConfig", {**TEXT, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**TEXT, "tie_word_embeddings": False}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**TEXT, "num_local_experts": 3}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**TEXT, **MOE}),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**TEXT, "num_local_experts": 3, "layer_types": ["full_attention"] * 2},
    ),
}


def write_base(name: str, directory: Path, dtype: torch.dtype = torch.float64, **save: Any) -> Path:
    """Writes a tiny model of random weights. ``save``: options of ``save_pretrained``."""
    class_name, config_name, options = MODELS[name]
    config = getattr(transformers, config_name)(**options)
    model = getattr(transformers, class_name)(config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_((0.3 * noise).to(dtype))
    model.save_pretrained(directory, **save)
    return directory


def load_base(name: str, directory: Path, dtype: torch.dtype = torch.float64) -> Any:
    loaded = getattr(transformers, MODELS[name][0]).from_pretrained(directory, dtype=dtype)
    return loaded.eval()


def write_adapter(
    name: str, base: Path, directory: Path, seed: int = 0, std: float = 0.3, **config: Any
) -> Path:
    """Writes an adapter whose trained numbers are random, as PEFT saves it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load_base(name, base)
        peft_model = get_peft_model(model, LoraConfig(**config)).double()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in peft_model.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.copy_(std * noise)
        peft_model.save_pretrained(str(directory))
    return directory


def peft_model_of(name: str, base: Path, adapter: Path) -> Any:
    """The adapter on its base, in evaluation mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = PeftModel.from_pretrained(
            load_base(name, base), adapter, autocast_adapter_dtype=False
        )
    return wrapped.double().eval()


def merged_by_peft(name: str, base: Path, adapter: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft_model_of(name, base, adapter).merge_and_unload()


def assert_merged_as_by_peft(name: str, base: Path, adapter: Path, out: Path) -> None:
    """Checks that a merged model, as transformers loads it, has the weights of PEFT's merge."""
    ours = load_base(name, out).state_dict()
    theirs = merged_by_peft(name, base, adapter).state_dict()
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        scale = expected.abs().max()
        assert (ours[key] - expected).abs().max() <= 1e-6 * scale, key
