"""Adapters on a base whose file has other names, or another cut, than the model in memory."""

from collections.abc import Mapping

from merit_fast.merge.read.adapters.adapter import Adapter
from merit_fast.merge.read.adapters.on_base import put_on_base
from merit_fast.merge.read.checkpoint import Checkpoint
from merit_fast.merge.read.entries import TensorEntry
from merit_fast.merge.read.names.modules import ModuleNames, module_names
from merit_fast.records import replace


def put_on_named_base(adapter: Adapter, base: Checkpoint) -> Checkpoint:
    """The base with the adapter's changes, in the names and the cut of the base's file.

    An adapter whose modules the file names is put on it directly. Otherwise the base is read in
    its names in memory, which are PEFT's, changed, and written back: a change of stacked experts
    reaches a file that holds them one by one. Names of older versions are translated, and a
    language model is found inside a multimodal base.

    Raises:
        InputError: see ``put_on_base``; a name is nowhere in the base.
    """
    if _names_files(adapter, base):
        return put_on_base(adapter, base)
    names = module_names(base)
    memory = replace(base, tensors=names.tensors, shards=(("", tuple(names.tensors)),))
    adapted = put_on_base(_renamed(adapter, names), memory)
    changed = {
        module: entry
        for module, entry in adapted.tensors.items()
        if entry is not names.tensors.get(module)
    }
    return _in_file(names, adapted, changed)


def _names_files(adapter: Adapter, base: Checkpoint) -> bool:
    """Whether the base's file has every tensor that the adapter names."""
    modules = (*(layer.module for layer in adapter.parts.layers), *adapter.parts.rows)
    named = {*(f"{module}.weight" for module in modules), *adapter.parts.whole}
    return named <= base.tensors.keys()


def _renamed(adapter: Adapter, names: ModuleNames) -> Adapter:
    parts = replace(
        adapter.parts,
        layers=tuple(
            replace(layer, module=names.of_module(layer.module)) for layer in adapter.parts.layers
        ),
        rows={names.of_module(module): entry for module, entry in adapter.parts.rows.items()},
        whole={names.of(name): entry for name, entry in adapter.parts.whole.items()},
    )
    return replace(adapter, parts=parts)


def _in_file(
    names: ModuleNames, adapted: Checkpoint, changed: Mapping[str, TensorEntry]
) -> Checkpoint:
    """The base's file with the changed parameters in it."""
    base = names.checkpoint
    new = {module: entry for module, entry in changed.items() if module not in names.tensors}
    touched = {
        name for module in changed if module in names.tensors for name in names.files_of(module)
    }
    written = names.in_files(adapted.tensors, touched)
    file, held = base.shards[-1]
    shards = (*base.shards[:-1], (file, (*held, *new)))
    return replace(adapted, tensors={**base.tensors, **written, **new}, shards=shards)
