"""Models that name or cut their tensors differently, in the names of one of them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from merit_fast.errors import InputError
from merit_fast.merge.read.checkpoint import Checkpoint
from merit_fast.merge.read.entries import TensorEntry
from merit_fast.records import replace

if TYPE_CHECKING:
    from merit_fast.merge.read.names.model_class import ModelClass
    from merit_fast.merge.read.names.modules import ModuleNames


def match_names(donor: Checkpoint, others: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The other models under the donor's names, split or joined as its file is.

    Names meet in memory: two tensors are one parameter if transformers loads them as one. A tensor
    without a counterpart keeps its name. A model is returned as it is if its names and shapes are
    among the donor's or hold all of them, or if its class has no map.

    Args:
        donor: its names count; its config.json tells its class.
        others: a model without config.json has the donor's class.

    Raises:
        InputError: two tensors of a model are one parameter; shapes do not fit where a tensor is
            cut or joined.
    """
    names: ModuleNames | None = None
    matched = []
    for other in others:
        if other is donor or _is_within(other, donor) or _is_within(donor, other):
            matched.append(other)
            continue
        from merit_fast.merge.read.names.modules import module_names

        names = names or module_names(donor)
        matched.append(_matched(names, other))
    return matched


def _matched(mine: "ModuleNames", other: Checkpoint) -> Checkpoint:
    from merit_fast.merge.read.names.model_class import is_language_model_of, model_class
    from merit_fast.merge.read.names.modules import ModuleNames

    kind = model_class(other.path)
    kind = kind if kind.config else mine.kind
    theirs = ModuleNames(other, kind, _shapes(mine.tensors).get)
    inside = _inside if is_language_model_of(kind, mine.kind) else _unchanged
    here = {inside(module, kind, mine.kind): module for module in theirs.tensors}
    given = {name: theirs.tensors[module] for name, module in here.items()}
    tensors = mine.in_files(given)
    used = {module for name in tensors for module in mine.parameters_of(name)}
    rest = {}
    for name, module in here.items():
        if name not in used:
            shown = _shown(theirs, module, mine, tensors)
            rest[shown] = replace(theirs.tensors[module], name=shown)
    if {**tensors, **rest} == dict(other.tensors):
        return other
    note = f"{other.path}: tensors have the names of {mine.checkpoint.path}"
    shards = _shards(mine.checkpoint, tensors, tuple(rest))
    return replace(other, tensors={**tensors, **rest}, shards=shards, notes=(*other.notes, note))


def _shown(
    theirs: "ModuleNames", module: str, mine: "ModuleNames", taken: Mapping[str, TensorEntry]
) -> str:
    """The name of a parameter that the donor lacks: its file's, or that in memory."""
    from merit_fast.merge.read.names.modules import is_whole

    stored = theirs.files_of(module)[0] if is_whole(theirs.views[module]) else module
    for name in (stored, module):
        if name not in taken and name not in mine.checkpoint.tensors:
            return name
    entry = theirs.tensors[module]
    rule = f"is the parameter {module}, not what {mine.checkpoint.path} calls so"
    raise InputError(f"{entry.file}: {stored}: {rule}")


def _inside(module: str, text: "ModelClass", whole: "ModelClass") -> str:
    """A language model's parameter by its name in the multimodal model."""
    head, _, rest = module.partition(".")
    if text.prefix in text.roots and head == text.prefix:
        return f"{whole.text_path}.{rest}"
    return module if text.prefix in text.roots else f"{whole.text_path}.{module}"


def _unchanged(module: str, text: "ModelClass", whole: "ModelClass") -> str:
    return module


def _shards(
    donor: Checkpoint, tensors: Mapping[str, TensorEntry], rest: tuple[str, ...]
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The donor's files with the tensors that are there; the others at the end of the last one."""
    shards = [
        (file, tuple(name for name in names if name in tensors)) for file, names in donor.shards
    ]
    last, names = shards[-1]
    shards[-1] = (last, (*names, *rest))
    return tuple(shard for shard in shards if shard[1])


def _shapes(tensors: Mapping[str, TensorEntry]) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, entry in tensors.items()}


def _is_within(part: Checkpoint, whole: Checkpoint) -> bool:
    """Whether every tensor of one model is in the other, in name and shape."""
    return _shapes(part.tensors).items() <= _shapes(whole.tensors).items()
