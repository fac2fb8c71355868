"""Changes after patch_model are followed: the model's own code runs, with what is there now."""

import functools
import pickle

import pytest
import torch
from support.architectures import VOCABULARY, inputs, make
from support.checks import assert_close
from support.patched import assert_same_gradients, loss_and_gradients
from torch import nn
from transformers import activations
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama import modeling_llama

from merit_fast import patch_model
from merit_fast.patch.classes import patched_class
from merit_fast.patch.forms import rotary
from merit_fast.patch.head import deferred_output


def other_rotation(q, k, cos, sin, unsqueeze_dim=1):
    return q * cos.unsqueeze(1), k * sin.unsqueeze(1)


def other_activation(model, monkeypatch):
    model.model.layers[0].mlp.act_fn = torch.nn.GELU()


def other_activation_function(model, monkeypatch):
    mlp = model.model.layers[1].mlp
    del mlp.act_fn
    mlp.act_fn = torch.tanh


def activation_hook(model, monkeypatch):
    act = model.model.layers[0].mlp.act_fn
    act.register_forward_hook(lambda module, args, output: output * 2)


def activation_class(model, monkeypatch):
    monkeypatch.setattr(activations.SiLUActivation, "forward", lambda self, x: torch.sin(x))


def epsilon(model, monkeypatch):
    model.model.layers[0].input_layernorm.variance_epsilon = 0.5


def norm_class(model, monkeypatch):
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", lambda self, x: x * self.weight)


def wrapped_norm_class(model, monkeypatch):
    """The wrapper takes the name of the forward that it wraps."""
    plain = modeling_llama.LlamaRMSNorm.forward

    @functools.wraps(plain)
    def forward(self, x):
        return 2 * plain(self, x)

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", forward)


def norm_subclass(model, monkeypatch):
    norm = model.model.layers[1].post_attention_layernorm
    cls = type(norm)
    norm.__class__ = type("Doubled", (cls,), {"forward": lambda self, x: 2 * cls.forward(self, x)})


def norm_instance(model, monkeypatch):
    norm = model.model.layers[1].post_attention_layernorm
    plain = norm.forward
    norm.forward = lambda x: 2 * plain(x)


def hook_of_every_norm(model, monkeypatch):
    def double(module, args, output):
        return 2 * output if isinstance(module, modeling_llama.LlamaRMSNorm) else None

    hooks = nn.modules.module._global_forward_hooks
    monkeypatch.setitem(hooks, -1, double)


def hook_of_every_head(model, monkeypatch):
    def double(module, args, output):
        return 2 * output if getattr(module, "out_features", 0) == VOCABULARY else None

    monkeypatch.setitem(nn.modules.module._global_forward_hooks, -1, double)


def linear_class(model, monkeypatch):
    plain = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 1.5 * plain(self, x))


def mlp_class(model, monkeypatch):
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: self.down_proj(
        self.gate_proj(x) * self.up_proj(x)
    ))  # fmt: skip


def rotation(model, monkeypatch):
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", other_rotation)


def attention_class(model, monkeypatch):
    monkeypatch.setattr(
        modeling_llama.LlamaAttention,
        "forward",
        lambda self, hidden_states, **kwargs: (self.o_proj(self.q_proj(hidden_states)), None),
    )


def attention_implementation(model, monkeypatch):
    model.set_attn_implementation("eager")


def model_class(model, monkeypatch):
    plain = modeling_llama.LlamaForCausalLM.forward

    def forward(self, *args, **kwargs):
        output = plain(self, *args, **kwargs)
        output.loss = 2 * output.loss
        return output

    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "forward", forward)


