"""Sketches of rows with images equal those of exact gradients, with the tower and without."""

from dataclasses import replace

import pytest
import torch
from support.checks import assert_close
from support.runs import Notes
from support.sketch.exact_gradients import SKETCH, sketch_of_loss
from support.vision.layouts import LAYOUTS
from support.vision.rows import as_example, processed_rows

from merit_fast.data import Dataset, collate
from merit_fast.data.images import load_processor
from merit_fast.manifests.sketch_state import SketchState
from merit_fast.model import freeze_parameters, load_model, target_losses, tower_parameters
from merit_fast.progress import SilentProgress
from merit_fast.sketch import SketchConfig, sketch_mixture
from merit_fast.sketch.gradients import GradientSketcher

# The image_newline of these is a parameter outside any module that maps tensors.
TOWERS = [name for name in LAYOUTS if name not in ("llava_next", "llava_onevision")]


def load_case(folder, name, freeze):
    rows = processed_rows(load_processor(str(folder)))
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
        assert not tower_parameters(model).keys() & set(sketcher.parameter_names)
    for mine, example in zip(result, examples, strict=True):
        count = int((example.labels >= 0).sum())
        exact = sketch_of_loss(model, lambda e=example, n=count: mean_loss(model, e) * n)
        assert_close(mine, exact[0])


@pytest.mark.parametrize("name", TOWERS)
def test_the_stage_with_the_tower(vision_folders, tmp_path, name):
    """The sum of the file is that of the rows' exact gradients, by tokens, whatever images."""
    folder = vision_folders(name)
    model, examples = load_case(folder, name, [])
    config = SketchConfig(examples=4, proj_dim=4096, seed=7, batch_size=4, blocks=2, dtype="fp32")
    datasets = [Dataset("digits", examples)]
    arguments = (str(folder), "print", datasets, 0, config, tmp_path, SilentProgress())
    sketch_mixture(*arguments, freeze=[])
    state = SketchState.read(tmp_path / "digits.safetensors")
    exact = torch.zeros(4096, dtype=torch.float64)
    for example in examples:
        count = int((example.labels >= 0).sum())  # what a row counts
        exact += count * sketch_of_loss(model, lambda e=example: mean_loss(model, e))[0].double()
    assert_close(state.block_sums.sum(0).float(), exact.float())


def test_other_images_under_the_same_text_are_sketched_again(vision_folders, tmp_path):
    """An earlier sketch is reused for the same images only."""
    folder = vision_folders("qwen2_5_vl")
    _, examples = load_case(folder, "qwen2_5_vl", None)
    pixels = examples[0].media.pixels
    darker = pixels | {"pixel_values": pixels["pixel_values"] - 1}
    media = replace(examples[0].media, pixels=darker)
    others = [replace(examples[0], media=media), *examples[1:]]
    config = SketchConfig(examples=4, proj_dim=4096, blocks=4, dtype="fp32")
    bytes_of = []
    for number, rows in enumerate((examples, examples, others)):
        out = tmp_path / str(number)
        out.mkdir()
        earlier = [tmp_path / str(number - 1)] if number else []
        notes = Notes()
        arguments = (str(folder), "print", [Dataset("digits", rows)], 0, config, out, notes)
        sketch_mixture(*arguments, earlier)
        assert any("reused" in note for note in notes.notes) == (number == 1)
        bytes_of.append((out / "digits.safetensors").read_bytes())
    assert bytes_of[0] == bytes_of[1] != bytes_of[2]
