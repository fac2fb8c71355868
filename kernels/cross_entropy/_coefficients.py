"""Results of the rows of a head, from their states; coefficients of the gradients of the logits."""

import torch
from torch import Tensor

from merit_fast.kernels.cross_entropy._arguments import LossTerms


def token_losses(state: Tensor, terms: LossTerms, vocabulary: int) -> Tensor:
    """float64 losses [M] of rows whose states are [4, M]."""
    top, total, target, plain = state
    lse = top + total.log()
    smoothing = terms.label_smoothing
    loss: Tensor = lse - (1 - smoothing) * target
    if smoothing:
        loss = loss - smoothing / vocabulary * plain
    return loss + terms.z_loss * lse**2 if terms.z_loss else loss


def loss_coefficients(
    softmax: Tensor, weights: Tensor, terms: LossTerms, vocabulary: int
) -> Tensor:
    """[4, M] float32: shift, factor, target, uniform of ``_native.gradient``.

    They are those of the sum of weights [M] * losses; softmax [2, M]: the first rows of the state.
    """
    top, total = softmax
    smoothing = terms.label_smoothing
    factor = weights * (1 + 2 * terms.z_loss * (top + total.log())) / total
    return torch.stack(
        [top, factor, weights * (1 - smoothing), weights * (smoothing / vocabulary)]
    ).float()


def token_statistics(state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probability, entropy, top-1 and log-sum-exp of rows whose states are [6, M]."""
    top, total, target, _, weighted, before = state
    log_probs = target - top - total.log()
    entropy = total.log() - weighted / total  # a sum of two numbers that are not negative
    is_top1 = (target >= top) & (target > before)
    return log_probs.float(), entropy.float(), is_top1, (top + total.log()).float()


def statistics_coefficients(
    softmax: Tensor,
    entropy: Tensor,
    d_log_probs: Tensor | None,
    d_entropy: Tensor | None,
    d_lse: Tensor | None,
) -> Tensor:
    """[4, M] or [5, M] float32: as above, and linear where the entropy has a gradient.

    d log_p[label] / d z[j] = (j == label) - p[j]
    d entropy / d z[j] = -p[j] * (log p[j] + entropy)
    d lse / d z[j] = p[j]
    """
    top, total = softmax
    zeros = torch.zeros_like(top)
    of_label = zeros if d_log_probs is None else d_log_probs.double()
    factor = -of_label if d_lse is None else d_lse.double() - of_label
    if d_entropy is None:
        return torch.stack([top, factor / total, -of_label, zeros]).float()
    slope = d_entropy.double()
    factor = factor + slope * (total.log() - entropy.double())
    return torch.stack([top, factor / total, -of_label, zeros, -slope / total]).float()
