"""Layers that language models lack: adapters, convolutions, all kinds of norms, unknown modules."""

import pytest
import torch
from support.checks import assert_close
from support.sketch.exact_gradients import (
    SKETCH,
    exact_sketches,
    hook_sketches,
    ragged_examples,
    sketch_of_loss,
    tiny,
)
from torch import nn
from torch.nn import functional as F

from merit_fast.errors import MeritFastError
from merit_fast.sketch.capture.coverage import cover_of
from merit_fast.sketch.capture.layout import Site
from merit_fast.sketch.gradients import GradientSketcher


def assert_equal_to_examples(model, x, **options):
    """Runs ``model``, which maps [B, ...] to anything; its output gives a fixed loss."""
    model.eval()
    with GradientSketcher(model, SKETCH, **options) as sketcher:
        model(x).square().sum().backward()
        result = sketcher.take()
    truth = [sketch_of_loss(model, lambda row=row: model(row[None]).square().sum()) for row in x]
    assert_close(result, torch.cat(truth))


def test_peft_lora_factors():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny("llama"), config).eval()
    examples = ragged_examples()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 8 and all("lora_" in name for name in names)
    assert_close(hook_sketches(model, examples), exact_sketches(model, examples))


class HandMadeLora(nn.Module):
    """Factors without modules of their own, used by F.linear."""

    def __init__(self, base, rank=3):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(0.1 * torch.randn(rank, base.in_features))
        self.b = nn.Parameter(0.1 * torch.randn(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


def test_raw_factors():
    model = tiny("qwen2").requires_grad_(False)
    examples = ragged_examples()
    for layer in model.model.layers:
        layer.self_attn.v_proj = HandMadeLora(layer.self_attn.v_proj)
    assert_close(hook_sketches(model, examples), exact_sketches(model, examples))


class Patches(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv
        self.norm = nn.LayerNorm(12)

    def forward(self, pixels):
        return self.norm(self.conv(pixels).flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    "conv, shape",
    [
        (nn.Conv2d(3, 12, 4, stride=4), (3, 3, 12, 8)),
        (nn.Conv2d(3, 12, (3, 2), stride=(2, 1), padding=1, bias=False), (3, 3, 7, 6)),
        (nn.Conv2d(3, 12, 3, padding="same", padding_mode="reflect"), (2, 3, 5, 6)),
        (nn.Conv3d(3, 12, (2, 4, 4), stride=(2, 4, 4)), (2, 3, 4, 8, 8)),
        (nn.Conv2d(6, 12, 3, groups=3, dilation=2), (2, 6, 9, 9)),
        (nn.Conv1d(3, 12, 3, padding=1), (3, 3, 9)),
        (nn.Conv1d(6, 12, 4, padding=3, groups=6, dilation=2, stride=2), (3, 6, 14)),
        (nn.Conv1d(6, 12, 3, groups=3), (3, 6, 14)),
    ],
    ids=[
        "patches",
        "overlapping",
        "reflected",
        "patches-3d",
        "grouped",
        "one-dimensional",
        "depthwise",
        "grouped-1d",
    ],
)
def test_convolutions(conv, shape):
    assert_equal_to_examples(Patches(conv), torch.randn(shape))


class Norm(nn.Module):
    """(1 + w) n(x) with a bias, in a precision of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(8))
        self.bias = nn.Parameter(0.1 * torch.randn(8))

    def forward(self, x):
        n = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6)
        return ((1 + self.weight) * n.float() + self.bias).to(x.dtype)


class Squared(nn.Module):
    """Looks like a norm, but is not linear in its weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x):
        return x * self.weight**2


class Pooled(nn.Module):
    """Mixes an example's tokens; one scalar, one matrix."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.mixing = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        weights = torch.softmax(
            (self.inner(x) @ self.mixing).mean(-1, keepdim=True) * self.temperature, dim=1
        )
        return x * weights


@pytest.mark.parametrize(
    "module", [nn.LayerNorm(8), nn.RMSNorm(8), Norm(), Squared(), Pooled(), nn.GroupNorm(5, 5)]
)
def test_norms_and_unknown_modules(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert_equal_to_examples(
        nn.Sequential(nn.Linear(6, 8), module, nn.Linear(8, 3)), torch.randn(3, 5, 6)
    )


def test_only_true_norms_take_the_closed_form():
    closed = [
        m
        for m in (nn.LayerNorm(8), nn.RMSNorm(8), Norm(), Squared(), nn.GroupNorm(4, 8))
        if cover_of(site(m))
    ]
    assert [type(m) for m in closed] == [nn.LayerNorm, nn.RMSNorm, Norm]


def site(module):
    return Site(module, {local: local for local, _ in module.named_parameters(recurse=False)})


def test_an_output_that_is_changed_in_place():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    assert_equal_to_examples(model, torch.randn(3, 5, 6))


def test_an_input_that_is_changed_in_place_is_an_error_not_a_wrong_sketch():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x):
            h = x * 1
            y = self.linear(h)
            h += 1
            return y + h

    model = Model()
    with (
        GradientSketcher(model, SKETCH),
        pytest.raises(RuntimeError, match="modified by an inplace operation"),
    ):
        model(torch.randn(2, 3, 6)).sum().backward()


def test_embeddings_whose_gradient_depends_on_the_batch_are_refused():
    with pytest.raises(
        MeritFastError, match="weight of Embedding has scale_grad_by_freq or max_norm"
    ):
        GradientSketcher(nn.Sequential(nn.Embedding(5, 4, scale_grad_by_freq=True)), SKETCH)


def test_rows_that_cannot_be_told_apart_are_refused():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x.flatten(0, 1)[:7])

    model = Flat()
    with (
        GradientSketcher(model, SKETCH),
        pytest.raises(MeritFastError, match="linear.weight of Linear sees values"),
    ):
        model(torch.randn(3, 5, 4)).sum().backward()
