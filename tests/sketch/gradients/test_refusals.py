"""sketch_gradients refuses wrong arguments, and names parameters that it cannot cover."""

import re

import pytest
import torch
from support.sketch.exact_gradients import (
    SKETCH,
    tiny,
)
from torch.nn import functional as F

import merit_fast
from merit_fast.errors import InputError, MeritFastError
from merit_fast.sketch.gradients import GradientSketcher


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"parameters": "blocks("},
            "parameters: must be 'all', 'blocks' or a regular expression, got 'blocks",
        ),
        (
            {"parameters": "no such"},
            "parameters: must select at least one parameter that requires a gradient",
        ),
        (
            {"mode": "sum"},
            "mode: must be 'per_example', got 'sum'; merit_fast.sketch_sums sketches sums",
        ),
        ({"normalize": "adamw"}, "normalize: must be None, 'adam' or 'kfac'"),
        ({"normalize": "adam"}, "optimizer: must be given with normalize='adam', and only then"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(InputError, match=message):
        merit_fast.sketch_gradients(tiny("llama"), **options)


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(InputError, match="must select at least one parameter"):
        merit_fast.sketch_gradients(tiny("llama").requires_grad_(False))


class Gates(torch.nn.Module):
    """Multiplies by scales that other modules own."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.owners = torch.nn.ModuleList(torch.nn.ParameterList([torch.ones(1)]) for _ in "ab")

    def forward(self, x):
        return self.inner(x * self.owners[0][0]) * self.owners[1][0]


def test_parameters_that_cannot_be_covered_are_named_all_together_with_a_regex():
    model = tiny("llama", tied=True)
    model.model.layers[1].mlp = Gates(model.model.layers[1].mlp)
    with (
        pytest.raises(
            MeritFastError,
            match=r"parameter model.layers.1.mlp.owners.0.0 is used outside its module's forward, "
            r"in mul \(and 1 more: model.layers.1.mlp.owners.1.0\)",
        ) as caught,
        GradientSketcher(model, SKETCH),
    ):
        model(input_ids=torch.ones(2, 5, dtype=torch.long))
    regex = re.search(r"parameters='(.*?)'", str(caught.value))[1].replace(r"\\", "\\")
    rest = merit_fast.sketch_gradients(model, 4096, parameters=regex)
    assert set(dict(model.named_parameters())) - set(rest.parameter_names) == {
        "model.layers.1.mlp.owners.0.0",
        "model.layers.1.mlp.owners.1.0",
    }


class FusedHead(torch.nn.Module):
    """Reads the head's weight as a fused loss does, without calling the head."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, input_ids, use_head=False):
        hidden = self.inner.model(input_ids).last_hidden_state
        return (
            self.inner.lm_head(hidden) if use_head else F.linear(hidden, self.inner.lm_head.weight)
        )


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_parameter_used_behind_its_modules_back_is_named(tied):
    model = FusedHead(tiny("llama", tied))
    name = "inner.model.embed_tokens.weight" if tied else "inner.lm_head.weight"
    with GradientSketcher(model, SKETCH) as sketcher:
        model(torch.ones(2, 5, dtype=torch.long), use_head=True).sum().backward()
        assert len(sketcher.take()) == 2
        with pytest.raises(
            MeritFastError,
            match=f"parameter {name} is used outside its module's forward, in linear",
        ):
            model(torch.ones(2, 5, dtype=torch.long), use_head=None)


def test_a_weight_that_a_fused_attention_reads_is_named():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    model = Model()
    chosen = {"attention.out_proj.weight": model.attention.out_proj.weight}
    with (
        pytest.raises(
            MeritFastError, match="attention.out_proj.weight is used outside its module's forward"
        ),
        GradientSketcher(model, SKETCH, chosen),
    ):
        model(torch.randn(2, 3, 8))


def test_a_module_called_without_the_model_is_refused():
    model = tiny("llama")
    with (
        pytest.raises(
            MeritFastError, match="embed_tokens.weight of Embedding ran outside the forward pass"
        ),
        GradientSketcher(model, SKETCH),
    ):
        model.model(torch.ones(2, 5, dtype=torch.long))
