"""Second moments of what a gradient is made of, summed over the tokens of any number of passes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from merit_fast.errors import MeritFastError


class NotFiniteMomentsError(MeritFastError):
    """A gradient of some example holds NaN or infinity."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"kfac_factors: parameter {name}: must have a finite gradient in every example, "
            "found NaN or infinity"
        )


@dataclass
class SideMoments:
    """Sums over the tokens of one use of a parameter, whose gradient is sum over t of l_t r_t^T.

    Attributes:
        rows: [E, R / E, R / E] sum of l l^T, or its diagonal [E, R / E]; float32.
        columns: [E, C, C] sum of r r^T, or its diagonal [E, C]; float32.
        tokens: [E] float64 number of tokens where neither l nor r is 0.
    """

    rows: Tensor
    columns: Tensor
    tokens: Tensor

    def add(self, other: "SideMoments") -> None:
        self.rows += other.rows
        self.columns += other.columns
        self.tokens += other.tokens


class FactorSums:
    """Second moments of every parameter, and the number of examples that they are of.

    Args:
        shapes: parameter name -> its ``matrix_shape``.
        max_side: sides longer than that keep their diagonal only.

    Attributes:
        uses: (name, kind of use) -> moments of its sides. A matrix that is both embedding and head
            has two uses.
        squares: name -> sum of squares of the examples' gradients, in its ``matrix_shape``.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], max_side: int) -> None:
        self.shapes = shapes
        self.max_side = max_side
        self.uses: dict[tuple[str, str], SideMoments] = {}
        self.squares: dict[str, Tensor] = {}
        self.examples = 0

    @torch.no_grad()
    def add_product(self, name: str, left: Tensor, right: Tensor, part: int = 0) -> None:
        """Adds tokens of a gradient left^T right: [..., R / E] and [..., C] of matrix ``part``."""
        left = left.flatten(0, -2)
        right = right.flatten(0, -2)
        active = left.any(-1) & right.any(-1)
        moments = self._moments(name, "product", left.shape[1], left.device)
        moments.tokens[part] += active.sum()
        _add_moment(moments.rows[part], left[active].float())
        _add_moment(moments.columns[part], right[active].float())

    @torch.no_grad()
    def add_lookup(self, name: str, dy: Tensor, ids: Tensor) -> None:
        """Adds tokens of an embedding: l is one-hot, so only counts of ids [...] are kept."""
        dy = dy.flatten(0, -2)
        active = dy.any(-1)
        moments = self._moments(name, "lookup", 0, dy.device)
        moments.tokens[0] += active.sum()
        moments.rows[0] += torch.bincount(ids.flatten()[active], minlength=moments.rows.shape[1])
        _add_moment(moments.columns[0], dy[active].float())

    @torch.no_grad()
    def add_gradients(self, name: str, gradients: Tensor, first_row: int = 0) -> None:
        """Adds examples' gradients [B, r, C] of the rows from ``first_row`` on."""
        if name not in self.squares:
            self.squares[name] = torch.zeros(self.shapes[name], device=gradients.device)
        rows = self.squares[name][first_row : first_row + gradients.shape[1]]
        rows += gradients.float().square().sum(0)

    def merge(self, other: "FactorSums") -> None:
        """Adds the sums of other examples.

        Raises:
            NotFiniteMomentsError: they hold NaN or infinity. These sums are as before.
        """
        for name, value in other._traces():
            if not value.isfinite().all():
                raise NotFiniteMomentsError(name)
        for key, moments in other.uses.items():
            if key in self.uses:
                self.uses[key].add(moments)
            else:
                self.uses[key] = moments
        for name, squares in other.squares.items():
            if name in self.squares:
                self.squares[name] += squares
            else:
                self.squares[name] = squares
        self.examples += other.examples

    def _traces(self) -> Iterator[tuple[str, Tensor]]:
        for (name, _), moments in self.uses.items():
            for side in (moments.rows, moments.columns):
                yield name, diagonal_of(side).sum()
        for name, squares in self.squares.items():
            yield name, squares.sum()

    def _moments(self, name: str, kind: str, height: int, device: torch.device) -> SideMoments:
        """The moments of a use; ``height``: rows of each matrix of the stack; 0: a lookup."""
        key = (name, kind)
        if key not in self.uses:
            rows, columns = self.shapes[name]
            parts = rows // height if height else 1
            full_rows = 0 < height <= self.max_side
            full_columns = columns <= self.max_side
            height = height or rows
            self.uses[key] = SideMoments(
                torch.zeros(parts, *([height] * (2 if full_rows else 1)), device=device),
                torch.zeros(parts, *([columns] * (2 if full_columns else 1)), device=device),
                torch.zeros(parts, dtype=torch.float64, device=device),
            )
        return self.uses[key]


def diagonal_of(factor: Tensor) -> Tensor:
    """[E, n]: the diagonals of [E, n, n], or [E, n] itself."""
    return factor if factor.dim() == 2 else factor.diagonal(dim1=1, dim2=2)


def _add_moment(total: Tensor, values: Tensor) -> None:
    """Adds values^T values, [N, n] -> [n, n], or its diagonal [n]."""
    if total.dim() == 1:
        total += values.square().sum(0)
    else:
        with torch.autocast(values.device.type, enabled=False):
            total.addmm_(values.T, values)
