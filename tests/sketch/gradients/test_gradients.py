"""The hooks' sketches equal those of exact per-example gradients, in every architecture."""

import pytest
import torch
from support.checks import assert_close
from support.sketch.exact_gradients import (
    SKETCH,
    exact_sketches,
    hook_sketches,
    ragged_examples,
    sketch_of_loss,
    summed_loss,
    tiny,
)
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from merit_fast.errors import MeritFastError
from merit_fast.kernels.sketch import flat_sketch, matrix_shape
from merit_fast.sketch.gradients import GradientSketcher
from merit_fast.sketch.selection import select_parameters


@pytest.mark.parametrize(
    "architecture", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "opt", "gpt2", "neox"]
)
def test_hooks_equal_a_pass_per_example(architecture):
    check(tiny(architecture))


@pytest.mark.parametrize("architecture", ["llama", "gemma", "gpt2"])
def test_a_tied_head_adds_to_the_embedding(architecture):
    check(tiny(architecture, tied=True))


def check(model):
    examples = ragged_examples()
    result = hook_sketches(model, examples)
    truth = exact_sketches(model, examples)
    for mine, exact in zip(result, truth, strict=True):
        assert_close(mine, exact)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_hooks_equal_torch_func(architecture):
    model = tiny(architecture)
    (example, *_) = ragged_examples()
    model.set_attn_implementation("eager")  # vmap refuses the masks of the fused one
    ids = torch.tensor(example.input_ids)[None].long()
    labels = torch.tensor(example.labels)[None].long()

    def loss(values, one_ids, one_labels):
        logits = functional_call(
            model, values, (), {"input_ids": one_ids[None], "use_cache": False}
        ).logits
        return F.cross_entropy(logits[0, :-1], one_labels[1:], ignore_index=-100, reduction="sum")

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, ids, labels)
    out = torch.zeros(1, SKETCH.proj_dim)
    for name, gradient in gradients.items():
        flat_sketch(
            gradient.view(1, *matrix_shape(gradient.shape[1:])),
            name,
            SKETCH,
            out=out,
            backend="eager",
        )
    assert_close(hook_sketches(model, [example]), out)


@pytest.mark.parametrize("architecture", ["llama", "gemma", "qwen3", "gpt2", "neox"])
def test_norms_and_biases_alone(architecture):
    """They weigh little in a whole gradient: an error in them must not drown."""
    model = tiny(architecture)
    examples = ragged_examples()
    parameters = r"norm|ln_|bias$"
    chosen = select_parameters(model, parameters)
    result = hook_sketches(model, examples, parameters=chosen)
    assert_close(result, exact_sketches(model, examples, chosen))


def test_frozen_parameters_are_left_out():
    model = tiny("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name or "norm" in name)
    examples = ragged_examples()
    assert_close(hook_sketches(model, examples), exact_sketches(model, examples))


def test_batching_padding_and_order_do_not_matter():
    model = tiny("qwen2", tied=True)
    examples = ragged_examples((9, 14, 5, 30))
    together = hook_sketches(model, examples)
    alone = torch.cat([hook_sketches(model, [example]) for example in examples])
    turned = hook_sketches(model, examples[::-1]).flip(0)
    assert_close(together, alone)
    assert_close(turned, alone)


def test_gpt2_without_position_ids_has_a_position_gradient_per_example():
    """Its positions [1, T] are shared by the batch; their gradient would arrive summed over it."""
    model = tiny("gpt2")
    ids = torch.randint(1, 97, (3, 11))
    chosen = select_parameters(model, "wpe")

    def loss(rows):
        logits = model(input_ids=rows, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")

    with GradientSketcher(model, SKETCH, chosen) as sketcher:
        loss(ids).backward()
        result = sketcher.take()
    truth = [sketch_of_loss(model, lambda row=row: loss(row[None]), chosen) for row in ids]
    assert_close(result, torch.cat(truth))


def test_scales_multiply_every_gradient():
    model = tiny("gpt2", tied=True)
    examples = ragged_examples()
    scales = {name: torch.rand(matrix_shape(p.shape)) + 0.5 for name, p in model.named_parameters()}
    result = hook_sketches(model, examples, scales=scales)
    rows = []
    for example in examples:
        model.zero_grad()
        summed_loss(model, [example]).backward()
        out = torch.zeros(1, SKETCH.proj_dim)
        for name, p in model.named_parameters():
            flat_sketch(p.grad.view_as(scales[name])[None] * scales[name], name, SKETCH, out=out)
        rows.append(out)
    assert_close(result, torch.cat(rows))


def test_batch_norm_in_training_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4))
    with pytest.raises(MeritFastError, match="1.weight of BatchNorm1d mixes the examples"):
        GradientSketcher(model, SKETCH)
