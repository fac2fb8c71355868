"""One step of AdamW as every backend receives it."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One step of N tensors with one device and one kind of weight, gradient, moments and master.

    Every tensor is dense, and all of a parameter have its layout: elements are taken in memory
    order.
    """

    weights: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    scales: Sequence[Tensor]  # of 8-bit moments: N of the first, then N of the second
    masters: Sequence[Tensor]  # N or none
    averages: Sequence[Tensor]  # N or none
    clip: Tensor | None  # float32 scalar on their device, which multiplies the gradients
    rates: Sequence[
        float
    ]  # for each tensor: lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), share in average
    keys: Sequence[int]  # 64 bits of (seed, step, parameter), signed, for stochastic rounding
    firsts: Sequence[int]  # index of each tensor's first element in its whole parameter
    numbers: Sequence[float]  # 1 - lr * weight_decay, beta1, beta2, epsilon
    stochastic: bool
    zero_grad: bool

    def __len__(self) -> int:
        return len(self.weights)
