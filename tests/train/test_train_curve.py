"""Fifty steps of ``train`` with and without our kernels give one loss curve."""

import json

import pytest
import torch
from support.checks import assert_never_worse, rounding_share, tree_bytes
from support.runs import Notes
from support.tiny import make_model, make_tokenizer
from support.training import dataset, job, train, weights

from merit_fast.train import TrainConfig, train_branch

STEPS = 50
RECIPE = dict(
    epochs=10, batch_size=4, learning_rate=5e-3, max_shard_size="60KB", checkpoint_steps=20
)


def curve(base, folder, rows, **changes):
    """The losses of fifty steps."""
    config = TrainConfig(**{**RECIPE, **changes})
    assert train(base, folder, config, rows).steps == STEPS
    return json.loads((folder / "losses.json").read_text())


def curves(base, tmp_path, **changes):
    rows = dataset("a", 0, rows=20)
    return {
        kernels: curve(base, tmp_path / kernels, rows, kernels=kernels, **changes)
        for kernels in ("auto", "eager")
    }


def test_kernels_change_only_the_rounding_of_fifty_steps(tiny_model, tmp_path):
    losses = curves(tiny_model, tmp_path, dtype="fp32")
    # The model has learned: frozen curves would agree as well.
    assert losses["eager"][-1] < 0.7 * losses["eager"][0]
    assert losses["auto"] == pytest.approx(losses["eager"], rel=2e-4)
    trained = weights(tmp_path / "auto")
    expected = weights(tmp_path / "eager")
    for name, weight in weights(tiny_model).items():
        moved = (trained[name] - weight).flatten()
        wanted = (expected[name] - weight).flatten()
        assert torch.nn.functional.cosine_similarity(moved, wanted, dim=0) > 0.999, name


def test_bf16_curves_stay_as_close_to_fp32_as_eagers(tmp_path):
    """Pools four models: small roundings grow over fifty steps, on one model in eager's favour."""
    results = []
    for seed in range(4):
        folder = tmp_path / str(seed)
        make_tokenizer(folder / "base")
        make_model(folder / "base", dtype=torch.bfloat16, seed=seed)
        rows = dataset("a", seed, rows=20)
        ours = curve(folder / "base", folder / "auto", rows, dtype="bf16")
        eager = curve(folder / "base", folder / "eager", rows, dtype="bf16", kernels="eager")
        truth = curve(folder / "base", folder / "fp32", rows, dtype="fp32", kernels="eager")
        assert eager[-1] < 0.7 * eager[0]
        results.append(torch.tensor([ours, eager, truth]))
    ours, eager, truth = torch.cat(results, dim=1)
    assert_never_worse(ours, eager, truth, rounding_share(len(results)))


def test_the_output_names_the_kernels_beside_the_result_only(tiny_model, tmp_path):
    """The branch looks like an unpatched run's; only timing.json lists the kernels."""
    curves(tiny_model, tmp_path, dtype="fp32")
    timing = {
        k: json.loads((tmp_path / k / "timing.json").read_text())["kernels"]
        for k in ("auto", "eager")
    }
    replaced = {"rms_norm": 5, "add_rms_norm": 2, "swiglu": 2, "rope": 2, "head": 1}
    assert timing == {"auto": replaced, "eager": {}}
    trees = [
        tree_bytes(tmp_path / kernels, ("timing.json", "metrics.jsonl", "losses.json"))
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
    assert display.notes == 2 * [
        "kernels: rms_norm x 5, add_rms_norm x 2, swiglu x 2, rope x 2, head x 1"
    ]
