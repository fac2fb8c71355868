"""What changes after patch_model is followed: the model's own code runs, with what is there now."""

import pickle

import pytest
import torch
from support.architectures import inputs, make
from support.checks import assert_close
from support.patched import assert_same_gradients, loss_and_gradients
from transformers import activations
from transformers.models.llama import modeling_llama

from merit_fast import patch_model
from merit_fast.patch.classes import patched_class


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
    norm_class, mlp_class, rotation, attention_class, attention_implementation, model_class,
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


@pytest.mark.parametrize("change", [norm_class, mlp_class, rotation, attention_class])
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
