"""patch_model replaces a module only if the trial shows that it computes the same everywhere."""

import random
import time

import numpy as np
import pytest
import torch
from support.architectures import CASES, inputs, make
from support.checks import assert_close
from support.patched import assert_same_gradients, loss_and_gradients
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from merit_fast import patch_model
from merit_fast.patch import model as patch_module
from merit_fast.patch import whole
from merit_fast.patch.classes import swap_of
from merit_fast.patch.forms import gated


class DropoutMLP(LlamaMLP):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class DormantDropoutMLP(LlamaMLP):
    rate = 0.0

    def forward(self, x):
        return F.dropout(super().forward(x), self.rate, self.training)


class NoisyMLP(LlamaMLP):
    def forward(self, x):
        return super().forward(x) + 0 * torch.randn_like(x)


class DetachedGateMLP(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).detach() * self.up_proj(x))


class ClampedMLP(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=1e3) * self.up_proj(x))


class WeightOnlyMLP(LlamaMLP):
    """Goes past what stands in the projection's place, such as an adapter or a hook."""

    def forward(self, x):
        gate = F.linear(x, self.gate_proj.weight)
        return self.down_proj(self.act_fn(gate) * self.up_proj(x))


class RoundedMLP(LlamaMLP):
    def forward(self, x):
        scale = 1.5 if x.dtype == torch.bfloat16 else 1.0
        return super().forward(x) * scale


class TrainingNorm(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x) * (1.5 if self.training else 1.0)


class FixedEpsilonNorm(LlamaRMSNorm):
    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class FrozenNorm(LlamaRMSNorm):
    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight.detach() * wide.to(x.dtype)


class OneRowNorm(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x) * (2.0 if x.dim() == 2 else 1.0)


class CountingNorm(LlamaRMSNorm):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


MLPS = [
    DropoutMLP, DormantDropoutMLP, NoisyMLP, DetachedGateMLP, ClampedMLP, WeightOnlyMLP, RoundedMLP,
]  # fmt: skip
NORMS = [TrainingNorm, FixedEpsilonNorm, FrozenNorm, OneRowNorm, CountingNorm]


def with_classes(mlp=None, norm=None):
    model = make("llama")
    for layer in model.model.layers:
        if mlp is not None:
            layer.mlp.__class__ = mlp
        if norm is not None:
            layer.input_layernorm.__class__ = norm
    return model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mlp", MLPS)
def test_an_mlp_that_does_more_stays(mlp, training):
    """``from_pretrained`` leaves models in evaluation, where dropout does nothing."""
    model = with_classes(mlp=mlp)
    patch = patch_model(model.train(training))
    assert dict(patch.replaced) == {"rms_norm": 5, "add_rms_norm": 2, "rope": 2, "head": 1}
    assert any(mlp.__name__ in note for note in patch.notes)
    plain = with_classes(mlp=mlp)
    torch.manual_seed(3)
    _, expected = loss_and_gradients(plain, inputs())
    torch.manual_seed(3)
    _, actual = loss_and_gradients(model.train(), inputs())
    assert_same_gradients(actual, expected)


@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_that_differs_somewhere_stays(norm):
    model = with_classes(norm=norm)
    patch = patch_model(model.eval())
    assert patch.replaced["rms_norm"] == 3
    assert any(norm.__name__ in note for note in patch.notes)
    assert not any(vars(module).get("calls") for module in model.modules())


def test_a_default_device_changes_no_trial():
    model = make("llama", sliding_window=5)  # a config that no other test has compared
    with torch.device("meta"):
        patch = patch_model(model)
    assert dict(patch.replaced) == CASES["llama"][3]


def test_a_first_pass_that_compiles_kernels_may_take_long(monkeypatch):
    """The limit is one of the model's own code."""
    passes = []
    observe = whole._observe
    plain = gated.swiglu

    def slow(*args, **options):
        end = time.thread_time() + 0.3
        while time.thread_time() < end:
            pass
        return plain(*args, **options)

    def observe_with_slow_kernels(*args):
        passes.append(args)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(gated, "swiglu", slow)
            return observe(*args)

    monkeypatch.setattr(whole, "_MOST_SECONDS", 0.5)  # two layers take longer
    monkeypatch.setattr(whole, "_observe", observe_with_slow_kernels)
    model = make("llama", sliding_window=6)  # a config that no other test has compared
    patch = patch_model(model)
    assert len(passes) == 2 and dict(patch.replaced) == CASES["llama"][3], str(patch)


def test_projections_of_other_names_and_orders_are_found_by_trial():
    class UpFirst(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.both = torch.nn.Linear(48, 80)
            self.out = torch.nn.Linear(40, 48)

        def forward(self, hidden):
            up, gate = self.both(hidden).chunk(2, -1)
            return self.out(F.gelu(gate, approximate="tanh") * up)

    model = make("llama")
    torch.manual_seed(0)
    model.model.layers[0].mlp = UpFirst()
    batch = inputs()
    plain, expected = loss_and_gradients(model, batch)
    assert patch_model(model).replaced == {
        "rms_norm": 5, "add_rms_norm": 2, "swiglu": 1, "geglu": 1, "rope": 2, "head": 1,
    }  # fmt: skip
    patched, actual = loss_and_gradients(model, batch)
    assert_close(patched.loss.detach(), plain.loss.detach())
    assert_same_gradients(actual, expected)


def test_a_model_that_differs_as_a_whole_loses_the_op(monkeypatch):
    """The trials of single modules pass; only the whole shows that the head's loss is another."""
    monkeypatch.setattr("merit_fast.patch.head._loses_nothing", lambda *arguments: True)
    cls = type(make("llama"))

    class LlamaForCausalLM(cls):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            if output.loss is not None and output.logits is not None:
                output.loss = output.loss + output.logits.square().mean()
            return output

    model = make("llama")
    model.__class__ = LlamaForCausalLM
    patch = patch_model(model)
    assert "head" not in patch.replaced and patch.replaced["rms_norm"] == 5
    assert any(note.startswith("head: the whole model then ") for note in patch.notes)


def test_trials_leave_generators_and_the_model_as_they_were():
    model = make("gemma2", sliding_window=7)  # a config that no other test has compared
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    attributes = [list(vars(module)) for module in model.modules()]
    patch_model(model)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert [list(vars(module)) for module in model.modules()] == attributes
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in kept.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training


@pytest.mark.parametrize("patched_before", [True, False])
@pytest.mark.parametrize("place", ["plan_head", "try_whole", "swap_all"])
def test_an_error_leaves_every_module_as_it_was(monkeypatch, patched_before, place):
    model = make("llama")
    if patched_before:
        patch_model(model)
    before = [type(module) for module in model.modules()]

    def fails(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(patch_module, place, fails)
    with pytest.raises(KeyboardInterrupt):
        patch_model(model)
    assert [type(module) for module in model.modules()] == before


def test_modules_that_cannot_be_swapped_take_the_others_back():
    model = make("llama")

    class Slotted(LlamaRMSNorm):
        __slots__ = ("__weakref__x",)

    class Fixed(Slotted):
        def __setattr__(self, name, value):
            if name == "__class__":
                raise TypeError("fixed")
            super().__setattr__(name, value)

    model.model.norm = Fixed(48)  # the last norm of the model
    with pytest.raises(TypeError, match="fixed"):
        patch_model(model)
    assert not any(swap_of(module) for module in model.modules())
