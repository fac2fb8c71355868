"""The epilogues in Triton: a program owns a row of logits, or a block of it, without atomics."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    """Within 2 units in the last place (Cephes' polynomial near 0)."""
    square = x * x
    p = -5.70498872745e-3 * square + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    near = p * square * x + x
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def _logits(logits, bias, row, column, columns, scale, HAS_BIAS: tl.constexpr):
    """A block of a row with its bias and scale; 0 past the row's end."""
    inside = column < columns
    z = tl.load(logits + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + column, mask=inside, other=0.0)
    return z * scale


@triton.jit(do_not_specialize=["first"])
def update_kernel(
    logits, bias, labels, state, stride, columns, first, scale, softcap, sharpness,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, STATISTICS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Updates a row's maximum, sum of exponentials, label's logit and sum of logits.

    With STATISTICS also the sum of (logit - maximum) * exponential, and the maximum over the words
    before the label. Reads each logit once.
    """
    row = tl.program_id(0).to(tl.int64)
    at = state + row
    top = tl.load(at).to(tl.float32)
    total = tl.load(at + stride)
    target = tl.load(at + 2 * stride)
    plain = tl.load(at + 3 * stride)
    weighted = total
    before = top
    if STATISTICS:
        weighted = tl.load(at + 4 * stride)
        before = tl.load(at + 5 * stride).to(tl.float32)
    label = tl.load(labels + row) - first
    for c in range(0, columns, BLOCK):
        column = c + tl.arange(0, BLOCK)
        z = _logits(logits, bias, row, column, columns, scale, HAS_BIAS)
        if HAS_CAP:
            z = softcap * _tanh(z / softcap)
        z = tl.where(column < columns, z * sharpness, -float("inf"))
        high = tl.maximum(top, tl.max(z, 0))
        shift = tl.where(high == -float("inf"), 0.0, high)  # any shift gives a sum of 0
        decay = tl.exp(top - shift).to(tl.float64)
        if STATISTICS:
            drop = tl.maximum(top - shift, -128.0)  # finite where its exponential is 0
            weighted = (weighted + total * drop.to(tl.float64)) * decay
            x = tl.maximum(z - shift, -128.0)
            weighted += tl.sum(x * tl.exp(z - shift), 0).to(tl.float64)
            earlier = tl.where(column < label, z, -float("inf"))
            before = tl.maximum(before, tl.max(earlier, 0))
        total = total * decay
        total += tl.sum(tl.exp(z - shift), 0).to(tl.float64)
        plain += tl.sum(tl.where(column < columns, z, 0.0), 0).to(tl.float64)
        target += tl.sum(tl.where((column == label) & (column < columns), z, 0.0), 0).to(tl.float64)
        top = high
    tl.store(at, top.to(tl.float64))
    tl.store(at + stride, total)
    tl.store(at + 2 * stride, target)
    tl.store(at + 3 * stride, plain)
    if STATISTICS:
        tl.store(at + 4 * stride, weighted)
        tl.store(at + 5 * stride, before.to(tl.float64))


@triton.jit(do_not_specialize=["first"])
def gradient_kernel(
    logits, bias, labels, terms, out, stride, columns, first, scale, softcap, sharpness,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_LINEAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of a row's logits. Reads and writes each once."""
    blocks = (columns + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    at = terms + row
    shift = tl.load(at)
    factor = tl.load(at + stride)
    target = tl.load(at + 2 * stride)
    uniform = tl.load(at + 3 * stride)
    label = tl.load(labels + row) - first
    z = _logits(logits, bias, row, column, columns, scale, HAS_BIAS)
    slope = scale * sharpness
    if HAS_CAP:
        x = z / softcap
        z = softcap * _tanh(x)
        decay = tl.exp(-2.0 * tl.abs(x))  # precise also where tanh rounds to 1
        slope *= 4.0 * decay / ((1.0 + decay) * (1.0 + decay))
    z = z * sharpness - shift
    if HAS_LINEAR:
        factor += tl.load(at + 4 * stride) * tl.maximum(z, -128.0)
    d = factor * tl.exp(z) - uniform - tl.where(column == label, target, 0.0)
    d *= slope
    tl.store(out + row * columns + column, d.to(out.dtype.element_ty), mask=column < columns)
