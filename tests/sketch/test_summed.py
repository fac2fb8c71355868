"""Sketches of whole passes while a model trains: exact, and nothing in the training changes."""

import json

import numpy as np
import pytest
import torch
from support.checks import assert_close
from support.paths import ROOT, TESTS
from support.sketch.summed_runs import (
    SKETCH,
    batch,
    copy_with_gradient,
    exact,
    llama,
    summed,
    train,
)
from support.split.block_sums import measure_conflict
from support.warm import run_together
from torch import nn

from merit_fast.errors import InputError, MeritFastError
from merit_fast.kernels.sketch import CountSketch, flat_sketch, matrix_shape
from merit_fast.manifests.sketch_state import SketchState
from merit_fast.sketch.precondition import adam_scales
from merit_fast.sketch.summed import SummedSketcher


# ---- sketches
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_pass_is_the_sketch_of_what_it_adds_to_grad(tied):
    model = llama(tied)
    with summed(model) as sketcher:
        model(**batch(0)).loss.backward()
        first = sketcher.update("a", count=3, loss_divisor=3)
        assert_close(first, 3 * exact(model))
        before = exact(model)
        model(**batch(1)).loss.backward()  # accumulates on top of the first
        second = sketcher.update("b", count=3)
        assert_close(second, exact(model) - before, torch.bfloat16)
        assert_close(second, exact(copy_with_gradient(model, batch(1))))
    assert set(sketcher.state) == {"a", "b"} and sketcher.state["a"].num_examples == 3
    assert_close(sketcher.state["a"].block_sums.sum(0), first[0])


def test_training_gives_the_same_bits():
    plain = llama()
    watched = llama()
    expected = train(plain, 4)
    with summed(watched) as sketcher:
        assert train(watched, 4, sketcher) == expected
    assert all(
        torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True)
    )
    assert not any(p._backward_hooks for p in watched.parameters())
    state = sketcher.state["d0"]
    assert state.num_examples == 12 and state.num_target_tokens == 120
    assert state.block_counts.tolist() == [3, 3, 3, 3, 0, 0, 0, 0]


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_gradient_checkpointing_gives_the_same(reentrant):
    model = llama()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with summed(model) as sketcher:
        model(**batch(0)).loss.backward()
        assert_close(sketcher.update("a", count=1), exact(model))


def test_autocast_and_bf16_weights_are_read_as_they_are():
    model = llama()
    with summed(model) as sketcher:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch(0)).loss
        loss.backward()
        assert_close(sketcher.update("a", count=1), exact(model))
    half = llama().bfloat16()
    with summed(half) as sketcher:
        half(**batch(0)).loss.backward()
        assert_close(sketcher.update("a", count=1), exact(half))


def test_sparse_embeddings_and_shapes_of_every_kind():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(50, 6, sparse=True)
            self.filter = nn.Conv1d(6, 4, 2)
            self.image = nn.Conv2d(1, 3, 2)
            self.gain = nn.Parameter(torch.tensor(2.0))
            self.unused = nn.Parameter(torch.ones(5))

        def forward(self, ids):
            picture = self.filter(self.words(ids).transpose(1, 2))
            return (self.gain * self.image(picture.unsqueeze(1))).square().sum()

    model = Net()
    scales = {name: torch.rand(matrix_shape(p.shape)) for name, p in model.named_parameters()}
    for factors in (None, scales):
        model.zero_grad()
        with summed(model, scales=factors) as sketcher:
            model(torch.tensor([[1, 4, 4, 9], [4, 0, 2, 2]])).backward()
            assert_close(sketcher.update("a", count=2), exact(model, factors))
    assert model.words.weight.grad.is_sparse and model.unused.grad is None


def test_scales_of_adam_multiply_the_gradient():
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, 2, optimizer=optimizer)
    scales = adam_scales(model, optimizer, dict(model.named_parameters()))
    optimizer.zero_grad()
    with summed(model, scales=scales) as sketcher:
        model(**batch(5)).loss.backward()
        assert_close(sketcher.update("a", count=3), exact(model, scales))
    assert "sum adam" in sketcher.identity.model_fingerprint


DDP = """
import json, os, sys, torch, torch.distributed as dist
sys.path[:0] = sys.argv[3:]
from support.sketch.summed_runs import batch, copy_with_gradient, exact, llama, summed
rank = int(sys.argv[1])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[2], 2), rank=rank, world_size=2)
model = llama()
parallel = torch.nn.parallel.DistributedDataParallel(model)
with summed(model) as sketcher:
    parallel(**batch(rank)).loss.backward()
    mine = sketcher.update("a", count=3)
truth = exact(copy_with_gradient(llama(), batch(rank)))
averaged = exact(model)
dist.destroy_process_group()
errors = [float((mine - other).norm() / truth.norm()) for other in (truth, averaged)]
print(json.dumps(errors), flush=True)
os._exit(0)  # gloo's threads may otherwise be torn down while they run
"""


