"""Residual sums that are normalised in one pass, inside layers whose own forward does anything."""

import pytest
import torch
from support.architectures import inputs, make
from support.checks import assert_close
from support.patched import assert_same_gradients, loss_and_gradients
from torch import nn
from torch.nn import functional as F
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from merit_fast import patch_model
from merit_fast.patch.classes import swap_of


class Plain(LlamaDecoderLayer):
    """``finish`` is static, so that it runs on what the forward runs on."""

    def forward(self, hidden_states, **kwargs):
        residual = hidden_states
        hidden_states, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        return self.finish(self, residual, hidden_states)

    @staticmethod
    def finish(self, residual, hidden_states):
        residual = residual + hidden_states
        return residual + self.mlp(self.post_attention_layernorm(residual))


class DropsOut(Plain):
    @staticmethod
    def finish(self, residual, hidden_states):
        residual = residual + F.dropout(hidden_states, 0.3, self.training)
        hidden_states = self.mlp(self.post_attention_layernorm(residual))
        return F.dropout(hidden_states, 0.3, self.training) + residual


class Scales(Plain):
    @staticmethod
    def finish(self, residual, hidden_states):
        residual = hidden_states * 0.5 + residual
        hidden_states = -self.mlp(self.post_attention_layernorm(residual)) / 3
        hidden_states += residual[..., :1]
        return torch.stack([residual, hidden_states]).sum(0)


class Looks(Plain):
    @staticmethod
    def finish(self, residual, hidden_states):
        assert isinstance(self.mlp, nn.Module)
        assert self.mlp.hidden_size == hidden_states.shape[-1]
        residual = residual + hidden_states
        if not torch.isfinite(residual).all() or len(residual) > 9:
            raise ValueError
        normed = self.post_attention_layernorm(residual)
        residual = residual.to(normed.dtype) + self.mlp(normed)
        return residual.clamp(-9, 9)


class Keeps(Plain):
    @staticmethod
    def finish(self, residual, hidden_states):
        self.kept = hidden_states
        self.mlp.kept = hidden_states
        return Plain.finish(self, residual, hidden_states)


class NormsTwice(Plain):
    @staticmethod
    def finish(self, residual, hidden_states):
        residual = residual + hidden_states
        first = self.post_attention_layernorm(residual)
        second = self.post_attention_layernorm(residual)
        return residual + self.mlp(first) + self.mlp(second)


class AddsBranches(Plain):
    @staticmethod
    def finish(self, residual, hidden_states):
        both = hidden_states + self.mlp(self.post_attention_layernorm(residual))
        return both + residual


def with_layers(cls):
    model = make("llama")
    for layer in model.model.layers:
        layer.__class__ = cls
    return model


@pytest.mark.parametrize(
    "cls, is_added",
    [(Plain, True), (DropsOut, False), (Scales, False), (Looks, False), (NormsTwice, True),
     (AddsBranches, False)],
)  # fmt: skip
def test_any_forward_of_a_layer_gives_what_it_gave(cls, is_added, monkeypatch):
    # The tiny model of the trial is made of these layers, too.
    monkeypatch.setattr(modeling_llama, "LlamaDecoderLayer", cls)
    batch = inputs()
    plain = with_layers(cls)
    torch.manual_seed(1)
    expected_output, expected = loss_and_gradients(plain, batch)
    model = with_layers(cls)
    patch = patch_model(model)
    assert ("add_rms_norm" in patch.replaced) == is_added, str(patch)
    torch.manual_seed(1)
    output, actual = loss_and_gradients(model, batch)
    assert_close(output.loss.detach(), expected_output.loss.detach())
    assert_same_gradients(actual, expected)
    model.gradient_checkpointing_enable()
    torch.manual_seed(1)
    _, again = loss_and_gradients(model, batch)
    assert_same_gradients(again, expected)


def test_what_a_layer_keeps_is_a_tensor(monkeypatch):
    monkeypatch.setattr(modeling_llama, "LlamaDecoderLayer", Keeps)
    model = make("llama")
    assert patch_model(model).replaced["add_rms_norm"] == 2
    model(**inputs())
    for layer in model.model.layers:
        assert type(layer.kept) is torch.Tensor and type(layer.mlp.kept) is torch.Tensor


def test_a_layer_that_the_tiny_model_lacks_keeps_its_class():
    model = make("llama")
    model.model.layers[1].__class__ = Plain
    assert patch_model(model).replaced["add_rms_norm"] == 1
    assert swap_of(model.model.layers[0]) and not swap_of(model.model.layers[1])


def test_a_norm_with_a_hook_gets_the_sum():
    seen = []
    for patched in (False, True):
        model = make("llama").eval()
        if patched:
            assert patch_model(model).replaced["add_rms_norm"] == 2
        norm = model.model.layers[1].post_attention_layernorm
        norm.register_forward_hook(lambda module, args, output: seen.append(args[0].detach()))
        model(**inputs())
    assert type(seen[1]) is torch.Tensor
    assert_close(seen[1], seen[0])


def test_layers_that_never_add_before_a_norm_keep_their_class():
    model = make("granite")  # it multiplies each branch first
    patch = patch_model(model)
    assert "add_rms_norm" not in patch.replaced
    assert not any(swap_of(layer) for layer in model.model.layers)
