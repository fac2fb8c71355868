"""Attributes that a forward reads are followed at every call, or the module stays."""

import pytest
import torch
from support.architectures import inputs, make
from support.checks import assert_close
from support.patched import assert_same_gradients, loss_and_gradients
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from merit_fast import patch_model


class LimitedMLP(LlamaMLP):
    limit = None

    def forward(self, x):
        gate = self.act_fn(self.gate_proj(x))
        gate = gate if self.limit is None else gate.clamp(max=self.limit)
        return self.down_proj(gate * self.up_proj(x))


class FactorMLP(LlamaMLP):
    factor = 1.0

    def forward(self, x):
        return super().forward(x) * self.factor


class ConfiguredMLP(LlamaMLP):
    def forward(self, x):
        output = super().forward(x)
        return output if self.config.pretraining_tp == 1 else 2 * output


class InheritingMLP(FactorMLP):
    def forward(self, x):
        return super().forward(x)


class HeldNorm(LlamaRMSNorm):
    """``held`` differs between the layers and may change; a first trial sees 1."""

    def forward(self, x):
        return super().forward(x) * (self.held[0] if isinstance(self.held, list) else self.held)


class HeldMLP(LlamaMLP):
    def forward(self, x):
        return super().forward(x) * (self.held[0] if isinstance(self.held, list) else self.held)


class RememberingNorm(LlamaRMSNorm):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.widths = set()

    def forward(self, x):
        self.widths.add(x.shape[-1])
        return super().forward(x)


def with_classes(mlp, norm=LlamaRMSNorm):
    model = make("llama")
    for layer in model.model.layers:
        layer.mlp.__class__ = mlp
        layer.input_layernorm.__class__ = norm
    return model


@pytest.mark.parametrize("kind", ["buffer", "tensor", "list", "property"])
def test_modules_whose_forwards_read_tensors_or_lists_stay(kind):
    batch = inputs()
    model = with_classes(HeldMLP, HeldNorm)
    for number, layer in enumerate(model.model.layers):
        for module in (layer.mlp, layer.input_layernorm):
            value = torch.tensor(1.0 + number)
            if kind == "property":
                members = {"held": property(lambda self: self.kept)}
                module.__class__ = type(type(module).__name__, (type(module),), members)
                module.kept = value
            elif kind == "buffer":
                module.register_buffer("held", value)
            else:
                module.held = value if kind == "tensor" else [value.item()]
    plain, expected = loss_and_gradients(model, batch)
    patch = patch_model(model)
    assert patch.replaced["rms_norm"] == 3 and "swiglu" not in patch.replaced
    assert any("HeldNorm" in note and "reads held" in note for note in patch.notes)
    patched, actual = loss_and_gradients(model, batch)
    assert_close(patched.loss.detach(), plain.loss.detach())
    assert_same_gradients(actual, expected)


@pytest.mark.parametrize(
    "cls, name, value",
    [(LimitedMLP, "limit", 0.01), (FactorMLP, "factor", 3.0), (InheritingMLP, "factor", 3.0)],
)
def test_plain_values_that_a_forward_reads_are_followed(cls, name, value):
    losses = []
    for patched in (False, True):
        model = with_classes(mlp=cls)
        if patched:
            assert patch_model(model).replaced["swiglu"] == 2
        for layer in model.model.layers:
            setattr(layer.mlp, name, value)
        losses.append(model(**inputs()).loss.detach())
    assert_close(losses[1], losses[0])
    assert not torch.isclose(losses[0], make("llama")(**inputs()).loss, rtol=1e-5)


def test_a_value_of_the_config_that_a_forward_reads_is_followed():
    losses = []
    for patched in (False, True):
        model = with_classes(ConfiguredMLP)
        model.config.pretraining_tp = 1
        if patched:
            assert patch_model(model).replaced["swiglu"] == 2
        model.config.pretraining_tp = 2
        losses.append(model(**inputs()).loss.detach())
    assert_close(losses[1], losses[0])
    assert not torch.isclose(losses[0], make("llama")(**inputs()).loss, rtol=1e-5)


def test_a_norm_that_fills_a_set_stays():
    model = make("llama")
    model.model.norm = RememberingNorm(48)
    patch = patch_model(model)
    assert patch.replaced["rms_norm"] == 4 and not model.model.norm.widths
    assert any("RememberingNorm" in note for note in patch.notes)
