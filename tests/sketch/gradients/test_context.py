"""sketch_gradients: selected parameters, passes, the state and the model afterwards."""

import subprocess
import sys

import pytest
import torch
from support.checks import assert_close
from support.sketch.exact_gradients import (
    SKETCH,
    exact_sketches,
    hook_sketches,
    ragged_examples,
    summed_loss,
    tiny,
)

import merit_fast
from merit_fast.errors import InputError, MeritFastError
from merit_fast.kernels.sketch import CountSketch
from merit_fast.sketch.gradients import GradientSketcher


def everything(model):
    """All that a user could find changed."""
    hooks = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_forward_hooks_with_kwargs",
    )
    return (
        {
            name: (p.requires_grad, p.grad is None, p._version)
            for name, p in model.named_parameters()
        },
        {name: [dict(getattr(m, hook)) for hook in hooks] for name, m in model.named_modules()},
        {name: "forward" in m.__dict__ for name, m in model.named_modules()},
        torch.get_rng_state().tolist(),
    )


@pytest.mark.parametrize("architecture", ["llama", "opt", "mixtral"])
def test_model_is_restored_even_after_an_exception(architecture):
    model = tiny(architecture, tied=True)
    model.get_input_embeddings().weight.requires_grad_(False)
    before = everything(model)
    with pytest.raises(RuntimeError, match="on purpose"), merit_fast.sketch_gradients(model, 4096):
        summed_loss(model, ragged_examples()).backward()
        raise RuntimeError("on purpose")
    assert everything(model) == before
    with merit_fast.sketch_gradients(model, 4096):
        summed_loss(model, ragged_examples()).backward()
    assert everything(model) == before


def test_state_holds_sums_per_dataset():
    model = tiny("llama")
    examples = ragged_examples((9, 14, 5, 6))
    exact = exact_sketches(model, examples).double()
    with merit_fast.sketch_gradients(model, 4096, seed=7) as sketcher:
        for rows, ids in (((0, 1, 2), ["a", "b", "a"]), ((3,), ["a"])):
            summed_loss(model, [examples[row] for row in rows]).backward()
            sketches = sketcher.update(
                ids, loss_sums=[2.0] * len(ids), num_target_tokens=torch.ones(len(ids)).int()
            )
            assert_close(sketches, exact[list(rows)])
    assert list(sketcher.state) == ["a", "b"]
    a, b = sketcher.state.values()
    assert a.block_counts.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert (a.loss_sum, a.num_target_tokens, b.num_examples) == (6.0, 3, 1)
    assert_close(a.block_sums[:3], exact[[0, 2, 3]])
    assert_close(b.block_square_norms[0], exact[1].square().sum())
    assert a.identity.parameters == tuple(name for name, _ in model.named_parameters())
    with merit_fast.sketch_gradients(model, 4096, seed=8) as other:
        summed_loss(model, examples[:1]).backward()
        other.update(["a"])
    with pytest.raises(MeritFastError, match="disagree in seed"):
        a.merge(other.state["a"])


def test_nested_and_repeated_blocks():
    model = tiny("mixtral", tied=True)
    examples = ragged_examples()
    with (
        GradientSketcher(model, SKETCH) as first,
        GradientSketcher(model, CountSketch(8192)) as second,
    ):
        for _ in range(2):
            summed_loss(model, examples).backward()
            inner = first.take()
            outer = second.take()
    assert_close(inner, exact_sketches(model, examples))
    assert outer.shape == (3, 8192)
    assert_close(hook_sketches(model, examples), inner)


def test_a_second_forward_pass_before_update_is_refused():
    model = tiny("llama")
    examples = ragged_examples()
    with GradientSketcher(model, SKETCH) as sketcher:
        loss = summed_loss(model, examples)
        with torch.no_grad():
            summed_loss(model, examples[:1])  # an evaluation in between is fine
        with pytest.raises(MeritFastError, match="second forward pass before update"):
            summed_loss(model, examples)
        loss.backward(retain_graph=True)
        result = sketcher.take()
        with pytest.raises(MeritFastError, match="was updated or discarded"):
            loss.backward()
        summed_loss(model, examples)
        sketcher.discard()
        summed_loss(model, examples).backward()
        assert torch.equal(sketcher.take(), result)


def test_a_forward_pass_that_fails_is_forgotten():
    model = tiny("llama")
    examples = ragged_examples()
    with GradientSketcher(model, SKETCH) as sketcher:
        with pytest.raises(IndexError):
            model(input_ids=torch.full((1, 3), 1000))
        summed_loss(model, examples).backward()
        result = sketcher.take()
    assert_close(result, exact_sketches(model, examples))


def test_update_before_a_pass_and_of_another_length_say_so():
    model = tiny("llama")
    with GradientSketcher(model, SKETCH) as sketcher:
        with pytest.raises(MeritFastError, match="before a forward and backward pass"):
            sketcher.update(["a"])
        loss = summed_loss(model, ragged_examples())
        with pytest.raises(MeritFastError, match="before a forward and backward pass"):
            sketcher.take()
        loss.backward()
        with pytest.raises(InputError, match=r"dataset_ids: must be one per example \(3\), got 2"):
            sketcher.update(["a", "b"])
        with pytest.raises(InputError, match="loss_sums: must be one per example"):
            sketcher.update(["a", "b", "c"], loss_sums=[1.0])
        assert len(sketcher.update(["a", "b", "c"])) == 3


def test_blocks_and_regex_select_by_name():
    def names(**options):
        return merit_fast.sketch_gradients(tiny("llama"), 4096, **options).parameter_names

    assert all(name.startswith("model.layers.") for name in names(parameters="blocks"))
    assert len(names(parameters="blocks")) == len(names()) - 3
    assert names(parameters=r"layers\.1\.mlp\.up") == ["model.layers.1.mlp.up_proj.weight"]


def test_normalize_adam_uses_the_optimizers_moments():
    model = tiny("llama")
    examples = ragged_examples()
    optimizer = torch.optim.AdamW(model.parameters(), eps=1e-3)
    summed_loss(model, examples[:1]).backward()
    optimizer.step()
    model.zero_grad()
    with merit_fast.sketch_gradients(
        model, 4096, seed=7, normalize="adam", optimizer=optimizer
    ) as sketcher:
        summed_loss(model, examples).backward()
        sketches = sketcher.update([0, 0, 1])
    for parameter in (
        model.parameters()
    ):  # multiplying a gradient entry is differentiating along a stretched axis
        moment = optimizer.state[parameter]["exp_avg_sq"] / (1 - 0.999)
        parameter.register_hook(lambda g, v=moment: g / (v.sqrt() + 1e-3))
    assert_close(sketches, exact_sketches(model, examples), torch.float32)
    assert sketcher.state[0].identity.model_fingerprint.startswith("adam ")


def test_sketch_sums_adds_one_sketch_per_backward_pass():
    model = tiny("llama")
    examples = ragged_examples()
    exact = exact_sketches(model, examples).sum(0, keepdim=True)
    with merit_fast.sketch_sums(model, 4096, seed=7) as sketcher:
        summed_loss(model, examples).backward()
        assert_close(sketcher.update("a", count=3), exact)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_importing_the_package_loads_no_torch():
    script = "import sys, merit_fast; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
