"""Sketches of the examples of one pass, to which gradients add in any form they come in."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from merit_fast.kernels.sketch import (
    CountSketch,
    embedding_grad_sketch,
    flat_sketch,
    linear_grad_sketch,
    matrix_shape,
    vector_grad_sketch,
)
from merit_fast.sketch.precondition.moments import FactorSums
from merit_fast.sketch.precondition.sides import Preconditioner

REST = ""  # key of the parameters that are in no part


@dataclass
class ExampleSketches:
    """Sketches of B examples.

    Attributes:
        preconditioner: multiplies every gradient before it is sketched.
        size: B.
        part_of: parameter name -> part of the model whose sketches are kept apart.
        apart: sketches of every parameter are kept apart.
        collect: gets the second moments of every gradient; None: nobody does.
        is_sketched: gradients are sketched; False: they are only collected.
    """

    sketch: CountSketch
    preconditioner: Preconditioner
    size: int
    part_of: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    apart: bool = field(default=False, kw_only=True)
    collect: FactorSums | None = field(default=None, kw_only=True)
    is_sketched: bool = field(default=True, kw_only=True)
    outs: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict, kw_only=True)

    def out(self, name: str, device: torch.device) -> Tensor:
        """[B, D] float32, to which the gradients of ``name`` on ``device`` add."""
        key = (name if self.apart else self.part_of.get(name, REST), device)
        if key not in self.outs:
            self.outs[key] = torch.zeros(
                self.size, self.sketch.proj_dim, dtype=torch.float32, device=device
            )
        return self.outs[key]

    def add(self, name: str, example: int, gradient: Tensor) -> None:
        """Adds one example's gradient of a whole parameter."""
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        if self.collect is not None:
            rows = gradient.detach().reshape(1, *matrix_shape(gradient.shape))
            self.collect.add_gradients(name, rows)
        if self.is_sketched:
            out = self.out(name, gradient.device)[example : example + 1]
            add_sketch(self, name, gradient, out)

    def add_product(
        self,
        name: str,
        left: Tensor,
        right: Tensor,
        offsets: Tensor | None = None,
        part: int = 0,
        place: tuple[int, int, int] | None = None,
    ) -> None:
        """Adds left^T right of every example: [B, T, r] and [B, T, C], or [N, ...] with offsets.

        The parameter has the product as its rows from ``part`` r on; ``place`` is first row, first
        column and number of columns of a slice, which nothing multiplies.
        """
        if self.collect is not None:
            self.collect.add_product(name, left, right, part)
        if not self.is_sketched:
            return
        height = left.shape[-1]
        scale = self.preconditioner.scales.get(name)
        scale = None if scale is None else scale[part * height : (part + 1) * height]
        self.preconditioner.require_seen(name, left, right)
        sides = self.preconditioner.sides.get(name)
        if sides is not None:
            left = sides.left(left, part)
            right = sides.right(right, part)
        linear_grad_sketch(
            left,
            right,
            name,
            self.sketch,
            cu_seqlens=offsets,
            first_row=part * height if place is None else place[0],
            first_column=0 if place is None else place[1],
            columns=None if place is None else place[2],
            scale=scale,
            out=self.out(name, left.device),
        )

    def add_lookup(self, name: str, dy: Tensor, ids: Tensor, offsets: Tensor | None) -> None:
        """Adds the gradient of an embedding: dy [B, T, C] at the rows ids [B, T]."""
        if self.collect is not None:
            self.collect.add_lookup(name, dy, ids)
        if not self.is_sketched:
            return
        self.preconditioner.require_seen(name, dy)
        sides = self.preconditioner.sides.get(name)
        if sides is not None:
            dy = sides.right(dy) * sides.rows[0][ids].unsqueeze(-1)
        embedding_grad_sketch(dy, ids, name, self.sketch, **self._options(name, dy, offsets))

    def add_vector(
        self,
        name: str,
        dy: Tensor,
        offsets: Tensor | None,
        x: Tensor | None = None,
        epsilon: float | None = None,
    ) -> None:
        """Adds the sum of dy, or of dy times the normalised x, as ``vector_grad_sketch`` does."""
        if self.collect is not None:
            sums = example_sums(dy, offsets, x, epsilon)
            self.collect.add_gradients(name, sums.view(len(sums), *matrix_shape(sums.shape[1:])))
        if not self.is_sketched:
            return
        self.preconditioner.require_seen(name, dy)
        options = self._options(name, dy, offsets)
        vector_grad_sketch(dy, name, self.sketch, x=x, epsilon=epsilon, **options)

    def add_gradients(self, name: str, gradients: Tensor, first_row: int = 0) -> None:
        """Adds gradients [B, r, C], one per example, of the rows from ``first_row`` on."""
        if self.collect is not None:
            self.collect.add_gradients(name, gradients, first_row)
        if not self.is_sketched:
            return
        self.preconditioner.require_seen(name, gradients)
        scale = self.preconditioner.scales.get(name)
        scale = None if scale is None else scale[first_row : first_row + gradients.shape[1]]
        out = self.out(name, gradients.device)
        flat_sketch(gradients, name, self.sketch, first_row=first_row, scale=scale, out=out)

    def _options(self, name: str, value: Tensor, offsets: Tensor | None) -> dict[str, Any]:
        scale = self.preconditioner.scales.get(name)
        return {"cu_seqlens": offsets, "scale": scale, "out": self.out(name, value.device)}


@torch.no_grad()
def add_sketch(target: ExampleSketches, name: str, gradient: Tensor, out: Tensor) -> None:
    """Adds the sketch of a whole parameter's gradient to ``out`` [1, D]."""
    add_multiplied(target, name, side_multiplied(target.preconditioner, name, gradient), out)


@torch.no_grad()
def side_multiplied(preconditioner: Preconditioner, name: str, gradient: Tensor) -> Tensor:
    """[1, R, C]: a whole parameter's gradient, multiplied from its sides if it has factors."""
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    rows = gradient.detach().reshape(1, *matrix_shape(gradient.shape))
    preconditioner.require_seen(name, rows)
    sides = preconditioner.sides.get(name)
    return rows if sides is None else sides.gradient(rows)


def add_multiplied(target: ExampleSketches, name: str, rows: Tensor, out: Tensor) -> None:
    """Adds the sketch of a gradient [1, R, C] of ``side_multiplied`` to ``out`` [1, D]."""
    flat_sketch(rows, name, target.sketch, scale=target.preconditioner.scales.get(name), out=out)


@torch.no_grad()
def example_sums(
    dy: Tensor, offsets: Tensor | None, x: Tensor | None = None, epsilon: float | None = None
) -> Tensor:
    """[B, C]: each example's sum over tokens of dy, or of dy times x, as ``vector_grad_sketch``."""
    values = dy.float()
    if x is not None:
        factor = x.float()
        if epsilon is not None:
            factor = factor * torch.rsqrt(factor.square().mean(-1, keepdim=True) + epsilon)
        values = values * factor
    if offsets is None:
        return values.sum(1)
    example = torch.repeat_interleave(
        torch.arange(len(offsets) - 1, device=dy.device), offsets.diff().to(dy.device)
    )
    return values.new_zeros(len(offsets) - 1, dy.shape[-1]).index_add_(0, example, values)
