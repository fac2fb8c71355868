"""The output's tensors and files, and the input entries that each tensor is made of."""

import json
import math
import struct
from collections.abc import Iterable, Sequence
from functools import cached_property
from json.encoder import encode_basestring_ascii
from typing import TYPE_CHECKING

from merit_fast.errors import InputError
from merit_fast.kernels.average.dtypes import ITEM_BYTES
from merit_fast.merge.option_names import OptionError
from merit_fast.merge.read.checkpoint import (
    INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
)
from merit_fast.merge.read.entries import TensorEntry, is_float, is_quantised, own_dtype
from merit_fast.records import record

if TYPE_CHECKING:
    from merit_fast.merge.engine.quantise.encoding import Encoding
    from merit_fast.merge.engine.quantise.forms import Form, Forms


@record(many=True)
class OutputTensor:
    """One tensor of the output, and the input entries it is made of, in the order of the inputs."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    inputs: tuple[TensorEntry, ...]
    encoding: "Encoding | None" = None  # codes and scales in place of values
    copied: tuple[tuple[str, TensorEntry], ...] = ()  # stored tensors in place of values

    @property
    def num_elements(self) -> int:
        return self.inputs[0].num_elements

    @property
    def num_bytes(self) -> int:
        return sum(stored.num_bytes for stored in self.stored)

    @property
    def is_quantised(self) -> bool:
        return self.encoding is not None or bool(self.copied)

    @property
    def stored(self) -> tuple["StoredTensor", ...]:
        """Entries of the file's header: the tensor itself, its codes and scales, or its copies."""
        if self.copied:
            parts = [(name, entry.dtype, entry.shape) for name, entry in self.copied]
            return tuple(StoredTensor(*part) for part in parts)
        own = StoredTensor(self.name, self.dtype, self.shape)
        if self.encoding is None:
            return (own,)
        scale = self.encoding
        return own, StoredTensor(scale.scale_name, scale.scale_dtype, scale.scale_shape)


@record(many=True)
class StoredTensor:
    """One entry of a safetensors header."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@record
class OutputFile:
    name: str
    tensors: tuple[OutputTensor, ...]

    @cached_property
    def stored(self) -> list[StoredTensor]:
        """Entries of the header by offset. With codes, wide dtypes come first: all are aligned."""
        entries = [stored for tensor in self.tensors for stored in tensor.stored]
        if any(tensor.is_quantised for tensor in self.tensors):
            entries.sort(key=lambda stored: -ITEM_BYTES[stored.dtype])
        return entries

    @cached_property
    def header(self) -> bytes:
        """``header_of`` the tensors that the file stores."""
        return header_of(self.stored)

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(stored.num_bytes for stored in self.stored)


def lay_out(
    checkpoints: Sequence[Checkpoint],
    base: Checkpoint | None,
    dtype: str | None,
    missing: str = "error",
    shard_bytes: int | None = None,
    num_models: int | None = None,
    forms: "Forms | None" = None,
) -> tuple[OutputFile, ...]:
    """Checks that the inputs fit together and decides the output's files.

    Args:
        checkpoints: the inputs; the output's files are those of the first.
        base: replaces a tensor that an input lacks if ``missing`` is "base". Its float dtype does
            not decide the output's, unless no model has a tensor of its own.
        dtype: dtype of the output's float tensors ("BF16", "F16", "F32"). None: the models', which
            must then agree.
        missing: treatment of a tensor that some input lacks: "error", "base" or "drop".
        shard_bytes: most bytes of an output file. None: the first input's files.
        num_models: the first inputs, which are models; another one is the base. None: all.
        forms: chooses the quantised tensors of the output. None: it has none.

    Raises:
        InputError: a tensor is missing, extra, of another shape or dtype; names file, tensor, rule
            and values.
    """
    first = base if missing == "base" and base else checkpoints[0]
    entries = {name: _entries(name, checkpoints, base, missing) for name in first.tensors}
    for checkpoint in checkpoints:
        for name, entry in checkpoint.tensors.items():
            if name not in first.tensors and missing != "drop":
                raise _unmatched(f"{entry.file}: {name}: is not in {first.path}")
    chosen = _Dtypes(checkpoints[:num_models], base, dtype, forms)
    files = []
    for file, names in first.shards:
        tensors = [_tensor(name, entries[name], chosen) for name in names if entries[name]]
        if tensors:
            files.append(OutputFile(file, tuple(tensors)))
    if not files:
        raise InputError(f"{first.path}: shares no tensor with the other models")
    return (
        cut_files([tensor for file in files for tensor in file.tensors], shard_bytes)
        if shard_bytes
        else tuple(files)
    )


class _Dtypes:
    """The dtype of each output tensor: the one asked for, else that of the models' own tensors."""

    def __init__(
        self,
        models: Sequence[Checkpoint],
        base: Checkpoint | None,
        asked: str | None,
        forms: "Forms | None",
    ) -> None:
        self.forms = forms
        self.models = models
        self.base = base
        self.asked = asked

    @cached_property
    def _common(self) -> set[str]:
        """Dtypes of all models' plain float tensors."""
        tensors = [entry for model in self.models for entry in model.tensors.values()]
        plain = (entry for entry in tensors if not is_quantised(entry))
        return {own_dtype(entry) for entry in plain if is_float(entry)}

    def form_and_dtype(
        self, name: str, entries: Sequence[TensorEntry]
    ) -> "tuple[Form | None, str]":
        """A float tensor's quantised form in the output, None for a plain one, and its dtype.

        Raises:
            InputError: the models' own dtypes differ, or are 8-bit codes, and none is asked for.
        """
        of_models = entries[: len(self.models)]
        own = [entry for entry in of_models if not self._is_of_base(name, entry)]
        form = self.forms.of(name, entries, own) if self.forms else None
        if form is not None:
            return form, form.dtype
        return None, self.asked or self._of(name, entries, own)

    def _of(self, name: str, entries: Sequence[TensorEntry], own: Sequence[TensorEntry]) -> str:
        """The dtype of a plain float tensor. ``own``: the models' entries without the base's."""
        is_listed = bool(own) or any(name in model.tensors for model in self.models)
        if not is_listed and len(self._common) == 1:
            dtype = next(iter(self._common))
        else:
            dtype = own_dtype((own or entries)[0])
        for other in own:
            if own_dtype(other) != dtype:
                rule = f"{other.file}: {name}: dtype must be {dtype} as in {own[0].file}"
                raise OptionError(f"{rule}, got {own_dtype(other)}", "dtype", "{} chooses one")
        quantised = next(filter(is_quantised, own or entries), None)
        if quantised:
            rule = f"{quantised.file}: {name}: is {own_dtype(quantised)}"
            raise OptionError(rule, "dtype", "{} must choose the output's dtype")
        return dtype

    def _is_of_base(self, name: str, entry: TensorEntry) -> bool:
        """Whether a model takes the tensor from the base, as adapters do or where it lacks it."""
        start = self.base.tensors.get(name) if self.base else None
        return start is not None and (start.file, start.offset) == (entry.file, entry.offset)


