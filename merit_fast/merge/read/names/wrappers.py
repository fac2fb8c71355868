"""Names as wrappers of training loops write them: compiled, distributed, checkpointed modules."""

from merit_fast.errors import InputError
from merit_fast.merge.read.checkpoint import Checkpoint
from merit_fast.records import replace

# torch.compile, FSDP and activation checkpointing; no module of a model has such a name.
_INSIDE = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
_AROUND = "module."  # DistributedDataParallel, around the whole model only


def without_wrappers(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without the parts of its names that are wrappers' names.

    Raises:
        InputError: two tensors differ in wrappers only.
    """
    if not _may_be_wrapped(checkpoint):
        return checkpoint
    names = {name: _inner(name) for name in checkpoint.tensors}
    removed = sorted({part for name in names for part in name.split(".")} & _INSIDE)
    while all(name.startswith(_AROUND) for name in names.values()):
        names = {old: new.removeprefix(_AROUND) for old, new in names.items()}
        removed.append(_AROUND.rstrip("."))
    if not removed:
        return checkpoint
    owners: dict[str, str] = {}
    for old, new in names.items():
        if new in owners or not new:
            other = f"as {owners[new]} is" if new in owners else "is no tensor's name"
            raise InputError(
                f"{checkpoint.tensors[old].file}: {old}: is {new!r} without its wrappers, {other}"
            )
        owners[new] = old
    tensors = {new: replace(checkpoint.tensors[old], name=new) for new, old in owners.items()}
    shards = tuple((file, tuple(names[name] for name in held)) for file, held in checkpoint.shards)
    note = f"{checkpoint.path}: names are read without {', '.join(dict.fromkeys(removed))}"
    return replace(checkpoint, tensors=tensors, shards=shards, notes=(*checkpoint.notes, note))


def _may_be_wrapped(checkpoint: Checkpoint) -> bool:
    """Whether a wrapper's name stands anywhere in the names, found without a look at each part."""
    text = "\n".join(checkpoint.tensors)
    first = next(iter(checkpoint.tensors), "")
    return first.startswith(_AROUND) or any(part in text for part in _INSIDE)


def _inner(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _INSIDE)
