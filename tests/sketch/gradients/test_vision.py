"""Vision-language models: towers that see all images' patches end to end, or one per example."""

import pytest
import torch
from support.checks import assert_close
from support.sketch.exact_gradients import SKETCH, sketch_of_loss
from torch.nn import functional as F

from merit_fast.errors import MeritFastError
from merit_fast.sketch.gradients import GradientSketcher
from merit_fast.sketch.selection import select_parameters

IMAGE = 100
VIDEO = 101
GRIDS = torch.tensor(
    [[1, 4, 4], [1, 4, 8], [1, 8, 4], [1, 4, 4]]
)  # patches; image tokens: 4, 8, 8, 4
IMAGES_OF = [[0, 1], [], [2], [3]]


@pytest.fixture(scope="module")
def qwen_vl():
    import transformers as t

    text = dict(
        vocab_size=120,
        hidden_size=36,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=3,
    )
    text |= dict(num_key_value_heads=1, pad_token_id=0, bos_token_id=None, eos_token_id=None)
    text["rope_parameters"] = {
        "rope_type": "default",
        "mrope_section": [2, 2, 2],
        "rope_theta": 1e4,
    }
    vision = dict(
        depth=2, hidden_size=24, intermediate_size=40, num_heads=2, patch_size=4, window_size=16
    )
    vision |= dict(out_hidden_size=36, fullatt_block_indexes=[1])
    config = t.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=102,
        vision_end_token_id=103,
    )
    torch.manual_seed(0)
    return t.Qwen2_5_VLForConditionalGeneration(config).eval()


def batch(examples, width=24):
    """Rows of text with their images' tokens, and only those images' pixels."""
    generator = torch.Generator().manual_seed(1)
    pixels = [
        torch.randn(int(count), 3 * 2 * 4 * 4, generator=generator) for count in GRIDS.prod(1)
    ]
    ids = torch.randint(1, 99, (4, width), generator=generator)
    for row, images in enumerate(IMAGES_OF):
        at = 2
        for image in images:
            tokens = int(GRIDS[image].prod()) // 4
            ids[row, at : at + tokens] = IMAGE
            at += tokens + 1
    chosen = [image for row in examples for image in IMAGES_OF[row]]
    ids = ids[list(examples)]
    arguments = {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int(), "use_cache": False}
    if chosen:
        arguments |= {
            "pixel_values": torch.cat([pixels[i] for i in chosen]),
            "image_grid_thw": GRIDS[chosen],
        }
    return arguments


def loss_of(model, arguments):
    logits = model(**arguments).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, arguments["input_ids"][:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize(
    "parameters", ["all", "visual", "patch_embed|norm", r"language_model|lm_head"]
)
def test_hooks_equal_a_pass_per_example(qwen_vl, parameters):
    chosen = select_parameters(qwen_vl, parameters)
    with GradientSketcher(qwen_vl, SKETCH, chosen) as sketcher:
        loss_of(qwen_vl, batch(range(4))).backward()
        result = sketcher.take()
    truth = [
        sketch_of_loss(qwen_vl, lambda row=row: loss_of(qwen_vl, batch([row])), chosen)
        for row in range(4)
    ]
    for mine, exact in zip(result, truth, strict=True):
        assert_close(mine, exact[0]) if exact.any() else torch.testing.assert_close(mine, exact[0])


def test_frozen_tower_needs_no_image_tokens_to_be_known(qwen_vl):
    """Nothing of the tower is sketched, so its rows need not be told apart."""
    qwen_vl.model.visual.requires_grad_(False)
    ids = qwen_vl.config.image_token_id
    try:
        with GradientSketcher(qwen_vl, SKETCH) as sketcher:
            loss_of(qwen_vl, batch(range(4))).backward()
            result = sketcher.take()
        truth = [
            sketch_of_loss(qwen_vl, lambda row=row: loss_of(qwen_vl, batch([row])))
            for row in range(4)
        ]
        assert_close(result, torch.cat(truth))
        assert qwen_vl.config.image_token_id == ids
    finally:
        qwen_vl.requires_grad_(True)


def test_text_alone_leaves_the_tower_without_gradient(qwen_vl):
    with GradientSketcher(
        qwen_vl, SKETCH, select_parameters(qwen_vl, "visual|lm_head")
    ) as sketcher:
        loss_of(qwen_vl, batch([1, 1])).backward()
        result = sketcher.take()
    truth = sketch_of_loss(qwen_vl, lambda: loss_of(qwen_vl, batch([1])), ["lm_head.weight"])
    assert_close(result, truth.expand(2, -1))


def test_images_that_cannot_be_told_apart_are_refused_by_name(qwen_vl):
    arguments = batch(range(4))
    embeddings = qwen_vl.get_input_embeddings()(arguments.pop("input_ids")).detach()
    parameter = "parameter model.visual.patch_embed.proj.weight of Conv3d"
    message = f"{parameter} sees 4 images that cannot be told apart"
    with GradientSketcher(qwen_vl, SKETCH), pytest.raises(MeritFastError, match=message):
        qwen_vl(inputs_embeds=embeddings, **arguments)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_checkpointed_tower(qwen_vl, reentrant):
    with GradientSketcher(qwen_vl, SKETCH) as sketcher:
        loss_of(qwen_vl, batch(range(4))).backward()
        plain = sketcher.take()
    qwen_vl.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    try:
        with GradientSketcher(qwen_vl, SKETCH) as sketcher:
            loss_of(qwen_vl, batch(range(4))).backward()
            assert_close(sketcher.take(), plain)
    finally:
        qwen_vl.eval().gradient_checkpointing_disable()


@pytest.fixture(scope="module")
def llava():
    import transformers as t

    text = t.LlamaConfig(
        vocab_size=120,
        hidden_size=36,
        intermediate_size=52,
        num_hidden_layers=1,
        num_attention_heads=3,
    )
    vision = t.SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    config = t.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(0)
    return t.LlavaForConditionalGeneration(config).eval()


def test_one_image_per_example(llava):
    ids = torch.randint(1, 99, (3, 12))
    pixels = torch.randn(3, 3, 8, 8)
    ids[:, 2:6] = IMAGE

    def loss(rows):
        return loss_of(
            llava, {"input_ids": ids[rows], "pixel_values": pixels[rows], "use_cache": False}
        )

    chosen = {n: p for n, p in llava.named_parameters() if "head" not in n or "lm_head" in n}
    with GradientSketcher(llava, SKETCH, chosen) as sketcher:
        loss([0, 1, 2]).backward()
        result = sketcher.take()
    assert_close(
        result,
        torch.cat([sketch_of_loss(llava, lambda row=row: loss([row]), chosen) for row in range(3)]),
    )


def test_images_that_do_not_divide_evenly_are_refused(llava):
    ids = torch.randint(1, 99, (2, 12))
    ids[0, 2:10] = IMAGE  # both images in the first example: rows would seem to be the examples'
    with (
        GradientSketcher(llava, SKETCH),
        pytest.raises(MeritFastError, match="pixel_values of 2 images for 2 example"),
    ):
        llava(input_ids=ids, pixel_values=torch.randn(2, 3, 8, 8))
