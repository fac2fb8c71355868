"""Logits that are not computed: a placeholder that a model's own forward scales and caps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from merit_fast.kernels.cross_entropy import linear_cross_entropy
from merit_fast.patch.classes import supported

_listener: Callable[[Tensor], None] | None = None
_terms: "LossTerms | None" = None


@dataclass
class LossTerms:
    """Terms that a loss without logits gets next to its own.

    Attributes:
        label_smoothing: in [0, 1), as for ``linear_cross_entropy``.
        z_loss: at least 0, as for ``linear_cross_entropy``.
        num_uses: losses that had these terms.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    num_uses: int = 0


@contextmanager
def with_loss_terms(terms: LossTerms) -> Iterator[LossTerms]:
    """Gives every deferred cross-entropy in a with-block these terms, and counts them."""
    global _terms
    before = _terms
    _terms = terms
    try:
        yield terms
    finally:
        _terms = before


@contextmanager
def token_losses_seen_by(listener: Callable[[Tensor], None]) -> Iterator[None]:
    """Calls ``listener`` with the token losses of each deferred cross-entropy in a with-block.

    The losses are detached, in the labels' shape, and 0 where the label is -100. They come from the
    pass that gives the loss and cost nothing.
    """
    global _listener
    before = _listener
    _listener = listener
    try:
        yield
    finally:
        _listener = before


class DeferredLogits:
    """A placeholder for ``F.linear(hidden, weight, bias)``; records how a forward changes it."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        steps: tuple[tuple[str, float], ...] = (),
    ) -> None:
        self.hidden = hidden
        self.weight = weight
        self.bias = bias
        self.steps = steps

    def of(self, hidden: Tensor) -> "DeferredLogits":
        """The logits of other hidden states, changed in the same way."""
        return DeferredLogits(hidden, self.weight, self.bias, self.steps)

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
        steps = (*self.steps, (step, float(number)))
        return DeferredLogits(self.hidden, self.weight, self.bias, steps)

    def scale_and_cap(self) -> tuple[float, float | None] | None:
        """(scale, cap) of logits = cap * tanh(scale * linear / cap).

        Without a cap: logits = scale * linear.

        None if the recorded steps are something else.
        """
        steps = self.steps
        cap = None
        if [step for step, _ in steps[-3:]] == ["div", "tanh", "mul"]:
            divisor = steps[-3][1]
            factor = steps[-1][1]
            if divisor == factor:
                cap = factor
                steps = steps[:-3]
        scale = 1.0
        for step, number in steps:
            if step == "tanh":
                return None
            scale = scale * number if step == "mul" else scale / number
        return scale, cap

    def computed(self) -> Tensor:
        """The logits, computed after all."""
        logits = F.linear(self.hidden, self.weight, self.bias)
        for step, number in self.steps:
            if step == "mul":
                logits = logits * number
            elif step == "div":
                logits = logits / number
            else:
                logits = torch.tanh(logits)
        return logits

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Hidden, weight and bias as F.linear takes them; None where our kernels cannot."""
        tensors = [self.hidden, self.weight, *([] if self.bias is None else [self.bias])]
        device = self.hidden.device.type
        if torch.is_autocast_enabled(device):
            tensors = [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]
        if not supported(*tensors):
            return None
        return tensors[0], tensors[1], tensors[2] if len(tensors) == 3 else None


def deferred_cross_entropy(
    logits: DeferredLogits, labels: Tensor, backend: str | None, **options: Any
) -> Any:
    """``linear_cross_entropy`` of shifted labels; None where the model computes something else."""
    form = logits.scale_and_cap()
    operands = logits.operands()
    if form is None or operands is None or logits.hidden.shape[:-1] != labels.shape:
        return None
    scale, cap = form
    hidden, weight, bias = operands
    if scale != 1.0 and bias is not None:
        return None
    hidden = hidden if scale == 1.0 else hidden * scale
    if _terms is not None:
        options |= {"label_smoothing": _terms.label_smoothing, "z_loss": _terms.z_loss}
        _terms.num_uses += 1
    if _listener is None:
        return linear_cross_entropy(
            hidden, weight, labels, bias=bias, softcap=cap, backend=backend, **options
        )
    rows = hidden.flatten(0, -2)  # each row is an example of its own, so its loss is told
    losses = linear_cross_entropy(
        rows, weight, labels.flatten(), bias=bias, softcap=cap, backend=backend, **options
    )
    _listener(losses.example_loss.detach().view(labels.shape))
    return losses
