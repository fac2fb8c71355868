"""patch_model in training stacks: Trainer, PEFT, DDP, autocast, checkpointing, compile, sketch."""

from pathlib import Path

import pytest
import torch
from support.architectures import VOCABULARY, inputs, make
from support.checks import assert_close
from support.patched import assert_same_gradients, loss_and_gradients
from support.warm import run_together
from torch import nn

from merit_fast import patch_model

SHARDED = Path(__file__).with_name("sharded.py")

ROWS = [
    {"input_ids": list(range(3 + i, 12 + i)), "labels": [-100, -100, *range(5 + i, 12 + i)]}
    for i in range(24)
]


def run_trainer(model, folder, **options):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        folder,
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        report_to=[],
        learning_rate=1e-3,
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS[:4])
    trainer.train()
    return [
        entry["loss"] for entry in trainer.state.log_history if "loss" in entry
    ], trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.1}, {"bf16": True}], ids=str)
def test_trainer_logs_the_same_losses(tmp_path, options):
    plain = run_trainer(make("qwen2"), tmp_path / "plain", **options)
    model = make("qwen2")
    patch = patch_model(model)
    patched = run_trainer(model, tmp_path / "patched", **options)
    rounding = 1e-2 if "bf16" in options else 1e-4
    assert patched[0] == pytest.approx(plain[0], rel=rounding) and len(plain[0]) == 6
    assert patched[1] == pytest.approx(plain[1], rel=rounding)
    patch.restore()
    assert model.train()(**inputs()).logits is not None


def test_gradient_checkpointing_recomputes_the_same():
    model = make("llama")
    batch = inputs()
    plain, expected = loss_and_gradients(model, batch)
    patch_model(model)
    model.gradient_checkpointing_enable()
    patched, actual = loss_and_gradients(model, batch)
    assert_close(patched.loss.detach(), plain.loss.detach())
    assert_same_gradients(actual, expected)


def test_adapters_train_inside_a_patched_model():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "gate_proj", "down_proj"], init_lora_weights=False
    )
    model = peft.get_peft_model(make("qwen2"), config)
    batch = inputs()
    plain, expected = loss_and_gradients(model, batch)
    patch = patch_model(model)
    assert dict(patch.replaced) == {
        "rms_norm": 5,
        "add_rms_norm": 2,
        "swiglu": 2,
        "rope": 2,
        "head": 1,
    }
    patched, actual = loss_and_gradients(model, batch)
    assert patched.logits is None
    assert_close(patched.loss.detach(), plain.loss.detach())
    assert_same_gradients(actual, expected)
    patch.restore()
    assert torch.equal(model(**batch).loss, plain.loss)


def test_an_adapted_head_is_left_alone():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make("llama"), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    patch = patch_model(model)
    assert "head" not in patch.replaced
    assert "LlamaForCausalLM: lm_head: Linear is no plain linear layer" in patch.notes
    assert model(**inputs()).logits is not None


