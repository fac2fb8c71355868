"""Truncated singular value decompositions of low-rank products and of whole matrices."""

from typing import Protocol

import numpy as np
import numpy.typing as npt

from merit_fast.records import record

Array = npt.NDArray[np.float64]
_OVERSAMPLING = 10  # further directions of a random range finder
_POWERS = 4  # passes over the matrix and its transpose that sharpen the range
_EXACT_SIDE = 256  # matrices with a shorter side up to this are decomposed whole
_DENSE_SHARE = 4  # so are those of which more than a quarter of the directions are asked for


@record
class Cut:
    """left [out, r] @ right [r, in], and the squared Frobenius norms of matrix and remainder."""

    left: Array
    right: Array
    total: float
    lost: float


def cut_product(left: Array, right: Array, rank: int) -> Cut:
    """The best approximation of left @ right of a rank, without forming the product.

        Q, R = qr(left); P, S = qr(right.T)
        U, s, V = svd(R @ S.T)
        (Q @ U[:, :rank] * s[:rank] ** 0.5) @ (s[:rank, None] ** 0.5 * V[:rank] @ P.T)

    Args:
        left: [out, n].
        right: [n, in].
        rank: at most n.
    """
    q, r = np.linalg.qr(left)
    p, s = np.linalg.qr(right.T)
    u, values, v = np.linalg.svd(r @ s.T, full_matrices=False)
    cut = _cut(q @ u[:, :rank], values, v[:rank] @ p.T, float(np.sum(values * values)))
    return _padded(cut, rank)


class Matrix(Protocol):
    """A matrix [out, in] that is multiplied, not held."""

    shape: tuple[int, int]

    def times(self, right: Array) -> Array: ...

    def transposed_times(self, left: Array) -> Array: ...

    def gram(self) -> tuple[Array, bool]: ...

    def square(self) -> float: ...

    def whole(self) -> Array: ...


def cut_matrix(matrix: Matrix, rank: int, seed: int) -> Cut:
    """The best approximation of a matrix of a rank, or close to it.

    Matrices with a short side, and ranks near the full one, take LAPACK's exact decomposition.
    Others take a random range finder with power iterations, which multiplies with the matrix eleven
    times: Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithms 4.4 and 5.1. Memory:
    4 (out + in) (rank + 10) float64. The remainder's norm is that of the cut that is returned.

    Args:
        matrix: [out, in].
        rank: directions to keep, at most the shorter side.
        seed: of the random directions.
    """
    side = min(matrix.shape)
    total = matrix.square()
    if side <= _EXACT_SIDE or rank * _DENSE_SHARE > side:
        u, values, v = np.linalg.svd(matrix.whole(), full_matrices=False)
        return _cut(u[:, :rank], values, v[:rank], total)
    generator = np.random.default_rng(seed)
    width = min(rank + _OVERSAMPLING, side)
    basis, _ = np.linalg.qr(matrix.times(generator.standard_normal((matrix.shape[1], width))))
    for _ in range(_POWERS):
        other, _ = np.linalg.qr(matrix.transposed_times(basis))
        basis, _ = np.linalg.qr(matrix.times(other))
    u, values, v = np.linalg.svd(matrix.transposed_times(basis).T, full_matrices=False)
    cut = _cut(basis @ u[:, :rank], values, v[:rank], total)
    kept = float(np.sum(values[:rank] ** 2))
    return Cut(cut.left, cut.right, total, max(total - kept, 0.0))


def cut_energy(matrix: Matrix, energy: float, least: int = 1) -> Cut:
    """The best approximation of the least rank that keeps a share of the squared Frobenius norm.

    The Gram matrix of the shorter side is decomposed: its eigenvalues are the squared singular
    values, and its vectors span the cut. Memory: 3 min(out, in)^2 float64.

    Args:
        matrix: [out, in].
        energy: above 0, below or equal to 1.
        least: the least rank to give.
    """
    gram, of_rows = matrix.gram()
    squares, vectors = np.linalg.eigh(gram)
    squares = np.maximum(squares[::-1], 0.0)
    total = float(squares.sum())
    shares = np.cumsum(squares) / max(total, np.finfo(np.float64).tiny)
    enough = int(np.searchsorted(shares, energy * (1.0 - 1e-12))) + 1 if total > 0.0 else 1
    rank = min(max(enough, least), len(squares))
    kept = vectors[:, ::-1][:, :rank]
    other = matrix.transposed_times(kept) if of_rows else matrix.times(kept)
    norms = np.sqrt(np.linalg.norm(other, axis=0))
    norms = np.where(norms > 0.0, norms, 1.0)
    lost = max(total - float(np.sum(squares[:rank])), 0.0)
    if of_rows:
        return Cut(kept * norms, (other / norms).T, total, lost)
    return Cut(other / norms, (kept * norms).T, total, lost)


def _cut(left: Array, values: Array, right: Array, total: float) -> Cut:
    """A cut after the first columns of ``left``; singular values go to both sides in halves."""
    rank = left.shape[1]
    roots = np.sqrt(values[:rank])
    lost = float(np.sum(values[rank:] ** 2))
    return Cut(left * roots, roots[:, None] * right, total, lost)


def _padded(cut: Cut, rank: int) -> Cut:
    """The cut with directions of zeros, where the matrix has fewer than asked for."""
    lacking = max(rank - cut.left.shape[1], 0)
    left = np.pad(cut.left, ((0, 0), (0, lacking)))
    right = np.pad(cut.right, ((0, lacking), (0, 0)))
    return Cut(left, right, cut.total, cut.lost)
