"""A language model's loss without logits: its own forward runs on a placeholder for them."""

import functools
import inspect
import warnings
import weakref
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from merit_fast.kernels.labels import IGNORED_LABEL
from merit_fast.patch.classes import (
    Forward,
    Plan,
    has_hooks,
    method_on_instance,
    runs_ours,
    swap_of,
)
from merit_fast.patch.deferred import DeferredLogits, deferred_cross_entropy
from merit_fast.patch.proof import random_tensor, seed_generator, undisturbed

_NARROW = 8
_LINEAR = nn.Linear.forward
# Models that have seen a target, or whose user was told that they have not.
_KNOWN_TO_LEARN: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def deferred_logits(model: nn.Module, inputs: Mapping[str, Any]) -> DeferredLogits | None:
    """Runs a patched model up to its deferred logits; None if the head is not patched."""
    output = deferred_output(model, inputs)
    return None if output is None else output.logits


def deferred_output(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The output of a patched model with deferred logits; None if the head is not patched."""
    origin = swap_of(model)
    if origin is None or origin.maker is not head_forward or not runs_ours(model):
        return None
    name, backend = origin.options
    if not _is_plain(model, name):
        return None
    if has_hooks(model):  # FSDP2 gathers the weights in them, and this call goes past them
        return None
    view = _View(model, name, backend)
    return origin.original.forward(view, **inputs, return_dict=True)


def plan_head(model: Any, backend: str | None) -> Plan | str:
    """Plans a forward that defers logits; returns the reason if the model cannot have it."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    name = next(
        (name for name, child in model.named_children() if child is head and head is not None), None
    )
    if name is None:
        return "has no language-model head of its own"
    method = method_on_instance(model)
    if method is not None:
        return f"has a {method} of its own on the instance"
    if not isinstance(head, nn.Linear) or type(head).forward is not _LINEAR:
        return f"{name}: {type(head).__name__} is no plain linear layer"
    with undisturbed(head.weight.device):
        is_equal = _loses_nothing(model, name, backend)
    if not is_equal:
        return f"{name}: the loss without logits is not what the model computes"
    return Plan(model, "head", head_forward, (name, backend))


def head_forward(original: type[nn.Module], name: str, backend: str | None) -> Forward:
    """Makes a forward that skips the logits in training with labels."""
    plain = original.forward

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        skip = kwargs.pop("skip_logits", None)
        wanted = self.training if skip is None else skip
        if (
            not wanted
            or kwargs.get("labels") is None
            or swap_of(self) is None
            or not _is_plain(self, name)
        ):
            return plain(self, *args, **kwargs)
        output = plain(_View(self, name, backend), *args, **kwargs)
        if isinstance(output, tuple):
            return tuple(None if isinstance(value, DeferredLogits) else value for value in output)
        return type(output)(**{key: value for key, value in output.items() if key != "logits"})

    return forward


def _is_plain(model: Any, name: str) -> bool:
    """Whether the head is a plain layer without hooks and the loss is transformers' own."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    head = getattr(model, name)
    return (
        type(head).forward is _LINEAR
        and "forward" not in head.__dict__
        and not has_hooks(head)
        and model.loss_function is ForCausalLMLoss
    )


class _View:
    """The model as its own forward sees it, with another head and loss; it stays unchanged."""

    def __init__(self, model: Any, name: str, backend: str | None) -> None:
        replaced = {
            name: functools.partial(_defer, getattr(model, name)),
            "loss_function": self._loss,
        }
        self.__dict__.update(_model=model, _backend=backend, _replaced=replaced)

    def __getattr__(self, name: str) -> Any:
        return self._replaced[name] if name in self._replaced else getattr(self._model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._model, name, value)

    def _loss(
        self,
        logits: DeferredLogits,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = IGNORED_LABEL,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Computes transformers' ForCausalLMLoss without logits where that gives the same loss."""
        targets = (
            F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
            if shift_labels is None
            else shift_labels
        )
        _warn_without_targets(self._model, targets, ignore_index)
        losses = None
        if ignore_index == IGNORED_LABEL and vocab_size == logits.weight.shape[0]:
            reduction = "mean" if num_items_in_batch is None else "sum"
            targets = targets.to(logits.hidden.device)
            losses = deferred_cross_entropy(logits, targets, self._backend, reduction=reduction)
        if losses is None:
            options = {
                "num_items_in_batch": num_items_in_batch,
                "ignore_index": ignore_index,
                **kwargs,
            }
            loss: Tensor = self._model.loss_function(
                logits=logits.computed(),
                labels=labels,
                vocab_size=vocab_size,
                shift_labels=shift_labels,
                **options,
            )
            return loss
        if num_items_in_batch is None:
            return cast(Tensor, losses.loss.clone())  # mixtures of experts add to it in place
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(losses.loss.device)
        return cast(Tensor, losses.loss / num_items_in_batch)


