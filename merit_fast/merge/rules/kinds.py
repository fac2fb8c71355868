"""The kinds of merge methods: how the engine is told to combine a tensor."""

from collections.abc import Callable

from merit_fast.kernels.average.deltas import DeltaRule
from merit_fast.kernels.average.elements import ElementRule
from merit_fast.merge.rules.gram import Array
from merit_fast.merge.rules.values import Coefficients, TensorValues
from merit_fast.records import record


@record
class WeightedSum:
    """A weighted sum of whole tensors, in one pass.

    ``coefficients`` gives [K + 1] numbers, the base's last. ``moves_base`` says whether the base
    takes part, from two facts: the scale is 1; the scale is 1 and the weights sum to 1 in every
    tensor.
    """

    coefficients: Callable[[TensorValues], Coefficients]
    moves_base: Callable[[bool, bool], bool]


@record
class FromGram:
    """A weighted sum whose coefficients come from the tensor's Gram matrix, taken by a first pass.

    With a base the matrix is of the deltas, and the base's coefficient is the last. ``by_vector``
    makes [V, inputs] coefficients from the matrices [V, K, K] of the rows or columns of a tensor;
    None: the method takes whole tensors only.
    """

    coefficients: Callable[[Array, TensorValues], Coefficients]
    by_vector: Callable[[Array, TensorValues], Array] | None = None


@record
class ThinnedDeltas:
    """A rule that drops elements of the deltas before they are summed.

    ``by_row``: elements are ranked within rows, so the engine holds whole rows. ``by_squares``:
    models are weighed by sums of squares, which have one chunk size.
    """

    rule: Callable[[TensorValues], DeltaRule]
    by_row: bool = False
    by_squares: bool = False


@record
class ElementByElement:
    """A rule that decides for every element which models count.

    ``by_row``: elements are compared within rows, so the engine holds whole rows.
    """

    rule: Callable[[TensorValues], ElementRule]
    by_row: bool = False
