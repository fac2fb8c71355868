"""metrics.jsonl, held-out losses, early stop and trackers of a branch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.checks import tree_bytes
from support.runs import MEASURED
from support.tiny import make_model, make_tokenizer
from support.training import (
    CONFIG,
    dataset,
    held_out_rows,
    job,
    read_metrics,
    stop_after,
    train,
    weights,
)
from torch.nn import functional as F

from merit_fast.data import Dataset, Example
from merit_fast.errors import InputError, MeritFastError
from merit_fast.model import load_model
from merit_fast.progress import SilentProgress
from merit_fast.train import TrainConfig, loop, train_branch
from merit_fast.train.adapter.config import AdapterConfig
from merit_fast.train.schedule import learning_rate


def own_losses(model_path, rows):
    """Nats of every target token of single rows, by plain transformers."""
    model = load_model(str(model_path), "fp32")
    losses = []
    for example in rows.examples:
        ids = torch.tensor(example.input_ids)[None].long()
        labels = torch.tensor(example.labels[1:]).long()
        logits = model(ids).logits[0, :-1]
        losses.append(F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100))
    return model, losses


@pytest.mark.parametrize("kernels", ["auto", "eager"])
@pytest.mark.parametrize("packing", [False, True])
def test_a_line_of_metrics_is_what_single_rows_give(tiny_model, tmp_path, kernels, packing):
    sets = [dataset("a", 0, rows=4), dataset("b", 1, rows=3)]
    config = replace(CONFIG, epochs=1, batch_size=7, kernels=kernels, packing=packing, clip_norm=0)
    train(tiny_model, tmp_path / "out", config, *sets)
    (line,) = read_metrics(tmp_path / "out")
    joined = Dataset("all", (*sets[0].examples, *sets[1].examples))
    model, losses = own_losses(tiny_model, joined)
    counts = [rows.num_target_tokens for rows in sets]
    (sum(losses) / sum(counts)).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    sums = [float(sum(losses[:4]).detach()), float(sum(losses[4:]).detach())]
    expected = [total / count for total, count in zip(sums, counts, strict=True)]
    assert line["dataset_losses"] == pytest.approx(expected, rel=1e-5)
    assert line["dataset_tokens"] == counts and line["num_target_tokens"] == sum(counts)
    assert line["loss"] == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    assert line["norm"] == pytest.approx(float(norm), rel=1e-4)
    assert line["step"] == 1 and line["learning_rate"] == learning_rate(0, 1, config)
    assert line["num_tokens"] == sum(rows.num_tokens for rows in sets) and line["seconds"] > 0


ADAPTER = AdapterConfig("lora", rank=4, targets=("q_proj", "down_proj"))
RECIPES = {
    "all weights": TrainConfig(
        epochs=6, batch_size=4, learning_rate=1e-2, dtype="fp32", checkpoint_steps=3,
        evaluate_steps=2, patience=2,
    ),
    "adapter, 8 bit": TrainConfig(
        epochs=6, batch_size=4, learning_rate=3e-2, dtype="fp32", checkpoint_steps=3,
        evaluate_steps=2, patience=2, adapter=ADAPTER, optimizer="adamw-8bit", packing=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_an_early_stop_keeps_the_best_weights_also_after_kills(
    tiny_model, tmp_path, monkeypatch, name
):
    config = RECIPES[name]
    work = replace(job(tiny_model, dataset("a", 0)), held_out=(held_out_rows(),))
    for folder in ("whole", "broken"):
        (tmp_path / folder).mkdir()
    manifest = train_branch(work, config, tmp_path / "whole", SilentProgress())
    lines = read_metrics(tmp_path / "whole")
    measured = [(line["step"], line["held_out_loss"]) for line in lines if "held_out_loss" in line]
    best_step, best_loss = min(measured, key=lambda pair: pair[1])
    assert manifest.steps == best_step
    assert manifest.steps_run == len([line for line in lines if "loss" in line]) < 18
    assert measured[-1][0] == manifest.steps_run and len(measured) - 2 == best_step // 2
    kept = [line for line in lines if "loss" in line and line["step"] <= best_step]
    assert manifest.num_target_tokens == sum(line["num_target_tokens"] for line in kept)
    _, losses = own_losses(tmp_path / "whole", held_out_rows())
    mean = float(sum(losses).detach()) / held_out_rows().num_target_tokens
    assert mean == pytest.approx(best_loss, rel=1e-4)
    for step in (3, manifest.steps_run):
        stop_after(step, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            train_branch(work, config, tmp_path / "broken", SilentProgress())
        monkeypatch.undo()
        with (tmp_path / "broken" / "metrics.jsonl").open("a") as file:
            file.write('{"step": 5, "lo')  # cut by a kill
    train_branch(work, config, tmp_path / "broken", SilentProgress())
    assert tree_bytes(tmp_path / "whole", MEASURED) == tree_bytes(tmp_path / "broken", MEASURED)
    again = read_metrics(tmp_path / "broken")
    assert [line | {"seconds": 0} for line in again] == [line | {"seconds": 0} for line in lines]


def test_a_measurement_changes_nothing_of_the_training(tiny_model, tmp_path):
    rows = dataset("a", 0)
    config = replace(CONFIG, evaluate_steps=2)
    train(tiny_model, tmp_path / "plain", CONFIG, rows)
    (tmp_path / "watched").mkdir()
    work = replace(job(tiny_model, rows), held_out=(held_out_rows(),))
    manifest = train_branch(work, config, tmp_path / "watched", SilentProgress())
    assert manifest.steps_run is None
    plain = weights(tmp_path / "plain")
    watched = weights(tmp_path / "watched")
    assert all(torch.equal(plain[key], watched[key]) for key in plain)


def test_held_out_rows_must_be_there(tiny_model, tmp_path):
    config = replace(CONFIG, evaluate_steps=2)
    with pytest.raises(InputError, match="needs held-out rows of every dataset of merit-0, b has"):
        work = replace(
            job(tiny_model, dataset("a", 0), dataset("b", 1)), held_out=(held_out_rows(),)
        )
        train_branch(work, config, tmp_path, SilentProgress())
    with pytest.raises(InputError, match="patience: must be absent without evaluate_steps, got 2"):
        TrainConfig(patience=2)
    with pytest.raises(InputError, match="evaluate_steps: must be at least 1, got 0"):
        TrainConfig(evaluate_steps=0)


@pytest.mark.parametrize("kernels", ["auto", "eager"])
def test_a_gradient_that_is_not_finite_stops_and_keeps_the_checkpoint(
    tiny_model, tmp_path, monkeypatch, kernels
):
    """The last step's NaN gradient, too: its loss is finite."""
    config = replace(CONFIG, kernels=kernels, checkpoint_steps=2, batch_size=4)
    plain = loop.train_step
    saved = {}

    def poisons(trained, optimizer, batches, names, steps, config, position, ranks):
        if position.step == steps - 1:
            saved["bytes"] = (tmp_path / "resume.safetensors").read_bytes()
            weight = trained.model.get_submodule("model.layers.1.mlp.up_proj").weight
            weight.register_hook(lambda gradient: gradient * float("nan"))
        return plain(trained, optimizer, batches, names, steps, config, position, ranks)

    monkeypatch.setattr(loop, "train_step", poisons)
    message = (
        r"the gradient of model.layers.1.mlp.up_proj.weight is not finite at step 5 with rows "
        r"of dataset a; lower"
    )
    with pytest.raises(MeritFastError, match=message):
        train_branch(job(tiny_model, dataset("a", 0)), config, tmp_path, SilentProgress())
    assert not (tmp_path / "branch.json").exists() and not list(tmp_path.glob("model*"))
    assert (tmp_path / "resume.safetensors").read_bytes() == saved["bytes"]


