"""Both passes over the tiles of a head: torch's products, a backend's epilogues.

Forward: the logits of a tile are hidden @ W[tile].T, for the trainable rows; ``update`` adds them
to each row's state: maximum, sum of exponentials, label's logit. Backward: the logits are computed
again (the first ones may have been kept), ``gradient`` turns them into their gradient d, then
dW[tile] = d.T @ hidden, written once, and d_hidden += d @ W[tile]. Very many tokens come in chunks
inside a tile, so that W[tile] and dW[tile] stay in the cache.

On CPUs with products of bf16 pairs one native call does all of a pass for up to MOST_ROWS rows
(csrc/head/head.inl): four products instead of five, and logits that are rounded only where they
are kept.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from merit_fast.kernels.cross_entropy import _native
from merit_fast.kernels.cross_entropy._tiled import TiledHead

# torch.mm(out_dtype=), from torch 2.8 on.
WIDE_PRODUCTS = "dtype" in torch.ops.aten.mm.overloads()  # type: ignore[no-untyped-call]

# Takes the gradient of the logits of some rows for the words from the first one on.
TakeGradient = Callable[[Tensor, slice, int], None]


def forward(head: TiledHead, kept: Tensor, statistics: bool) -> Tensor:
    """State of the trainable rows, float64 [4, M], or [6, M] with statistics (``_native.update``).

    Fills ``kept`` with the logits of the first tiles.
    """
    rows_of_state = 6 if statistics else 4
    state = torch.zeros(rows_of_state, len(head), dtype=torch.float64, device=head.hidden.device)
    state[0] = -torch.inf
    if statistics:
        state[5] = -torch.inf
    if head.in_one_call and len(head):
        kept.zero_()
        _native.head_forward(head, kept, state)
        return state
    filled = 0
    for first, last, weight in head.tiles() if len(head) else ():
        keep = head.kept(kept, first, last)
        filled = filled if keep is None else last * len(head)
        for rows in head.chunks():
            logits = head.buffer(rows, last - first) if keep is None else keep
            torch.mm(head.hidden[rows], weight.T, out=logits)
            head.epilogue.update(logits, *head.of_tile(first, last, rows), state[:, rows])
    kept[filled:] = 0  # the result of an op is defined
    return state


def backward(
    head: TiledHead,
    kept: Tensor,
    terms: Tensor,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    wants_hidden: bool,
    take: TakeGradient | None = None,
) -> Tensor | None:
    """Fills the gradients of weight and bias; returns that of the trainable rows in float32.

    terms [4, M] or [5, M] float32: the coefficients of ``_native.gradient``. Gradients that are
    None or not wanted are not computed; ``take`` sees the gradient of every tile's logits.
    """
    sums = torch.zeros_like(head.hidden, dtype=torch.float32) if wants_hidden else None
    for first, last, weight in head.tiles() if len(head) else ():
        keep = head.kept(kept, first, last)
        total = None
        for rows in head.chunks():
            d = logits = head.buffer(rows, last - first)
            if keep is None:
                torch.mm(head.hidden[rows], weight.T, out=logits)
            else:
                logits = keep
            head.epilogue.gradient(logits, *head.of_tile(first, last, rows), terms[:, rows], d)
            if sums is not None:
                add_product(sums[rows], d, weight)
            if d_bias is not None:
                d_bias[first:last] += d.sum(0, dtype=torch.float32)
            if take is not None:
                take(d, rows, first)
            if d_weight is not None:
                total = _weight_gradient(head, d, rows, d_weight[first:last], total)
        if d_weight is not None and total is not None:
            d_weight[first:last] = total
    if d_weight is not None and not len(head):
        d_weight.zero_()
    return sums


def backward_in_one_call(
    head: TiledHead,
    kept: Tensor,
    terms: Tensor,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    wants_hidden: bool,
) -> Tensor | None:
    """``backward`` by one native call, for a head that has ``in_one_call`` and rows."""
    sums = None
    if wants_hidden:
        shape = (_native.padded_rows(len(head)), head.hidden.shape[1])
        sums = torch.zeros(shape, dtype=torch.float32)
    _native.head_backward(head, kept, terms, sums, d_weight, d_bias)
    return None if sums is None else sums[: len(head)]


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a @ b to ``out`` in float32: the product is never rounded to bf16 before it is added.

    torch has bf16 products with a float32 result on GPUs only. Elsewhere a second product gives the
    remainder of the first one's rounding: torch subtracts the first before it rounds. On a CPU with
    bf16 instructions this is faster, and takes less memory, than widening both factors.
    """
    if a.dtype == torch.float32:
        out.addmm_(a, b)
    elif a.is_cuda and WIDE_PRODUCTS:
        out += torch.mm(a, b, out_dtype=torch.float32)
    else:
        rounded = torch.mm(a, b)
        out += rounded
        out += torch.addmm(rounded, a, b, beta=-1)


def _weight_gradient(
    head: TiledHead, d: Tensor, rows: slice, out: Tensor, total: Tensor | None
) -> Tensor | None:
    """dW[tile] of a chunk: written to ``out`` if it is the only one, else added to the result.

    W[tile] is not needed any more, so the product takes the memory of its widened copy.
    """
    if head.chunk == len(head) and head.dtype == out.dtype:
        torch.mm(d.T, head.hidden[rows], out=out)
        return None
    if head.chunk == len(head):
        return torch.mm(d.T, head.hidden[rows], out=head.wide_buffer(len(out)))
    if total is None:
        total = torch.zeros_like(out, dtype=torch.float32)
    add_product(total, d.T, head.hidden[rows])
    return total
