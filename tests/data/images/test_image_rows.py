"""Rows with images: bad ones, long ones, and what a store keeps of them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny import make_tokenizer
from support.vision.image_rows import Turn, make_conversation, write_image
from support.vision.models import make_qwen_folder

from merit_fast.data import DataConfig, DatasetConfig, collate
from merit_fast.data.conversation import Image, Message
from merit_fast.data.encode import RowEncoder
from merit_fast.data.images import (
    ImageMedia,
    image_layout,
    load_processor,
    load_tokenizer_or_processor,
    reads_images,
)
from merit_fast.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the model of Qwen2.5-VL's layout, and images a.png, b.png and c.png."""
    images = {"a.png": (56, 56), "b.png": (84, 56), "c.png": (28, 84)}
    return make_qwen_folder(tmp_path_factory.mktemp("qwen"), images)


@pytest.fixture(scope="module")
def processor(folder):
    return load_tokenizer_or_processor(str(folder / "model"))


def make_encoder(processor, media=None, **options):
    entry = DatasetConfig(name="a", path="a", media=media)
    return RowEncoder(entry, DataConfig(**options), processor)


def encode(processor, conversation, **options):
    return encode_with(make_encoder(processor, **options), conversation)


def encode_with(encoder, conversation):
    (row,) = encoder.encode_read([conversation])
    if row.error:
        raise row.error
    return row.examples, row.outcomes


def image_tokens(example):
    return [image.num_tokens for image in example.media.images]


