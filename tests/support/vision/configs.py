"""Configs of tiny models that read images: each is made from a vocabulary's size and its ids."""

from collections.abc import Callable
from typing import Any

MakeConfig = Callable[[int, dict[str, int]], Any]

PINPOINTS = [[28, 56], [56, 28], [56, 56]]
_ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
_TEXT: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    bos_token_id=None,
    eos_token_id=None,
)
_TOWER: dict[str, Any] = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
)


def qwen2(kind: str) -> MakeConfig:
    def make(vocabulary: int, ids: dict[str, int]) -> Any:
        import transformers

        tower: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 14}
        if kind == "Qwen2VL":
            tower |= {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
        else:
            tower |= {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32}
            tower |= {"window_size": 56, "fullatt_block_indexes": [1]}
        text = _TEXT | {"vocab_size": vocabulary, "rope_parameters": _ROPE}
        return getattr(transformers, f"{kind}Config")(
            text_config=text, vision_config=tower, **_qwen_ids(ids)
        )

    return make


def qwen3(vocabulary: int, ids: dict[str, int]) -> Any:
    from transformers import Qwen3VLConfig

    rope = _ROPE | {"mrope_interleaved": True}
    text = _TEXT | {"vocab_size": vocabulary, "head_dim": 8, "rope_parameters": rope}
    tower: dict[str, Any] = {"depth": 2, "hidden_size": 16, "intermediate_size": 24}
    tower |= {"num_heads": 2}
    tower |= {"patch_size": 14, "out_hidden_size": 32, "num_position_embeddings": 16}
    tower |= {"deepstack_visual_indexes": [0]}
    return Qwen3VLConfig(text_config=text, vision_config=tower, **_qwen_ids(ids))


def _qwen_ids(ids: dict[str, int]) -> dict[str, Any]:
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": False,
    }


def gemma3(vocabulary: int, ids: dict[str, int]) -> Any:
    from transformers import Gemma3Config

    return Gemma3Config(
        text_config=_TEXT | {"vocab_size": vocabulary, "head_dim": 8, "sliding_window": 64},
        vision_config=_TOWER | {"image_size": 56, "patch_size": 14, "vision_use_head": False},
        mm_tokens_per_image=4,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
    )


def smolvlm(vocabulary: int, ids: dict[str, int]) -> Any:
    from transformers import SmolVLMConfig

    return SmolVLMConfig(
        text_config=_TEXT | {"vocab_size": vocabulary, "model_type": "llama", "pad_token_id": 0},
        vision_config=_TOWER | {"image_size": 28, "patch_size": 7},
        image_token_id=ids["<image>"],
        scale_factor=2,
        tie_word_embeddings=False,
    )


def llava(name: str) -> MakeConfig:
    def make(vocabulary: int, ids: dict[str, int]) -> Any:
        import transformers

        more = {} if name == "LlavaConfig" else {"image_grid_pinpoints": PINPOINTS}
        return getattr(transformers, name)(
            text_config=_TEXT | {"vocab_size": vocabulary, "model_type": "llama"},
            vision_config=_TOWER
            | {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14},
            image_token_index=ids["<image>"],
            image_seq_length=4,
            vision_feature_select_strategy="default",
            vision_feature_layer=-2,
            **more,
        )

    return make


def llava_onevision(vocabulary: int, ids: dict[str, int]) -> Any:
    from transformers import LlavaOnevisionConfig

    tower = {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}
    return LlavaOnevisionConfig(
        text_config=_TEXT | {"vocab_size": vocabulary, "model_type": "qwen2"},
        vision_config=_TOWER | tower | {"vision_use_head": False},
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=False,
    )