CHANGES = [
    other_activation, other_activation_function, activation_hook, activation_class, epsilon,
    norm_class, wrapped_norm_class, norm_subclass, norm_instance, hook_of_every_norm,
    hook_of_every_head, linear_class, mlp_class, rotation, attention_class,
    attention_implementation, model_class,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_later_change_has_its_effect(change):
    batch = inputs()
    results = []
    for patched in (False, True):
        model = make("llama")
        if patched:
            patch_model(model)
        with pytest.MonkeyPatch.context() as monkeypatch:
            change(model, monkeypatch)
            results.append(loss_and_gradients(model, batch))
    (plain, expected), (output, actual) = results
    assert_close(output.loss.detach(), plain.loss.detach())
    assert_same_gradients(actual, expected)
    if change is not attention_implementation:
        unchanged = make("llama")(**batch).loss.detach()
        assert not torch.isclose(plain.loss.detach(), unchanged, rtol=1e-5)


def method_of_class(model, monkeypatch):
    plain = modeling_gemma2.Gemma2RMSNorm._norm
    monkeypatch.setattr(modeling_gemma2.Gemma2RMSNorm, "_norm", lambda self, x: 2 * plain(self, x))


def method_of_instance(model, monkeypatch):
    norm = model.model.layers[1].pre_feedforward_layernorm
    plain = norm._norm
    norm._norm = lambda x: 2 * plain(x)


@pytest.mark.parametrize("is_changed_before", [False, True])
@pytest.mark.parametrize("change", [method_of_class, method_of_instance])
def test_a_method_that_a_forward_calls_is_followed(change, is_changed_before):
    losses = []
    for patched in (False, True):
        model = make("gemma2")
        with pytest.MonkeyPatch.context() as monkeypatch:
            if patched and not is_changed_before:
                patch_model(model)
            change(model, monkeypatch)
            if patched and is_changed_before:
                patch_model(model)
            losses.append(model(**inputs()).loss.detach())
    assert_close(losses[1], losses[0])
    assert not torch.isclose(losses[0], make("gemma2")(**inputs()).loss, rtol=1e-5)


def test_a_rotation_that_is_replaced_before_a_second_patch_is_the_one_that_runs(monkeypatch):
    """Either function rotates as ours does, so that ours runs under both."""
    patch_model(make("llama"))
    plain = modeling_llama.apply_rotary_pos_emb
    calls = []
    rotated = rotary._rotated

    def counted(*args, **options):
        calls.append(args)
        return rotated(*args, **options)

    monkeypatch.setattr(rotary, "_rotated", counted)
    for other in (lambda q, k, cos, sin, **options: plain(q, k, cos, sin), plain):
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", other)
        model = make("llama")
        patch_model(model)
        calls.clear()
        model(**inputs())
        assert len(calls) == 2


def test_deferred_logits_do_not_go_past_a_forward_on_the_instance():
    model = make("llama")
    patch_model(model)
    assert deferred_output(model, inputs()) is not None
    plain = model.forward
    model.forward = lambda **inputs: plain(**inputs)
    assert deferred_output(model, inputs()) is None


@pytest.mark.parametrize(
    "change", [norm_class, wrapped_norm_class, mlp_class, rotation, attention_class]
)
def test_a_process_with_other_classes_opens_a_pickle_with_them(change, monkeypatch):
    """The proof was of another forward, so that the class's own runs."""
    model = make("llama")
    patch_model(model)
    data = pickle.dumps(model)
    patched_class.cache_clear()  # as in a process that has not made the classes
    for name in [name for name in vars(modeling_llama) if name.startswith("_merit_fast")]:
        monkeypatch.delattr(modeling_llama, name)
    change(model, monkeypatch)
    opened = pickle.loads(data)
    assert_close(opened(**inputs()).loss.detach(), make("llama")(**inputs()).loss.detach())


@pytest.mark.filterwarnings("error")
def test_a_first_batch_without_targets_is_told_once():
    model = make("qwen2")
    patch_model(model)
    batch = inputs()
    without = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    with pytest.warns(UserWarning, match="Qwen2ForCausalLM: every label so far is -100"):
        assert model(**without).loss == 0
    model(**without)  # a second warning would be an error, as all are below
    learning = make("qwen2")
    patch_model(learning)
    learning(**batch)
    learning(**without)
