"""Multiplication of gradients by a preconditioner: entry by entry, or side by side."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from merit_fast.errors import MeritFastError

_PROBES = 64


class NoFactorError(MeritFastError):
    """A parameter has a gradient now, but had none where its factors were collected."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"sketch_gradients: parameter {name}: must have a gradient in the rows of the K-FAC "
            "factors, found none there; collect factors from rows that reach it, or leave it out "
            "(parameters=...)"
        )


@dataclass(frozen=True)
class Sides:
    """Multiplies a gradient matrix G [R, C] from both sides: rows @ G @ columns.T.

    A stack of E matrices (experts) has its own factors for each; any other parameter has E = 1.

    Attributes:
        rows: [E, R / E, R / E], or its diagonal [E, R / E]; float32.
        columns: [E, C, C], or its diagonal [E, C]; float32.
    """

    rows: Tensor
    columns: Tensor

    def left(self, values: Tensor, part: int = 0) -> Tensor:
        """Left factors [..., R / E] of a product left^T right."""
        return _times(values, self.rows[part])

    def right(self, values: Tensor, part: int = 0) -> Tensor:
        """Right factors [..., C]."""
        return _times(values, self.columns[part])

    def gradient(self, gradient: Tensor) -> Tensor:
        """Gradients [B, R, C] of the whole parameter."""
        batch, _, columns = gradient.shape
        parts = gradient.float().view(batch, len(self.rows), -1, columns)
        with torch.autocast(gradient.device.type, enabled=False):
            is_diagonal = self.rows.dim() == 2
            parts = parts * self.rows.unsqueeze(-1) if is_diagonal else self.rows @ parts
            is_diagonal = self.columns.dim() == 2
            parts = parts * self.columns.unsqueeze(1) if is_diagonal else parts @ self.columns.mT
        return parts.flatten(1, 2)

    def noise_gain(self) -> float:
        """Factor by which the norm of white noise grows: |rows| |columns| / sqrt(R C)."""
        entries = self.rows.shape[1] * len(self.rows) * self.columns.shape[1]
        rows = self.rows.flatten(1).square().sum(1).double()
        columns = self.columns.flatten(1).square().sum(1).double()
        return float((rows * columns).sum().div(entries).sqrt())


def _times(values: Tensor, factor: Tensor) -> Tensor:
    values = values.float()
    if factor.dim() == 1:
        return values * factor
    with torch.autocast(values.device.type, enabled=False):  # a user may call backward within it
        return values @ factor.T


@dataclass(frozen=True)
class Preconditioner:
    """Multipliers of the gradients of a model.

    Attributes:
        scales: parameter name -> factors of its entries, float32 in its ``matrix_shape``.
        sides: parameter name -> factors of its sides; no name is in both.
        unseen: parameters without a gradient where the factors were collected.
        kind: "adam", "kfac", or "" for none.
    """

    scales: Mapping[str, Tensor] = field(default_factory=dict)
    sides: Mapping[str, Sides] = field(default_factory=dict)
    unseen: frozenset[str] = frozenset()
    kind: str = ""

    def fingerprinted(self, model_fingerprint: str) -> str:
        """The fingerprint of the model under this preconditioner: sketches of others differ."""
        if not self.kind:
            return model_fingerprint
        return f"{self.kind} {scales_fingerprint(self.tensors())}: {model_fingerprint}"

    def require_seen(self, name: str, *values: Tensor) -> None:
        """Raises NoFactorError if an unseen parameter has a gradient.

        Args:
            values: the gradient itself, or factors of it with a token in each row.
        """
        if name not in self.unseen:
            return
        active = values[0].flatten(0, -2).any(-1)
        for value in values[1:]:
            active = active & value.flatten(0, -2).any(-1)
        if bool(active.any()):
            raise NoFactorError(name)

    def noise_gain(self, name: str) -> float:
        """Factor by which the norm of white noise in a parameter's gradient grows."""
        if name in self.sides:
            return self.sides[name].noise_gain()
        if name in self.scales:
            return float(self.scales[name].square().mean().sqrt())
        return 1.0

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by a name of its own."""
        named = dict(self.scales)
        for name, sides in self.sides.items():
            named[f"{name}\nrows"] = sides.rows
            named[f"{name}\ncolumns"] = sides.columns
        return named

    def describe(self) -> dict[str, str]:
        """Parameter name -> words for how it is preconditioned."""
        words = {name: "entries" for name in self.scales}
        for name, sides in self.sides.items():
            rows = "diagonal rows" if sides.rows.dim() == 2 else "rows"
            columns = "diagonal columns" if sides.columns.dim() == 2 else "columns"
            words[name] = f"{rows}, {columns}"
        return words | {name: "no factor: no gradient seen" for name in sorted(self.unseen)}


def scales_fingerprint(scales: Mapping[str, Tensor]) -> str:
    """16 hex digits of names, shapes and 64 spread entries of each scale.

    Sketches by other scales must not be added.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, scale in sorted(scales.items()):
        probes = scale.flatten()[:: max(1, scale.numel() // _PROBES)].float().cpu()
        digest.update(f"{name}\n{list(scale.shape)}\n".encode() + probes.numpy().tobytes())
    return digest.hexdigest()
