"""Sketches of rows with images equal those of exact gradients, with the tower and without."""

import pytest
import torch
from support.checks import assert_close
from support.sketch.exact_gradients import SKETCH, sketch_of_loss
from support.vision import LAYOUTS
from support.vision_rows import as_example, load_processor, processed_rows

from merit_fast.data import Dataset, collate
from merit_fast.manifests.sketch_state import SketchState
from merit_fast.model import freeze_parameters, load_model, target_losses
from merit_fast.progress import Progress
from merit_fast.sketch import SketchConfig, sketch_mixture
from merit_fast.sketch.gradients import GradientSketcher

# LLaVA-NeXT's image_newline is a parameter outside any module that maps tensors
TOWERS = [name for name in LAYOUTS if name != "llava_next"]


def load_case(folder, name, freeze):
    rows = processed_rows(load_processor(folder, LAYOUTS[name]))
    model = load_model(str(folder), "fp32")
    freeze_parameters(model, freeze)
    return model, [as_example(row) for row in rows]


def mean_loss(model, example):
    return target_losses(model, collate([example], [0], 0)).loss.mean()


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_language_model_from_one_batch(vision_folders, name):
    model, examples = load_case(vision_folders(name), name, None)
    with GradientSketcher(model, SKETCH) as sketcher:
        target_losses(model, collate(examples, [0] * 4, 0)).loss.sum().backward()
        result = sketcher.take()
        assert not any("vis" in key or "proj" in key.split(".")[1] for key in sketcher.parameter_names)
    for mine, example in zip(result, examples, strict=True):
        count = int((example.labels >= 0).sum())
        exact = sketch_of_loss(model, lambda e=example, n=count: mean_loss(model, e) * n)
        assert_close(mine, exact[0])


@pytest.mark.parametrize("name", TOWERS)
def test_the_stage_with_the_tower(vision_folders, tmp_path, name):
    """The sum of the file is that of the rows' exact gradients, whatever images they hold."""
    folder = vision_folders(name)
    model, examples = load_case(folder, name, [])
    config = SketchConfig(examples=4, proj_dim=4096, seed=7, batch_size=4, blocks=2, dtype="fp32")
    datasets = [Dataset("digits", examples)]
    arguments = (str(folder), "print", datasets, 0, config, tmp_path, Progress(quiet=True))
    sketch_mixture(*arguments, freeze=[])
    state = SketchState.from_bytes((tmp_path / "digits.safetensors").read_bytes())
    exact = torch.zeros(4096, dtype=torch.float64)
    for example in examples:
        exact += sketch_of_loss(model, lambda e=example: mean_loss(model, e))[0].double()
    assert_close(torch.as_tensor(state.sums).sum(0).float(), exact.float())
