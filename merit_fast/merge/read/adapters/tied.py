"""Heads that are the input embedding too, under an adapter that changes one of the two.

An adapter that changes both alike, or only rows of the embedding, leaves them one matrix. Any other
change was trained with two matrices, so the head becomes a tensor of its own.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from merit_fast.errors import InputError
from merit_fast.merge.read.adapters.folder import is_adapter
from merit_fast.merge.read.checkpoint import Checkpoint
from merit_fast.merge.read.companions import CONFIG_FILE, is_embedding
from merit_fast.merge.read.entries import Change, ChangedEntry, LowRank, Rows, TensorEntry
from merit_fast.merge.read.files import open_regular, read_json
from merit_fast.records import replace

if TYPE_CHECKING:
    from merit_fast.merge.read.adapters.adapter import Adapter

_HEADS = ("lm_head", "embed_out")
_HEAD_OF = {"embed_in.weight": "embed_out.weight"}  # GPT-NeoX; others: lm_head.weight
_WITH_HEAD = ("CausalLM", "LMHeadModel", "ConditionalGeneration")


def has_tied_head(base: Checkpoint) -> bool:
    """Whether the model's head is its input embedding: it has one, and the file holds none."""
    if any(is_head(name) for name in base.tensors):
        return False
    file = base.path / CONFIG_FILE
    values = read_json(file) if file.exists() else {}
    text = values.get("text_config")
    flags = [values.get("tie_word_embeddings")]
    flags += [text.get("tie_word_embeddings")] if isinstance(text, dict) else []
    architectures = values.get("architectures")
    named = architectures if isinstance(architectures, list) else []
    if named and not any(str(name).endswith(_WITH_HEAD) for name in named):
        return False
    return True in flags or (bool(named) and False not in flags)


def is_head(name: str) -> bool:
    """Whether a tensor is an output head, by its name."""
    words = name.split(".")
    return len(words) >= 2 and words[-2] in _HEADS and words[-1] == "weight"


def named_head(adapter: "Adapter", base: Checkpoint) -> str | None:
    """The tied head that an adapter names though the base's file holds none; None without one.

    Raises:
        InputError: the base has not exactly one input embedding.
    """
    parts = adapter.parts
    modules = [layer.module for layer in parts.layers] + list(parts.rows)
    names = [*parts.whole, *(f"{module}.weight" for module in modules)]
    heads = [name for name in names if is_head(name) and name not in base.tensors]
    if not heads or not has_tied_head(base):
        return None
    embedding_of(base)
    return heads[0]


def settle_head(
    adapter: "Adapter", base: Checkpoint, result: Checkpoint, whole: Iterable[str]
) -> Checkpoint:
    """The adapted model with one matrix for embedding and head, or two where they differ.

    Args:
        adapter: the adapter.
        base: its base.
        result: the base's tensors with the changes, and the head if the adapter names it.
        whole: the tensors that the adapter replaces.

    Raises:
        InputError: the base has not exactly one input embedding.
    """
    tensors = dict(result.tensors)
    if not has_tied_head(base):
        return result
    head = next((name for name in tensors if is_head(name)), None)
    touched = {name for name, entry in tensors.items() if isinstance(entry, ChangedEntry)}
    touched |= set(whole)
    if head is None and not any(is_embedding(name) for name in touched):
        return result
    embedding = embedding_of(base)
    if head is not None and _same(tensors[embedding], tensors[head]):
        del tensors[head]
        return replace(result, tensors=tensors)
    if head is None:
        if adapter.config.ensure_weight_tying or _only_rows(tensors[embedding]):
            return result
        head = head_name(embedding)
        tensors[head] = replace(base.tensors[embedding], name=head)
    return _with_head(replace(result, tensors=tensors), head)


