"""Our optimizer and our loss in transformers' Trainer, one line each."""

from typing import Any

from merit_fast.errors import InputError, MeritFastError
from merit_fast.kernels.optimizer import FusedAdamW
from merit_fast.patch.deferred import LossTerms, with_loss_terms


def fused_adamw(arguments: Any, **options: Any) -> tuple[type[FusedAdamW], dict[str, Any]]:
    """``optimizer_cls_and_kwargs`` of a Trainer that runs ``FusedAdamW``.

        args = TrainingArguments("out", learning_rate=1e-5, max_grad_norm=0.0)
        Trainer(model, args, optimizer_cls_and_kwargs=fused_adamw(args, max_norm=1.0), ...)

    The Trainer makes the parameter groups, with ``args.weight_decay``, and the schedule; the
    learning rate, betas, eps and seed are those of ``args``, which a Trainer would not pass on.

    Args:
        arguments: the Trainer's ``TrainingArguments``, or those of TRL.
        options: keywords of ``FusedAdamW``; they win.

    Raises:
        InputError: both the optimizer and the Trainer would clip.
    """
    if options.get("max_norm") and arguments.max_grad_norm:
        raise InputError(
            f"max_grad_norm: must be 0 where the optimizer clips (max_norm="
            f"{options['max_norm']}), got {arguments.max_grad_norm}"
        )
    given = {
        "lr": arguments.learning_rate,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "eps": arguments.adam_epsilon,
        "seed": arguments.seed,
    }
    return FusedAdamW, given | options


def use_loss(trainer: Any, z_loss: float = 0.0) -> None:
    """Computes a Trainer's label smoothing, and a z-loss, without logits.

        patch_model(model)
        trainer = Trainer(model, TrainingArguments("out", label_smoothing_factor=0.1), ...)
        use_loss(trainer, z_loss=1e-4)

        loss = mean over target tokens of
            (1 - s) * nll + s / V * sum_v(-log p_v) + z_loss * logsumexp(logits)^2

    A Trainer with ``label_smoothing_factor`` takes the labels away before the model runs, so that
    even a patched model computes all logits. Here the labels stay and the head's kernel adds both
    terms; the loss is the Trainer's own to rounding. Evaluation stays as it is. Without either term
    a patched model needs no ``use_loss``.

    Args:
        trainer: a Trainer whose model ``patch_model`` has patched.
        z_loss: at least 0 (PaLM, Chowdhery et al. 2022).

    Raises:
        InputError: ``z_loss`` is negative, or the Trainer has a ``compute_loss_func`` or is TRL's.
        MeritFastError: in training, the loss did not come from a patched head.
    """
    if z_loss < 0:
        raise InputError(f"z_loss: must be at least 0, got {z_loss}")
    if trainer.compute_loss_func is not None:
        raise InputError("compute_loss_func: must be None with use_loss, which is a loss itself")
    if hasattr(trainer, "aux_loss_enabled"):
        raise InputError(
            f"use_loss: {type(trainer).__name__} has a head of its own; take use_head of "
            "merit_fast.integrations.trl"
        )
    smoothing = float(trainer.args.label_smoothing_factor)
    plain = trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not model.training:
            return plain(model, inputs, *args, **kwargs)
        smoother = trainer.label_smoother
        trainer.label_smoother = None  # it would take the labels away
        try:
            with with_loss_terms(LossTerms(smoothing, z_loss)) as terms:
                result = plain(model, inputs, *args, **kwargs)
        finally:
            trainer.label_smoother = smoother
        if not terms.num_uses:
            raise MeritFastError(
                "use_loss: the loss did not come from a patched head; call patch_model(model) "
                "before training, and read in its notes why the head stays"
            )
        return result

    trainer.compute_loss = compute_loss