def test_ddp_wraps_a_patched_model_and_is_patched_inside(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        inner = make("llama")
        batch = inputs()
        plain, expected = loss_and_gradients(inner, batch)
        model = nn.parallel.DistributedDataParallel(inner)
        patch_model(model)
        patched, _ = loss_and_gradients(model, batch)
        actual = {name: p.grad for name, p in inner.named_parameters()}
        del model  # while the group exists: its threads may hang if DDP is the last to hold it
    finally:
        torch.distributed.destroy_process_group()
    assert_close(patched.loss.detach(), plain.loss.detach())
    assert_same_gradients(actual, expected)


@pytest.mark.process
def test_sharded_models_are_patched_before_and_after_fully_shard(tmp_path):
    """Ranks of equal batches: the mean of their gradients is one process's gradient."""
    meeting = tmp_path / "rendezvous"
    results = run_together([[SHARDED, str(rank), meeting] for rank in (0, 1)], timeout=240)
    for result in results:
        assert result.returncode == 0, result.stderr


def test_autocast_computes_in_its_dtype():
    model = make("llama")
    batch = inputs()
    truth = model(**batch).loss.detach()
    with torch.autocast("cpu", torch.bfloat16):
        plain, expected = loss_and_gradients(model, batch)
        patch_model(model)
        patched, actual = loss_and_gradients(model, batch)
    assert patched.logits is None and patched.loss.dtype == torch.float32
    assert (patched.loss - truth).abs() <= (plain.loss - truth).abs() + 2e-3 * truth
    assert_same_gradients(actual, expected, floor=0.1)


def test_norms_compile_whole():
    model = make("gemma")
    x = torch.randn(2, 5, 48)
    expected = model.model.norm(x)
    patch_model(model)
    assert_close(
        torch.compile(model.model.norm, fullgraph=True, backend="eager")(x).detach(),
        expected.detach(),
    )


def test_a_compiled_model_follows_later_changes():
    model = make("llama", num_hidden_layers=1)
    patch_model(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    before = compiled(**inputs()).loss.detach()
    other = make("llama", num_hidden_layers=1)
    other.model.layers[0].mlp.act_fn = model.model.layers[0].mlp.act_fn = nn.GELU()
    expected = other(**inputs()).loss.detach()
    assert not torch.isclose(before, expected, rtol=1e-5)
    assert_close(compiled(**inputs()).loss.detach(), expected)


def test_half_precision_and_double_run_the_models_own_code():
    model = make("llama").double()
    patch_model(model)
    plain = make("llama").double()
    batch = inputs()
    assert torch.equal(model(**batch).loss, plain(**batch).loss)


def test_every_way_to_ask_for_a_loss():
    model = make("gemma2")
    batch = inputs()
    shifted = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    asks = [
        {"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(7)},
        {"shift_labels": shifted},
        {"labels": batch["labels"].clamp(min=7), "ignore_index": 7}, {"output_hidden_states": True},
    ]  # fmt: skip
    expected = [model(**{**batch, **ask}) for ask in asks]
    patch_model(model)
    for ask, plain in zip(asks, expected, strict=True):
        patched = model(**{**batch, **ask})
        assert_close(patched.loss.detach(), plain.loss.detach())
        assert patched.logits is None and (patched.hidden_states is None) == (
            plain.hidden_states is None
        )
    loss, logits = model(**batch, return_dict=False, use_cache=False)
    assert_close(loss.detach(), model(**batch).loss.detach())
    assert logits is None  # its place stays
    assert model(**batch, skip_logits=False).logits.shape[-1] == VOCABULARY
    assert model.eval()(**batch).logits is not None
    assert model(**batch, skip_logits=True).logits is None
    without = {key: value for key, value in batch.items() if key != "labels"}
    assert model.train()(**without).logits is not None
    with pytest.raises(ValueError, match="batch_size"):  # transformers' own error
        model(**batch, logits_to_keep=2)


def test_a_loss_function_or_hook_of_the_users_own_is_obeyed():
    model = make("llama")
    patch_model(model)
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum() * 0 + 42
    assert model(**inputs()).loss == 42
    del model._loss_function
    seen = []
    handle = model.lm_head.register_forward_hook(
        lambda module, args, output: seen.append(output.shape)
    )
    assert model(**inputs()).logits is not None and seen
    handle.remove()
    assert model(**inputs()).logits is None


def test_the_weight_of_a_parametrised_head_is_computed_once():
    """Each computation in training changes the vectors that estimate the norm."""
    results = []
    for patched in (False, True):
        model = make("llama")
        if patched:
            patch_model(model)
        nn.utils.parametrizations.spectral_norm(model.lm_head)
        output, gradients = loss_and_gradients(model, inputs())
        assert (output.logits is None) == patched
        results.append((output.loss.detach(), gradients))
    assert_close(results[1][0], results[0][0])
    assert_same_gradients(results[1][1], results[0][1])


def test_generation_is_unchanged():
    model = make("qwen3").eval()
    ids = inputs()["input_ids"][1:]
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    patch_model(model)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)


def test_sketches_of_a_patched_model_are_those_of_the_model():
    from merit_fast import sketch_gradients

    batch = inputs()
    found = []
    for patched in (False, True):
        model = make("qwen2")
        if patched:
            patch_model(model)
        # The loss is the batch's mean, which a check refuses.
        with sketch_gradients(model, proj_dim=4096, check="never") as sketcher:
            model(**batch).loss.backward()
            found.append(sketcher.take())
    assert_close(found[1], found[0])
