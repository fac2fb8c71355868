"""The loss of batches with images equals the unbatched model's own, patched or not."""

import pytest
import torch
from support.vision import LAYOUTS
from support.vision_rows import ROWS, as_example, load_processor, processed_rows

from merit_fast.data import collate
from merit_fast.errors import InputError, MeritFastError
from merit_fast.model import load_model, target_losses
from merit_fast.patch.model import patch_model
from merit_fast.train.loss import batch_loss, require_packing

EVERY_LAYOUT = pytest.mark.parametrize("name", LAYOUTS)
TOLERANCE = {"rtol": 0, "atol": 5e-6}


@pytest.fixture(scope="module")
def case(vision_folders):
    """Layout -> model, examples, and the mean loss that the model itself gives each row."""
    made = {}

    def make(name):
        if name not in made:
            folder = vision_folders(name)
            rows = processed_rows(load_processor(folder, LAYOUTS[name]))
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
        loss, total = batch_loss(model, batch, 1)
        loss.backward()
    targets = torch.tensor([targets for _, targets in ROWS])
    assert total == pytest.approx(float((own * targets).sum()), abs=1e-4)
    for key, parameter in model.named_parameters():
        if key in expected:
            torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-3, atol=1e-4)
    model.zero_grad()
    model.eval()


def test_packed_rows_with_images_are_refused(case):
    model, examples, _ = case("qwen2_5_vl")
    with pytest.raises(InputError, match="train.packing: must be false where rows hold images"):
        require_packing(model, examples)
    require_packing(model, [examples[1], examples[1]])


def test_pixel_inputs_of_another_model_are_refused_by_name(case):
    model, _, _ = case("llava")
    _, examples, _ = case("qwen2_5_vl")
    with pytest.raises(MeritFastError, match="takes no image_grid_thw"):
        target_losses(model, collate(examples[:1], [0], 0))
