"""Layouts of images in the inputs of models: processors, special tokens and settings."""

from dataclasses import dataclass, field
from typing import Any

from support.vision.configs import (
    PINPOINTS,
    MakeConfig,
    gemma3,
    llava,
    llava_onevision,
    qwen2,
    qwen3,
    smolvlm,
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
    config: MakeConfig
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


def _qwen(processor: str, template: str, config: MakeConfig, **image_options: Any) -> Layout:
    return Layout(
        template=template,
        processor=processor,
        image_processor="Qwen2VLImageProcessorPil",
        tokens=_QWEN_TOKENS,
        image_options=_QWEN_IMAGES | image_options,
        config=config,
    )


def _llava(name: str, image_processor: str, **image_options: Any) -> Layout:
    return Layout(
        processor=f"{name}Processor",
        image_processor=image_processor,
        tokens=("<image>",),
        image_options=_CLIP_IMAGES | image_options,
        processor_options={
            "patch_size": 14,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
        config=llava(f"{name}Config"),
    )


LAYOUTS = {
    "qwen2_vl": _qwen("Qwen2VLProcessor", "qwen2_5_vl.jinja", qwen2("Qwen2VL")),
    "qwen2_5_vl": _qwen("Qwen2_5_VLProcessor", "qwen2_5_vl.jinja", qwen2("Qwen2_5_VL")),
    "qwen3_vl": _qwen("Qwen3VLProcessor", "qwen3_vl.jinja", qwen3, patch_size=14),
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
        config=gemma3,
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
        config=smolvlm,
    ),
    "llava": _llava("Llava", "CLIPImageProcessorPil"),
    "llava_next": _llava("LlavaNext", "LlavaNextImageProcessorPil", image_grid_pinpoints=PINPOINTS),
    "llava_onevision": Layout(
        processor="LlavaOnevisionProcessor",
        image_processor="LlavaOnevisionImageProcessorPil",
        tokens=("<image>", "<video>"),
        roles={"image_token": "<image>", "video_token": "<video>"},
        image_options={
            "size": {"height": 28, "width": 28},
            "image_grid_pinpoints": PINPOINTS,
        },
        processor_options={"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
        config=llava_onevision,
    ),
}
