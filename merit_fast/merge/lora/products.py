"""The low-rank products of an adapter's layers, alike for linear layers, kernels and experts."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from merit_fast.errors import InputError
from merit_fast.merge.engine.changes import floats
from merit_fast.merge.engine.opened import OpenFiles
from merit_fast.merge.read.adapters.keys import Layer
from merit_fast.records import record

Array = npt.NDArray[np.float64]


@record
class Form:
    """What a layer's factors look like, whatever their rank."""

    a_name: str
    b_name: str
    experts: int
    out: int
    inner: tuple[int, ...]  # sizes of A after the rank: [in], or a convolution's [in, ...]

    def a_shape(self, rank: int) -> tuple[int, ...]:
        return (self.experts * rank, *self.inner)

    def b_shape(self, rank: int) -> tuple[int, ...]:
        return (self.out, rank * self.experts, *[1] * (len(self.inner) - 1))


def form_of(layer: Layer, rank: int) -> Form:
    """The form of a layer whose config has this rank.

    Raises:
        InputError: the factors are not of that rank.
    """
    a = layer.a.shape
    b = layer.b.shape
    fits = len(a) == len(b) >= 2 and a[0] == b[1] and a[0] % rank == 0
    if not fits or (a[0] != rank and len(a) > 2):
        raise InputError(
            f"{layer.a.file}: {layer.a.name}: must be of rank {rank} by adapter_config.json, got "
            f"{list(a)} and lora_B {list(b)}"
        )
    return Form(layer.a.name, layer.b.name, a[0] // rank, b[0], a[1:])


def read_product(layer: Layer, form: Form, files: OpenFiles) -> tuple[Array, Array]:
    """(left [E, out, r], right [E, r, in]) in float64, not scaled."""
    a = floats(layer.a, files).astype(np.float64)
    b = floats(layer.b, files).astype(np.float64)
    right = a.reshape(form.experts, a.shape[0] // form.experts, -1)
    left = np.moveaxis(b.reshape(form.out, -1, form.experts), 2, 0)
    return left, right


def stored_factors(left: Array, right: Array, form: Form) -> list[Array]:
    """[A, B] as PEFT stores them, of left [E, out, r] and right [E, r, in]."""
    rank = right.shape[1]
    a = right.reshape(form.a_shape(rank))
    b = np.moveaxis(left, 0, 2).reshape(form.b_shape(rank))
    return [a, b]


def joined(products: Sequence[tuple[float, Array, Array]]) -> tuple[Array, Array]:
    """Left and right of sum_k factor_k * left_k @ right_k, side by side: ranks add up."""
    left = np.concatenate([factor * left for factor, left, _ in products], axis=2)
    right = np.concatenate([right for _, _, right in products], axis=1)
    return left, right
