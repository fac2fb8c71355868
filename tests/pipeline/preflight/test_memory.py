"""The forecast of training's memory, against the tensors of a branch in training."""

import pytest
from support.training import CONFIG, dataset

from merit_fast.data import collate
from merit_fast.pipeline.preflight.memory import (
    describe_memory,
    settle_shard,
    training_bytes,
)
from merit_fast.train.config import TrainConfig
from merit_fast.train.loss import batch_loss
from merit_fast.train.optimizer import MasterAdamW
from merit_fast.train.prepare import prepare_model

LORA = {"kind": "lora", "rank": 4}


def config_of(**changes) -> TrainConfig:
    from merit_fast.options.parser import parse

    values = {"kernels": "eager", "dtype": "bf16", **changes}
    config: TrainConfig = parse(TrainConfig, values, "train")
    return config


def held_bytes(base, config):
    """Bytes of parameters, gradients, masters and moments behind a backward pass."""
    trained = prepare_model(str(base), config)
    optimizer = MasterAdamW(trained.model, config)
    batch = collate([dataset("a", 1).examples[0]], [0], 0)
    optimizer.backward(batch_loss(trained.model, batch, 1).loss, 1e-3)
    tensors = list(trained.model.parameters())
    tensors += [p.grad for p in optimizer.parameters if p.grad is not None]
    if config.update_in_backward is None:
        optimizer.step(1e-3)
    own = {id(tensor) for tensor in tensors}
    tensors += [
        tensor
        for name, tensor in optimizer.state().items()
        if not name.startswith(("step.", "last_norm")) and not name.startswith("master.")
    ]
    tensors += [master for master in optimizer.masters if id(master) not in own]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "fp32"},
        {"dtype": "fp32", "freeze": ["mlp"]},
        {"optimizer": "adamw-8bit"},
        {"adapter": LORA},
        {"adapter": LORA, "dtype": "fp32", "optimizer": "adamw-8bit"},
    ],
    ids=str,
)
def test_the_forecast_counts_the_bytes_of_a_branch(tiny_model, changes):
    config = config_of(**changes)
    assert training_bytes(tiny_model, config) == pytest.approx(held_bytes(tiny_model, config), 0.02)


def test_updates_in_the_backward_pass_keep_no_gradients(tiny_model):
    plain = training_bytes(tiny_model, CONFIG)
    fewer = training_bytes(tiny_model, config_of(dtype="fp32", update_in_backward="previous"))
    assert fewer == plain * 3 // 4


def test_the_note_tells_what_each_process_holds(tiny_model):
    assert "processes" not in describe_memory(tiny_model, CONFIG)
    note = describe_memory(tiny_model, config_of(shard="full", adapter=LORA))
    assert "each of N processes needs the N-th part of it" in note and "whole adapter" in note


def test_auto_divides_where_whole_models_of_this_machine_do_not_fit(tiny_model, monkeypatch):
    config = config_of(shard="auto")
    whole = training_bytes(tiny_model, config)
    module = "merit_fast.pipeline.preflight.memory"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    notes = []
    for room, expected in ((2.3, "none"), (2.1, "full")):  # two of them here, a tenth for the rest
        monkeypatch.setattr(f"{module}.available_memory_bytes", lambda size=int(room * whole): size)
        assert settle_shard(tiny_model, config, notes.append) == expected
        assert notes[-1].startswith(f"train.shard auto is {expected}: whole models need")
    monkeypatch.setattr(f"{module}.available_memory_bytes", lambda: 9 * whole)
    in_backward = config_of(shard="auto", update_in_backward="previous")
    assert settle_shard(tiny_model, in_backward, notes.append) == "full"
    assert "where that does not fit, each of N processes" in describe_memory(tiny_model, config)
