"""Tiny models that read images, one per layout, with their processors, all made from config."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

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


@dataclass(frozen=True)
class Layout:
    """A layout of images in a model's inputs.

    Attributes:
        processor: name of the processor's class in transformers.
        image_processor: name of the image processor's class (the Pillow form).
        tokens: special tokens of the vocabulary, next to the end token.
        image_options: arguments of the image processor.
        config: makes the model's config from the vocabulary size and the ids of the tokens.
        template: file in TRL's folder of chat templates; None: ``CHATML_IMAGES``.
        roles: attributes of the tokenizer that the processor reads, such as image_token.
        processor_options: arguments of the processor.
    """

    processor: str
    image_processor: str
    tokens: tuple[str, ...]
    image_options: dict[str, Any]
    config: Callable[[int, dict[str, int]], Any]
    template: str | None = None
    roles: dict[str, str] = field(default_factory=dict)
    processor_options: dict[str, Any] = field(default_factory=dict)


CHATML_IMAGES = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_QWEN_IMAGES: dict[str, Any] = {"size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 12}}
_CROP = {"height": 28, "width": 28}
_CLIP_IMAGES: dict[str, Any] = {"size": {"shortest_edge": 28}, "crop_size": _CROP}
_LLAVA_OPTIONS: dict[str, Any] = {
    "patch_size": 14,
    "num_additional_image_tokens": 1,
    "vision_feature_select_strategy": "default",
}
_PINPOINTS = [[28, 56], [56, 28], [56, 56]]


def _qwen2(kind: str) -> Callable[[int, dict[str, int]], Any]:
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


def _qwen3(vocabulary: int, ids: dict[str, int]) -> Any:
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


def _gemma3(vocabulary: int, ids: dict[str, int]) -> Any:
    from transformers import Gemma3Config

    return Gemma3Config(
        text_config=_TEXT | {"vocab_size": vocabulary, "head_dim": 8, "sliding_window": 64},
        vision_config=_TOWER | {"image_size": 56, "patch_size": 14, "vision_use_head": False},
        mm_tokens_per_image=4,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
    )


def _smolvlm(vocabulary: int, ids: dict[str, int]) -> Any:
    from transformers import SmolVLMConfig

    return SmolVLMConfig(
        text_config=_TEXT | {"vocab_size": vocabulary, "model_type": "llama", "pad_token_id": 0},
        vision_config=_TOWER | {"image_size": 28, "patch_size": 7},
        image_token_id=ids["<image>"],
        scale_factor=2,
        tie_word_embeddings=False,
    )


def _llava(name: str) -> Callable[[int, dict[str, int]], Any]:
    def make(vocabulary: int, ids: dict[str, int]) -> Any:
        import transformers

        more = {} if name == "LlavaConfig" else {"image_grid_pinpoints": _PINPOINTS}
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


def _llava_onevision(vocabulary: int, ids: dict[str, int]) -> Any:
    from transformers import LlavaOnevisionConfig

    tower = {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}
    return LlavaOnevisionConfig(
        text_config=_TEXT | {"vocab_size": vocabulary, "model_type": "qwen2"},
        vision_config=_TOWER | tower | {"vision_use_head": False},
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=_PINPOINTS,
        tie_word_embeddings=False,
    )


LAYOUTS = {
    "qwen2_vl": Layout(
        template="qwen2_5_vl.jinja",
        processor="Qwen2VLProcessor",
        image_processor="Qwen2VLImageProcessorPil",
        tokens=_QWEN_TOKENS,
        image_options=_QWEN_IMAGES,
        config=_qwen2("Qwen2VL"),
    ),
    "qwen2_5_vl": Layout(
        template="qwen2_5_vl.jinja",
        processor="Qwen2_5_VLProcessor",
        image_processor="Qwen2VLImageProcessorPil",
        tokens=_QWEN_TOKENS,
        image_options=_QWEN_IMAGES,
        config=_qwen2("Qwen2_5_VL"),
    ),
    "qwen3_vl": Layout(
        template="qwen3_vl.jinja",
        processor="Qwen3VLProcessor",
        image_processor="Qwen2VLImageProcessorPil",
        tokens=_QWEN_TOKENS,
        image_options=_QWEN_IMAGES | {"patch_size": 14},
        config=_qwen3,
    ),
    "gemma3": Layout(
        template="gemma3.jinja",
        processor="Gemma3Processor",
        image_processor="Gemma3ImageProcessorPil",
        tokens=("<start_of_image>", "<end_of_image>", "<image_soft_token>", "<start_of_turn>"),
        roles={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
            "bos_token": "<bos>",
            "eos_token": "<end_of_turn>",
        },
        image_options={"size": {"height": 56, "width": 56}},
        processor_options={"image_seq_length": 4},
        config=_gemma3,
    ),
    "smolvlm": Layout(
        template="smolvlm.jinja",
        processor="SmolVLMProcessor",
        image_processor="SmolVLMImageProcessorPil",
        tokens=(
            "<fake_token_around_image>",
            "<image>",
            "<global-img>",
            *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
        ),
        roles={"eos_token": "<end_of_utterance>", "bos_token": "<|im_start|>"},
        image_options={"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}},
        processor_options={"image_seq_len": 4},
        config=_smolvlm,
    ),
    "llava": Layout(
        processor="LlavaProcessor",
        image_processor="CLIPImageProcessorPil",
        tokens=("<image>",),
        image_options=_CLIP_IMAGES,
        processor_options=_LLAVA_OPTIONS,
        config=_llava("LlavaConfig"),
    ),
    "llava_next": Layout(
        processor="LlavaNextProcessor",
        image_processor="LlavaNextImageProcessorPil",
        tokens=("<image>",),
        image_options=_CLIP_IMAGES | {"image_grid_pinpoints": _PINPOINTS},
        processor_options=_LLAVA_OPTIONS,
        config=_llava("LlavaNextConfig"),
    ),
    "llava_onevision": Layout(
        processor="LlavaOnevisionProcessor",
        image_processor="LlavaOnevisionImageProcessorPil",
        tokens=("<image>", "<video>"),
        roles={"image_token": "<image>", "video_token": "<video>"},
        image_options={
            "size": {"height": 28, "width": 28},
            "image_grid_pinpoints": _PINPOINTS,
        },
        processor_options={"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
        config=_llava_onevision,
    ),
}


def make_vision_tokenizer(directory: Path, layout: Layout) -> Any:
    """Trains a byte-level tokenizer with the layout's special tokens and saves it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["user\n assistant\n which digit is it?"] * 4, trainer)
    roles = {"eos_token": "<|im_end|>"} | layout.roles
    named = dict.fromkeys(["<|im_start|>", *roles.values(), *layout.tokens])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in named])
    extra = {key: value for key, value in roles.items() if key not in ("eos_token", "bos_token")}
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token=roles["eos_token"],
        bos_token=roles.get("bos_token"),
        extra_special_tokens=extra,
    )
    fast.save_pretrained(directory)
    return fast


def make_vision_model(directory: Path, name: str, *, seed: int = 0) -> Any:
    """Saves a tiny model of a layout with its tokenizer, processor and template.

    Args:
        directory: where the checkpoint goes.
        name: key of ``LAYOUTS``.
        seed: seed of the weights.

    Returns:
        The model, in float32 and evaluation mode.
    """
    import transformers

    layout = LAYOUTS[name]
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_vision_tokenizer(directory, layout)
    getattr(transformers, layout.image_processor)(**layout.image_options).save_pretrained(directory)
    settings = {"processor_class": layout.processor, **layout.processor_options}
    (directory / "processor_config.json").write_text(json.dumps(settings))
    (directory / "chat_template.jinja").write_text(_read_template(layout.template))
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.get_vocab()}
    config = layout.config(len(tokenizer), ids)
    torch.manual_seed(seed)
    model = transformers.AutoModelForImageTextToText.from_config(  # type: ignore[no-untyped-call]
        config, dtype=torch.float32
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that every pixel moves the loss
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(directory)
    return model.eval()


def _read_template(name: str | None) -> str:
    if name is None:
        return CHATML_IMAGES
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / name).read_text(encoding="utf-8")
