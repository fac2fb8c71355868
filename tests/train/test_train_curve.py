"""Fifty steps of ``train`` with and without our kernels give one loss curve."""

import json

import pytest
import torch
from support.checks import tree_bytes
from support.runs import Notes
from support.tiny import make_model, make_tokenizer
from support.training import dataset, job, train, weights

from merit_fast.train import TrainConfig, train_branch

STEPS = 50
RECIPE = dict(
    epochs=10, batch_size=4, learning_rate=5e-3, max_shard_size="60KB", checkpoint_steps=20
)


def curves(base, tmp_path, **changes):
    rows, found = dataset("a", 0, rows=20), {}
    for kernels in ("auto", "eager"):
        config = TrainConfig(**{**RECIPE, **changes, "kernels": kernels})
        assert train(base, tmp_path / kernels, config, rows).steps == STEPS
        found[kernels] = json.loads((tmp_path / kernels / "losses.json").read_text())
    return found


def test_kernels_change_only_the_rounding_of_fifty_steps(tiny_model, tmp_path):
    found = curves(tiny_model, tmp_path, dtype="fp32")
    assert (
        found["eager"][-1] < 0.7 * found["eager"][0]
    )  # it has learned: a frozen curve would agree as well
    assert found["auto"] == pytest.approx(found["eager"], rel=2e-4)
    trained, expected = weights(tmp_path / "auto"), weights(tmp_path / "eager")
    for name, weight in weights(tiny_model).items():
        moved, wanted = trained[name] - weight, expected[name] - weight
        assert (
            torch.nn.functional.cosine_similarity(moved.flatten(), wanted.flatten(), dim=0) > 0.999
        ), name


def test_in_bf16_as_well(tmp_path):
    base = tmp_path / "base"
    make_tokenizer(base)
    make_model(base, dtype=torch.bfloat16)
    found = curves(base, tmp_path, dtype="bf16")
    assert found["eager"][-1] < 0.7 * found["eager"][0]
    assert found["auto"] == pytest.approx(found["eager"], rel=2e-2)


def test_the_output_names_the_kernels_beside_the_result_only(tiny_model, tmp_path):
    """The branch looks like an unpatched run's; only timing.json lists the kernels."""
    curves(tiny_model, tmp_path, dtype="fp32")
    timing = {
        k: json.loads((tmp_path / k / "timing.json").read_text())["kernels"]
        for k in ("auto", "eager")
    }
    assert timing == {"auto": {"rms_norm": 5, "swiglu": 2, "rope": 2, "head": 1}, "eager": {}}
    trees = [
        tree_bytes(tmp_path / kernels, ("timing.json", "losses.json"))
        for kernels in ("auto", "eager")
    ]
    assert trees[0].keys() == trees[1].keys()
    differing = {name for name in trees[0] if trees[0][name] != trees[1][name]}
    assert all(name.endswith(".safetensors") for name in differing), differing


def test_a_run_shows_a_note_once_and_the_next_run_shows_it_again(tiny_model, tmp_path):
    display = Notes()
    rows = dataset("a", 0, rows=4)
    config = TrainConfig(dtype="fp32", batch_size=4)
    for run in ("first", "second"):
        noted = set()
        for branch in ("b0", "b1"):
            directory = tmp_path / run / branch
            directory.mkdir(parents=True)
            train_branch(job(tiny_model, rows), config, directory, display, noted)
    assert display.notes == 2 * ["kernels: rms_norm x 5, swiglu x 2, rope x 2, head x 1"]
