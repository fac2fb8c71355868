"""Sketches of whole passes beside training: exact, and nothing in the training changes."""

import copy
import json

import numpy as np
import pytest
import torch
from support.checks import assert_close
from support.paths import ROOT, TESTS
from support.warm import run_together
from torch import nn

from merit_fast.errors import MeritFastError
from merit_fast.kernels.sketch import CountSketch, flat_sketch, matrix_shape
from merit_fast.manifests.sketch_state import SketchState
from merit_fast.sketch.precondition import adam_scales
from merit_fast.sketch.summed import SummedSketcher
from merit_fast.split.conflict import measure_conflict

SKETCH = CountSketch(4096, seed=7)


def llama(tied=True):
    import transformers as t

    config = t.LlamaConfig(
        vocab_size=97,
        hidden_size=36,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(3)
    return t.LlamaForCausalLM(config)


def batch(seed, examples=3, length=11):
    ids = torch.randint(0, 97, (examples, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def summed(model, **options):
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return SummedSketcher(model, SKETCH, parameters, fingerprint="f", **options)


def exact(model, scales=None):
    """The sketch of what lies in ``.grad``."""
    out = torch.zeros(1, SKETCH.proj_dim)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad.to_dense().reshape(matrix_shape(parameter.shape))
            gradient = gradient if scales is None else gradient * scales[name]
            flat_sketch(gradient.unsqueeze(0), name, SKETCH, out=out, backend="eager")
    return out


def train(model, steps, sketcher=None, optimizer=None, first=0):
    """Losses of AdamW steps of two passes each: accumulation, clipping, decay."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(first, first + steps):
        for part in range(2):
            loss = model(**batch(10 * step + part)).loss
            loss.backward()
            if sketcher:
                sketcher.update(
                    f"d{part}",
                    count=3,
                    loss_sum=3 * loss.item(),
                    num_target_tokens=30,
                    loss_divisor=3,
                )
            losses.append(loss.item())
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return losses


# ---- what is sketched
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


def copy_with_gradient(model, inputs):
    other = copy.deepcopy(model)
    other.zero_grad()
    other(**inputs).loss.backward()
    return other


def test_training_goes_on_to_the_same_bits():
    plain, watched = llama(), llama()
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
            self.filter, self.image = nn.Conv1d(6, 4, 2), nn.Conv2d(1, 3, 2)
            self.gain, self.unused = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.ones(5))

        def forward(self, ids):
            picture = self.filter(self.words(ids).transpose(1, 2))
            return (self.gain * self.image(picture.unsqueeze(1))).square().sum()

    model = Net()
    scales = {name: torch.rand(matrix_shape(p.shape)) for name, p in model.named_parameters()}
    for given in (None, scales):
        model.zero_grad()
        with summed(model, scales=given) as sketcher:
            model(torch.tensor([[1, 4, 4, 9], [4, 0, 2, 2]])).backward()
            assert_close(sketcher.update("a", count=2), exact(model, given))
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
from test_summed import batch, copy_with_gradient, exact, llama, summed
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
    from pathlib import Path

    here = Path(__file__).resolve().parent
    ranks = run_together(
        [["-c", DDP, str(rank), tmp_path / "store", here, TESTS, ROOT] for rank in range(2)],
        timeout=300,
    )
    for rank in ranks:
        assert rank.returncode == 0, rank.stderr
        own, average = json.loads(rank.stdout.splitlines()[-1])
        assert own < 2e-6 and average > 0.1


# ---- what the state says
def test_signal_of_passes_of_unequal_size_is_unbiased():
    """Through the real hook: the gradient of ``sum(w * x)`` is the sum of the rows of x, mean + noise."""
    generator, width = torch.Generator().manual_seed(0), 4096
    model = nn.Linear(width, 1, bias=False)
    mean = torch.randn(width, generator=generator) / 64  # length near 1; noise of one example: 4
    found, naive = [], []
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
        found.append(conflict.signal_fraction[0] * conflict.norm[0] ** 2)
        naive.append(conflict.norm[0] ** 2)
    truth = float(mean.square().sum())
    standard_error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - truth) < 3 * standard_error + 0.01 * truth
    assert np.mean(naive) > truth + 0.3  # the noise of 32 examples: 16 / 32


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


def test_restored_states_go_on_where_they_were():
    model, whole = llama(), llama()
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


# ---- refusals
def test_update_wants_one_backward_pass_of_one_dataset():
    model = llama()
    with summed(model) as sketcher:
        with pytest.raises(MeritFastError, match=r"update\('a'\) without a backward pass"):
            sketcher.update("a", count=1)
        model(**batch(0)).loss.backward()
        with pytest.raises(MeritFastError, match="one dataset per backward pass, got a, b"):
            sketcher.update(["a", "b", "a"])
        sketcher.update(["a", "a", "a"])
        assert sketcher.state["a"].num_examples == 3
        model(**batch(0)).loss.backward()
        sketcher.update(torch.tensor([4, 4, 4]))
        assert sketcher.state[4].num_examples == 3
        with pytest.raises(MeritFastError, match="without a backward pass"):
            sketcher.update("a", count=1)
        model(**batch(0)).loss.backward()
        with pytest.raises(MeritFastError, match="count must be at least 1"):
            sketcher.update("a", count=0)
        with pytest.raises(
            MeritFastError, match="count, the number of examples of the pass, is required"
        ):
            sketcher.update("a")
        sketcher.discard()
        with pytest.raises(MeritFastError, match="without a backward pass"):
            sketcher.update("a", count=1)


def test_a_gradient_that_is_not_finite_leaves_the_state_as_it_was():
    model = llama()
    with summed(model) as sketcher:
        model(**batch(0)).loss.backward()
        sketcher.update("a", count=3)
        before = sketcher.state["a"].block_sums.clone()
        (model(**batch(0)).loss * float("inf")).backward()
        with pytest.raises(MeritFastError, match="gradient of dataset 'a' is not finite"):
            sketcher.update("a", count=3)
    assert (
        torch.equal(sketcher.state["a"].block_sums, before)
        and sketcher.state["a"].num_examples == 3
    )


def test_parameters_that_cannot_be_watched_are_named():
    model = llama()
    named = dict(model.named_parameters())
    model.model.norm.weight.requires_grad_(False)
    with pytest.raises(MeritFastError, match="parameter model.norm.weight is frozen"):
        SummedSketcher(model, SKETCH, named)
    tied = {
        "lm_head.weight": model.lm_head.weight,
        "model.embed_tokens.weight": model.model.embed_tokens.weight,
    }
    with pytest.raises(
        MeritFastError, match="lm_head.weight and model.embed_tokens.weight are one"
    ):
        SummedSketcher(model, SKETCH, tied)
    with pytest.raises(MeritFastError, match="parameter lm_head.weight has no scale"):
        SummedSketcher(model, SKETCH, {"lm_head.weight": model.lm_head.weight}, scales={})
    with pytest.raises(MeritFastError, match="LlamaForCausalLM has no trainable parameter"):
        SummedSketcher(model, SKETCH, {})
    empty = nn.Parameter(torch.empty(0))
    with pytest.raises(MeritFastError, match="parameter x is sharded"):
        SummedSketcher(model, SKETCH, {"x": empty})


def test_hooks_are_gone_after_an_exception():
    model = llama()
    with pytest.raises(RuntimeError, match="on purpose"), summed(model):
        raise RuntimeError("on purpose")
    assert not any(p._backward_hooks for p in model.parameters())
