"""The scale of a loss, read from the gradient of the logits: sums of losses, not a batch's mean.

A cross entropy gives row t of the logits y the gradient

    dy_t = c_t (softmax(y_t) - onehot(target)),   c_t the token's weight in the loss

so c_t is known without the loss: 1 / (target tokens of the example) for each example's mean, 1 for
its sum. Weights of another pattern, and losses of another form, pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from merit_fast.errors import MeritFastError
from merit_fast.manifests.sketch_state import Weight
from merit_fast.sketch.capture.trees import tensors_of

_ROWS = 64  # logits at a time
_FORM = 0.02  # of a row's gradient: how far it may be from a cross entropy's
_ROUNDING = 2e-6  # of c
_EQUAL = 0.01  # of a weight


def output_names(output: Any) -> dict[int, str]:
    """Identity of every tensor in a model's output -> the name of its entry, or its number."""
    if isinstance(output, Tensor):
        return {id(output): "output"}
    entries: Any = ()
    if isinstance(output, Mapping):
        entries = output.items()
    elif isinstance(output, list | tuple):
        entries = enumerate(output)
    names = {id(value): "output" for value in tensors_of(output)}
    for key, entry in entries:
        names.update({id(value): str(key) for value in tensors_of(entry)})
    return names


def refuse_mixed(name: str, output: Tensor, size: int) -> None:
    """Refuses a gradient at an output in which the losses of several examples are mixed.

    Raises:
        MeritFastError: the output is one number, or the logits of a router, and ``size`` > 1.
    """
    if size == 1:
        return
    if output.numel() == 1:
        raise MeritFastError(
            f"sketch_gradients: the loss comes from the model's {name!r}, one number for {size} "
            "examples, which may be their mean or hold auxiliary losses: take the sum of the "
            "examples' losses from the logits, or give batches of one example"
        )
    if name.endswith("router_logits"):
        raise MeritFastError(
            f"sketch_gradients: the loss depends on the model's {name!r}: an auxiliary loss of "
            f"routers mixes the {size} examples; leave it out, or give batches of one example"
        )


@dataclass
class LossScale:
    """Weights c of the tokens in the loss of one pass, summed over its backward passes.

    Attributes:
        weights: number of the output -> c of its rows, 0 where no gradient came; None: the
            gradient is not that of a cross entropy.
        parts: number of the output -> index of each example's part.
        rounding: relative, of the gradients' dtype.
    """

    weights: dict[int, Tensor | None] = field(default_factory=dict)
    parts: dict[int, list[tuple[Any, ...]]] = field(default_factory=dict)
    rounding: float = 0.0

    def add(self, number: int, logits: Tensor, dy: Tensor, parts: list[tuple[Any, ...]]) -> None:
        """Reads the weights from a gradient that has arrived at output ``number``."""
        found = token_weights(logits, dy)
        self.rounding = torch.finfo(dy.dtype).eps
        before = self.weights.get(number, found)
        self.parts[number] = parts
        self.weights[number] = found
        if found is not None and before is not None and before is not found:
            self.weights[number] = before + found
        if before is None:
            self.weights[number] = None

    def check(
        self,
        row_examples: Sequence[int] | None,
        weight: Weight,
        num_target_tokens: Sequence[int] = (),
    ) -> None:
        """Judges the weights of every output.

        Args:
            row_examples: example of each row of the pass; None: each row is one.
            weight: of the sketcher.
            num_target_tokens: [B] of the examples, which are their weights; empty: not known yet.

        Raises:
            MeritFastError: the loss is a mean over the batch, or no mean though ``weight`` is
                "tokens", or over other numbers of tokens.
        """
        for number, weights in self.weights.items():
            if weights is None:
                continue
            rows = [weights[part].double() for part in self.parts[number]]
            numbers = range(len(rows)) if row_examples is None else row_examples
            found: dict[int, Tensor] = {}
            for example, row in zip(numbers, rows, strict=True):
                part = row[row != 0]
                found[example] = torch.cat([found[example], part]) if example in found else part
            sums = [float(tokens.sum()) for tokens in found.values() if len(tokens)]
            _judge(sums, weights[weights != 0], weight)
            for example, tokens in found.items():
                if num_target_tokens and len(tokens):
                    _check_number(example, tokens, num_target_tokens[example], self.rounding)


