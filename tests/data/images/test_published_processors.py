"""Processors with the settings that published models have: the tokens of an image are known."""

import json

import pytest
from support.vision.image_rows import Turn, make_conversation, write_image
from support.vision.layouts import LAYOUTS
from support.vision.models import make_vision_tokenizer

from merit_fast.data import DataConfig, DatasetConfig
from merit_fast.data.encode import RowEncoder
from merit_fast.data.images import load_processor

HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
PATCHES = {"temporal_patch_size": 2, "merge_size": 2, **HALF}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# layout -> settings of the image processor, settings of the processor, placeholder, tokens of an
# image of 640 x 480 pixels
PUBLISHED = {
    "qwen2_5_vl": (
        {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, **PATCHES}
        | {"image_processor_type": "Qwen2VLImageProcessor"},
        {},
        "<|image_pad|>",
        (644 // 28) * (476 // 28),
    ),
    "qwen3_vl": (
        {"size": {"longest_edge": 16777216, "shortest_edge": 65536}, "patch_size": 16, **PATCHES}
        | {"image_processor_type": "Qwen2VLImageProcessorFast"},
        {},
        "<|image_pad|>",
        (640 // 32) * (480 // 32),
    ),
    "gemma3": (
        {"size": {"height": 896, "width": 896}, "do_pan_and_scan": None, **HALF}
        | {"image_processor_type": "Gemma3ImageProcessor"},
        {"image_seq_length": 256},
        "<start_of_image>",
        256,
    ),
    "smolvlm": (  # 4 x 3 tiles and the whole image
        {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}, **HALF}
        | {"image_processor_type": "SmolVLMImageProcessor"},
        {"image_seq_len": 64},
        "<image>",
        (4 * 3 + 1) * 64,
    ),
    "llava": (
        {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}, **HALF}
        | {"image_processor_type": "CLIPImageProcessor"},
        {
            "patch_size": 14,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
        "<image>",
        (336 // 14) ** 2,
    ),
    "llava_onevision": (  # 2 x 2 tiles of 27 x 27 without the padded rows, line ends, the whole
        {"size": {"height": 384, "width": 384}, "image_grid_pinpoints": [[384, 384], [768, 768]]}
        | {"image_processor_type": "LlavaOnevisionImageProcessor", **HALF},
        {"num_image_tokens": 729, "vision_feature_select_strategy": "full"},
        "<image>",
        40 * 54 + 40 + 729,
    ),
}


@pytest.mark.parametrize("template_file", ["chat_template.json", "tokenizer_config.json"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_an_image_takes_the_tokens_that_the_published_settings_give(tmp_path, name, template_file):
    image_settings, settings, placeholder, num_tokens = PUBLISHED[name]
    processor_class = {"processor_class": LAYOUTS[name].processor}
    make_vision_tokenizer(tmp_path, LAYOUTS[name])
    template = tmp_path / template_file
    values = json.loads(template.read_text()) if template.exists() else {}
    values["chat_template"] = TEMPLATE.replace("IMAGE", placeholder)
    template.write_text(json.dumps(values))
    preprocessor = tmp_path / "preprocessor_config.json"
    preprocessor.write_text(json.dumps(image_settings | processor_class))
    if settings:
        (tmp_path / "processor_config.json").write_text(json.dumps(settings | processor_class))

    write_image(tmp_path / "a.png", 640, 480)
    row = make_conversation(tmp_path, Turn("which?", "seven", ("a.png",)))
    entry = DatasetConfig(name="a", path="a")
    (encoded,) = RowEncoder(
        entry, DataConfig(max_length=4096), load_processor(str(tmp_path))
    ).encode_read([row])
    assert encoded.error is None
    (example,) = encoded.examples
    assert [image.num_tokens for image in example.media.images] == [num_tokens]
    assert example.media.tensors()["pixel_values"].numel() > 0
