"""An adapter put on its base: a checkpoint of the base's tensors with the adapter's changes."""

from collections.abc import Mapping
from typing import Any

from merit_fast.errors import InputError
from merit_fast.merge.read.adapters.adapter import Adapter
from merit_fast.merge.read.adapters.config import Scalings
from merit_fast.merge.read.adapters.experts import ATTENTION, match_parameters, parameter_changes
from merit_fast.merge.read.adapters.folder import ADAPTER_CONFIG
from merit_fast.merge.read.adapters.keys import Layer
from merit_fast.merge.read.adapters.modules import bias_change, layer_changes, stored_transposed
from merit_fast.merge.read.adapters.tied import embedding_of, named_head, settle_head
from merit_fast.merge.read.checkpoint import Checkpoint
from merit_fast.merge.read.companions import CONFIG_FILE, is_embedding
from merit_fast.merge.read.entries import Change, ChangedEntry, Rows, TensorEntry, is_float
from merit_fast.merge.read.files import read_json
from merit_fast.merge.read.names.token_rows import differ_in_rows
from merit_fast.records import fields, replace


def put_on_base(adapter: Adapter, base: Checkpoint) -> Checkpoint:
    """The base with the adapter's changes, as a checkpoint of changed tensors.

    A whole tensor of the adapter takes the place of the base's. Its LoRA layers, bias changes and
    new rows of embeddings come on top.

    Raises:
        InputError: a tensor that the adapter changes is not in the base or has another shape; a
            change cannot be told from the files.
    """
    work = _Work(adapter, base)
    work.take_whole_tensors()
    work.change_modules()
    work.change_rows()
    return work.finished()


