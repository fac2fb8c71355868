"""K-FAC factors: each parameter's Fisher matrix as a Kronecker product, damped and inverted."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from merit_fast.errors import InputError, MeritFastError, one_line, show
from merit_fast.kernels.sketch import matrix_shape
from merit_fast.sketch.precondition.moments import FactorSums, SideMoments, diagonal_of
from merit_fast.sketch.precondition.sides import Preconditioner, Sides

DAMPING = 0.1
_ROUNDING = 1e-10  # (1e-5)^2: gradients below that of the largest are rounding
_VERSION = 1


@dataclass(frozen=True)
class KfacFactors:
    """K-FAC factors of a model's parameters (Martens & Grosse 2015, arXiv 1503.05671).

    The gradient of an example of a weight W [R, C] is a sum over its tokens of l r^T: dy x^T in a
    linear layer. Where tokens count as independent and l as independent of r, its Fisher matrix is

        F = E[g g^T] = rows (x) columns
        rows    ~ sum over tokens of l l^T                 S of a linear layer
        columns ~ sum over tokens of r r^T / tokens        A, the mean of x x^T

    and ``sketch_gradients(normalize="kfac")`` sketches W_rows @ G @ W_columns^T, where
    W^T W = (factor + sqrt(damping) * mean(diagonal of factor) * I)^-1 by a Cholesky factor. So
    inner products of sketches estimate tr(G^T rows^-1 H columns^-1) = g^T (rows (x) columns)^-1 h.
    That is Martens & Grosse's factored Tikhonov damping, with pi from the mean eigenvalues and
    lambda = damping * the mean eigenvalue of F, for each parameter (Grosse et al. 2023, arXiv
    2308.03296, take 0.1). A mean eigenvalue below 1e-10 of the largest parameter's is raised to
    that: such gradients are rounding only, as those of a key's bias are.

    Attributes:
        rows: parameter name -> [E, R / E, R / E] float32, or its diagonal [E, R / E]. E is the
            number of experts in a stack, else 1. The means are over all examples; only the product
            of the two sides has a meaning, their traces are equal.
        columns: [E, C, C], or its diagonal [E, C].
        diagonals: parameter name -> mean over the examples of g^2, in its ``matrix_shape``, for
            vectors and for what is no product of two sides.
        unseen: parameters that had no gradient.
        examples: number of examples.
        damping: as above, above 0.
    """

    rows: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]
    diagonals: Mapping[str, Tensor]
    unseen: tuple[str, ...]
    examples: int
    damping: float = DAMPING

    def __post_init__(self) -> None:
        if not 0 < self.damping < float("inf"):
            raise InputError(f"damping: must be above 0 and finite, got {show(self.damping)}")

    @classmethod
    def of_sums(cls, sums: FactorSums, damping: float = DAMPING) -> "KfacFactors":
        """The factors of all examples in ``sums``.

        Raises:
            MeritFastError: there is none.
        """
        if sums.examples == 0:
            raise MeritFastError("kfac_factors: needs at least one example, got 0")
        rows: dict[str, Tensor] = {}
        columns: dict[str, Tensor] = {}
        diagonals: dict[str, Tensor] = {}
        unseen = []
        for name, shape in sums.shapes.items():
            uses = {kind: m for (other, kind), m in sums.uses.items() if other == name}
            squares = sums.squares.get(name)
            if squares is not None:
                diagonal = squares / sums.examples
                for moments in uses.values():
                    diagonal += _entries(moments, sums.examples).view(shape)
                if bool(diagonal.any()):
                    diagonals[name] = diagonal
            elif uses:
                product = _product(uses, sums.examples)
                if product is not None:
                    rows[name], columns[name] = product
            if name not in rows and name not in diagonals:
                unseen.append(name)
        return cls(rows, columns, diagonals, tuple(unseen), sums.examples, damping)

    @property
    def num_bytes(self) -> int:
        """Bytes of all factors; a sketcher's multipliers take as many again."""
        tensors = (*self.rows.values(), *self.columns.values(), *self.diagonals.values())
        return sum(tensor.nbytes for tensor in tensors)

    def with_damping(self, damping: float) -> "KfacFactors":
        """Returns these factors with another damping."""
        return dataclasses.replace(self, damping=damping)

    def preconditioner(self, parameters: Mapping[str, Tensor]) -> Preconditioner:
        """Multipliers for some parameters; each factor's Cholesky decomposition runs in float64.

        Raises:
            MeritFastError: a parameter is absent from the factors or has another shape.
        """
        sides = {}
        scales = {}
        largest = max(map(self._mean_eigenvalue, {*self.rows, *self.diagonals}), default=0.0)
        for name, parameter in parameters.items():
            shape = matrix_shape(parameter.shape)
            mean = self._mean_eigenvalue(name)
            damping = self.damping * max(1.0, _ROUNDING * largest / mean) if mean else 0.0
            if name in self.rows:
                self._require_shape(name, shape, self._shape_of(name))
                rows = self.rows[name].to(parameter.device)
                columns = self.columns[name].to(parameter.device)
                root = damping**0.5
                sides[name] = Sides(_inverse_root(rows, root), _inverse_root(columns, root))
            elif name in self.diagonals:
                diagonal = self.diagonals[name].to(parameter.device)
                self._require_shape(name, shape, tuple(diagonal.shape))
                scales[name] = (diagonal + damping * diagonal.mean()).rsqrt()
            elif name not in self.unseen:
                raise MeritFastError(f"kfac: parameter {name} is absent from the factors")
        unseen = frozenset(self.unseen) & parameters.keys()
        return Preconditioner(scales, sides, unseen, "kfac")

    def _mean_eigenvalue(self, name: str) -> float:
        """Mean eigenvalue of a parameter's F; 0 where it had no gradient."""
        if name in self.diagonals:
            return float(self.diagonals[name].double().mean())
        if name not in self.rows:
            return 0.0
        sides = (self.rows[name], self.columns[name])
        return math.prod(float(diagonal_of(side).double().mean()) for side in sides)

    def _shape_of(self, name: str) -> tuple[int, ...]:
        parts, height = self.rows[name].shape[:2]
        return (parts * height, self.columns[name].shape[1])

    @staticmethod
    def _require_shape(name: str, shape: tuple[int, int], found: tuple[int, ...]) -> None:
        if shape != found:
            raise MeritFastError(
                f"kfac: parameter {name}: must be {list(found)} as in the factors, "
                f"found {list(shape)}"
            )

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file."""
        tensors = {}
        for kind in ("rows", "columns", "diagonals"):
            for name, tensor in getattr(self, kind).items():
                tensors[f"{kind}/{name}"] = tensor.contiguous()
        facts = {
            "version": _VERSION,
            "examples": self.examples,
            "damping": self.damping,
            "unseen": list(self.unseen),
        }
        save_file(tensors, path, {"kfac": json.dumps(facts, sort_keys=True)})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "KfacFactors":
        """Reads a file that ``save`` wrote.

        Raises:
            InputError: the file is absent, broken or something else.
        """
        kinds: dict[str, dict[str, Tensor]] = {"rows": {}, "columns": {}, "diagonals": {}}
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                facts = json.loads((file.metadata() or {})["kfac"])
                for key in file.keys():  # noqa: SIM118
                    kind, _, name = key.partition("/")
                    kinds[kind][name] = file.get_tensor(key)
        except Exception as error:  # the reader raises many kinds; all mean that it cannot be read
            raise InputError(
                f"{path}: is not a file of K-FAC factors ({one_line(error)})"
            ) from None
        if facts["version"] != _VERSION:
            raise InputError(f"{path}: version: must be {_VERSION}, found {show(facts['version'])}")
        return cls(
            kinds["rows"],
            kinds["columns"],
            kinds["diagonals"],
            tuple(facts["unseen"]),
            facts["examples"],
            facts["damping"],
        )


def _product(uses: Mapping[str, SideMoments], examples: int) -> tuple[Tensor, Tensor] | None:
    """Rows and columns of the Kronecker product that stands for all uses; None: no token.

    With L_u, R_u and n_u of use u, F = sum over u of (L_u (x) R_u) / (n_u * examples). Its partial
    traces give the factors: rows ~ sum of L_u tr(R_u) / n_u, columns ~ sum of R_u tr(L_u) / n_u,
    with the trace of F. For one use the product is F itself.
    """
    has_lookup = "lookup" in uses  # the moments of one-hot vectors are diagonal
    diagonal_columns = any(moments.columns.dim() == 2 for moments in uses.values())
    rows = torch.zeros(())
    columns = torch.zeros(())
    trace = torch.zeros(())
    for moments in uses.values():
        left = diagonal_of(moments.rows) if has_lookup else moments.rows
        right = diagonal_of(moments.columns) if diagonal_columns else moments.columns
        left_trace = diagonal_of(moments.rows).double().sum(1)
        right_trace = diagonal_of(moments.columns).double().sum(1)
        weight = 1 / (moments.tokens.clamp_min(1) * examples)
        trace = trace.to(weight) + left_trace * right_trace * weight
        rows = rows.to(weight) + _scaled(left, right_trace * weight)
        columns = columns.to(weight) + _scaled(right, left_trace * weight)
    if not bool(trace.any()):
        return None
    root = torch.where(trace > 0, trace, 1.0).rsqrt()
    return _scaled(rows, root).float(), _scaled(columns, root).float()


def _scaled(factor: Tensor, by: Tensor) -> Tensor:
    return factor.double() * by.view(-1, *[1] * (factor.dim() - 1))


def _entries(moments: SideMoments, examples: int) -> Tensor:
    """[E, R / E, C]: the diagonal of F of one use, entry by entry."""
    rows = diagonal_of(moments.rows) / (moments.tokens.clamp_min(1) * examples).unsqueeze(1)
    return (rows.unsqueeze(2) * diagonal_of(moments.columns).unsqueeze(1)).float()


def _inverse_root(factor: Tensor, damping: float) -> Tensor:
    """W with W^T W = (factor + damping * mean(diagonal) * I)^-1; float32.

    The mean runs over all experts of a stack, so one that got no token has a factor too.
    """
    added = damping * diagonal_of(factor).double().mean()
    if factor.dim() == 2:
        return (factor.double() + added).rsqrt().float()
    roots = []
    for matrix in factor:
        damped = matrix.double()
        damped = damped + added * torch.eye(len(damped), dtype=torch.float64, device=matrix.device)
        lower = torch.linalg.cholesky(damped)
        identity = torch.eye(len(damped), dtype=torch.float64, device=matrix.device)
        roots.append(torch.linalg.solve_triangular(lower, identity, upper=False).float())
    return torch.stack(roots)
