"""Passes run in every way give the same sketches: checkpointing, attention, padding, packing."""

import gc
import os
import weakref
from pathlib import Path

import pytest
import torch
from support.checks import FLOOR, assert_close
from support.paths import ROOT, TESTS
from support.sketch.exact_gradients import (
    SKETCH,
    exact_sketches,
    example_loss,
    hook_sketches,
    ragged_examples,
    sketch_of_loss,
    summed_loss,
    tiny,
)
from support.warm import run_together
from torch.nn import functional as F

import merit_fast
from merit_fast.errors import MeritFastError
from merit_fast.sketch.gradients import GradientSketcher


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize(
    "architecture, parameters", [("llama", "blocks"), ("gpt2", "all"), ("mixtral", "all")]
)
def test_gradient_checkpointing_gives_the_same(architecture, reentrant, parameters):
    model = tiny(architecture)
    examples = ragged_examples()
    with merit_fast.sketch_gradients(model, 4096, parameters=parameters) as sketcher:
        summed_loss(model, examples).backward()
        plain = sketcher.take()
    # transformers checkpoints in training only; of these models only GPT-2 has dropout.
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with merit_fast.sketch_gradients(model, 4096, parameters=parameters) as sketcher:
        for _ in range(2):
            summed_loss(model, examples).backward()
            assert_close(sketcher.take(), plain)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_an_example_without_a_finite_gradient_is_named_and_no_state_changes(broken):
    model = torch.nn.Linear(5, 3)
    x = torch.randn(4, 5)
    with merit_fast.sketch_gradients(model, 4096) as sketcher:
        model(x).square().sum().backward()
        sketcher.update(["a", "b", "a", "b"])
        before = {name: state.to_bytes() for name, state in sketcher.state.items()}
        (model(x).square().sum(1) * torch.tensor([1.0, 1.0, broken, 1.0])).sum().backward()
        told = "example 2 of the batch, of dataset 'a': must have a finite gradient"
        with pytest.raises(MeritFastError, match=told):
            sketcher.update(["a", "b", "a", "b"])
        assert {name: state.to_bytes() for name, state in sketcher.state.items()} == before
        model(x).square().sum().backward()
        sketcher.update(["a", "b", "a", "b"])
    assert sketcher.state["a"].num_examples == 4


def test_checkpointing_frees_the_inputs_until_they_are_computed_again():
    """Autograd keeps the inputs, so checkpointing drops them; a hook's own reference would not."""
    model = tiny("llama").train()
    examples = ragged_examples()
    inputs = []
    linear = model.model.layers[0].mlp.down_proj
    linear.register_forward_pre_hook(
        lambda module, args: inputs.append(weakref.ref(args[0].untyped_storage()))
    )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with GradientSketcher(model, SKETCH, check="never") as sketcher:
        loss = summed_loss(model, examples)
        gc.collect()
        assert [reference() for reference in inputs] == [None]
        loss.backward()
        assert len(inputs) == 2 and len(sketcher.take()) == 3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_attention_and_padding_side_do_not_matter(attention, side):
    model = tiny("qwen2")
    examples = ragged_examples()
    model.set_attn_implementation(attention)
    width = max(len(e.input_ids) for e in examples)
    ids = torch.zeros(3, width, dtype=torch.long)
    labels = torch.full((3, width), -100)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        columns = slice(length) if side == "right" else slice(width - length, None)
        ids[row, columns] = torch.tensor(example.input_ids)
        labels[row, columns] = torch.tensor(example.labels)
    lengths = torch.tensor([len(e.input_ids) for e in examples])
    steps = torch.arange(width)
    mask = steps < lengths[:, None] if side == "right" else steps >= width - lengths[:, None]
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    with GradientSketcher(model, SKETCH) as sketcher:
        logits = model(
            input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False
        ).logits
        F.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        ).backward()
        result = sketcher.take()
    assert_close(result, exact_sketches(model, examples))


@pytest.mark.parametrize(
    "architecture, attention",
    [("llama", "eager"), ("qwen3", "sdpa"), ("gpt2", "sdpa"), ("mixtral", "sdpa")],
)
def test_a_packed_row_gives_one_sketch_per_segment(architecture, attention):
    model = tiny(architecture)
    examples = ragged_examples()
    model.set_attn_implementation(attention)
    exact = exact_sketches(model, examples)
    ids = []
    positions = []
    bounds = [0]
    losses = []
    for example in examples:
        ids += example.input_ids.tolist()
        positions += range(len(example.input_ids))
        bounds.append(len(ids))
    arguments = {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "use_cache": False,
    }
    with GradientSketcher(model, SKETCH) as sketcher:
        sketcher.packed(torch.tensor(bounds))
        logits = model(**arguments).logits[0]
        for example, start, stop in zip(examples, bounds, bounds[1:], strict=False):
            targets = torch.tensor(example.labels).long()[1:]
            losses.append(F.cross_entropy(logits[start : stop - 1], targets, reduction="sum"))
        sum(losses).backward()
        assert_close(sketcher.update(["a", "b", "a"]), exact)
        sketcher.packed(torch.tensor([0, 3, 99]))
        with pytest.raises(MeritFastError, match="cu_seqlens must rise from 0 to N"):
            model(**arguments)


