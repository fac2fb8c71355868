"""Mean gradients of the demo's tasks in files, and what is kept of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merit_fast.data import (
    DataConfig,
    Dataset,
    DatasetConfig,
    collate,
    load_mixture,
    load_tokenizer,
    pad_token_id,
)
from merit_fast.demo import prepare_mixture
from merit_fast.kernels.sketch import CountSketch, flat_sketch, matrix_shape
from merit_fast.manifests.atomic import replace_file
from merit_fast.model import target_losses

COLUMNS = 1 << 20  # of all tasks' gradients at a time: the exact inner products need 28 x 8 MiB
STRIDE = 5  # of the entries that MERIT keeps (arXiv 2606.01717)


@dataclass(frozen=True)
class Range:
    """Range of one parameter in a gradient file."""

    name: str
    start: int
    shape: tuple[int, int]  # rows and columns that are hashed

    @property
    def stop(self) -> int:
        return self.start + self.shape[0] * self.shape[1]


def ranges_of(model: torch.nn.Module) -> list[Range]:
    """Ranges of all parameters in the model's order; a tied one counts once."""
    ranges = []
    start = 0
    for name, parameter in model.named_parameters():
        ranges.append(Range(name, start, matrix_shape(parameter.shape)))
        start = ranges[-1].stop
    return ranges


def load_tasks(directory: Path, model: Path, quick: bool) -> tuple[list[Dataset], int]:
    tokenizer = load_tokenizer(str(model))
    entries: list[dict[str, Any]] = [*prepare_mixture(directory / "tasks", quick=quick)]
    mixture = [DatasetConfig(**entry) for entry in entries]
    return load_mixture(mixture, tokenizer, DataConfig(), part="train"), pad_token_id(tokenizer)


def write_gradient(
    model: torch.nn.Module, dataset: Dataset, examples: int, pad: int, file: Path
) -> dict[str, float]:
    """Writes the gradient of the mean over examples of their mean losses, in float32.

    All parameters end to end.
    """
    chosen = dataset.examples[:examples]
    losses = target_losses(model, collate(chosen, [0] * len(chosen), pad))
    zeros = losses.loss.new_zeros(len(chosen))
    sums = zeros.index_add(0, losses.example, losses.loss)
    mean = (sums / zeros.index_add(0, losses.example, torch.ones_like(losses.loss))).mean()
    model.zero_grad()
    mean.backward()  # type: ignore[no-untyped-call]
    temporary = file.with_name(file.name + ".tmp")
    square = 0.0
    with open(temporary, "wb") as stream:
        for parameter in model.parameters():
            assert parameter.grad is not None
            square += float(parameter.grad.double().square().sum())
            stream.write(parameter.grad.contiguous().numpy().data)
    replace_file(temporary, file)
    return {"loss": float(mean.detach()), "norm": square**0.5, "examples": float(len(chosen))}


def mapped(file: Path, size: int) -> Tensor:
    return torch.from_file(str(file), shared=False, size=size, dtype=torch.float32)


def exact_products(
    gradients: Sequence[Tensor], ranges: Sequence[Range]
) -> Iterator[tuple[str, Tensor]]:
    """[N, N] float64 inner products of the tasks' gradients, parameter by parameter."""
    for entry in ranges:
        products = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
        for start in range(entry.start, entry.stop, COLUMNS):
            rows = torch.stack(
                [g[start : min(start + COLUMNS, entry.stop)] for g in gradients]
            ).double()
            products += rows @ rows.T
        yield entry.name, products


def strided_products(gradients: Sequence[Tensor], offset: int) -> Tensor:
    """[N, N] float64 inner products of every fifth entry of the tasks' gradients, from one on."""
    products = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for start in range(offset, len(gradients[0]), STRIDE * COLUMNS):
        rows = torch.stack([g[start : start + STRIDE * COLUMNS : STRIDE] for g in gradients])
        products += rows.double() @ rows.double().T
    return products


def sketch_gradient(gradient: Tensor, ranges: Sequence[Range], sketch: CountSketch) -> Tensor:
    out = torch.zeros(1, sketch.proj_dim)
    for entry in ranges:
        flat_sketch(
            gradient[entry.start : entry.stop].view(1, *entry.shape), entry.name, sketch, out=out
        )
    return out[0]
