"""Tensors that are indexed by token: known by their names, and checked by their sizes."""

from collections.abc import Sequence
from dataclasses import dataclass

from merit_fast.errors import InputError
from merit_fast.merge.parameters import layer_of
from merit_fast.merge.read.checkpoint import Checkpoint
from merit_fast.merge.read.entries import TensorEntry, is_float

# Ends of names. The first that a model has is its input embedding.
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "shared.weight",
    "embeddings.weight",
    "embedding.weight",
)
_OTHERS = (
    "embed_tokens_per_layer.weight",  # Gemma 3n
    "lm_head.weight",
    "lm_head.bias",
    "lm_head.linear.weight",
    "lm_head.linear.bias",
    "lm_head.decoder.weight",
    "lm_head.decoder.bias",
    "embed_out.weight",
    "embed_out.bias",
    "output.weight",
    "output_layer.weight",
    "shared_head.head.weight",  # DeepSeek's layers that predict further tokens
    "cls.predictions.bias",
    "cls.predictions.decoder.weight",
    "cls.predictions.decoder.bias",
    "predictions.decoder.weight",
    "predictions.decoder.bias",
    "predictions.bias",
    "vocab_projector.weight",
    "vocab_projector.bias",
)
_LAST_AXIS = ("final_logits_bias",)  # [1, V]


@dataclass(frozen=True)
class Matrix:
    """A tensor with one row per token. ``axis``: the dimension that counts tokens."""

    name: str
    axis: int

    def rows(self, checkpoint: Checkpoint) -> int:
        return checkpoint.tensors[self.name].shape[self.axis]


def embedding_of(checkpoint: Checkpoint) -> TensorEntry | None:
    """The input embedding: of several, the one with the most rows; None where there is none."""
    for ending in _EMBEDDINGS:
        found = [e for name, e in checkpoint.tensors.items() if _ends(name, ending)]
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
    for name, entry in models[0].tensors.items():
        axis = _axis(name, entry)
        if axis is not None:
            found.append(Matrix(name, axis))
        elif _looks_indexed(name, models, rows):
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
    return found


def _axis(name: str, entry: TensorEntry) -> int | None:
    if any(_ends(name, ending) for ending in _LAST_AXIS):
        return len(entry.shape) - 1
    return 0 if any(_ends(name, ending) for ending in (*_EMBEDDINGS, *_OTHERS)) else None


def _looks_indexed(name: str, models: Sequence[Checkpoint], rows: Sequence[int]) -> bool:
    """Whether a tensor outside the layers is as long as the vocabulary in every model."""
    if layer_of(name) is not None:
        return False
    for model, count in zip(models, rows, strict=True):
        entry = model.tensors.get(name)
        embedding = embedding_of(model)
        if entry is None or embedding is None or count not in entry.shape:
            return False
        if count in embedding.shape[1:]:  # a small model: the hidden size says nothing
            return False
    return True


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")
