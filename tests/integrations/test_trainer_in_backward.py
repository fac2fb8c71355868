"""Updates inside the backward pass in a Trainer: schedules, accumulation, norms, refusals."""

import pytest
import torch
from support.sketch.trainer_runs import arguments, llama, pad, rows

from merit_fast.kernels.optimizer import FusedAdamW


def train_layerwise(folder, layerwise, accumulation=1, max_grad_norm=0.0, **options):
    import transformers as t

    model = llama()
    optimizer = FusedAdamW(model.parameters(), lr=1e-2, **options)
    if layerwise is not None:
        optimizer.step_in_backward(accumulation=accumulation, **layerwise)
    arguments_of_run = arguments(
        folder,
        max_grad_norm=max_grad_norm,
        gradient_accumulation_steps=accumulation,
        lr_scheduler_type="linear",
        logging_steps=1,
    )
    run = t.Trainer(
        model,
        arguments_of_run,
        data_collator=pad,
        train_dataset=rows(),
        optimizers=(optimizer, None),
    )
    run.remove_callback(t.PrinterCallback)
    run.train()
    norms = [entry["grad_norm"] for entry in run.state.log_history if "grad_norm" in entry]
    return list(model.parameters()), norms


@pytest.mark.parametrize("accumulation", [1, 2])
def test_updates_in_the_pass_follow_the_trainers_schedule_accumulation_and_norm(
    tmp_path, accumulation
):
    plain, true_norms = train_layerwise(tmp_path / "plain", None, accumulation)
    ours, norms = train_layerwise(tmp_path / "ours", {}, accumulation)
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
    assert norms == pytest.approx(true_norms, rel=1e-5) and min(norms) > 0


def test_the_trainers_own_clipping_is_refused_once_it_would_change_a_gradient(tmp_path):
    with pytest.raises(RuntimeError, match="max_grad_norm=0"):
        train_layerwise(tmp_path, {}, max_grad_norm=1e-3)


def test_an_accumulation_that_the_optimizer_was_not_told_is_refused(tmp_path):
    import transformers as t

    model = llama()
    optimizer = FusedAdamW(model.parameters())
    optimizer.step_in_backward()
    options = arguments(tmp_path, max_grad_norm=0.0, gradient_accumulation_steps=2)
    run = t.Trainer(
        model, options, data_collator=pad, train_dataset=rows(), optimizers=(optimizer, None)
    )
    with pytest.raises(RuntimeError, match="pass accumulation=N"):
        run.train()