@pytest.mark.parametrize("kernels", ["auto", "eager"])
@pytest.mark.parametrize("packing", [False, True])
def test_the_dataset_of_a_gradient_that_is_not_finite_is_named(
    tmp_path, monkeypatch, kernels, packing
):
    """Only rows of b hold token 399, whose embedding has no finite gradient."""
    base = tmp_path / "base"
    make_tokenizer(base)
    make_model(base, tie_word_embeddings=False)
    bad = np.array([5, 399, 7, 8], np.int32)
    labels = np.where(np.arange(4) < 2, -100, bad).astype(np.int32)
    sets = [dataset("a", 0, rows=3), Dataset("b", (Example(bad, labels),)), dataset("c", 1, rows=3)]
    for rows in sets[::2]:
        assert not any((example.input_ids == 399).any() for example in rows.examples)
    plain = loop.train_step

    def poisons(trained, *arguments):
        def poisoned(gradient):
            return gradient * float("nan") if gradient[399].any() else gradient

        trained.model.get_input_embeddings().weight.register_hook(poisoned)
        return plain(trained, *arguments)

    monkeypatch.setattr(loop, "train_step", poisons)
    config = replace(CONFIG, kernels=kernels, packing=packing, batch_size=7)
    with pytest.raises(MeritFastError, match=r"is not finite at step 0 .*dataset b; lower"):
        train(base, tmp_path / "out", config, *sets)


def test_several_processes_are_refused(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="train_branch without ranks: WORLD_SIZE must be 1, got 2"):
        train(tiny_model, tmp_path / "out", CONFIG, dataset("a", 0))
    assert list((tmp_path / "out").iterdir()) == []
