"""Training: the step fixes the order; accumulation and resume change nothing; bf16 masters."""

import errno
import json

import numpy as np
import pytest
import torch
from support.checks import assert_close, tree_bytes
from support.runs import MEASURED
from support.tiny import make_model, make_tokenizer
from support.training import CONFIG, dataset, job, train, weights
from torch.nn import functional as F

import merit_fast.train.resume as resume
from merit_fast.errors import InputError, MeritFastError
from merit_fast.manifests.io import read_manifest
from merit_fast.manifests.schemas import BranchManifest
from merit_fast.progress import SilentProgress
from merit_fast.train import TrainConfig, train_branch
from merit_fast.train.optimizer import MasterAdamW
from merit_fast.train.resume import Position, read_checkpoint, write_checkpoint
from merit_fast.train.schedule import count_tokens, learning_rate, num_steps, step_examples


def test_every_example_once_per_epoch_in_another_order():
    config = TrainConfig(epochs=3, batch_size=4)
    assert num_steps(10, config) == 9
    epochs = [
        np.concatenate([step_examples(3 * e + s, 10, config) for s in range(3)]) for e in range(3)
    ]
    for order in epochs:
        assert sorted(order) == list(range(10))
    assert not np.array_equal(epochs[0], epochs[1])


@pytest.mark.parametrize("steps", [0, 2, 3, 7, 9])
def test_tokens_of_so_many_steps_are_those_of_their_examples(steps):
    config = TrainConfig(epochs=3, batch_size=4, seed=5)
    lengths = [3 * i + 1 for i in range(10)]
    by_step = [sum(lengths[i] for i in step_examples(s, 10, config)) for s in range(9)]
    assert count_tokens(lengths, steps, config) == sum(by_step[:steps])


def test_learning_rate_rises_then_falls_to_its_final_share():
    config = TrainConfig(learning_rate=1.0, warmup_fraction=0.1, final_fraction=0.2)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert max(rates) == 1.0 and rates[-1] == pytest.approx(0.2)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert learning_rate(0, 1, config) > 0


def test_branch_is_complete_and_loads(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    a, b = dataset("a", 0), dataset("b", 1, rows=3)
    manifest = train(tiny_model, tmp_path / "out", CONFIG, a, b)
    assert manifest == read_manifest(BranchManifest, tmp_path / "out" / "branch.json")
    assert manifest.num_target_tokens == 2 * (a.num_target_tokens + b.num_target_tokens)
    assert (manifest.num_examples, manifest.num_tokens) == (26, 2 * (a.num_tokens + b.num_tokens))
    assert (manifest.steps, manifest.datasets) == (8, ("a", "b"))
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert not list((tmp_path / "out").glob("resume*"))
    losses = json.loads((tmp_path / "out" / "losses.json").read_text())
    assert len(losses) == 8 and losses[-1] < losses[0]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    AutoTokenizer.from_pretrained(tmp_path / "out")


def test_a_checkpoint_that_does_not_fit_keeps_the_last_one(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, {"a": torch.zeros(5)}, Position(step=3))

    def full(path, tensors, metadata, ranks):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(resume, "write_tensors", full)
    with pytest.raises(MeritFastError, match=r"resume.safetensors: no space is left on its disk"):
        write_checkpoint(tmp_path, {"a": torch.ones(5)}, Position(step=6))
    assert [path.name for path in tmp_path.iterdir()] == ["resume.safetensors"]
    tensors, position = read_checkpoint(tmp_path)
    assert position.step == 3 and not tensors["a"].any()


def test_first_step_equals_torch_by_hand(tiny_model, tmp_path):
    """One step of our loop against F.cross_entropy, clip_grad_norm_ and AdamW on unpadded rows."""
    from transformers import AutoModelForCausalLM

    rows = dataset("a", 3, rows=4)
    config = TrainConfig(
        batch_size=4, learning_rate=1e-3, dtype="fp32", warmup_fraction=0.0, weight_decay=0.1
    )
    train(tiny_model, tmp_path / "out", config, rows)
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, attn_implementation="eager"
    )
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98))
    total = sum(
        F.cross_entropy(model(torch.tensor(e.input_ids)[None].long()).logits[0, :-1],
                        torch.tensor(e.labels[1:]).long(), ignore_index=-100, reduction="sum")
        for e in rows.examples
    )  # fmt: skip
    (total / rows.num_target_tokens).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    trained = weights(tmp_path / "out")
    for name, parameter in model.named_parameters():
        assert (trained[name] - parameter).abs().max() < 1e-4, name
        moved, expected = trained[name] - before[name], parameter.detach() - before[name]
        assert F.cosine_similarity(moved.flatten(), expected.flatten(), dim=0) > 0.99, name


