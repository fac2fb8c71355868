"""Weighted sums with weights of their own for every row or column: rule as data, and reference.

The native engine that merges files (csrc/elements/vectors.cpp) gives the same bits without ever
holding a whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from merit_fast.kernels.average import _eager
from merit_fast.kernels.average._eager import rounded, to_float64
from merit_fast.kernels.lazy import np
from merit_fast.records import record

if TYPE_CHECKING:
    import numpy.typing as npt

Array: TypeAlias = "npt.NDArray[np.float64]"
# Gram matrices [V, K, K] -> weights [V, inputs]
VectorWeights = Callable[[Array], Array]


@record
class VectorRule:
    """One tensor's sum over its vectors v: out_v = sum_k weights(gram_v)[k] theta_k,v.

        x = tensor.reshape(-1, length)                  # rows, with period 0
        x = tensor.reshape(-1, period).T                # columns, with period
        gram_v[a, b] = <x_a,v, x_b,v>                   # from_base: of deltas from the last input

    All in float64. A row's products are summed in eight lanes as in ``delta_gram``, a column's in
    the order of the rows. ``weights`` gives a number for every input, the base's last.
    """

    weights: VectorWeights
    length: int
    period: int
    from_base: bool

    def grams(self, inputs: Sequence[npt.NDArray[Any]], dtypes: Sequence[str]) -> Array:
        """[V, K, K] Gram matrices of every vector of a whole tensor."""
        branches = len(inputs) - int(self.from_base)
        base = inputs[-1]
        base_dtype = dtypes[-1]
        if not self.from_base:
            base = np.zeros(inputs[0].size)
            base_dtype = "F64"
        if self.period:
            return self._column_grams(inputs[:branches], base, dtypes, base_dtype)
        grams = np.empty((inputs[0].size // self.length, branches, branches))
        for v in range(len(grams)):
            here = slice(v * self.length, (v + 1) * self.length)
            models = [x[here] for x in inputs[:branches]]
            grams[v] = _eager.delta_gram(models, base[here], dtypes[:branches], base_dtype)
        return grams

    def _column_grams(
        self,
        models: Sequence[npt.NDArray[Any]],
        base: npt.NDArray[Any],
        dtypes: Sequence[str],
        base_dtype: str,
    ) -> Array:
        start = to_float64(base, base_dtype)
        deltas = [
            (to_float64(x, dtype) - start).reshape(-1, self.period)
            for x, dtype in zip(models, dtypes, strict=False)
        ]
        grams = np.zeros((self.period, len(models), len(models)))
        for a, first in enumerate(deltas):
            for b, second in enumerate(deltas):
                for row in first * second:
                    grams[:, a, b] += row
        return grams


def mix_vectors(
    inputs: Sequence[npt.NDArray[Any]],
    rule: VectorRule,
    *,
    dtypes: Sequence[str],
    out_dtype: str,
) -> tuple[npt.NDArray[Any], bool]:
    """Applies a rule to one whole tensor.

    Args:
        inputs: arrays [n] of the models, then the base if ``rule.from_base``; bf16 as uint16 bits.
        rule: the vectors and their weights.
        dtypes, out_dtype: "BF16", "F16", "F32" or "F64".

    Returns:
        [n] of ``out_dtype`` (bf16 as uint16 bits), and whether every result is finite.
    """
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        weights = rule.weights(rule.grams(inputs, dtypes))
        total = np.zeros(inputs[0].size)
        for k, (x, dtype) in enumerate(zip(inputs, dtypes, strict=True)):
            weight = weights[:, k]
            each = (
                np.tile(weight, x.size // rule.period)
                if rule.period
                else np.repeat(weight, rule.length)
            )
            part = each * to_float64(x, dtype)
            total = part if k == 0 else total + part
        return rounded(total, out_dtype)
