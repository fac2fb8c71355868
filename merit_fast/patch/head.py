"""A language model's head without logits: the model's own forward runs, its logits are a note of what they would be."""

import copy
import functools
import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from merit_fast.kernels.cross_entropy import linear_cross_entropy
from merit_fast.patch.classes import MAKERS, Forward, is_patched, supported, swap


class DeferredLogits:
    """What ``head(hidden)`` stands for in a forward that only scales and caps it on the way to the loss."""

    def __init__(
        self, hidden: Tensor, head: nn.Linear, steps: tuple[tuple[str, float], ...] = ()
    ) -> None:
        self.hidden, self.head, self.steps = hidden, head, steps

    def __mul__(self, factor: float) -> "DeferredLogits":
        return self._with("mul", factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "DeferredLogits":
        return self._with("div", divisor)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.tanh and len(args) == 1 and not kwargs:
            return args[0]._with("tanh", 1.0)
        return NotImplemented

    def _with(self, step: str, number: float) -> "DeferredLogits":
        if not isinstance(number, int | float):
            return NotImplemented
        return DeferredLogits(self.hidden, self.head, (*self.steps, (step, float(number))))

    def scale_and_cap(self) -> tuple[float, float | None] | None:
        """logits = cap * tanh(scale * head(hidden) / cap), or without a cap; None: something else."""
        steps, cap = self.steps, None
        if [step for step, _ in steps[-3:]] == ["div", "tanh", "mul"] and steps[-3][1] == steps[-1][
            1
        ]:
            steps, cap = steps[:-3], steps[-1][1]
        scale = 1.0
        for step, number in steps:
            if step == "tanh":
                return None
            scale = scale * number if step == "mul" else scale / number
        return scale, cap

    def computed(self) -> Tensor:
        logits: Tensor = self.head(self.hidden)
        for step, number in self.steps:
            logits = (
                logits * number
                if step == "mul"
                else logits / number
                if step == "div"
                else torch.tanh(logits)
            )
        return logits

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """hidden, weight and bias as F.linear would multiply them; None where our kernels do not."""
        tensors = [
            self.hidden,
            self.head.weight,
            *([] if self.head.bias is None else [self.head.bias]),
        ]
        device = self.hidden.device.type
        if torch.is_autocast_enabled(device):
            tensors = [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]
        if not supported(*tensors):
            return None
        return tensors[0], tensors[1], tensors[2] if len(tensors) == 3 else None


def deferred_cross_entropy(
    logits: DeferredLogits, labels: Tensor, backend: str | None, **options: Any
) -> Any:
    """``linear_cross_entropy`` of shifted labels; None where it does not do what the model does."""
    form, operands = logits.scale_and_cap(), logits.operands()
    if form is None or operands is None or logits.hidden.shape[:-1] != labels.shape:
        return None
    (scale, cap), (hidden, weight, bias) = form, operands
    if scale != 1.0 and bias is not None:
        return None
    hidden = hidden if scale == 1.0 else hidden * scale
    return linear_cross_entropy(
        hidden, weight, labels, bias=bias, softcap=cap, backend=backend, **options
    )


def deferred_logits(model: nn.Module, inputs: Mapping[str, Any]) -> DeferredLogits | None:
    """The logits of a patched model's forward, not computed; None for a model whose head is not patched."""
    if not is_patched(model) or type(model)._merit_fast_patch[1] != "head":  # type: ignore[attr-defined]
        return None
    original, _, (name, backend) = type(model)._merit_fast_patch  # type: ignore[attr-defined]
    if not _is_plain(model, name):
        return None
    logits: DeferredLogits = original.forward(
        _View(model, name, backend), **inputs, return_dict=True
    ).logits
    return logits


def patch_head(model: Any, backend: str | None) -> str | None:
    """Swaps the model's own class for one that defers logits; or says why not."""
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
    swap(model, "head", name, backend)
    return None


def _head_forward(original: type[nn.Module], name: str, backend: str | None) -> Forward:
    plain = original.forward

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        skip = kwargs.pop("skip_logits", None)
        wanted = self.training if skip is None else skip
        if (
            not wanted
            or kwargs.get("labels") is None
            or not is_patched(self)
            or not _is_plain(self, name)
        ):
            return plain(self, *args, **kwargs)
        output = plain(_View(self, name, backend), *args, **kwargs)
        if isinstance(output, tuple):
            return tuple(value for value in output if not isinstance(value, DeferredLogits))
        return type(output)(**{key: value for key, value in output.items() if key != "logits"})

    return forward


def _is_plain(model: Any, name: str) -> bool:
    """Whether nobody watches or replaces the head or the loss: hooks of a sketch, adapters, shards, another loss."""
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
    """The model as its own forward sees it, but for head and loss. The model itself is not changed while it runs."""

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
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """transformers' ForCausalLMLoss."""
        targets = (
            F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
            if shift_labels is None
            else shift_labels
        )
        found = None
        if ignore_index == -100 and vocab_size == logits.head.weight.shape[0]:
            reduction = "mean" if num_items_in_batch is None else "sum"
            targets = targets.to(logits.hidden.device)
            found = deferred_cross_entropy(logits, targets, self._backend, reduction=reduction)
        if found is None:
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
            return cast(Tensor, found.loss.clone())  # mixtures of experts add to it in place
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(found.loss.device)
        return cast(Tensor, found.loss / num_items_in_batch)


def _defer(head: nn.Linear, hidden: Tensor) -> DeferredLogits:
    return DeferredLogits(hidden, head)


class _AnyOutput:
    """What a decoder returns, for a trial of what comes after it."""

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
    """Tries the model's own forward on a narrow random head: the same losses with and without logits?"""
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
    labels = torch.tensor([[1, 2, -100, 3, 4], [-100, 5, 6, 0, 1]], device=weight.device) % len(
        weight
    )
    labels[0, 2] = labels[1, 0] = -100
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
            except (
                TypeError,
                AttributeError,
            ):  # it does more to its logits than scale and cap them
                return False
            if not torch.allclose(actual, expected, rtol=1e-4, atol=1e-4):
                return False
    return True


MAKERS["head"] = _head_forward
