"""The first pass of K-FAC: second moments of every gradient, by the taps of the sketcher."""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Literal

from torch import Tensor, nn

from merit_fast.errors import InputError, show
from merit_fast.kernels.sketch import CountSketch, matrix_shape
from merit_fast.sketch.divided.freezing import is_trainable
from merit_fast.sketch.precondition import FactorSums, KfacFactors
from merit_fast.sketch.precondition.factors import DAMPING
from merit_fast.sketch.selection import select_parameters, unwrapped
from merit_fast.sketch.sketcher import GradientSketcher

_WIDTH = 4096  # of the sketches that a checked pass compares
MAX_SIDE = 2048


def kfac_factors(
    model: nn.Module,
    parameters: str = "all",
    max_side: int = MAX_SIDE,
    *,
    check: Literal["first", "always", "never"] = "first",
    uncovered: Literal["autograd", "error"] = "error",
) -> "FactorCollector":
    """Collects K-FAC factors of a model inside a with-block, in which the weights are frozen.

        with kfac_factors(model) as collector:
            losses_per_example.sum().backward()
            collector.update()
        factors = collector.factors()
        with sketch_gradients(model, normalize="kfac", factors=factors) as sketcher: ...

    Take the rows that you sketch afterwards, or a sample of them. ``KfacFactors`` defines the
    factors. Linear layers, Conv2d, Conv3d, embeddings and the stacks of routed experts have a
    factor for each side; vectors (norms, and biases apart from their weights), dense Conv1d and
    whatever takes a backward pass per example have the mean square of each entry of the examples'
    gradients.

    Args:
        model: any torch module, as for ``sketch_gradients``.
        parameters: as for ``sketch_gradients``.
        max_side: sides longer than that keep the diagonal of their factor only, as an embedding's
            side of tokens always does. A side of n takes 4 n^2 bytes, and during a pass 8 n^2.
        check: as for ``sketch_gradients``.
        uncovered: as for ``sketch_gradients``.

    Raises:
        InputError: an argument breaks its rule.
        MeritFastError: as ``sketch_gradients``.
    """
    if max_side < 1:
        raise InputError(f"max_side: must be at least 1, got {show(max_side)}")
    chosen = select_parameters(unwrapped(model), parameters, is_trainable)
    return FactorCollector.of(model, chosen, max_side, check, uncovered)


class FactorCollector:
    """Collects the second moments of which K-FAC's factors are made.

    One forward pass, one backward pass and one ``update`` go together, as in ``GradientSketcher``,
    whose rules and check hold here too.

    Args:
        sketcher: with ``collect_side``; entered and left with the collector.
        sums: of no example yet, for the sketcher's parameters.
    """

    def __init__(self, sketcher: GradientSketcher, sums: FactorSums) -> None:
        self.sketcher = sketcher
        self.sums = sums

    @classmethod
    def of(
        cls,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        max_side: int,
        check: Literal["first", "always", "never"],
        uncovered: Literal["autograd", "error"],
        notify: Callable[[str], None] | None = None,
    ) -> "FactorCollector":
        """A collector for chosen parameters by name; the rest as for ``kfac_factors``."""
        sketcher = GradientSketcher(
            model,
            CountSketch(_WIDTH),
            parameters,
            check=check,
            uncovered=uncovered,
            notify=notify,
            collect_side=max_side,
        )
        shapes = {name: matrix_shape(value.shape) for name, value in parameters.items()}
        return cls(sketcher, FactorSums(shapes, max_side))

    def __enter__(self) -> "FactorCollector":
        self.sketcher.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.sketcher.__exit__(kind, error, trace)

    def packed(self, cu_seqlens: Tensor) -> None:
        """Announces a packed row, as ``GradientSketcher.packed`` does."""
        self.sketcher.packed(cu_seqlens)

    def discard(self) -> None:
        """Discards the forward pass since the last update."""
        self.sketcher.discard()

    def update(self) -> None:
        """Adds the examples of the last backward pass.

        Raises:
            MeritFastError: a gradient holds NaN or infinity. The sums are as before.
        """
        self.sums.merge(self.sketcher.take_moments())

    def factors(self, damping: float = DAMPING) -> KfacFactors:
        """The factors of all examples so far.

        Raises:
            InputError: ``damping`` is not above 0.
            MeritFastError: there was no ``update``.
        """
        return KfacFactors.of_sums(self.sums, damping)