def _judge(sums: Sequence[float], tokens: Tensor, weight: Weight) -> None:
    if not sums or all(_equal(total, 1.0) for total in sums):
        return
    least = float(tokens.min())
    is_constant = _equal(float(tokens.max()), least)
    if is_constant and _equal(least, 1.0):
        if weight == "tokens":
            raise MeritFastError(
                "sketch_gradients: weight 'tokens' needs each example's mean over its target "
                "tokens, which the sums are then multiplied by; the loss is each example's sum"
            )
        return
    if is_constant:
        scale = least
    elif all(_equal(total, sums[0]) for total in sums):
        scale = sums[0]
    else:
        return
    divisor = round(1 / scale)
    if divisor < 2 or not _equal(divisor * scale, 1.0):
        return
    what = ""
    if is_constant and divisor == len(tokens):
        what = ", the target tokens of the batch"
    elif divisor == len(sums):
        what = ", the examples of the batch"
    raise MeritFastError(
        f"sketch_gradients: the loss is divided by {divisor}{what}: must be the sum of the "
        "examples' losses, each its mean over target tokens or its sum; "
        "loss_per_example.sum().backward()"
    )


def _check_number(example: int, weights: Tensor, given: int, rounding: float) -> None:
    """Refuses a number of target tokens that is not the one of the example's mean."""
    least = float(weights.min())
    if not (_equal(float(weights.max()), least) and _equal(float(weights.sum()), 1.0)):
        return
    is_off = abs(1 / least - given) > 0.5 + 4 * rounding * given
    if is_off and len(weights) != given:
        raise MeritFastError(
            f"sketch_gradients: num_target_tokens: must be the tokens in the loss, "
            f"{len(weights)} of example {example}, got {given}; labels at position 0 are in no loss"
        )


def _equal(value: float, other: float) -> bool:
    return abs(value - other) <= _EQUAL * abs(other)


@torch.no_grad()
def token_weights(logits: Tensor, dy: Tensor) -> Tensor | None:
    """Finds c of every row with dy = c (softmax(logits) - onehot), c > 0; 0 where dy is 0.

    Args:
        logits: [..., V].
        dy: [..., V] their gradient.

    Returns:
        [...] float32; None if some row has another form.
    """
    if logits.dim() < 2 or logits.shape[-1] < 2:
        return None
    rows = logits.detach().reshape(-1, logits.shape[-1])
    gradients = dy.reshape(rows.shape)
    weights = torch.zeros(len(rows), device=dy.device)
    for start in range(0, len(rows), _ROWS):
        part = gradients[start : start + _ROWS]
        live = part.ne(0).any(-1).nonzero()[:, 0]
        if len(live):
            found = _weights_of_rows(rows[start + live].float(), part[live].float())
            if found is None:
                return None
            weights[start + live] = found
    return weights.reshape(logits.shape[:-1])


def _weights_of_rows(logits: Tensor, dy: Tensor) -> Tensor | None:
    """[M] weights of rows [M, V] that all have a gradient, from the entries off the target."""
    chance = logits.softmax(-1)
    target = dy.argmin(-1, keepdim=True)
    at_target = dy.gather(-1, target)[:, 0]
    chance.scatter_(-1, target, 0.0)
    dy.scatter_(-1, target, 0.0)
    total = dy.sum(-1)
    weights = total / chance.sum(-1)
    error = (dy - weights[:, None] * chance).abs().sum(-1) + (at_target + total).abs()
    fits = (total > 0) & (error <= _FORM * total + _ROUNDING * weights)
    return weights if bool(fits.all()) else None