def give_heads(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The models, each with the head that an adapter among them has made a tensor of its own.

    A model whose head is its embedding gets it as the head too, which leaves it as it is.
    """
    heads = {
        name
        for checkpoint in checkpoints
        if is_adapter(checkpoint.path)
        for name in checkpoint.tensors
        if is_head(name)
    }
    if len(heads) != 1:
        return list(checkpoints)
    head = heads.pop()
    given = []
    for checkpoint in checkpoints:
        lacks = not any(is_head(name) for name in checkpoint.tensors)
        if lacks and (is_adapter(checkpoint.path) or has_tied_head(checkpoint)):
            embedding = embedding_of(checkpoint)
            tensors = dict(checkpoint.tensors)
            tensors[head] = replace(tensors[embedding], name=head)
            checkpoint = _with_head(replace(checkpoint, tensors=tensors), head)
        given.append(checkpoint)
    return given


def embedding_of(checkpoint: Checkpoint) -> str:
    """The name of a model's only input embedding.

    Raises:
        InputError: it has none or several.
    """
    names = [name for name in checkpoint.tensors if is_embedding(name)]
    if len(names) != 1:
        raise InputError(
            f"{checkpoint.path}: its head is tied to one of {len(names)} input embeddings, so an "
            "adapter of either cannot be merged; save the model untied first"
        )
    return names[0]


def head_name(embedding: str) -> str:
    """The name that transformers gives the head of a model with this embedding."""
    return _HEAD_OF.get(".".join(embedding.split(".")[-2:]), "lm_head.weight")


def _with_head(checkpoint: Checkpoint, head: str) -> Checkpoint:
    """The checkpoint with the head in its last file, where no file holds it yet."""
    if any(head in names for _, names in checkpoint.shards):
        return checkpoint
    file, names = checkpoint.shards[-1]
    shards = (*checkpoint.shards[:-1], (file, (*names, head)))
    return replace(checkpoint, shards=shards)


def _only_rows(entry: TensorEntry) -> bool:
    """Whether an embedding has new rows only: PEFT lets a tied head follow those."""
    return isinstance(entry, ChangedEntry) and all(
        isinstance(change, Rows) for change in entry.changes
    )


def _same(embedding: TensorEntry, head: TensorEntry) -> bool:
    """Whether an embedding and a head with their changes are the same values, by their bytes."""
    mine = embedding.changes if isinstance(embedding, ChangedEntry) else ()
    theirs = head.changes if isinstance(head, ChangedEntry) else ()
    sources = [
        entry.source if isinstance(entry, ChangedEntry) and entry.source else entry
        for entry in (embedding, head)
    ]
    return (
        len(mine) == len(theirs)
        and same_values(*sources)
        and all(_same_change(*pair) for pair in zip(mine, theirs, strict=True))
    )


def _same_change(mine: Change, theirs: Change) -> bool:
    """Whether an embedding's change and a head's are equal; factors swap between the two."""
    if isinstance(mine, Rows) and isinstance(theirs, Rows):
        is_same = mine.indices == theirs.indices
        return is_same and same_values(mine.rows, theirs.rows)
    if isinstance(mine, LowRank) and isinstance(theirs, LowRank):
        return (
            mine.scaling == theirs.scaling
            and mine.transposed
            and not theirs.transposed
            and _is_transpose(mine.a, theirs.b)
            and _is_transpose(mine.b, theirs.a)
        )
    return False


def _is_transpose(first: TensorEntry, second: TensorEntry) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape[::-1]:
        return False
    import numpy as np

    item = first.num_bytes // max(first.num_elements, 1)
    arrays = [
        np.frombuffer(_bytes(entry), f"V{item}").reshape(entry.shape) for entry in (first, second)
    ]
    return np.ascontiguousarray(arrays[0].T).tobytes() == arrays[1].tobytes()


def same_values(first: TensorEntry, second: TensorEntry) -> bool:
    """Whether two stored tensors are one, or equal byte for byte."""
    if (first.file, first.offset) == (second.file, second.offset):
        return True
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return _bytes(first) == _bytes(second)


def _bytes(entry: TensorEntry) -> bytes:
    with open_regular(entry.file) as opened:
        opened.seek(entry.offset)
        return opened.read(entry.num_bytes)
