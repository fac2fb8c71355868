"""Summed sketches refuse mixed datasets, gradients that are not finite, hidden parameters."""

import pytest
import torch
from sketch.summed_runs import SKETCH, batch, llama, summed
from torch import nn

from merit_fast.errors import MeritFastError
from merit_fast.sketch.summed import SummedSketcher


def test_update_wants_one_backward_pass_of_one_dataset():
    model = llama()
    with summed(model) as sketcher:
        with pytest.raises(MeritFastError, match=r"update\('a'\): no backward pass"):
            sketcher.update("a", count=1)
        model(**batch(0)).loss.backward()
        with pytest.raises(MeritFastError, match="one dataset per backward pass, got a, b"):
            sketcher.update(["a", "b", "a"])
        sketcher.update(["a", "a", "a"])
        assert sketcher.state["a"].num_examples == 3
        model(**batch(0)).loss.backward()
        sketcher.update(torch.tensor([4, 4, 4]))
        assert sketcher.state[4].num_examples == 3
        with pytest.raises(MeritFastError, match="no backward pass"):
            sketcher.update("a", count=1)
        model(**batch(0)).loss.backward()
        with pytest.raises(MeritFastError, match="count must be at least 1"):
            sketcher.update("a", count=0)
        with pytest.raises(MeritFastError, match="count, the number of examples, is required"):
            sketcher.update("a")
        sketcher.discard()
        with pytest.raises(MeritFastError, match="no backward pass"):
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
