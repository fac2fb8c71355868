"""A language model's loss without logits: its own forward runs on a placeholder for them."""

import copy
import functools
import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from merit_fast.kernels.labels import IGNORED_LABEL
from merit_fast.patch.classes import Forward, swap, swap_of
from merit_fast.patch.deferred import DeferredLogits, deferred_cross_entropy


def deferred_logits(model: nn.Module, inputs: Mapping[str, Any]) -> DeferredLogits | None:
    """Runs a patched model up to its deferred logits; None if the head is not patched."""
    output = deferred_output(model, inputs)
    return None if output is None else output.logits


def deferred_output(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The output of a patched model with deferred logits; None if the head is not patched."""
    origin = swap_of(model)
    if origin is None or origin.maker is not head_forward:
        return None
    name, backend = origin.options
    if not _is_plain(model, name):
        return None
    view = _View(model, name, backend)
    return origin.original.forward(view, **inputs, return_dict=True)


def patch_head(model: Any, backend: str | None) -> str | None:
    """Swaps the model's own class for one that defers logits; returns the reason if it cannot."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    name = next(
        (name for name, child in model.named_children() if child is head and head is not None), None
    )
    if name is None:
        return "has no language-model head of its own"
    if "forward" in model.__dict__:
        return "has a forward of its own on the instance"
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return f"{name}: {type(head).__name__} is no plain linear layer"
    if not _loses_nothing(model, name, backend):
        return f"{name}: the loss without logits is not what the model computes"
    swap(model, head_forward, name, backend)
    return None


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
            return tuple(value for value in output if not isinstance(value, DeferredLogits))
        return type(output)(**{key: value for key, value in output.items() if key != "logits"})

    return forward


def _is_plain(model: Any, name: str) -> bool:
    """Whether the head is a plain layer without hooks and the loss is transformers' own."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    head = getattr(model, name)
    hooks = (
        head._forward_hooks,
        head._forward_pre_hooks,
        head._backward_hooks,
        head._backward_pre_hooks,
    )
    return (
        type(head).forward is nn.Linear.forward
        and "forward" not in head.__dict__
        and not any(hooks)
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
        losses = None
        if ignore_index == IGNORED_LABEL and vocab_size == logits.head.weight.shape[0]:
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


def _defer(head: nn.Linear, hidden: Tensor) -> DeferredLogits:
    return DeferredLogits(hidden, head)


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
    """Compares the model's own losses with ours on a narrow random head."""
    weight = getattr(model, name).weight
    generator = torch.Generator().manual_seed(0)
    twin = copy.copy(model)
    twin.__dict__["training"] = True
    hidden = torch.randn(2, 5, 8, generator=generator).to(weight.device)
    head = nn.Linear(8, len(weight), bias=False, device="meta")
    head.weight = nn.Parameter(
        torch.randn(len(weight), 8, generator=generator).to(weight.device), False
    )
    twin.__dict__["_modules"] = {child: _Decoder(hidden) for child in model._modules} | {name: head}
    tokens = torch.tensor([[1, 2, 0, 3, 4], [0, 5, 6, 0, 1]], device=weight.device)
    labels = tokens % len(weight)
    labels[0, 2] = IGNORED_LABEL
    labels[1, 0] = IGNORED_LABEL
    inputs: dict[str, Any] = {
        "input_ids": torch.zeros_like(labels),
        "labels": labels,
        "return_dict": True,
    }
    if "output_router_logits" in inspect.signature(type(model).forward).parameters:
        inputs["output_router_logits"] = False
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        for extra in ({}, {"num_items_in_batch": 11}, {"shift_labels": labels}):
            try:
                expected = type(model).forward(twin, **inputs, **extra).loss
            except Exception:  # whatever foreign code raises on the trial: it is not what we know
                return False
            try:
                actual = type(model).forward(_View(twin, name, backend), **inputs, **extra).loss
            except (TypeError, AttributeError):  # its logits are more than scaled and capped
                return False
            if not torch.allclose(actual, expected, rtol=1e-4, atol=1e-4):
                return False
    return True
