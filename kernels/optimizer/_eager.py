"""The reference in plain torch; on a CPU it gives the bits of the native kernel."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from merit_fast.kernels.optimizer._step import Step

BLOCK = 256  # 8-bit moments that share a scale
RANDOM_BLOCK = 1024  # elements whose random bits share a key
_MASK = 0xFFFFFFFF
_TINY = torch.finfo(torch.float32).tiny
_HUGE = torch.finfo(torch.float32).max


def adamw(step: Step, k: int) -> bool:
    """Updates tensor ``k`` of a step. Returns whether a weight won over its master."""
    weight = flat(step.weights[k])
    grad = flat(step.grads[k])
    exp_avg = flat(step.exp_avgs[k])
    exp_avg_sq = flat(step.exp_avg_sqs[k])
    scales = step.scales[k :: len(step)]
    master = flat(step.masters[k]) if step.masters else None
    average = flat(step.averages[k]) if step.averages else None
    decay, beta1, beta2, epsilon = step.numbers
    rate, root, average_weight = step.rates[3 * k : 3 * k + 3]

    g = grad.float() if step.clip is None else grad.float() * step.clip
    m = decoded(exp_avg, scales[0], second=False) if scales else exp_avg.float()
    v = decoded(exp_avg_sq, scales[1], second=True) if scales else exp_avg_sq.float()
    won = take_over_weights(weight, master)
    w = full_weight(weight, master)
    rest1 = 1.0 - beta1
    m = m + rest1 * (g - m) if _single(rest1) < 0.5 else g + -beta1 * (g - m)
    v = v * beta2 + (1.0 - beta2) * g * g
    w = w * decay - rate * (m / (_sqrt(v) * root + epsilon))

    bits = moment_bits = None
    if step.stochastic:
        bits, moment_bits = random_bits(len(weight), step.keys[k], weight.device, step.firsts[k])
    _store_weight(w, weight, master, bits)
    if scales:
        encode(m, exp_avg, scales[0], second=False, bits=bits)
        encode(v, exp_avg_sq, scales[1], second=True, bits=bits)
    else:  # the first is rounded with the high 16 bits, the second with the low ones
        _store(m, exp_avg, None if moment_bits is None else moment_bits >> 16)
        _store(v, exp_avg_sq, None if moment_bits is None else moment_bits & 0xFFFF)
    if average is not None:
        average += (full_weight(weight, master) - average) * average_weight
    if step.zero_grad:
        grad.zero_()
    return won


def flat(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in memory order, as a view."""
    return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))


def square_sum(grads: Sequence[Tensor]) -> Tensor:
    """Float64 scalar: the sum of squares of all elements."""
    sums = [grad.double().square().sum() for grad in grads]
    return torch.stack(sums).sum()


def full_weight(weight: Tensor, master: Tensor | None) -> Tensor:
    """The float32 weight: itself, its master, or the bf16 weight joined with its low bits.

    16 low bits give all bits of the master, 8 low bits give 24 of them.
    """
    if master is None or weight.dtype == torch.float32:
        return weight.float()
    if master.dtype == torch.float32:
        return master
    high = weight.view(torch.int16).int() << 16
    low = master.int() << 8 if master.dtype == torch.int8 else master.int()
    return (high + low).view(torch.float32)


def take_over_weights(weight: Tensor, master: Tensor | None) -> bool:
    """Makes every weight that is not its float32 master rounded the master; whether one was not.

    Such a weight was written by someone else. A weight that is NaN does not count.
    """
    if master is None or master.dtype != torch.float32 or weight.dtype == torch.float32:
        return False
    differs = master.bfloat16().view(torch.int16) != weight.view(torch.int16)
    master.copy_(torch.where(differs, weight.float(), master))
    return bool((differs & ~weight.isnan()).any())


def _store_weight(w: Tensor, weight: Tensor, master: Tensor | None, bits: Tensor | None) -> None:
    if master is None or weight.dtype == torch.float32:
        _store(w, weight, None if bits is None else bits >> 16)
    elif master.dtype == torch.float32:
        master.copy_(w)
        weight.copy_(w)
    else:
        # To nearest, halves away from zero: every weight has 2^16 masters, which 16 bits tell
        # apart.
        raw = w.view(torch.int32)
        if master.dtype == torch.int8:
            noise = torch.full_like(raw, 0x80) if bits is None else bits >> 24
            raw = _with_random(w, noise)
        raw = torch.where(w.isnan(), 0x7FC00000, raw)
        weight.view(torch.int16).copy_((raw + 0x8000) >> 16)
        master.copy_(raw >> 8 if master.dtype == torch.int8 else raw)


def _store(values: Tensor, out: Tensor, bits16: Tensor | None) -> None:
    if out.dtype == torch.bfloat16 and bits16 is not None:
        values = stochastic_bf16(values, bits16)
    out.copy_(values)