@pytest.mark.process
def test_every_rank_of_ddp_sketches_its_own_examples(tmp_path):
    ranks = run_together(
        [["-c", DDP, str(rank), tmp_path / "store", TESTS, ROOT] for rank in range(2)],
        timeout=300,
    )
    for rank in ranks:
        assert rank.returncode == 0, rank.stderr
        to_truth, to_average = json.loads(rank.stdout.splitlines()[-1])
        assert to_truth < 2e-6 and to_average > 0.1


# ---- the state
def test_signal_of_passes_of_unequal_size_is_unbiased():
    """Sketches through the real hook: the gradient of ``sum(w * x)`` is the sum of noisy rows."""
    generator = torch.Generator().manual_seed(0)
    width = 4096
    model = nn.Linear(width, 1, bias=False)
    mean = torch.randn(width, generator=generator) / 64  # length near 1; noise of one example: 4
    unbiased = []
    naive = []
    for _ in range(60):
        with SummedSketcher(
            model, SKETCH, {"weight": model.weight}, blocks=6, fingerprint="f"
        ) as sketcher:
            for size in (1, 5, 2, 8, 3, 1, 4, 8):
                rows = mean + torch.randn(size, width, generator=generator) * (4 / 64)
                (model(rows).sum() / size).backward()
                sketcher.update("a", count=size, loss_divisor=size)
        state = sketcher.state["a"]
        conflict = measure_conflict(
            state.block_sums.numpy()[None], state.block_counts.numpy()[None]
        )
        unbiased.append(conflict.signal_fraction[0] * conflict.norm[0] ** 2)
        naive.append(conflict.norm[0] ** 2)
    # Of the mean's sketch: the same draw of the hash in every state is no bias of the signal.
    truth = float(flat_sketch(mean[None], "weight", SKETCH).double().square().sum())
    standard_error = np.std(unbiased) / np.sqrt(len(unbiased))
    assert abs(np.mean(unbiased) - truth) < 3 * standard_error
    assert np.mean(naive) > truth + 0.3  # the noise of 32 examples: 16 / 32


def test_by_tokens_a_pass_counts_its_target_tokens():
    model = llama()
    with summed(model, weight="tokens") as sketcher:
        for seed, tokens in ((0, 20), (1, 7)):
            model(**batch(seed)).loss.backward()
            sketcher.update("a", count=3, num_target_tokens=tokens, loss_divisor=tokens)
        state = sketcher.state["a"]
        model(**batch(2)).loss.backward()
        with pytest.raises(InputError, match="num_target_tokens: must be at least 1 with weight"):
            sketcher.update("a", count=3)
        assert state.num_examples == 6
    assert state.block_weights.tolist()[:3] == [20, 7, 0] and state.identity.weight == "tokens"
    assert state.weighting_cosine is None and state.length_quantile(0.5) is None
    with summed(llama()) as by_examples:
        assert by_examples.identity.weight == "examples"


def test_a_state_of_sums_does_not_merge_with_one_of_examples(tmp_path):
    model = llama()
    with summed(model) as sketcher:
        model(**batch(0)).loss.backward()
        sketcher.update("a", count=3)
    state = sketcher.state["a"]
    assert torch.isnan(state.block_square_norms).all()
    examples = SketchState.zeros(
        type(state.identity)(SKETCH, "f", state.identity.parameters), len(state.block_counts)
    )
    with pytest.raises(MeritFastError, match="disagree in model_fingerprint: 'sum: f' and 'f'"):
        state.merge(examples)
    file = tmp_path / "a.safetensors"
    file.write_bytes(state.to_bytes())
    again = SketchState.read(file)
    assert again.identity == state.identity and again.to_bytes() == state.to_bytes()


def test_restored_states_resume():
    model = llama()
    whole = llama()
    with summed(whole) as sketcher:
        train(whole, 3, sketcher)
    expected = sketcher.state["d1"].to_bytes()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with summed(model) as sketcher:
        train(model, 2, sketcher, optimizer)
    kept = sketcher.state
    with summed(model) as sketcher:
        sketcher.restore(kept)
        train(model, 1, sketcher, optimizer, first=2)
    assert sketcher.state["d1"].to_bytes() == expected
    other = SummedSketcher(
        model, CountSketch(4096, 1), dict(model.named_parameters()), fingerprint="f"
    )
    with pytest.raises(MeritFastError, match="disagree in seed"):
        other.restore(kept)