def _unmatched(rule: str) -> OptionError:
    return OptionError(rule, "missing", "{} says what to do")


def index_text(
    files: Sequence[OutputFile], metadata: dict[str, object] | None = None
) -> str | None:
    """The index of the output; None for a single file without ``metadata``."""
    if [file.name for file in files] == [SINGLE_FILE] and not metadata:
        return None
    tensors = [tensor for file in files for tensor in file.tensors]
    values = {
        "total_parameters": sum(tensor.num_elements for tensor in tensors),
        "total_size": sum(tensor.num_bytes for tensor in tensors),
        **(metadata or {}),
    }
    weight_map = {stored.name: file.name for file in files for stored in file.stored}
    return (
        json.dumps({"metadata": values, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
        + "\n"
    )


def header_of(tensors: Iterable[StoredTensor]) -> bytes:
    """Length and JSON of a safetensors header, padded to a multiple of 8."""
    members = ['"__metadata__":{"format":"pt"}']
    start = 0
    for tensor in tensors:  # written by hand, since there are many and all are alike
        end = start + tensor.num_bytes
        shape = ",".join(map(str, tensor.shape))
        members.append(
            f'{encode_basestring_ascii(tensor.name)}:{{"dtype":"{tensor.dtype}",'
            f'"shape":[{shape}],"data_offsets":[{start},{end}]}}'
        )
        start = end
    text = f"{{{','.join(members)}}}".encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _entries(
    name: str, checkpoints: Sequence[Checkpoint], base: Checkpoint | None, missing: str
) -> tuple[TensorEntry, ...]:
    """The inputs' entries of a tensor; () if it is dropped."""
    chosen: list[TensorEntry] = []
    for checkpoint in checkpoints:
        entry = checkpoint.tensors.get(name)
        if entry is None and missing == "drop":
            return ()
        if entry is None and missing == "base" and base is not None:
            entry = base.tensors[name]
        if entry is None:
            where = checkpoint.path / INDEX_FILE
            where = where if where.exists() else checkpoint.path / SINGLE_FILE
            raise _unmatched(f"{where}: {name}: is missing, {checkpoints[0].path} has it")
        chosen.append(entry)
    return tuple(chosen)


def _tensor(name: str, entries: tuple[TensorEntry, ...], dtypes: _Dtypes) -> OutputTensor:
    first = entries[0]
    for other in entries[1:]:
        rule = ""
        if other.shape != first.shape:
            rule = f"shape must be {list(first.shape)} as in {first.file}, got {list(other.shape)}"
        elif other.dtype != first.dtype and not (is_float(first) and is_float(other)):
            rule = f"dtype must be {first.dtype} as in {first.file}, got {other.dtype}"
        if rule:
            raise InputError(f"{other.file}: {name}: {rule}")
    if not is_float(first):
        return OutputTensor(name, first.dtype, first.shape, entries)
    form, dtype = dtypes.form_and_dtype(name, entries)
    if form is not None:
        return OutputTensor(name, dtype, first.shape, entries, form.encoding, form.copied)
    return OutputTensor(name, dtype, first.shape, entries)


def cut_files(tensors: Sequence[OutputTensor], shard_bytes: int) -> tuple[OutputFile, ...]:
    """The output's files of at most ``shard_bytes``, or of one tensor."""
    groups: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.num_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.num_bytes
    if len(groups) == 1:
        return (OutputFile(SINGLE_FILE, tuple(groups[0])),)
    count = len(groups)
    return tuple(
        OutputFile(f"model-{i:05d}-of-{count:05d}.safetensors", tuple(group))
        for i, group in enumerate(groups, 1)
    )
