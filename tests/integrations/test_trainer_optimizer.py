"""FusedAdamW and our loss in a Trainer: accelerate wraps and loads them; torch's own numbers."""

import pytest
import torch
from support.sketch.trainer_runs import arguments, llama, losses, pad, rows, trainer

from merit_fast import patch_model
from merit_fast.errors import InputError, MeritFastError
from merit_fast.integrations import fused_adamw, use_loss
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


def test_the_class_and_keywords_follow_the_arguments_of_the_trainer(tmp_path):
    """Against torch's AdamW with the same arguments: rate, schedule, betas, decay by group."""
    import transformers as t

    def weights(**optimizer):
        options = arguments(
            tmp_path, learning_rate=2e-3, weight_decay=0.1, adam_beta2=0.95, max_grad_norm=0.5
        )
        if "max_norm" in optimizer:
            options.max_grad_norm = 0.0
        model = llama()
        chosen = {"optimizer_cls_and_kwargs": fused_adamw(options, **optimizer)}
        if not optimizer:
            chosen = {}
        run = t.Trainer(model, options, data_collator=pad, train_dataset=rows(), **chosen)
        run.remove_callback(t.PrinterCallback)
        run.train()
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    theirs = weights()
    assert (weights(max_norm=0.5) - theirs).abs().max() < 1e-5
    assert (weights(moments="fp32") - theirs).abs().max() < 1e-5
    assert (weights(lr=1e-2, max_norm=0.5) - theirs).abs().max() > 1e-3


def test_two_clippers_are_refused(tmp_path):
    with pytest.raises(InputError, match="max_grad_norm: must be 0 where the optimizer clips"):
        fused_adamw(arguments(tmp_path), max_norm=1.0)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_label_smoothing_without_logits_trains_the_weights_of_the_trainers_own(
    tmp_path, accumulation
):
    def weights(ours):
        model = llama()
        run = trainer(
            tmp_path,
            rows(),
            model,
            label_smoothing_factor=0.2,
            gradient_accumulation_steps=accumulation,
            max_steps=4 // accumulation,
        )
        seen = []
        model.register_forward_hook(lambda *args: seen.append(args[-1].logits))
        if ours:
            patch_model(model)
            use_loss(run)
        run.train()
        assert all((logits is None) == ours for logits in seen) and len(seen) == 4
        return losses(run), torch.cat([p.detach().flatten() for p in model.parameters()])

    theirs = weights(False)
    mine = weights(True)
    assert mine[0] == pytest.approx(theirs[0], rel=1e-5)
    assert (mine[1] - theirs[1]).abs().max() < 1e-4


def test_a_z_loss_is_added_and_an_unpatched_model_is_refused(tmp_path):
    model = llama()
    run = trainer(tmp_path, rows()[:2], model, learning_rate=0.0, max_steps=1)
    patch_model(model)
    use_loss(run, z_loss=0.1)
    run.train()
    labels = pad(
        [
            {key: row[key] for key in ("labels",)} | {"input_ids": row["input_ids"]}
            for row in rows()[:2]
        ]
    )
    with torch.no_grad():
        logits = llama().double()(input_ids=labels["input_ids"]).logits[:, :-1]
    targets = labels["labels"][:, 1:]
    token = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    token = token + 0.1 * logits.logsumexp(-1).square()
    expected = float(token[targets != -100].mean())
    assert losses(run) == pytest.approx([expected], rel=1e-5)

    run = trainer(tmp_path, rows(), llama())
    use_loss(run, z_loss=0.1)
    with pytest.raises(MeritFastError, match="did not come from a patched head"):
        run.train()
    with pytest.raises(InputError, match="z_loss: must be at least 0, got -1"):
        use_loss(run, z_loss=-1)
