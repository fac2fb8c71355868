"""use_head gives TRL's trainers what their own fused head gives, gradients included."""

import copy
from types import SimpleNamespace

import pytest
import torch
from support import architectures
from support.stacks.trl_runs import assert_same_logs, logs_of, sft_run

from merit_fast.errors import InputError
from merit_fast.integrations.trl import use_head

trl = pytest.importorskip("trl", reason="trl is not installed")
utils = pytest.importorskip("trl.trainer.utils")

FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
MODELS = {
    "llama": {},
    "gemma2": {},  # cap of logits
    "granite": {},  # logits_scaling
    "cohere": {},  # logit_scale
    "cohere at scale 0": {"logit_scale": 0.0},
    "mixtral": {},  # router logits
}


def twins(name, dtype=torch.float32, **options):
    """A model with TRL's head, and a copy of it with ours."""
    torch.manual_seed(0)
    model = architectures.make(name.split(" at ")[0], dtype, **MODELS.get(name, {}))
    other = copy.deepcopy(model)
    for each in (model, other):
        utils.add_fused_lm_head(each, outputs=FIELDS, **options)
    assert use_head(SimpleNamespace(model=other)) == 1
    return model, other


def inputs_of(labels=None):
    torch.manual_seed(1)
    ids = torch.randint(3, architectures.VOCABULARY, (3, 11))
    labels = ids.masked_fill(torch.rand(3, 11) < 0.4, -100) if labels is None else labels
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return {"input_ids": ids, "labels": labels.masked_fill(mask == 0, -100), "attention_mask": mask}


def outcome(model, inputs, **options):
    """The fused output, and the gradients of a loss that uses every differentiable field."""
    model.zero_grad()
    output = model(**inputs, fused_lm_head=True, **options)
    (output.loss + output.entropy.square().sum() * 0.1).backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, tolerance=2e-5):
    for field in ("loss", "aux_loss", *FIELDS[:4]):
        expected = getattr(theirs[0], field)
        found = getattr(ours[0], field)
        if expected is None:
            assert found is None
        else:
            assert found.shape == expected.shape and found.dtype == expected.dtype
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(ours[0].is_top1, theirs[0].is_top1)
    assert torch.equal(ours[0].label_mask, theirs[0].label_mask)
    assert set(ours[1]) == set(theirs[1])
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-3, atol=tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_fields_and_gradients_are_those_of_trls_head(name):
    for options in ({}, {"temperature": 0.7}):
        theirs, ours = twins(name, **options)
        inputs = inputs_of()
        assert_same(outcome(ours, inputs), outcome(theirs, inputs))
        again = {"num_items_in_batch": torch.tensor(37)}
        assert_same(outcome(ours, inputs, **again), outcome(theirs, inputs, **again))


def test_shifted_labels_and_batches_without_labels():
    theirs, ours = twins("llama")
    inputs = inputs_of()
    inputs["shift_labels"] = inputs.pop("labels").roll(-1, 1)
    assert_same(outcome(ours, inputs), outcome(theirs, inputs))
    inputs = inputs_of(torch.full((3, 11), -100))
    output, gradients = outcome(ours, inputs)
    assert output.loss == 0 and not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("cast", [False, True], ids=["as it is", "head in float32"])
def test_bf16_and_autocast_agree_within_their_rounding(cast):
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        theirs, ours = twins("llama", dtype, cast_lm_head_to_fp32=cast)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            mine = ours(**inputs_of(), fused_lm_head=True)
            other = theirs(**inputs_of(), fused_lm_head=True)
        torch.testing.assert_close(mine.log_probs, other.log_probs, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(mine.loss, other.loss, rtol=2e-3, atol=2e-3)


def test_without_the_flag_and_in_float16_their_own_forward_runs(caplog):
    theirs, ours = twins("llama")
    ids = inputs_of()["input_ids"]
    assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    theirs, ours = twins("llama", torch.float16)
    for each in (theirs, ours):
        each.eval()
    mine = ours(**inputs_of(), fused_lm_head=True)
    assert torch.equal(mine.log_probs, theirs(**inputs_of(), fused_lm_head=True).log_probs)
    assert "TRL's own head runs: our kernels take whole float32 or bfloat16" in caplog.text


@pytest.mark.parametrize(
    "options", [{"loss_type": "nll"}, {"loss_type": "dft", "packing": True, "max_length": 32}]
)
def test_sft_logs_the_same(base, tmp_path, options):
    options = {
        "learning_rate": 1e-3,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        **options,
    }
    theirs = logs_of(sft_run(trl.SFTTrainer, base, tmp_path, **options))
    run = sft_run(trl.SFTTrainer, base, tmp_path, **options)
    use_head(run)
    assert_same_logs(logs_of(run), theirs)


def test_what_a_fused_head_would_ignore_is_refused():
    import peft

    model = architectures.make("llama")
    with pytest.raises(InputError, match="has no fused head of TRL on its model; call use_head"):
        use_head(SimpleNamespace(model=model))
    utils.add_fused_lm_head(model)
    use_head(SimpleNamespace(model=model))
    with pytest.raises(InputError, match="has our head already"):
        use_head(SimpleNamespace(model=model))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(InputError, match="the language-model head has an adapter"):
        adapted(**inputs_of(), fused_lm_head=True)
    whole = architectures.make("llama")
    utils.add_fused_lm_head(whole)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    whole = peft.get_peft_model(whole, config)
    use_head(SimpleNamespace(model=whole))
    whole(**inputs_of(), fused_lm_head=True).loss.backward()
    trained = {name for name, p in whole.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("lm_head.modules_to_save" in name for name in trained)


def test_every_trainer_with_a_head_in_float16_is_warned_once(caplog):
    for number in (1, 2):
        model = architectures.make("llama").half()
        utils.add_fused_lm_head(model)
        use_head(SimpleNamespace(model=model))
        for _ in range(2):
            model(**inputs_of(), fused_lm_head=True)
        found = [line for line in caplog.messages if "TRL's own head runs" in line]
        assert len(found) == number