class _Work:
    """The changes of one adapter, collected by the base's tensors."""

    def __init__(self, adapter: Adapter, base: Checkpoint) -> None:
        self.adapter = adapter
        self.base = base
        self.tensors = dict(base.tensors)
        self.changes: dict[str, list[Change]] = {}
        self.scalings = Scalings(adapter.config, adapter.path / ADAPTER_CONFIG)
        if head := named_head(adapter, base):
            self.tensors[head] = replace(base.tensors[embedding_of(base)], name=head)

    def take_whole_tensors(self) -> None:
        for name, entry in self.adapter.parts.whole.items():
            target = self._target(name, entry)
            if target.shape != entry.shape and not differ_in_rows(
                name, target.shape, entry.shape
            ):  # of resized embeddings and heads the vocabularies decide
                raise InputError(
                    f"{entry.file}: {entry.name}: must have the shape of {name} in "
                    f"{self.base.path}, {list(target.shape)}, got {list(entry.shape)}"
                )
            self.tensors[name] = replace(entry, name=name)

    def change_modules(self) -> None:
        by_module: dict[str, list[Layer]] = {}
        for layer in self.adapter.parts.layers:
            by_module.setdefault(layer.module, []).append(layer)
        wrappers: dict[str, list[Layer]] = {}
        plain: dict[str, list[Layer]] = {}
        for module, layers in by_module.items():
            target = self.tensors.get(f"{module}.weight")
            is_plain = (
                target is not None and len(layers) == 1 and not _is_experts(layers[0], target)
            )
            (plain if is_plain else wrappers)[module] = layers
        square = self._squares_transposed({layers[0] for layers in plain.values()})
        for module, (layer,) in plain.items():
            self._change_module(module, layer, square)
        self._change_parameters(wrappers)

    def change_rows(self) -> None:
        for module, entry in self.adapter.parts.rows.items():
            name = f"{module}.weight"
            target = self._target(name, entry)
            indices = self._indices(module, entry)
            if len(target.shape) != 2 or entry.shape != (len(indices), target.shape[1]):
                raise InputError(
                    f"{entry.file}: {entry.name}: must hold a row for each of the "
                    f"{len(indices)} trainable_token_indices of {name} {list(target.shape)}, got "
                    f"{list(entry.shape)}"
                )
            if indices and max(indices) >= target.shape[0]:
                raise InputError(
                    f"{self.adapter.path / ADAPTER_CONFIG}: trainable_token_indices: must be "
                    f"below {target.shape[0]}, the rows of {name}, got {max(indices)}"
                )
            self._add(name, Rows(entry, indices))

    def finished(self) -> Checkpoint:
        for name, changes in self.changes.items():
            self.tensors[name] = changed(self.tensors[name], *changes)
        result = replace(self.base, path=self.adapter.path, tensors=self.tensors)
        return settle_head(self.adapter, self.base, result, self.adapter.parts.whole)

    def _change_module(self, module: str, layer: Layer, square: bool) -> None:
        target = self.tensors[f"{module}.weight"]
        transposed = stored_transposed(layer, target.shape)
        transposed = square if transposed is None else transposed
        rank, scaling = self.scalings.of(module)
        scaling *= layer.times
        use_dora = self.adapter.config.use_dora
        for change in layer_changes(layer, target, (rank, scaling), transposed, use_dora=use_dora):
            self._add(f"{module}.weight", change)
        bias = bias_change(layer, self.tensors.get(f"{module}.bias"), scaling)
        if bias is not None:
            self._add(f"{module}.bias", bias)

    def _change_parameters(self, wrappers: Mapping[str, list[Layer]]) -> None:
        if not wrappers:
            return
        named: dict[str, list[TensorEntry]] = {}
        for name, entry in self.tensors.items():
            module, _, leaf = name.rpartition(".")
            if module in wrappers and (self._is_parameter(name) or leaf == ATTENTION):
                named.setdefault(module, []).append(replace(entry, name=name))
        for module, layers in wrappers.items():
            self._refuse_variants(layers)
            pairs = match_parameters(module, layers, named.get(module, []), self.scalings)
            config = self.adapter.config
            model_type = _model_type(self.base)
            for name, change in parameter_changes(pairs, config, self.scalings, model_type):
                self._add(name, change)

    def _refuse_variants(self, layers: list[Layer]) -> None:
        for layer in layers:
            extra = layer.magnitude or layer.bias
            if extra is not None:
                raise InputError(f"{extra.file}: {extra.name}: belongs to no parameter's LoRA")

    def _is_parameter(self, name: str) -> bool:
        targets = self.adapter.config.target_parameters
        return any(name == target or name.endswith(f".{target}") for target in targets)

    def _squares_transposed(self, layers: set[Layer]) -> bool:
        """Whether square matrices are stored as [in, out].

        PEFT's fan_in_fan_out is that of the last layer it wrapped. Other layers' shapes tell
        better, where all that are not square agree.
        """
        told = {
            stored_transposed(layer, self.tensors[f"{layer.module}.weight"].shape)
            for layer in layers
            if not layer.is_embedding and any(word.isdecimal() for word in layer.module.split("."))
        }
        told.discard(None)
        return told == {True} if len(told) == 1 else self.adapter.config.fan_in_fan_out

    def _indices(self, module: str, entry: TensorEntry) -> tuple[int, ...]:
        listed = self.adapter.config.token_indices
        fitting = [key for key in listed if key and f".{module}".endswith(f".{key}")]
        key = max(fitting, key=len) if fitting else ""
        if key not in listed or (not key and not is_embedding(f"{module}.weight")):
            raise InputError(
                f"{entry.file}: {entry.name}: trainable_token_indices of {ADAPTER_CONFIG} must "
                f"name the rows of {module}"
            )
        return listed[key]

    def _target(self, name: str, entry: TensorEntry) -> TensorEntry:
        target = self.tensors.get(name)
        if target is None or not is_float(target):
            found = "no such tensor" if target is None else f"one of {target.dtype}"
            raise InputError(
                f"{entry.file}: {entry.name}: changes the float tensor {name}, "
                f"{self.base.path} has {found}"
            )
        return target

    def _add(self, name: str, change: Change) -> None:
        self.changes.setdefault(name, []).append(change)


def changed(entry: TensorEntry, *changes: Change) -> ChangedEntry:
    """An entry with changes on top."""
    return ChangedEntry(**_fields(entry), source=entry, changes=changes)


def _fields(entry: TensorEntry) -> dict[str, Any]:
    return {field.name: getattr(entry, field.name) for field in fields(TensorEntry)}


def _is_experts(layer: Layer, target: TensorEntry) -> bool:
    return len(layer.a.shape) == 2 and len(target.shape) == 3


def _model_type(base: Checkpoint) -> str | None:
    file = base.path / CONFIG_FILE
    if not file.exists():
        return None
    values = read_json(file)
    text = values.get("text_config")
    nested = text.get("model_type") if isinstance(text, dict) else None
    found = nested or values.get("model_type")
    return found if isinstance(found, str) else None