def test_a_packed_row_through_a_cut_head_is_refused():
    model = tiny("llama")
    ids = torch.randint(1, 97, (1, 12))
    with GradientSketcher(model, SKETCH) as sketcher:
        sketcher.packed(torch.tensor([0, 5, 12]))
        with pytest.raises(MeritFastError, match="lm_head.weight of Linear sees values of shape"):
            model(input_ids=ids, logits_to_keep=4)


@pytest.mark.parametrize("architecture", ["llama", "qwen2-moe"])
def test_bf16_autocast_is_as_close_as_its_own_gradients(architecture):
    model = tiny(architecture)
    examples = ragged_examples()
    truth = exact_sketches(model, examples)

    def rounded(example):
        with torch.autocast("cpu", torch.bfloat16):
            return example_loss(model, example)

    plain = torch.cat([sketch_of_loss(model, lambda e=e: rounded(e)) for e in examples])
    with GradientSketcher(model, SKETCH) as sketcher, torch.autocast("cpu", torch.bfloat16):
        loss = summed_loss(model, examples)
        loss.backward()
        result = sketcher.take()
    assert (result - truth).norm() <= 1.1 * (plain - truth).norm() + FLOOR[
        torch.float32
    ] * truth.norm()


@pytest.mark.parametrize("architecture", ["gemma", "gpt2", "mixtral"])
def test_bf16_weights(architecture):
    model = tiny(architecture).bfloat16()
    examples = ragged_examples()
    if architecture == "mixtral":
        model.set_experts_implementation(
            "eager"
        )  # torch's grouped products want other sizes in bf16
    result = hook_sketches(model, examples)
    plain = exact_sketches(model, examples)
    truth = exact_sketches(model.float(), examples)
    assert (result - truth).norm() <= 1.1 * (plain - truth).norm() + FLOOR[
        torch.float32
    ] * truth.norm()


def rank_main(rank, port, path):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    ddp = DistributedDataParallel(tiny("llama", tied=True))
    examples = ragged_examples((9, 14, 5, 6, 7))
    batches = [[0, 1], [2]] if rank == 0 else [[3, 4]]  # ranks may differ in passes
    with merit_fast.sketch_gradients(ddp, 4096, seed=7) as sketcher:
        for rows in batches:
            summed_loss(Unwrapped(ddp), [examples[row] for row in rows]).backward()
            sketcher.update(["a"] * len(rows))
    (path / f"{rank}").write_bytes(sketcher.state["a"].to_bytes())
    dist.barrier()  # and afterwards DDP trains as before
    ddp(input_ids=torch.ones(2, 5, dtype=torch.long)).logits.sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in ddp.parameters()])
    both = [torch.empty_like(gradients) for _ in range(2)]
    dist.all_gather(both, gradients)
    assert torch.equal(*both)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(
        0
    )  # gloo's threads may otherwise be torn down while they run, which aborts the process


class Unwrapped(torch.nn.Module):
    """Calls DDP's forward under the attributes of the model within."""

    def __init__(self, ddp):
        super().__init__()
        self.ddp = ddp
        self.config = ddp.module.config

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return self.ddp(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
        )


@pytest.mark.process
def test_states_of_ddp_ranks_add_to_that_of_one_process(tmp_path):
    import socket

    from merit_fast.manifests.sketch_state import SketchState

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(TESTS), str(ROOT)]!r}; "
        "from pathlib import Path; from test_passes import rank_main; "
        "rank_main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))"
    )
    ranks = run_together(
        [["-c", script, str(rank), str(port), tmp_path] for rank in range(2)], timeout=300
    )
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    merged = SketchState.read(tmp_path / "0")
    merged.merge(SketchState.read(tmp_path / "1"))
    model = tiny("llama", tied=True)
    examples = ragged_examples((9, 14, 5, 6, 7))
    with merit_fast.sketch_gradients(model, 4096, seed=7) as sketcher:
        summed_loss(model, examples).backward()
        sketcher.update(["a"] * 5)
    single = sketcher.state["a"]
    assert merged.identity == single.identity and merged.num_examples == 5
    assert_close(merged.block_sums.sum(0), single.block_sums.sum(0))
    assert_close(merged.block_square_norms.sum(), single.block_square_norms.sum())