def stochastic_bf16(values: Tensor, bits16: Tensor) -> Tensor:
    """Adds 16 random bits below bf16's last bit, then cuts: the mean of many roundings is exact.

    Values that bf16 can express stay as they are, and nothing finite becomes infinite.
    """
    cut = (_with_random(values, bits16) >> 16).to(torch.int16).view(torch.bfloat16)
    return cut.masked_fill(values.isnan(), float("nan"))


def _with_random(values: Tensor, random: Tensor) -> Tensor:
    """The bits of float32 values, int32, plus ``random`` for sizes below bf16's largest."""
    raw = values.view(torch.int32)
    return raw + torch.where((raw & 0x7FFFFFFF) < 0x7F7F0000, random, 0).int()


def random_bits(
    count: int, key: int, device: torch.device | None = None, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Random bits for weights and 8-bit moments, and for bf16 moments: [count] int64 below 2^32.

    They are of the elements ``first``, ``first`` + 1, ... of one step of one parameter, whose
    64-bit key this is. Two rounds of a hash: the first of the element's place in its 1024, the
    second begins with a key of the 1024.
    """
    index = torch.arange(first, first + count, device=device)
    place = _mixed((index & RANDOM_BLOCK - 1) ^ (key & _MASK))
    block = index // RANDOM_BLOCK
    weight_key = _mixed((block & _MASK) ^ (key >> 32 & _MASK))
    weight_key = _mixed(weight_key ^ block >> 32)
    moment_key = _mixed(weight_key + 0x9E3779B9 & _MASK)
    return _second_round(place ^ weight_key), _second_round(place ^ moment_key)


def _mixed(x: Tensor) -> Tensor:
    """Wellons' lowbias32 of int64 below 2^32."""
    return _second_round((x ^ x >> 16) * 0x7FEB352D & _MASK)


def _second_round(x: Tensor) -> Tensor:
    x = (x ^ x >> 15) * 0x846CA68B & _MASK
    return x ^ x >> 16


def decoded(codes: Tensor, scale: Tensor, *, second: bool) -> Tensor:
    """8-bit moments as float32.

    A first moment is sign * (code / 127)^2 * scale, a second moment (code / 255)^4 * scale. Both
    are squares of a code, or of a code's square, times the root of the scale.
    """
    code = codes.float()
    unit = _sqrt(scale) / (255.0**2 if second else 127.0)
    root = (code * code if second else code) * unit.repeat_interleave(BLOCK)[: len(codes)]
    return root * root.abs()


def encode(
    values: Tensor, codes: Tensor, scale: Tensor, *, second: bool, bits: Tensor | None
) -> None:
    """Writes codes, and for every 256 values their scale, which is the largest absolute value.

    The code is round(sqrt(s + h^2 - 1/4) + h) of a first moment and
    round(sqrt(sqrt(s) + 3 (h^2 - 1/4)) + h) of a second one: s is the value in units of the
    smallest code's, and h is 0, or with ``bits`` (random, below 2^32) even between -1/2 and 1/2.
    With h = 1/2 - u the code lies above k where s > k^2 + u ((k + 1)^2 - k^2): rounding is unbiased
    in the value, or to nearest. For fourth powers this holds up to 0.1 / k^2 of the step from k to
    k + 1. A second moment above zero keeps a code above zero: zero would divide the step by epsilon
    only.
    """
    steps = 255 if second else 127
    rows = F.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    top = rows.abs().amax(1)  # NaN if one is
    usable = (top >= _TINY) & (top <= _HUGE)
    divisor = torch.where(usable, top, 1.0)
    shift = _code_shift(bits, len(values))
    square = shift * shift - 0.25
    if second:
        factor = torch.tensor(float(steps**2)) / _sqrt(divisor)
        square = _sqrt(rows) * factor[:, None] + 3.0 * square
    else:
        lift = torch.where(divisor < 2.0**-80, 2.0**64, 1.0)  # else the factor could be infinite
        factor = torch.tensor(float(steps**2)) / (divisor * lift)
        square = rows.abs() * lift[:, None] * factor[:, None] + square
    code = (_sqrt(square.clamp(min=0)) + shift).round().clamp(max=steps)
    code = torch.maximum(code, (rows > 0).float()) if second else torch.copysign(code, rows)
    tiny = top < 1
    code = torch.where(usable[:, None], code, torch.where(tiny, 0.0, float(steps))[:, None])
    scale.copy_(torch.where(~usable & tiny, 0.0, top))
    codes.copy_(code.view(-1)[: len(values)].to(codes.dtype))


def _code_shift(bits: Tensor | None, count: int) -> Tensor:
    """Odd multiples of 2^-17 between -1/2 and 1/2, from the high 16 bits: [blocks, 256] or zero."""
    if bits is None:
        return torch.zeros(())
    signed = (bits >> 16) - (bits >> 31) * 65536
    return F.pad((2 * signed + 1).float() * 2.0**-17, (0, -count % BLOCK)).view(-1, BLOCK)


def _sqrt(x: Tensor) -> Tensor:
    """Rounded to nearest; MKL's square root of floats is not."""
    return x.double().sqrt().float()


def _single(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))
