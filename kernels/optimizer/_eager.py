"""The reference in plain torch, on tensors that are flat and dense: the same bits as the native kernel on a CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256  # 8-bit moments that share a scale
_MASK = 0xFFFFFFFF
_TINY, _HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def adamw(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scales: Sequence[Tensor],
    master: Tensor | None,
    average: Tensor | None,
    clip: Tensor | None,
    rates: Sequence[float],
    key: int,
    numbers: Sequence[float],
    stochastic: bool,
    zero_grad: bool,
) -> None:
    """One step of one tensor; arguments as in ``_ops.adamw``."""
    decay, beta1, beta2, epsilon = numbers
    rate, root, average_weight = rates
    g = grad.float() if clip is None else grad.float() * clip
    m = decoded(exp_avg, scales[0], second=False) if scales else exp_avg.float()
    v = decoded(exp_avg_sq, scales[1], second=True) if scales else exp_avg_sq.float()
    w = full_weight(weight, master)
    rest1 = 1.0 - beta1
    m = m + rest1 * (g - m) if _single(rest1) < 0.5 else g + -beta1 * (g - m)
    v = v * beta2 + (1.0 - beta2) * g * g
    w = w * decay - rate * (m / (_sqrt(v) * root + epsilon))
    key &= (1 << 64) - 1
    low, high = key & _MASK, key >> 32
    bits = random_bits(len(weight), low, high, weight.device) if stochastic else None
    moment_bits = random_bits(len(weight), high, low, weight.device) if stochastic else None
    _store_weight(w, weight, master, bits)
    if scales:
        encode(
            m,
            exp_avg,
            scales[0],
            second=False,
            bits=None if moment_bits is None else moment_bits >> 16,
        )
        encode(
            v,
            exp_avg_sq,
            scales[1],
            second=True,
            bits=None if moment_bits is None else moment_bits & 0xFFFF,
        )
    else:
        _store(m, exp_avg, None if moment_bits is None else moment_bits >> 16)
        _store(v, exp_avg_sq, None if moment_bits is None else moment_bits & 0xFFFF)
    if average is not None:
        average += (full_weight(weight, master) - average) * average_weight
    if zero_grad:
        grad.zero_()


def square_sum(grads: Sequence[Tensor]) -> Tensor:
    """Float64 scalar: the sum of squares of all elements."""
    sums = [grad.double().square().sum() for grad in grads]
    return torch.stack(sums).sum()


def full_weight(weight: Tensor, master: Tensor | None) -> Tensor:
    """The float32 weight: itself, its master, or the bf16 weight joined with the 16 bits it lacks."""
    if master is None or weight.dtype == torch.float32:
        return weight.float()
    if master.dtype == torch.float32:
        return master
    high = weight.view(torch.int16).int() << 16
    return (high + master.int()).view(torch.float32)


def _store_weight(w: Tensor, weight: Tensor, master: Tensor | None, bits: Tensor | None) -> None:
    if master is None or weight.dtype == torch.float32:
        _store(w, weight, None if bits is None else bits >> 16)
    elif master.dtype == torch.float32:
        master.copy_(w)
        weight.copy_(w)
    else:  # to nearest, halves away from zero: 2^16 masters a weight, so that 16 bits tell them apart
        raw = torch.where(w.isnan(), 0x7FC00000, w.view(torch.int32))
        weight.view(torch.int16).copy_((raw + 0x8000) >> 16)
        master.copy_(raw)


def _store(values: Tensor, out: Tensor, bits16: Tensor | None) -> None:
    if out.dtype == torch.bfloat16 and bits16 is not None:
        values = stochastic_bf16(values, bits16)
    out.copy_(values)


def stochastic_bf16(values: Tensor, bits16: Tensor) -> Tensor:
    """float32 plus 16 random bits below bf16's last, cut: up with the probability of what is cut off.

    What bf16 can express stays as it is, and nothing finite becomes infinite.
    """
    raw = values.view(torch.int32)
    total = raw + bits16.int()
    past = (total & 0x7FFFFFFF) >= 0x7F800000
    cut = (torch.where(past, raw, total) >> 16).to(torch.int16).view(torch.bfloat16)
    return cut.masked_fill(values.isnan(), float("nan"))


def random_bits(
    count: int, before: int, between: int, device: torch.device | None = None
) -> Tensor:
    """[count] int64 below 2^32: two rounds of Wellons' lowbias32 of the index, with a key before each."""
    index = torch.arange(count, device=device)
    x = (index & _MASK) ^ before
    x = (x ^ x >> 16) * 0x7FEB352D & _MASK
    x = x ^ between ^ ((index >> 32) * 0x9E3779B9 & _MASK)
    x = (x ^ x >> 15) * 0x846CA68B & _MASK
    return x ^ x >> 16


def decoded(codes: Tensor, scale: Tensor, *, second: bool) -> Tensor:
    """8-bit moments as float32: sign * (code / 127)^2 * scale, second moments (code / 255)^4 * scale."""
    code = codes.float()
    square = code * code if second else code * code.abs()
    share = square * square * (1 / 255**4) if second else square * (1 / 127**2)
    return share * scale.repeat_interleave(BLOCK)[: len(codes)]


def encode(
    values: Tensor, codes: Tensor, scale: Tensor, *, second: bool, bits: Tensor | None
) -> None:
    """Writes codes and the scale of every 256 values, the largest size among them.

    Rounding is unbiased in the value with ``bits`` (random, below 2^16), else to nearest. A second moment above zero
    keeps a code above zero: a zero would divide the step by epsilon alone.
    """
    steps, power = (255, 4) if second else (127, 2)
    rows = F.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    size = rows.abs()
    top = size.amax(1)  # NaN if one is
    usable = (top >= _TINY) & (top <= _HUGE)
    inverse = 1 / torch.where(usable, top, 1.0)
    place = size * inverse[:, None] * float(steps**power)
    root = _sqrt(_sqrt(place)) if second else _sqrt(place)
    whole = torch.where(root < steps - 1, root, steps - 1.0).trunc()
    high = whole + 1
    below, above = _power(whole, power), _power(high, power)
    share = (
        0.5
        if bits is None
        else F.pad(bits, (0, -len(bits) % BLOCK)).view(-1, BLOCK).float() * 2.0**-16
    )
    code = whole + (share * (above - below) < place - below)
    code = (
        torch.where((code == 0) & (place > 0), 1.0, code)
        if second
        else torch.where(rows < 0, -code, code)
    )
    tiny = top < 1
    code = torch.where(usable[:, None], code, torch.where(tiny, 0.0, float(steps))[:, None])
    scale.copy_(torch.where(~usable & tiny, 0.0, top))
    codes.copy_(code.view(-1)[: len(values)].to(codes.dtype))


def _power(x: Tensor, power: int) -> Tensor:
    square = x * x
    return square * square if power == 4 else square


def _sqrt(x: Tensor) -> Tensor:
    """To nearest, which MKL's of floats is not."""
    return x.double().sqrt().float()


def _single(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))
