"""FusedAdamW in a Trainer: accelerate wraps, saves and loads it without changing a bit."""

import pytest
import torch
from support.sketch.trainer_runs import arguments, llama, pad, rows

from merit_fast.kernels.optimizer import FusedAdamW


def train(folder, kind, resume=None, **changes):
    import transformers as t

    model = llama().bfloat16() if "master" in kind else llama()
    optimizer = FusedAdamW(model.parameters(), lr=1e-2, max_norm=1.0, **kind)
    options = arguments(folder, max_grad_norm=0.0, **changes)
    run = t.Trainer(
        model, options, data_collator=pad, train_dataset=rows(), optimizers=(optimizer, None)
    )
    run.remove_callback(t.PrinterCallback)
    run.train(resume_from_checkpoint=resume)
    return list(model.parameters())


@pytest.mark.parametrize(
    "kind",
    [{"moments": "int8"}, {"master": "split"}, {"average_decay": 0.99}],
    ids=["int8 moments", "split master", "running average"],
)
def test_a_resumed_run_ends_with_the_weights_of_one_that_never_stopped(tmp_path, kind):
    whole = train(tmp_path / "whole", kind)
    train(tmp_path / "cut", kind, save_strategy="steps", save_steps=2)
    resumed = train(tmp_path / "cut", kind, str(tmp_path / "cut" / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert not all(
        torch.equal(a, b.to(a.dtype)) for a, b in zip(whole, llama().parameters(), strict=True)
    )
