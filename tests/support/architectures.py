"""Tiny models with options of their own, and the modules that ``patch_model`` replaces."""

from typing import Any

import torch

VOCABULARY = 131
TEXT: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=48, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=12, max_position_embeddings=64,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=1)
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
VISION = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=48)

# name -> (class, config class, options, what is replaced)
DENSE = {"rms_norm": 5, "add_rms_norm": 2, "swiglu": 2, "rope": 2, "head": 1}
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, int]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}, DENSE),
    "mistral": ("MistralForCausalLM", "MistralConfig", {}, DENSE),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}, DENSE),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {}, {**DENSE, "rms_norm": 9}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {},
              {"rms_norm": 5, "add_rms_norm": 2, "geglu": 2, "rope": 2, "head": 1}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config",
               {"final_logit_softcapping": 3.0, "sliding_window": 8},
               {"rms_norm": 9, "add_rms_norm": 2, "geglu": 2, "rope": 2, "head": 1}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {"sliding_window": 8},
               {"rms_norm": 13, "add_rms_norm": 2, "geglu": 2, "rope": 2, "head": 1}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {}, DENSE),
    "phi3 partial": ("Phi3ForCausalLM", "Phi3Config",
                     {"rope_parameters": PARTIAL_ROPE}, DENSE),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", {}, DENSE),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {"logits_scaling": 4.0},
                {"rms_norm": 5, "swiglu": 2, "rope": 2, "head": 1}),
    "cohere": ("CohereForCausalLM", "CohereConfig", {"logit_scale": 0.25},
               {"swiglu": 2, "rope": 2, "head": 1}),
    "glm": ("GlmForCausalLM", "GlmConfig", {"head_dim": 16}, DENSE),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig",
                {"num_local_experts": 4, "output_router_logits": True},
                {"rms_norm": 5, "add_rms_norm": 2, "rope": 2, "head": 1}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig",
                  {**MOE, "shared_expert_intermediate_size": 24, "output_router_logits": True},
                  DENSE),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**MOE, "output_router_logits": True},
                  {"rms_norm": 9, "add_rms_norm": 2, "rope": 2, "head": 1}),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig",
                   {"vision_config": {**VISION, "fullatt_block_indexes": [0]},
                    "text_config": {**TEXT, "rope_parameters": MROPE}}, DENSE),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", "Qwen3VLConfig",
                 {"vision_config": {**VISION, "deepstack_visual_indexes": [0],
                                    "num_position_embeddings": 16},
                  "text_config": {**TEXT, "rope_parameters": MROPE}}, {**DENSE, "rms_norm": 9}),
}  # fmt: skip


def make(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> torch.nn.Module:
    """In training mode, with norm weights that are not all ones, so that a wrong norm shows."""
    import transformers

    model_class, config_class, options, _ = CASES[name]
    text = {} if "text_config" in options else TEXT
    torch.manual_seed(0)
    model: torch.nn.Module = getattr(transformers, model_class)(
        getattr(transformers, config_class)(**{**text, **options, **changes})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(2.0)
    return model.to(dtype).train()


def inputs(rows: int = 2, tokens: int = 13, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100).masked_fill(
        mask == 0, -100
    )
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
