"""The layers' Triton kernels: a program takes some rows, or a piece of one, without atomics.

Values are computed in float32 and rounded once, when they are stored. Strides are in elements. In
the place of an absent tensor another is passed, which a constant keeps from being touched.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
import triton
import triton.language as tl


@triton.jit
def _tile(first, rows, cols, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Row numbers [ROWS, 1], column numbers [1, BLOCK], and a mask of the entries that exist."""
    row = first + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    return row.to(tl.int64), col, (row < rows) & (col < cols)


@triton.jit
def norm_kernel(
    x, residual, total, out, scale, rows, cols,
    x_stride, residual_stride, total_stride, out_stride, epsilon,
    ADDS: tl.constexpr, ROUNDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = RMSNorm(x) * scale; ADDS: of x + residual, rounded and stored in ``total``."""
    row, col, inside = _tile(tl.program_id(0) * ROWS, rows, cols, ROWS, BLOCK)
    values = tl.load(x + row * x_stride + col, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        values += tl.load(residual + row * residual_stride + col, mask=inside, other=0.0).to(
            tl.float32
        )
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + row * total_stride + col, rounded, mask=inside)
        values = rounded.to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(values * values, 1) / cols + epsilon)
    y = values * inverse[:, None]
    if ROUNDS:
        y = y.to(total.dtype.element_ty).to(tl.float32)
    factor = tl.load(scale + col, mask=col < cols, other=0.0)
    tl.store(out + row * out_stride + col, (y * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward_kernel(
    dout, dtotal, x, dx, scale, sums, rows, cols,
    dout_stride, dtotal_stride, x_stride, dx_stride, epsilon, steps,
    ADDS: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of ``steps`` tiles of rows, and their sum of dout * x / RMS: a row of ``sums``.

    The sum is held in registers, or in memory for rows of more than 8192 elements, which take all
    registers.
    """
    HOLDS: tl.constexpr = BLOCK <= 8192
    program = tl.program_id(0).to(tl.int64)
    partial = tl.zeros((BLOCK,), tl.float32)
    for step in range(steps):
        row, col, inside = _tile((program * steps + step) * ROWS, rows, cols, ROWS, BLOCK)
        values = tl.load(x + row * x_stride + col, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(dout + row * dout_stride + col, mask=inside, other=0.0).to(tl.float32)
        inverse = (1.0 / tl.sqrt(tl.sum(values * values, 1) / cols + epsilon))[:, None]
        if SUMS:
            if HOLDS:
                partial += tl.sum(gradient * (values * inverse), 0)
            else:
                added = gradient * (values * inverse)
                before = tl.load(
                    sums + program * cols + col, mask=(col < cols) & (step > 0), other=0.0
                )
                tl.store(sums + program * cols + col, before + added, mask=col < cols)
        # Loaded again in every step: registers are few.
        gradient *= tl.load(scale + col, mask=col < cols, other=0.0)
        along = tl.sum(gradient * values, 1)[:, None] * inverse / cols * inverse
        result = (gradient - values * along) * inverse
        if ADDS:
            result += tl.load(dtotal + row * dtotal_stride + col, mask=inside, other=0.0).to(
                tl.float32
            )
        tl.store(dx + row * dx_stride + col, result.to(dx.dtype.element_ty), mask=inside)
    if SUMS and HOLDS:
        tl.store(
            sums + program * cols + tl.arange(0, BLOCK), partial, mask=tl.arange(0, BLOCK) < cols
        )


@triton.jit
def _activation(x, KIND: tl.constexpr):
    """The activation's value, and its derivative."""
    if KIND == "gelu":
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * share, share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:  # x times the logistic function of x, or of a cubic
        inner = x
        steep = x
        if KIND == "gelu_tanh":
            inner = x * (1.5957691216057308 + 0.07135481627260025 * (x * x))
            steep = x * (1.5957691216057308 + 0.21406444881780074 * (x * x))
        below = 1.0 + tl.exp(-inner)
        share = 1.0 / below
        return x / below, share + share * (1.0 - share) * steep


@triton.jit
def _piece(across, BLOCK: tl.constexpr):
    """Row and columns of a program; ``across`` programs share a row."""
    # Divided as 32 bits: a division of 64 is a call, around which registers are spilled.
    program = tl.program_id(0)
    row = (program // across).to(tl.int64)
    col = (program % across).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row, col


@triton.jit
def gated_kernel(
    gate, up, out, cols, gate_stride, up_stride, out_stride, across,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = activation(gate) * up."""
    row, col = _piece(across, BLOCK)
    g = tl.load(gate + row * gate_stride + col, mask=col < cols, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + col, mask=col < cols, other=0.0).to(tl.float32)
    value, _ = _activation(g, KIND)
    tl.store(out + row * out_stride + col, (value * u).to(out.dtype.element_ty), mask=col < cols)


@triton.jit
def gated_backward_kernel(
    dout, gate, up, dgate, dup, cols,
    dout_stride, gate_stride, up_stride, dgate_stride, dup_stride, across,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of gate and up."""
    row, col = _piece(across, BLOCK)
    gradient = tl.load(dout + row * dout_stride + col, mask=col < cols, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + col, mask=col < cols, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + col, mask=col < cols, other=0.0).to(tl.float32)
    value, slope = _activation(g, KIND)
    tl.store(
        dgate + row * dgate_stride + col,
        (gradient * u * slope).to(dgate.dtype.element_ty),
        mask=col < cols,
    )
    tl.store(
        dup + row * dup_stride + col, (gradient * value).to(dup.dtype.element_ty), mask=col < cols
    )


@triton.jit
def _turn(
    x, out, cos, sin, x_stride, out_stride, first, heads, half, width,
    NEIGHBOURS: tl.constexpr, BACKWARD: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Rotates HEADS heads of one token by its rows of cos and sin; BACKWARD rotates back."""
    col = tl.arange(0, HALF)[None, :]
    exists = col < half
    low = col
    high = half + col
    if NEIGHBOURS:
        low = 2 * col
        high = 2 * col + 1
    low_cos = tl.load(cos + low, mask=exists, other=0.0).to(tl.float32)
    high_cos = tl.load(cos + high, mask=exists, other=0.0).to(tl.float32)
    low_sin = tl.load(sin + low, mask=exists, other=0.0).to(tl.float32)
    high_sin = tl.load(sin + high, mask=exists, other=0.0).to(tl.float32)
    if BACKWARD:
        low_sin, high_sin = -high_sin, -low_sin
    head = first + tl.arange(0, HEADS)[:, None]
    inside = (head < heads) & exists
    source = x + head.to(tl.int64) * x_stride
    target = out + head.to(tl.int64) * out_stride
    a = tl.load(source + low, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + high, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + low, (a * low_cos - b * low_sin).to(out.dtype.element_ty), mask=inside)
    tl.store(target + high, (b * high_cos + a * high_sin).to(out.dtype.element_ty), mask=inside)
    if REST > 0:
        rest = 2 * half + tl.arange(0, REST)[None, :]
        inside = (head < heads) & (rest < width)
        values = tl.load(source + rest, mask=inside, other=0.0)
        tl.store(target + rest, values.to(tl.float32).to(out.dtype.element_ty), mask=inside)


@triton.jit
def rope_kernel(
    q, k, cos, sin, q_out, k_out, tokens, q_heads, k_heads, q_tiles, tiles, half, width,
    q_batch, q_head, q_token, k_batch, k_head, k_token,
    q_out_batch, q_out_head, q_out_token, k_out_batch, k_out_head, k_out_token,
    cos_batch, cos_token, sin_batch, sin_token,
    NEIGHBOURS: tl.constexpr, BACKWARD: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Rotates heads of a token: queries in ``q_tiles`` of ``tiles`` programs, keys in the rest."""
    program = tl.program_id(0)
    tile = program % tiles
    token = program // tiles
    b = (token // tokens).to(tl.int64)
    t = (token % tokens).to(tl.int64)
    cos += b * cos_batch + t * cos_token
    sin += b * sin_batch + t * sin_token
    if tile < q_tiles:
        q += b * q_batch + t * q_token
        q_out += b * q_out_batch + t * q_out_token
        first = tile * HEADS
        _turn(
            q, q_out, cos, sin, q_head, q_out_head, first, q_heads, half, width,
            NEIGHBOURS, BACKWARD, HEADS, HALF, REST,
        )  # fmt: skip
    else:
        k += b * k_batch + t * k_token
        k_out += b * k_out_batch + t * k_out_token
        first = (tile - q_tiles) * HEADS
        _turn(
            k, k_out, cos, sin, k_head, k_out_head, first, k_heads, half, width,
            NEIGHBOURS, BACKWARD, HEADS, HALF, REST,
        )  # fmt: skip