def test_an_image_takes_a_token_per_merged_patch(folder, processor):
    turn = Turn("which?", "seven", ("a.png", "b.png", "c.png"))
    (example,), _ = encode(processor, make_conversation(folder, turn))
    assert image_tokens(example) == [2 * 2, 3 * 2, 1 * 3]
    pixels = example.media.tensors()
    assert pixels["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 6], [1, 6, 2]]
    assert pixels["pixel_values"].shape == (16 + 24 + 12, 3 * 2 * 14 * 14)
    types = example.media.token_types
    assert types.sum() == 13 and len(types) == len(example.input_ids)
    pad = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert ((example.input_ids == pad) == (types == 1)).all()


def test_images_lie_below_the_folder_of_the_entry(folder, processor, tmp_path):
    conversation = make_conversation(tmp_path, Turn("which?", "seven", ("a.png",)))
    with pytest.raises(InputError, match="a.png is not there"):
        encode(processor, conversation)
    (example,), _ = encode_with(make_encoder(processor, media=str(folder)), conversation)
    assert example.media.images[0].file.path == str(folder / "a.png")


def bad_rows(folder):
    row = make_conversation(folder, Turn("which?", "seven", ("a.png",)))
    question, answer = row.messages
    parts = {"type": "image"}, {"type": "text", "text": "seven"}
    return {
        "more images than places": (
            replace(row, images=row.images * 2),
            "places for images as images (2), got 1",
        ),
        "more places than images": (replace(row, images=()), "as images (0), got 1"),
        "image in an answer": (
            replace(row, messages=(Message("user", "draw"), Message("assistant", parts))),
            "messages[1]: an answer must not hold an image",
        ),
        "missing": (replace(row, images=(Image(path="no.png"),)), "images[0]: must be an image"),
        "broken": (replace(row, images=(Image(content=b"GIF89a"),)), "images[0]: its bytes: is no"),
        "refused by the processor": (
            replace(row, images=(Image(path="line.png"),)),
            "images[0]: " + str(folder / "line.png"),
        ),
    }


@pytest.mark.parametrize("kind", bad_rows(Path()))
def test_a_bad_row_is_one_line_with_its_place(folder, processor, kind):
    write_image(folder / "line.png", 300, 1)
    row, words = bad_rows(folder)[kind]
    with pytest.raises(InputError) as caught:
        encode(processor, row)
    message = str(caught.value)
    assert message.startswith(f"{folder}/rows.jsonl:1: ") and words in message
    assert "\n" not in message


@pytest.mark.parametrize("spelled", ["question", "answer"])
def test_text_that_spells_an_image_token_is_text_or_refused(folder, processor, spelled):
    row = make_conversation(folder, Turn("is it <|image_pad|>?", "seven", ("a.png",), last=True))
    if spelled == "answer":
        row = make_conversation(folder, Turn("which?", "a <|image_pad|>", ("a.png",)))
    (example,), outcomes = encode(processor, row)
    assert image_tokens(example) == [4] and "split" in outcomes
    assert image_layout(processor).count(example.input_ids) == 4
    text = processor.tokenizer.decode(example.input_ids)
    assert text.count("<|image_pad|>") == 5 and "<|image_pad|>" in text.replace(
        "<|image_pad|>" * 4, ""
    )
    for choice, words in (("error", "special_tokens_in_text"), ("keep", "must not spell")):
        with pytest.raises(InputError, match=rf"rows.jsonl:1: .*{words}"):
            encode(processor, row, special_tokens_in_text=choice)


def test_only_the_images_before_a_trained_turn_are_read(folder, processor):
    turns = Turn("which?", "seven", ("a.png",)), Turn("and?", "two", ("b.png", "c.png"))
    row = make_conversation(folder, *turns, Turn("now?", None, ("missing.png",)))
    (example,), _ = encode(processor, row, train_on="last")
    assert image_tokens(example) == [4, 6, 3]
    untrained = replace(row.messages[3], in_loss=False)
    (example,), _ = encode(
        processor, replace(row, messages=(*row.messages[:3], untrained), images=row.images[:3])
    )
    assert image_tokens(example) == [4]


def test_images_behind_the_last_answer_are_not_read(folder, processor):
    turns = Turn("which?", "seven", ("a.png",)), Turn("and?", None, ("missing.png",))
    (example,), _ = encode(processor, make_conversation(folder, *turns))
    assert image_tokens(example) == [4]


@pytest.mark.parametrize("max_length", range(34, 75))
def test_truncation_never_cuts_an_image(folder, processor, max_length):
    turns = Turn("which?", "seven", ("a.png",)), Turn("and?", "one or two", ("b.png",), last=True)
    whole = encode(processor, make_conversation(folder, *turns))[0][0]
    examples, outcomes = encode(processor, make_conversation(folder, *turns), max_length=max_length)
    if not examples:
        assert outcomes == ("unanswered",)
        return
    (example,) = examples
    length = len(example.input_ids)
    assert length <= max_length and (length == len(whole.input_ids) or outcomes == ("truncated",))
    assert example.input_ids.tolist() == whole.input_ids[:length].tolist()
    assert example.labels[-1] == example.input_ids[-1]
    assert image_tokens(example) in ([4], [4, 6])
    assert image_layout(processor).count(example.input_ids) == sum(image_tokens(example))
    assert len(example.media.token_types) == length
    assert len(example.media.tensors()["image_grid_thw"]) == len(example.media.images)


def test_media_cannot_be_cut_inside_an_image(folder, processor):
    (example,), _ = encode(
        processor, make_conversation(folder, Turn("which?", "seven", ("a.png",)))
    )
    ((first, past),) = example.media.images[0].ranges
    with pytest.raises(ValueError, match="inside an image"):
        example.media.cut(past - 1)
    assert example.media.cut(first).images == () and len(example.media.cut(past).images) == 1


@pytest.mark.parametrize("too_long", ["truncate", "error", "drop"])
def test_an_image_that_leaves_no_room_for_an_answer_is_refused_or_dropped(
    folder, processor, too_long
):
    row = make_conversation(folder, Turn("which?", "seven", ("b.png",)))
    options = {"max_length": 6, "too_long": too_long}
    if too_long == "drop":
        assert encode(processor, row, **options) == ((), ("dropped",))
        return
    with pytest.raises(InputError, match=r"images\[0\].*data.max_length = 6 tokens, got 6 \(84 x"):
        encode(processor, row, **options)


def test_a_model_of_text_refuses_images_and_a_model_of_images_reads_text(
    folder, processor, tmp_path
):
    tokenizer = make_tokenizer(tmp_path)
    row = make_conversation(folder, Turn("which?", "seven", ("a.png",)))
    with pytest.raises(InputError, match=r"rows.jsonl:1: .*has images, and the model reads none"):
        encode(tokenizer, row)
    text = make_conversation(folder, Turn("which?", "seven"))
    (example,), _ = encode(processor, text)
    assert example.media.images == () and not example.media.token_types.any()
    assert encode(tokenizer, text)[0][0].media is None


@pytest.mark.parametrize("kind", ["file", "bytes", "bytes in a folder"])
def test_a_reference_in_json_gives_the_same_pixels(folder, processor, tmp_path, kind):
    row = make_conversation(folder, Turn("which?", "seven", ("a.png", "b.png")))
    if kind != "file":
        images = tuple(Image(content=(folder / i.path).read_bytes()) for i in row.images)
        row = replace(row, images=images)
    (example,), _ = encode(processor, row)
    reference = example.media.reference(tmp_path / "kept" if "folder" in kind else None)
    again = ImageMedia.from_reference(json.loads(json.dumps(reference)), image_layout(processor))
    assert np.array_equal(again.token_types, example.media.token_types)
    for name, tensor in example.media.tensors().items():
        assert torch.equal(again.tensors()[name], tensor)
    assert len(list(tmp_path.glob("kept/*"))) == (2 if "folder" in kind else 0)


def test_a_file_that_changed_before_training_stops_the_batch(folder, processor, tmp_path):
    write_image(tmp_path / "a.png", 56, 56)
    row = make_conversation(tmp_path, Turn("which?", "seven", ("a.png",)))
    (example,), _ = encode(processor, row)
    write_image(tmp_path / "a.png", 84, 56)
    with pytest.raises(InputError, match=r"a\.png"):
        collate([example], [0], 0)


def test_only_models_of_images_get_a_processor(folder, tmp_path):
    make_tokenizer(tmp_path)
    assert not reads_images(str(tmp_path)) and reads_images(str(folder / "model"))
    assert not hasattr(load_tokenizer_or_processor(str(tmp_path)), "image_processor")


def test_a_processor_that_cannot_be_loaded_is_one_line(folder, tmp_path, monkeypatch):
    for file in (folder / "model").iterdir():
        if file.name not in ("preprocessor_config.json", "model.safetensors"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match="no image processor could be loaded") as caught:
        load_processor(str(tmp_path))
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs Pillow: pip install 'merit_fast\[images\]'"):
        load_processor(str(folder / "model"))
