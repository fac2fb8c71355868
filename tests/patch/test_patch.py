"""patch_model: the same losses and gradients, one instance only, and back to the same bits."""

import copy
import pickle

import pytest
import torch
from support.architectures import CASES, inputs, make
from support.checks import assert_close, assert_never_worse, rounding_share
from support.patched import assert_same_gradients, loss_and_gradients
from support.warm import run_python

from merit_fast import patch_model
from merit_fast.errors import InputError


@pytest.mark.parametrize("name", CASES)
def test_loss_and_every_gradient_are_those_of_the_model(name):
    model = make(name)
    batch = inputs()
    plain, expected = loss_and_gradients(model, batch)
    patch = patch_model(model)
    assert dict(patch.replaced) == CASES[name][3], str(patch)
    patched, actual = loss_and_gradients(model, batch)
    assert patched.logits is None and plain.logits is not None
    assert type(patched) is type(plain)
    assert_close(patched.loss.detach(), plain.loss.detach())
    assert_same_gradients(actual, expected)


@pytest.mark.parametrize("name", CASES)
def test_restored_models_have_their_old_bits(name):
    model = make(name).eval()
    batch = inputs()
    before = model(**batch)
    with patch_model(model) as patch:
        assert_close(model(**batch).logits.detach(), before.logits.detach())
    after = model(**batch)
    assert torch.equal(after.logits, before.logits) and torch.equal(after.loss, before.loss)
    assert {type(m) for m in model.modules()} == {type(m) for m in make(name).modules()}
    patch.restore()  # again: nothing to do


def test_bf16_losses_are_no_further_from_the_truth():
    """Pools four models: in one number, rounding may happen to favour eager."""
    losses = []
    for name in ("llama", "gemma2", "phi3", "qwen3_moe"):
        batch = inputs()
        truth = make(name, torch.bfloat16).float().train()(**batch).loss.detach()
        model = make(name, torch.bfloat16)
        eager = model(**batch).loss.detach()
        patch_model(model)
        ours, gradients = loss_and_gradients(model, batch)
        losses.append(torch.stack([ours.loss.detach(), eager, truth]))
        assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in gradients.values())
    assert_never_worse(*torch.stack(losses, dim=1), rounding_share(len(losses)))


def test_notes_name_what_stays_unchanged():
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50))
    patch = patch_model(gpt2)
    assert patch.replaced == {"head": 1}
    assert "1 GPT2Attention: calls no function that rotates positions" in patch.notes
    assert "kernels: head x 1\n  unchanged: " in str(patch)
    assert patch_model(torch.nn.Linear(2, 2)).notes == (
        "Linear: has no language-model head of its own",
    )
    assert str(patch_model(torch.nn.Linear(2, 2))).startswith("kernels: nothing replaced\n")
    cohere = str(patch_model(make("cohere")))
    assert (
        "kernels: swiglu x 2, rope x 2, head x 1" in cohere
        and "3 CohereLayerNorm: computes no RMSNorm that is known here (sub)" in cohere
    )
    assert "visual: is not the language tower" in str(patch_model(make("qwen3_vl")))
    assert patch_model(make("llama").model).notes == (
        "LlamaModel: has no language-model head of its own",
    )


def test_a_wrong_guess_is_never_silent():
    model = make("llama")

    class LlamaRMSNorm(type(model.model.norm)):
        def forward(self, x):
            return super().forward(x) * 1.5

    model.model.norm.__class__ = LlamaRMSNorm
    model.model.layers[0].mlp.act_fn = torch.nn.Tanh()
    batch = inputs()
    plain, expected = loss_and_gradients(model, batch)
    patch = patch_model(model)
    assert dict(patch.replaced) == {
        "rms_norm": 4,
        "add_rms_norm": 2,
        "swiglu": 1,
        "rope": 2,
        "head": 1,
    }
    assert "1 LlamaRMSNorm: computes no RMSNorm that is known here" in patch.notes
    assert "1 LlamaMLP: activation Tanh is neither SiLU nor GELU" in patch.notes
    patched, actual = loss_and_gradients(model, batch)
    assert_close(patched.loss.detach(), plain.loss.detach())
    assert_same_gradients(actual, expected)


def test_only_this_instance_changes():
    from transformers.models.llama import modeling_llama

    before, rotary = make("llama"), modeling_llama.apply_rotary_pos_emb
    model = make("llama")
    patch_model(model)
    for other in (before, make("llama")):
        assert not any(hasattr(type(module), "_merit_fast_swap") for module in other.modules())
        assert other(**inputs()).logits is not None
    assert modeling_llama.apply_rotary_pos_emb is rotary
    assert isinstance(model, modeling_llama.LlamaForCausalLM)


def test_a_second_patch_starts_from_the_models_own_forwards():
    model = make("qwen2")
    first = patch_model(model)
    second = patch_model(model)
    assert first.replaced == second.replaced
    second.restore()
    assert type(model) is type(make("qwen2")) and model(**inputs()).logits is not None
    patch_model(model)
    assert not patch_model(model, kernels="eager").replaced
    assert model(**inputs()).logits is not None


def test_unknown_kernels_are_bad_input():
    with pytest.raises(
        InputError, match="kernels: must be auto, eager, cpu, triton, cuda; got 'fast'"
    ):
        patch_model(make("llama"), kernels="fast")


def test_copies_pickles_and_files_keep_everything(tmp_path):
    from transformers import AutoModelForCausalLM

    model = make("qwen3")
    batch = inputs()
    keys, expected = list(model.state_dict()), model(**batch).loss.detach()
    patch_model(model)
    assert list(model.state_dict()) == keys
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        output = twin(**batch)
        assert output.logits is None
        assert_close(output.loss.detach(), expected)
        patch_model(twin).restore()
        assert twin(**batch).logits is not None and model(**batch).logits is None
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(make("qwen3"))
    assert_close(loaded.train()(**batch).loss.detach(), expected)


LOAD = """
import pickle, sys
import torch
with open(sys.argv[1], "rb") as file:
    model, batch, expected = pickle.load(file)
output = model(**batch)
assert output.logits is None
assert abs(output.loss.item() - expected) < 1e-6 * expected
from merit_fast import patch_model
assert patch_model(model, kernels="eager").replaced == {}
assert model(**batch).logits is not None
"""


@pytest.mark.process
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_a_pickle_stays_patched_in_a_new_process(name, tmp_path):
    """The process loads the pickle before it imports merit_fast, as a spawned worker does."""
    model = make(name)
    patch_model(model)
    batch = inputs()
    file = tmp_path / "model.pickle"
    expected = copy.deepcopy(model)(**batch).loss.item()
    file.write_bytes(pickle.dumps((model, batch, expected)))
    result = run_python(["-c", LOAD, str(file)])
    assert result.returncode == 0, result.stderr


def test_patching_draws_no_random_numbers():
    model = make("gemma2")
    state = torch.get_rng_state()
    patch_model(model)
    assert torch.equal(torch.get_rng_state(), state)
