"""Our head in place of TRL's fused one: the same fields from the rows with labels only."""

import functools
import inspect
import logging
import sys
import types
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.utils import FusedCausalLMOutput

from merit_fast.errors import InputError, MeritFastError
from merit_fast.kernels.cross_entropy import linear_token_statistics
from merit_fast.kernels.labels import IGNORED_LABEL
from merit_fast.patch.classes import supported

_ROWS_AT_ONCE = 256

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _HeadForm:
    """Options of a trainer's fused head, as the trainer gave them to ``add_fused_lm_head``."""

    temperature: float
    cast_lm_head_to_fp32: bool
    outputs: tuple[str, ...]
    final_logit_softcapping: float | None
    logit_scale: float
    text_config: Any
    backbone_attr: str


@dataclass(frozen=True)
class _Operands:
    """Hidden states [B, T, H], the head's weight [V, H] and its bias [V], in one dtype."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def use_head(trainer: Any) -> int:
    """Replaces TRL's fused head of a trainer's model and reference model by ours.

        trainer = SFTTrainer(...)          # also DPO-, KTO-, GRPO- and RLOOTrainer
        use_head(trainer)                  # before train()

    Log-probabilities, entropies, top-1, losses and their gradients are those of TRL's head to
    rounding. Ours computes only rows that have a label; TRL's does so on a GPU only. Temperature,
    cap and scale of logits, and the router loss are the trainer's. A head in float16, or sharded
    over processes, stays TRL's, with one warning.

    Returns:
        Number of models whose head was replaced.

    Raises:
        InputError: the trainer has no fused head, trains already, or has an adapter on the head.
        MeritFastError: this TRL's head differs from the one that this adapter knows.
    """
    replaced = 0
    warned: set[str] = set()  # reasons: a warning for each trainer
    for role in ("model", "ref_model"):
        model = getattr(trainer, role, None)
        if model is None:
            continue
        model = getattr(model, "_orig_mod", model)  # torch_compile has wrapped a reference model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        forward = base.__dict__.get("forward")
        if forward is None and role == "ref_model":  # deepspeed's wrapper, or precomputed
            continue
        form = _form_of(forward, type(trainer).__name__)
        _require_no_adapter(base)
        base.forward = types.MethodType(_forward_of(type(base), forward, form, warned), base)
        replaced += 1
    return replaced


def _form_of(forward: Any, trainer: str) -> _HeadForm:
    """Reads what the trainer asked for from the forward that TRL made."""
    code = getattr(getattr(forward, "__func__", forward), "__code__", None)
    if code is None or "fused_lm_head" not in code.co_varnames:
        raise InputError(
            f"use_head: {trainer}: has no fused head of TRL on its model; call use_head once, "
            "after the trainer is made and before train()"
        )
    asked = inspect.getclosurevars(forward).nonlocals
    names = _HeadForm.__dataclass_fields__
    missing = [name for name in names if name not in asked]
    if len(missing) == len(names):
        raise InputError(f"use_head: {trainer}: has our head already")
    if missing:
        raise MeritFastError(
            f"use_head: {trainer}: this TRL's fused head does not tell its {missing[0]}; leave out "
            "use_head, or install the TRL that merit_fast[trl] names"
        )
    return _HeadForm(**{name: asked[name] for name in names})


def _require_no_adapter(model: Any) -> None:
    if "peft" not in sys.modules:  # nobody has made an adapter
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise InputError(
            "use_head: the language-model head has an adapter, which a fused head would ignore; "
            "leave the head out of target_modules, or list it in modules_to_save"
        )


def _forward_of(
    cls: type[nn.Module], theirs: Any, form: _HeadForm, warned: set[str]
) -> Callable[..., Any]:
    """A forward with our head where TRL asks for a fused one, and their own forward elsewhere."""

    @functools.wraps(cls.forward)  # generate reads the signature
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return theirs(*args, **kwargs)
        _require_no_adapter(self)
        if not _takes(self.get_output_embeddings(), form, warned):
            return theirs(*args, fused_lm_head=True, **kwargs)
        return _fused_output(self, form, args, kwargs)

    return forward


def _takes(head: Any, form: _HeadForm, warned: set[str]) -> bool:
    tensors = [head.weight] if head.bias is None else [head.weight, head.bias]
    if form.cast_lm_head_to_fp32 and not hasattr(head.weight, "device_mesh"):
        return True
    if torch.is_autocast_enabled(head.weight.device.type):
        dtype = torch.get_autocast_dtype(head.weight.device.type)
        is_plain = all(type(each) in (Tensor, nn.Parameter) for each in tensors)
        taken = is_plain and dtype in (torch.bfloat16, torch.float32)
    else:
        dtype = head.weight.dtype
        taken = supported(*tensors)
    if not taken:
        reason = f"our kernels take whole float32 or bfloat16 heads, got {dtype}"
        if reason not in warned:
            warned.add(reason)
            logger.warning("use_head: TRL's own head runs: %s", reason)
    return taken


def _fused_output(
    model: Any, form: _HeadForm, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> FusedCausalLMOutput:
    labels = kwargs.pop("labels", None)
    shift_labels = kwargs.pop("shift_labels", None)
    num_items = kwargs.pop("num_items_in_batch", None)
    kwargs["use_cache"] = False
    if getattr(form.text_config, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    decoded = getattr(model, form.backbone_attr)(*args, **kwargs)
    hidden = decoded.last_hidden_state
    if shift_labels is None:
        hidden = hidden[:, :-1]
        shift_labels = labels[:, 1:]
    head = model.get_output_embeddings()
    hidden = hidden.to(head.weight.device)
    targets = shift_labels.to(head.weight.device)
    fields = _statistics(form, head, hidden, targets)
    mask = targets != IGNORED_LABEL
    divisor = mask.sum().clamp(min=1) if num_items is None else num_items
    loss = -fields["log_probs"].sum() / divisor
    router_loss = _router_loss(form, decoded, kwargs)
    if router_loss is not None:
        loss = loss + getattr(form.text_config, "router_aux_loss_coef", 0.0) * router_loss
    return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=router_loss, **fields)


def _statistics(form: _HeadForm, head: Any, hidden: Tensor, targets: Tensor) -> dict[str, Any]:
    """The fields that the trainer asked for, [B, T]; 0 where there is no label."""
    device = hidden.device.type
    autocast = nullcontext()
    if form.cast_lm_head_to_fp32:
        autocast = torch.autocast(device, enabled=False)  # type: ignore[assignment]
    with autocast:
        operands = _operands(form, head, hidden)
        options = _options(form)
        found = linear_token_statistics(
            operands.hidden,
            operands.weight,
            targets,
            bias=operands.bias,
            entropy="entropy" in form.outputs,
            top1="is_top1" in form.outputs,
            **options,
        )
        fields = {"log_probs": found.log_probs, "entropy": found.entropy, "is_top1": found.is_top1}
        if "log_sum_sq_probs" in form.outputs:
            fields["log_sum_sq_probs"] = _log_sum_squares(operands, targets, options, found)
        if "mean_logits" in form.outputs:
            fields["mean_logits"] = _mean_logits(operands, targets, options)
    return fields


def _options(form: _HeadForm) -> dict[str, Any]:
    return {
        "softcap": form.final_logit_softcapping,
        "scale": float(form.logit_scale),
        "temperature": float(form.temperature),
    }


def _operands(form: _HeadForm, head: Any, hidden: Tensor) -> _Operands:
    device = hidden.device.type
    dtype = hidden.dtype
    if form.cast_lm_head_to_fp32:
        dtype = torch.float32
    elif torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    bias = None if head.bias is None else head.bias.to(dtype)
    return _Operands(hidden.to(dtype), head.weight.to(dtype), bias)


@torch.no_grad()
def _log_sum_squares(
    operands: _Operands, targets: Tensor, options: Mapping[str, Any], found: Any
) -> Tensor:
    """log(sum p^2) = lse(2 z) - 2 lse(z), of logits z; 0 where there is no label."""
    halved = {**options, "temperature": options["temperature"] / 2}
    doubled = linear_token_statistics(
        operands.hidden, operands.weight, targets, bias=operands.bias, **halved
    )
    log_sum: Tensor = doubled.log_sum_exp - 2 * found.log_sum_exp.detach()
    return log_sum


@torch.no_grad()
def _mean_logits(operands: _Operands, targets: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Mean of each row's logits over the vocabulary; 0 where there is no label.

    Without a cap the mean of products is the product with the mean.
    """
    is_target = targets != IGNORED_LABEL
    rows = operands.hidden[is_target].float()
    cap: float | None = options["softcap"]
    weight = operands.weight
    bias = operands.bias
    if cap is None:
        means: Tensor = rows @ weight.mean(0, dtype=torch.float32)
        if bias is not None:
            means = means + bias.mean(dtype=torch.float32)
        means = means * float(options["scale"])
    else:
        whole = weight.float()
        shift = None if bias is None else bias.float()
        parts: list[Tensor] = []
        for part in torch.split(rows, _ROWS_AT_ONCE):
            logits = nn.functional.linear(part, whole, shift) * float(options["scale"])
            capped: Tensor = cap * torch.tanh(logits / cap)
            parts.append(capped.mean(-1))
        means = torch.cat(parts)
    means = means / float(options["temperature"])
    return means.new_zeros(targets.shape).masked_scatter(is_target, means)


def _router_loss(form: _HeadForm, decoded: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The load-balancing loss of a mixture of experts, where its router logits are asked for."""
    if not kwargs.get("output_router_logits"):
        return None
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    loss = load_balancing_loss_func(
        decoded.router_logits,
        form.text_config.num_experts,
        form.text_config.num_experts_per_tok,
        kwargs.get("attention_mask"),
    )
    return torch.as_tensor(loss)  # the number 0 where a model has no experts
