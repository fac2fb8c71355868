"""Tied and untied output heads of several models, decided by values and configs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from merit_fast.errors import InputError
from merit_fast.merge.read.checkpoint import Checkpoint
from merit_fast.merge.read.companions import find_embedding, find_head, head_name, same_bytes
from merit_fast.merge.read.entries import TensorEntry, is_plain
from merit_fast.records import replace

if TYPE_CHECKING:
    from merit_fast.merge.read.names.model_class import ModelClass


def match_heads(donor: Checkpoint, models: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The models with output heads in all of them, or in none, where that changes no value.

    A head that repeats the input embedding byte for byte is left out where the donor's config ties
    the two. Where it does not, a model whose config ties them gets its embedding as its head.

    Args:
        donor: the model whose config.json the output gets.
        models: in the donor's names.

    Raises:
        InputError: some models have no head, and another's differs from its embedding.
    """
    with_head = [model for model in models if find_head(model.tensors)]
    heads = {head_name(model.tensors) for model in models} - {None}
    if len(heads) != 1:
        return list(models)
    name = heads.pop()
    assert name is not None
    if all(name in model.tensors for model in models):
        return list(models)
    kind = _class_of(donor)
    if kind.config and not kind.ties_head:
        return [_with_head(model, name) for model in models]
    for model in with_head:
        pair = find_head(model.tensors)
        if pair is None or not _repeats(*pair):
            tied = next(model for model in models if name not in model.tensors)
            raise InputError(
                f"{model.tensors[name].file}: {name}: must repeat the input embedding, which is "
                f"the head of {tied.path}; it differs: a tied head cannot be merged with an "
                "untied one"
            )
    return [_without(model, name) if name in model.tensors else model for model in models]


def _class_of(model: Checkpoint) -> "ModelClass":
    from merit_fast.merge.read.names.model_class import model_class

    return model_class(model.path)


def _repeats(embedding: TensorEntry, head: TensorEntry) -> bool:
    if (embedding.dtype, embedding.shape) != (head.dtype, head.shape):
        return False
    if is_plain(embedding) and is_plain(head):
        return same_bytes(embedding, head)
    return replace(head, name=embedding.name) == embedding


def _with_head(model: Checkpoint, name: str) -> Checkpoint:
    """A tied model with its embedding as its head; an untied one lacks a tensor and stays."""
    embedding = find_embedding(model.tensors)
    if name in model.tensors or embedding is None or not _class_of(model).ties_head:
        return model
    tensors = {**model.tensors, name: replace(embedding, name=name)}
    file, names = model.shards[-1]
    shards = (*model.shards[:-1], (file, (*names, name)))
    note = f"{model.path}: its head is its input embedding"
    return replace(model, tensors=tensors, shards=shards, notes=(*model.notes, note))


def _without(model: Checkpoint, name: str) -> Checkpoint:
    tensors = {key: entry for key, entry in model.tensors.items() if key != name}
    shards = ((file, tuple(n for n in names if n != name)) for file, names in model.shards)
    note = f"{model.path}: {name} repeats the input embedding and is left out"
    return replace(
        model,
        tensors=tensors,
        shards=tuple(shard for shard in shards if shard[1]),
        notes=(*model.notes, note),
    )
