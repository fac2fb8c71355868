"""Rows with images through every layout, against the model's own loss on its processor's output."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image as pillow
from support.vision.image_rows import Turn, make_conversation, write_image
from support.vision.layouts import LAYOUTS
from support.vision.models import make_vision_model

from merit_fast.data import DataConfig, DatasetConfig, collate, pack, pad_token_id
from merit_fast.data.encode import RowEncoder
from merit_fast.data.images import image_layout, load_tokenizer_or_processor

SIZES = {"wide.png": (100, 60), "tall.jpg": (40, 90), "small.png": (28, 28), "even.png": (64, 64)}


@pytest.fixture(scope="module", params=LAYOUTS)
def vision(request, tmp_path_factory):
    """The model, its processor, and conversations with 0 to 3 images in one and several turns."""
    folder = tmp_path_factory.mktemp(request.param)
    model = make_vision_model(folder / "model", request.param)
    processor = load_tokenizer_or_processor(str(folder / "model"))
    for name, size in SIZES.items():
        write_image(folder / name, *size)
    rows = (
        (Turn("no image", "text only"),),
        (Turn("which digit?", "seven", ("tall.jpg",)),),
        (
            Turn("compare", "the second", ("wide.png", "small.png")),
            Turn("and now?", "still", ("even.png",), last=True),
            Turn("sure?", "yes, sure"),
        ),
        (Turn("two of them", "ok", ("even.png", "wide.png"), last=True),),
        (Turn("again", "no", ("tall.jpg",)), Turn("unanswered", None)),
    )
    return model, processor, [make_conversation(folder, *turns) for turns in rows], folder


def encode(processor, conversations, **options):
    encoder = RowEncoder(DatasetConfig(name="a", path="a"), DataConfig(**options), processor)
    rows = encoder.encode_read(conversations)
    assert [row.error for row in rows] == [None] * len(rows)
    assert [len(row.examples) for row in rows] == [1] * len(rows)
    return [row.examples[0] for row in rows]


def losses(model, batch):
    with torch.no_grad():
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        logits = model(**inputs, **batch.media).logits
    pairs = zip(logits, batch.labels, strict=True)
    return [float(torch.nn.functional.cross_entropy(row[:-1], labels[1:])) for row, labels in pairs]


def make_batch(processor, examples):
    return collate(examples, [0] * len(examples), pad_token_id(processor.tokenizer))


def processor_output(processor, conversation, folder):
    """The model's inputs as transformers makes them from the conversation."""
    messages = [
        {
            "role": message.role,
            "content": list(message.content)
            if isinstance(message.content, tuple)
            else [{"type": "text", "text": message.content}],
        }
        for message in conversation.messages
    ]
    text = processor.tokenizer.apply_chat_template(
        messages, tokenize=False, chat_template=processor.chat_template
    )
    images = [pillow.open(folder / image.path) for image in conversation.images]
    return processor(
        text=[text],
        images=[images] if images else None,
        return_tensors="pt",
        add_special_tokens=False,
    )


def test_loss_of_a_mixed_batch_is_the_models_own_loss_of_each_row(vision):
    model, processor, conversations, folder = vision
    examples = encode(processor, conversations)
    batched = losses(model, make_batch(processor, examples))
    for conversation, example, loss in zip(conversations, examples, batched, strict=True):
        inputs = processor_output(processor, conversation, folder)
        length = len(example.input_ids)
        assert inputs["input_ids"][0, :length].tolist() == example.input_ids.tolist()
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[0, :length] = torch.as_tensor(example.labels)
        with torch.no_grad():
            assert loss == pytest.approx(float(model(**inputs, labels=labels).loss), abs=3e-6)


def test_targets_are_the_answers_and_their_ends(vision):
    _, processor, conversations, _ = vision
    for conversation, example in zip(conversations, encode(processor, conversations), strict=True):
        text = processor.tokenizer.decode(example.labels[example.labels >= 0])
        end = processor.tokenizer.eos_token
        answers = [m.content for m in conversation.messages if m.role == "assistant"]
        assert [answer.strip() for answer in text.split(end)] == [*answers, ""]
        assert not image_layout(processor).is_image(example.labels).any()


def test_a_cut_row_has_the_tokens_of_the_images_that_are_left(vision):
    """LLaVA-OneVision writes more tokens for an image without others; such a cut is refused."""
    model, processor, _, folder = vision
    turns = Turn("which?", "seven", ("even.png",)), Turn("and?", "one", ("wide.png",))
    conversation = make_conversation(folder, *turns)
    (whole,) = encode(processor, [conversation])
    options = DataConfig(max_length=whole.media.images[1].ranges[0][0])
    encoder = RowEncoder(DatasetConfig(name="a", path="a"), options, processor)
    (row,) = encoder.encode_read([conversation])
    if image_layout(processor).shrinks_several:
        assert "must keep two or none of its 2 images within data.max_length" in str(row.error)
        return
    (example,) = row.examples
    assert len(example.media.images) == 1
    assert np.isfinite(losses(model, make_batch(processor, [example]))).all()


def test_every_pixel_matters(vision, tmp_path):
    model, processor, _, _ = vision
    conversation = make_conversation(tmp_path, Turn("which?", "seven", ("a.png",)))
    found = []
    for seed in (0, 1):
        write_image(tmp_path / "a.png", 64, 64, seed=seed)
        found += losses(model, make_batch(processor, encode(processor, [conversation])))
    assert abs(found[0] - found[1]) > 1e-4


def test_batches_with_and_without_images_may_follow_each_other(vision):
    model, processor, conversations, _ = vision
    text, image = (make_batch(processor, [row]) for row in encode(processor, conversations[:2]))
    alone = [losses(model, text), losses(model, image)]
    assert [losses(model, batch) for batch in (image, text, text, image)] == [
        alone[1],
        alone[0],
        alone[0],
        alone[1],
    ]
    name = image_layout(processor).token_types_name
    assert set(text.media) == ({name} if name else set())
    assert all(not types.any() for types in text.media.values())


def test_training_mode_accepts_text_rows_and_images(vision):
    model, processor, conversations, _ = vision
    model.train()
    try:
        found = losses(model, make_batch(processor, encode(processor, conversations[:2])))
    finally:
        model.eval()
    assert np.isfinite(found).all()


def test_a_processor_can_be_sent_to_another_process(vision):
    _, processor, conversations, _ = vision
    again = pickle.loads(pickle.dumps(processor))
    ours, theirs = encode(processor, conversations), encode(again, conversations)
    assert [a.input_ids.tolist() for a in ours] == [b.input_ids.tolist() for b in theirs]


def test_packing_refuses_images(vision):
    _, processor, conversations, _ = vision
    with pytest.raises(ValueError, match=r"^pack: .* without .*(images|media)"):
        pack(encode(processor, conversations[:2]), [0, 0])
