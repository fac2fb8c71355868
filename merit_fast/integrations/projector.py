"""Random projection of gradients for TRAK, dattri and LESS, by the CountSketch, without tables."""

import functools
import math
from collections.abc import Iterator, Mapping
from numbers import Integral

import torch
from torch import Tensor
from torch.nn import functional as F

from merit_fast.kernels import _splitmix
from merit_fast.kernels.sketch import CountSketch, flat_sketch
from merit_fast.kernels.sketch._target import BUCKET, TILE, group_shape

FOLD = 4  # a width that no CountSketch has is folded from one at least this many times as wide
PIECE = 1 << 18  # entries of an example that are copied or converted at a time
PROJ_TYPES = ("rademacher", "normal", "sjlt", "count_sketch")


class Projector:
    """Random projection of per-example gradients with the interface of TRAK's and dattri's classes.

        out[b] = F CountSketch(vector of grads[b]),  E <out(g), out(h)> = <g, h>
        Var <out(g), out(h)> <= (1 + e) (|g|^2 |h|^2 + <g, h>^2) / proj_dim

    The vector is hashed as the rows of a matrix of 64 q columns, where q is the number of tiles
    across in a group (``merit_fast.kernels.sketch``). Where ``proj_dim`` is a multiple of 4096, F
    is the identity and e = 0. Else the sketch has the width D' = the next multiple of 4096 from
    4 ``proj_dim`` on, and F adds its entries, each with a random sign, to ``proj_dim`` sums by a
    random balanced deal: e = (proj_dim / 2 D')^2 <= 1 / 64.
    A dense matrix of random signs or normal numbers has the same law with e = 0.

    Time is linear in ``grad_dim`` and does not grow with ``proj_dim``; memory depends on neither.
    Projections depend on ``seed``, the model's id, ``grad_dim`` and ``proj_dim`` only; on a CPU to
    the bit, for any batch, slice and number of threads.

    Args:
        grad_dim: entries of a gradient, any number; dattri calls it ``feature_dim``.
        proj_dim: entries of a projection, any number.
        seed: seed of the hash.
        proj_type: "rademacher", "normal", "sjlt" or "count_sketch", or TRAK's or dattri's
            ``ProjectionType``: one projection, whose law holds for each. "identity",
            "random_mask" and "grass" name projections of another law and are refused.
        device: device of the projections; gradients are moved there piece by piece.
        dtype: dtype of the projections. Sums are float32.
        normalized: False multiplies by sqrt(proj_dim), the scale of TRAK's own projectors. TRAK
            divides projections by sqrt(grad_dim) and keeps them in float16, where small numbers
            are lost.
        block_size: taken because LESS passes it to every projector; has no effect.
        max_batch_size: as ``block_size``.
        feature_dim: ``grad_dim`` by dattri's name.
        backend: "eager", "cpu" (native), "triton"; None chooses by device.

    Raises:
        ValueError: a size is not positive, or ``proj_type`` has another law.
    """

    def __init__(  # noqa: PLR0913
        self,
        grad_dim: int | None = None,
        proj_dim: int = 4096,
        seed: int = 0,
        proj_type: str = "rademacher",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        normalized: bool = True,
        block_size: int | None = None,
        max_batch_size: int | None = None,
        feature_dim: int | None = None,
        backend: str | None = None,
    ) -> None:
        if (grad_dim is None) == (feature_dim is None):
            raise ValueError("Projector: give one of grad_dim and feature_dim")
        size = feature_dim if grad_dim is None else grad_dim
        self.grad_dim = _positive("grad_dim", size)
        self.feature_dim = self.grad_dim
        self.proj_dim = _positive("proj_dim", proj_dim)
        kind = getattr(proj_type, "value", proj_type)
        if kind not in PROJ_TYPES:
            raise ValueError(
                f"Projector: proj_type must be one of {', '.join(PROJ_TYPES)}, got {kind}"
            )
        if not dtype.is_floating_point:
            raise ValueError(f"Projector: dtype must be a float type, got {dtype}")
        self.seed = seed
        self.proj_type = proj_type
        self.device = torch.device(device)
        self.dtype = dtype
        self.normalized = normalized
        self.backend = backend
        is_folded = self.proj_dim % BUCKET != 0
        width = -(-FOLD * self.proj_dim // BUCKET) * BUCKET if is_folded else self.proj_dim
        self._sketch = CountSketch(width, seed)
        self._columns = TILE * group_shape(width // BUCKET)[1]

    def project(
        self,
        grads: Tensor | Mapping[str, Tensor],
        model_id: int = 0,
        *,
        ensemble_id: int | None = None,
    ) -> Tensor:
        """Project a batch of gradients. Not differentiable.

        Args:
            grads: [B, grad_dim], or a mapping of tensors [B, ...] whose flattened examples lie end
                to end in the mapping's order, as TRAK and dattri hand them over. float32, bfloat16,
                float16 or float64; any strides.
            model_id: number of the checkpoint; each has a hash of its own.
            ensemble_id: ``model_id`` by dattri's name.

        Returns:
            [B, proj_dim] of the projector's dtype, on its device.

        Raises:
            ValueError: shapes disagree with one another or with ``grad_dim``, or both ids are
                given.
            TypeError: a tensor is not of a float type, or the id is not an integer.
        """
        if ensemble_id is not None and model_id != 0:
            raise ValueError("Projector: give one of model_id and ensemble_id")
        number = model_id if ensemble_id is None else ensemble_id
        if not isinstance(number, Integral):
            raise TypeError(f"Projector: model_id must be an integer, got {number!r}")
        vectors = self._checked(grads)
        sums = torch.zeros(len(vectors[0]), self._sketch.proj_dim, device=self.device)
        name = f"model {int(number)}"
        place = 0
        for vector in vectors if len(sums) else ():
            self._add(vector, place, name, sums)
            place += vector.shape[1]
        return self._finished(sums, name)

    __call__ = project  # dattri's random_project returns a function of (features, ensemble_id)

    def free_memory(self) -> None:
        """Drop the deals of folded widths, which the next call makes again."""
        _deal.cache_clear()

    def _checked(self, grads: Tensor | Mapping[str, Tensor]) -> list[Tensor]:
        """Matrices of B rows. Row b of each matrix holds a part of example b."""
        if isinstance(grads, Mapping):
            vectors = _flattened(grads)
        else:
            _check_dtype("grads", grads)
            if grads.dim() != 2:
                raise ValueError(
                    f"Projector: grads must be [B, {self.grad_dim}], got {list(grads.shape)}"
                )
            vectors = [grads.detach()]
        entries = sum(vector.shape[1] for vector in vectors)
        if entries != self.grad_dim:
            raise ValueError(
                f"Projector: grads must have {self.grad_dim} entries an example, got {entries}"
            )
        return vectors

    def _add(self, vector: Tensor, place: int, name: str, sums: Tensor) -> None:
        """Add the sketch of [B, n], the entries of every gradient from ``place`` on."""
        columns = self._columns
        is_read = vector.device == sums.device and _is_dense(vector)
        buffer = None
        for first, last in _pieces(vector.shape, place % columns, columns, is_read):
            piece = vector[:, first:last]
            if not (is_read and _lies_in_rows(piece, vector)):
                if buffer is None:
                    buffer = torch.empty(len(vector) * max(PIECE, columns), device=sums.device)
                piece = buffer[: piece.numel()].view(piece.shape).copy_(piece)
            row, column = divmod(place + first, columns)
            flat_sketch(
                piece.view(len(piece), -1, min(last - first, columns)),
                name,
                self._sketch,
                first_row=row,
                first_column=column,
                columns=columns,
                out=sums,
                backend=self.backend,
            )

    def _finished(self, sums: Tensor, name: str) -> Tensor:
        """Sketches [B, D'] folded to [B, proj_dim], in their scale and dtype."""
        if self._sketch.proj_dim != self.proj_dim:
            order, signs = _deal(self._sketch, self.proj_dim, name, sums.device)
            dealt = (sums * signs)[:, order]
            rounds = 1 << (-(-dealt.shape[1] // self.proj_dim) - 1).bit_length()
            dealt = F.pad(dealt, (0, rounds * self.proj_dim - dealt.shape[1]))
            while dealt.shape[1] > self.proj_dim:  # by halves: an order that no batch changes
                left, right = dealt.chunk(2, 1)
                dealt = left + right
            sums = dealt
        if not self.normalized:
            sums = sums * self.proj_dim**0.5
        return sums.to(self.dtype)


def _positive(name: str, value: object) -> int:
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"Projector: {name} must be a positive integer, got {value}")
    return int(value)


def _check_dtype(name: str, grads: object) -> None:
    if not isinstance(grads, Tensor):
        raise TypeError(f"Projector: {name} must be a tensor, got {type(grads).__name__}")
    if not grads.dtype.is_floating_point:
        raise TypeError(f"Projector: {name}: dtype must be a float type, got {grads.dtype}")


def _flattened(grads: Mapping[str, Tensor]) -> list[Tensor]:
    """The tensors [B, ...] as matrices [B, n]."""
    if not grads:
        raise ValueError("Projector: grads must have a tensor, got an empty mapping")
    batch = None
    vectors = []
    for name, tensor in grads.items():
        _check_dtype(name, tensor)
        if tensor.dim() < 1 or batch not in (None, len(tensor)):
            wanted = "B" if batch is None else batch
            raise ValueError(f"Projector: {name} must be [{wanted}, ...], got {list(tensor.shape)}")
        batch = len(tensor)
        vectors.append(tensor.detach().reshape(batch, math.prod(tensor.shape[1:])))
    return vectors


def _is_dense(vector: Tensor) -> bool:
    """Whether the sketch reads the entries of [B, n] where they lie."""
    return vector.is_contiguous() and vector.dtype in (torch.float32, torch.bfloat16)


def _lies_in_rows(piece: Tensor, vector: Tensor) -> bool:
    """Whether rows of the hashed matrix lie end to end, from one example to the next too."""
    return len(vector) == 1 or piece.shape == vector.shape


def _pieces(
    shape: torch.Size, column: int, columns: int, is_read: bool
) -> Iterator[tuple[int, int]]:
    """Ranges of the entries of [B, n] that fill a part of a row of the hashed matrix, or rows.

    The first entry lies in ``column``. Whole rows that need no copy are one range; a copied range
    has ``PIECE`` entries, so that it stays in the cache.
    """
    batch, entries = shape
    first = min(-column % columns, entries)
    if first:
        yield 0, first
    rows_end = entries - (entries - first) % columns
    is_copied = not is_read or (batch > 1 and rows_end - first < entries)
    step = max(1, PIECE // columns) * columns if is_copied else max(1, entries)
    for start in range(first, rows_end, step):
        yield start, min(start + step, rows_end)
    if rows_end < entries:
        yield rows_end, entries


@functools.lru_cache(maxsize=8)
def _deal(
    sketch: CountSketch, proj_dim: int, name: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A random order of the sketch's entries, dealt out to ``proj_dim`` sums in turn, and signs."""
    key = sketch.key(f"{name}, folded to {proj_dim}")
    draws = _splitmix.draw(key, torch.arange(2 * sketch.proj_dim))
    order = draws[: sketch.proj_dim].argsort(stable=True)
    signs = 1.0 - 2.0 * (draws[sketch.proj_dim :] & 1).float()
    return order.to(device), signs.to(device)
