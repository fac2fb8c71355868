"""The loss of batches with images equals the unbatched model's own, patched or not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.vision.layouts import LAYOUTS
from support.vision.rows import ROWS, as_example, processed_rows

from merit_fast.data import Dataset, Example, collate, load_tokenizer_or_processor, pack
from merit_fast.data.images import load_processor
from merit_fast.errors import InputError, MeritFastError
from merit_fast.evaluate.losses import score_rows
from merit_fast.evaluate.retention import greedy_answers
from merit_fast.model import load_model, model_inputs, target_losses
from merit_fast.patch.model import patch_model
from merit_fast.train.loss import batch_loss, require_packing, require_text

EVERY_LAYOUT = pytest.mark.parametrize("name", LAYOUTS)
TOLERANCE = {"rtol": 0, "atol": 5e-6}


@pytest.fixture(scope="module")
def case(vision_folders):
    """Layout -> model, examples, and the mean loss that the model itself gives each row."""
    made = {}

    def make(name):
        if name not in made:
            folder = vision_folders(name)
            rows = processed_rows(load_processor(str(folder)))
            model = load_model(str(folder), "fp32")
            with torch.no_grad():
                own = torch.stack([model(**row).loss for row in rows])
            made[name] = model, [as_example(row) for row in rows], own
        return made[name]

    return make


def mean_losses(losses, count):
    sums = torch.zeros(count).index_add(0, losses.example, losses.loss.detach())
    return sums / torch.bincount(losses.example, minlength=count)


@EVERY_LAYOUT
def test_a_batch_of_rows_with_and_without_images(case, name):
    model, examples, own = case(name)
    batch = collate(examples, [0] * len(examples), 0)
    with torch.no_grad():
        losses = target_losses(model, batch)
    torch.testing.assert_close(mean_losses(losses, len(ROWS)), own, **TOLERANCE)


@EVERY_LAYOUT
def test_a_batch_of_text_after_images_and_images_after_text(case, name):
    """No state of an earlier batch moves a later one's loss."""
    model, examples, own = case(name)
    for row in (2, 1, 0, 1):
        with torch.no_grad():
            losses = target_losses(model, collate([examples[row]], [0], 0))
        torch.testing.assert_close(losses.loss.mean(), own[row], **TOLERANCE)


@EVERY_LAYOUT
def test_our_kernels_in_the_language_tower(case, name):
    """The loss without logits and its gradients are the plain model's."""
    model, examples, own = case(name)
    batch = collate(examples, [0] * len(examples), 0)
    target_losses(model.train(), batch).loss.sum().backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with patch_model(model) as patch:
        assert patch.replaced["head"] == 1 and patch.replaced["rope"] == 2
        loss = batch_loss(model, batch, 1)
        loss.loss.backward()
    targets = torch.tensor([targets for _, targets in ROWS])
    assert float(loss.dataset_losses) == pytest.approx(float((own * targets).sum()), abs=1e-4)
    for key, parameter in model.named_parameters():
        if key in expected:
            torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-3, atol=1e-4)
    model.zero_grad()
    model.eval()


def test_packed_rows_with_images_are_refused(case):
    _, examples, _ = case("qwen2_5_vl")
    text = Dataset("text", examples[1:2])
    require_text([text])
    with pytest.raises(InputError, match="must be false for dataset digits: its rows hold images"):
        require_text([text, Dataset("digits", examples)])


def test_text_is_packed_in_a_model_that_reads_images(case):
    """With M-RoPE too, an example in a packed row has the loss that it has by itself."""
    model, examples, own = case("qwen2_5_vl")
    text = Example(examples[1].input_ids, examples[1].labels)
    require_packing(model, [text, text])
    with torch.no_grad():
        losses = target_losses(model, pack([text, text], [0, 0]))
    torch.testing.assert_close(mean_losses(losses, 2), own[[1, 1]], **TOLERANCE)


def test_pixel_inputs_of_another_model_are_refused_by_name(case):
    model, _, _ = case("llava")
    _, examples, _ = case("qwen2_5_vl")
    with pytest.raises(MeritFastError, match="takes no image_grid_thw"):
        target_losses(model, collate(examples[:1], [0], 0))


def test_teacher_forced_exact_match_is_what_generation_writes(case):
    """Behind images too, a row is exact if and only if greedy decoding writes its answer."""
    model, examples, _ = case("qwen2_5_vl")
    rows = []
    for number, example in enumerate(examples):
        prompt = Example(example.input_ids, example.labels, media=example.media)
        inputs, _ = model_inputs(model, collate([prompt], [0], 0, pad_to_multiple_of=1))
        inputs |= {"logits_to_keep": 0, "use_cache": True}
        written = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        answer = written[0, len(example.input_ids) :].numpy().astype(np.int32)
        answer[-1] += number == 3  # the last row's answer is another one
        rows.append(answered(example, answer))
    scores = score_rows(model, [rows], 0, batch_size=4)
    assert scores.exact.tolist() == [1, 1, 1, 0]


def answered(example, answer):
    """The example's text as prompt, with other tokens as the answer."""
    labels = np.concatenate([np.full_like(example.input_ids, -100), answer])
    ids = np.concatenate([example.input_ids, answer])
    types = np.concatenate([example.media.token_types, np.zeros(len(answer), np.int8)])
    return Example(ids, labels, media=replace(example.media, token_types=types))


def test_answers_to_prompts_of_text_do_not_depend_on_earlier_images(case, vision_folders):
    """A cached beginning would otherwise take the offset of the last images' positions."""
    model, examples, _ = case("qwen2_5_vl")
    tokenizer = load_tokenizer_or_processor(str(vision_folders("qwen2_5_vl"))).tokenizer
    ends = [tokenizer.eos_token_id]
    prompts = [[5, 6, 7, 8, 9, 10, last] for last in (11, 12, 13, 14)]
    fresh = load_model(str(vision_folders("qwen2_5_vl")), "fp32")
    expected = greedy_answers(fresh, ends, prompts, 0, 6, share=True)
    with torch.no_grad():
        target_losses(model, collate(examples, [0] * 4, 0))
        model(**model_inputs(model, collate(examples, [0] * 4, 0))[0])
    assert model.model.rope_deltas is not None
    assert greedy_answers(model, ends, prompts, 0, 6, share=True) == expected