def test_accumulation_changes_only_rounding(tiny_model, tmp_path):
    rows = dataset("a", 0)
    train(tiny_model, tmp_path / "whole", CONFIG, rows)
    train(tiny_model, tmp_path / "cut", TrainConfig(**{**vars(CONFIG), "accumulation": 3}), rows)
    whole, cut = (
        json.loads((tmp_path / name / "losses.json").read_text()) for name in ("whole", "cut")
    )
    assert cut == pytest.approx(whole, rel=1e-4)


class StopAt(SilentProgress):
    """Raises in the middle of a step, as a lost machine would."""

    def __init__(self, calls):
        self.left = calls

    def advance(self, amount, detail=""):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_resumed_run_ends_with_the_same_bytes(tmp_path, dtype):
    base = tmp_path / "base"
    make_tokenizer(base)
    make_model(base, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    config = TrainConfig(epochs=2, batch_size=3, checkpoint_steps=2, dtype=dtype, seed=5)
    rows = dataset("a", 0)
    train(base, tmp_path / "whole", config, rows)
    broken = tmp_path / "broken"
    broken.mkdir()
    for stop in (5, 3):  # killed after 4 steps, resumed at 4, killed again
        with pytest.raises(KeyboardInterrupt):
            train_branch(job(base, rows), config, broken, StopAt(stop))
    assert (broken / "resume.safetensors").exists()
    train_branch(job(base, rows), config, broken, SilentProgress())
    assert tree_bytes(tmp_path / "whole", MEASURED) == tree_bytes(broken, MEASURED)


def test_bf16_masters_move_what_plain_bf16_loses():
    """20 steps at lr 1e-5 move masters by 2e-4; plain bf16 weights round most of that away."""
    weight = torch.nn.Parameter((torch.randn(64, 64) * 0.02).bfloat16())
    model = torch.nn.Module()
    model.register_parameter("w", weight)
    start = weight.detach().float().clone()
    optimizer = MasterAdamW(model, TrainConfig(clip_norm=0.0))
    for _ in range(20):
        weight.grad = torch.ones_like(weight)
        optimizer.step(1e-5)
    moved = (optimizer.masters[0] - start).abs()
    assert moved.mean() == pytest.approx(2e-4, rel=0.02)
    assert torch.equal(weight.detach(), optimizer.masters[0].bfloat16())


def test_a_loss_that_is_not_finite_stops_with_advice(tmp_path):
    base = tmp_path / "base"
    make_tokenizer(base)
    model = make_model(base)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(base)
    with pytest.raises(
        MeritFastError, match="loss is not finite at step 0 in dataset a; lower train.learning_rate"
    ):
        train(base, tmp_path / "out", CONFIG, dataset("a", 0))


def test_a_branch_without_examples_is_bad_input(tiny_model, tmp_path):
    with pytest.raises(InputError, match="merit-0: has no example"):
        train(tiny_model, tmp_path / "out", CONFIG)


def test_weights_after_training_agree_with_their_masters(tiny_model, tmp_path):
    train(tiny_model, tmp_path / "out", CONFIG, dataset("a", 0))
    changed = [
        n
        for n, w in weights(tmp_path / "out").items()
        if not torch.equal(w, weights(tiny_model)[n])
    ]
    assert len(changed) == len(weights(tiny_model))
    assert_close(weights(tmp_path / "out")["model.norm.weight"], torch.ones(72), torch.bfloat16)