def _warn_without_targets(model: nn.Module, targets: Tensor, ignore_index: int) -> None:
    """Warns once if no batch so far has a target: such a loss is 0 and trains nothing."""
    if (
        torch.compiler.is_compiling()
        or model in _KNOWN_TO_LEARN
        or type(targets) is not Tensor
        or targets.is_meta
        or torch._C._are_functorch_transforms_active()
    ):
        return
    _KNOWN_TO_LEARN.add(model)
    if not bool((targets != ignore_index).any()):
        warnings.warn(
            f"{type(model).__name__}: every label so far is {ignore_index}, so the loss is 0 and "
            "nothing is learned; check which tokens of the rows have labels",
            stacklevel=2,
        )


def _defer(head: nn.Linear, hidden: Tensor) -> DeferredLogits:
    # A parametrised weight is computed once, as in the head's own forward.
    return DeferredLogits(hidden, head.weight, head.bias)


class _AnyOutput:
    """A decoder's output, for a trial of the code that follows the decoder."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


class _Decoder(nn.Module):
    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> _AnyOutput:
        return _AnyOutput(self.hidden)


def _loses_nothing(model: Any, name: str, backend: str | None) -> bool:
    """Compares the model's own losses and gradients with ours on a narrow random head."""
    own = getattr(model, name)
    device = own.weight.device
    head = nn.Linear(_NARROW, len(own.weight), bias=own.bias is not None, device="meta")
    head.weight = nn.Parameter(random_tensor(len(own.weight), _NARROW, seed=0, device=device))
    if own.bias is not None:
        head.bias = nn.Parameter(random_tensor(len(own.weight), seed=1, device=device))
    hidden = random_tensor(2, 5, _NARROW, seed=2, device=device).requires_grad_()
    inputs = _trial_inputs(model, len(own.weight), device)
    labels = inputs["labels"]
    for training in (True, False):
        twin = object.__new__(type(model))
        vars(twin).update(vars(model))
        twin.__dict__["training"] = training
        decoders = {child: _Decoder(hidden) for child in model._modules}
        twin.__dict__["_modules"] = {**decoders, name: head}
        plain = functools.partial(type(model).forward, twin)
        ours = functools.partial(type(model).forward, _View(twin, name, backend))
        for extra in ({}, {"num_items_in_batch": 11}, {"shift_labels": labels}):
            arguments = {**inputs, **extra}
            try:
                expected = _loss_and_gradients(plain, arguments, [hidden, *head.parameters()])
            except Exception:  # whatever foreign code raises on the trial: it is not what we know
                return False
            try:
                actual = _loss_and_gradients(ours, arguments, [hidden, *head.parameters()])
            except (TypeError, AttributeError):  # its logits are more than scaled and capped
                return False
            for mine, theirs in zip(actual, expected, strict=True):
                if not torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4):
                    return False
    return True


def _trial_inputs(model: Any, vocabulary: int, device: torch.device) -> dict[str, Any]:
    tokens = torch.tensor([[1, 2, 0, 3, 4], [0, 5, 6, 0, 1]], device=device)
    labels = tokens % vocabulary
    labels[0, 2] = IGNORED_LABEL
    labels[1, 0] = IGNORED_LABEL
    inputs = {"input_ids": torch.zeros_like(labels), "labels": labels, "return_dict": True}
    if "output_router_logits" in inspect.signature(type(model).forward).parameters:
        inputs["output_router_logits"] = False
    return inputs


def _loss_and_gradients(
    forward: Forward, inputs: Mapping[str, Any], leaves: list[Tensor]
) -> list[Tensor]:
    seed_generator(leaves[0].device)
    loss = forward(**inputs).loss
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [loss.detach(), *gradients]
