"""Tiny models whose files and parameters have different names, written in both forms."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

TEXT: dict[str, Any] = dict(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=4, max_position_embeddings=64,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
VISION = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    image_size=8, patch_size=4,
)  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]}
QWEN_VISION = dict(depth=1, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=16)
EXPERTS = dict(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=12)

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3": ("Gemma3ForConditionalGeneration", "Gemma3Config", dict(
        text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4)),
    "llava": ("LlavaForConditionalGeneration", "LlavaConfig", dict(
        text_config={**TEXT, "model_type": "llama"},
        vision_config={**VISION, "model_type": "clip_vision_model", "projection_dim": 16})),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", dict(
        vision_config={**QWEN_VISION, "fullatt_block_indexes": [0]},
        text_config={**TEXT, "rope_parameters": MROPE})),
    "vit": ("ViTForImageClassification", "ViTConfig", VISION),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**TEXT, **EXPERTS}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**TEXT, "num_local_experts": 3}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {
        **TEXT, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 12, "first_k_dense_replace": 1, "q_lora_rank": 8,
        "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4,
        "n_group": 2, "topk_group": 1}),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {
        **TEXT, "num_local_experts": 3, "num_experts_per_tok": 2}),
}  # fmt: skip


def make(name: str, seed: int, **changes: Any) -> Any:
    """A float32 model with every parameter drawn anew from its seed."""
    model_class, config_class, options = CASES[name]
    config = getattr(transformers, config_class)(**{**options, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter))
    return model


def parameters(model: Any) -> dict[str, Tensor]:
    """The tensors that a model would save under its own names; tied ones once."""
    seen: set[int] = set()
    kept = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or not tensor.numel():
            kept[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    return kept


def write_memory_form(model: Any, path: Path) -> Path:
    """The parameters under their names in memory, as FSDP and plain training loops save them."""
    return write_tensors(model, path, parameters(model))


def write_hub_form(model: Any, path: Path) -> Path:
    """The names and the cut of the model's published checkpoints, as save_pretrained restores."""
    model.save_pretrained(path)
    return path


def write_tensors(model: Any, path: Path, tensors: dict[str, Tensor]) -> Path:
    """A model directory of these tensors."""
    path.mkdir(parents=True)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.float32
    model.config.save_pretrained(path)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def load_whole(model_class: Any, path: Path) -> dict[str, Tensor]:
    """The parameters of a directory that transformers loads with nothing missing or left over."""
    model, report = model_class.from_pretrained(path, output_loading_info=True)
    problems = {key: value for key, value in report.items() if value}
    assert not problems, problems
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_average(merged: dict[str, Tensor], models: list[Any], weights: list[float]) -> None:
    """Asserts that every parameter is the models' average: summed in float64, rounded once."""
    states = [model.state_dict() for model in models]
    assert merged.keys() == states[0].keys()
    for name, tensor in merged.items():
        total = sum(w * state[name].double() for w, state in zip(weights, states, strict=True))
        expected = total.to(tensor.dtype) if tensor.is_floating_point() else states[0][name]
        assert torch.equal(tensor, expected), name
