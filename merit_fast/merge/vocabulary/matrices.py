"""Tensors that are indexed by token: known by their names, and checked by their sizes."""

from collections.abc import Sequence

from merit_fast.errors import InputError
from merit_fast.merge.parameters import layer_of
from merit_fast.merge.read.checkpoint import Checkpoint
from merit_fast.merge.read.entries import TensorEntry, is_float
from merit_fast.merge.read.names.token_rows import EMBEDDINGS, ends_with, token_axis
from merit_fast.records import record


@record
class Matrix:
    """A tensor with one row per token. ``axis``: the dimension that counts tokens."""

    name: str
    axis: int

    def rows(self, checkpoint: Checkpoint) -> int:
        return checkpoint.tensors[self.name].shape[self.axis]


def embedding_of(checkpoint: Checkpoint) -> TensorEntry | None:
    """The input embedding: of several, the one with the most rows; None where there is none."""
    likely = [name for name in checkpoint.tensors if name.endswith(EMBEDDINGS)]
    for ending in EMBEDDINGS:
        found = [checkpoint.tensors[name] for name in likely if ends_with(name, ending)]
        found = [entry for entry in found if len(entry.shape) == 2]
        if found:
            return max(found, key=lambda entry: entry.shape[0])
    return None


def matrices_of(models: Sequence[Checkpoint], rows: Sequence[int]) -> list[Matrix]:
    """Every tensor that has a row for each token, in the first model's order.

    Args:
        models: all inputs of the merge.
        rows: rows of each one's input embedding.

    Raises:
        InputError: some tensor may be indexed by token, and its name does not tell; or a model
            lacks one of the matrices.
    """
    found = []
    embeddings = [embedding_of(model) for model in models]
    widths = [entry.shape[1] for entry in embeddings if entry is not None]
    has_wide_rows = any(map(int.__eq__, rows, widths))  # a small model: lengths tell nothing
    for name, entry in models[0].tensors.items():
        axis = token_axis(name, entry.shape)
        if axis is not None and layer_of(name) is not None and entry.shape[axis] != rows[0]:
            continue  # a layer's own matrix of that name
        if axis is not None:
            found.append(Matrix(name, axis))
        elif not has_wide_rows and _looks_indexed(name, models, rows):
            raise InputError(
                f"{entry.file}: {name}: has a dimension of {rows[0]}, as many as there are rows "
                "of tokens, and an unknown name: its rows cannot be matched by token"
            )
    for matrix in found:
        for model in models:
            own = model.tensors.get(matrix.name)
            if own is None:
                where = models[0].path
                raise InputError(f"{model.path}: {matrix.name}: is missing, {where} has it")
            if len(own.shape) <= matrix.axis or not is_float(own):
                rule = "must be a float tensor with a row for each token"
                raise InputError(
                    f"{own.file}: {matrix.name}: {rule}, got {own.dtype} {list(own.shape)}"
                )
            first = models[0].tensors[matrix.name]
            wanted = _without(first.shape, matrix.axis)
            if _without(own.shape, matrix.axis) != wanted:
                rule = f"shape must be that in {first.file} but for the rows, {list(first.shape)}"
                raise InputError(f"{own.file}: {matrix.name}: {rule}, got {list(own.shape)}")
    return found


def _looks_indexed(name: str, models: Sequence[Checkpoint], rows: Sequence[int]) -> bool:
    """Whether a tensor outside the layers is as long as the vocabulary in every model."""
    for model, count in zip(models, rows, strict=True):
        entry = model.tensors.get(name)
        if entry is None or count not in entry.shape:
            return False
    return layer_of(name) is None


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]
