"""A checkpoint's tensors under the names that its parameters have in memory, and the way back."""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping

from merit_fast.errors import InputError
from merit_fast.merge.read.checkpoint import Checkpoint
from merit_fast.merge.read.entries import (
    AssembledEntry,
    Part,
    TensorEntry,
    value_dtype,
)
from merit_fast.merge.read.names.boxes import View, contiguous, whole
from merit_fast.merge.read.names.conversions import ConversionError, convert
from merit_fast.merge.read.names.model_class import ModelClass, model_class
from merit_fast.merge.read.names.rules import Renamer, Rule, natural_order, numberless
from merit_fast.records import replace

Shape = tuple[int, ...]


class ModuleNames:
    """A checkpoint in transformers' own names: those of a model's parameters, and PEFT's modules.

    ``tensors`` are the entries by these names. An entry is the file's own under another name, or
    an ``AssembledEntry`` where the file splits, joins, turns or permutes the parameter.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        kind: ModelClass,
        shape_of: Callable[[str], Shape | None] = lambda name: None,
    ) -> None:
        self.checkpoint = checkpoint
        self.kind = kind
        self.views = _views(checkpoint, kind, shape_of)
        self.tensors = {
            name: entry_of(name, _filled(view, checkpoint.tensors))
            for name, view in self.views.items()
        }
        self._places: defaultdict[str, list[tuple[str, Part]]] = defaultdict(list)
        for module, view in self.views.items():
            for part in view.parts:
                self._places[part.source.name].append((module, part))

    def of(self, name: str) -> str:
        """The name in memory of a tensor that another version, or the language model, names so.

        A name that fits nothing comes back as the rules leave it.
        """
        if name in self.tensors:
            return name
        renamed = self.kind.with_prefix(Renamer(self.kind.rules).renamed(name))
        if renamed in self.tensors or self.kind.text_path is None:
            return renamed
        head, _, rest = name.partition(".")
        inside = f"{self.kind.text_path}.{rest if head == self.kind.prefix else name}"
        return inside if inside in self.tensors else renamed

    def of_module(self, module: str) -> str:
        """The name in memory of a module, as ``of`` gives a tensor's."""
        weight = self.of(f"{module}.weight")
        if weight in self.tensors:
            return weight.removesuffix(".weight")
        renamed = self.kind.with_prefix(Renamer(self.kind.rules).renamed(module))
        head, _, rest = module.partition(".")
        inside = f"{self.kind.text_path}.{rest if head == self.kind.prefix else module}"
        for name in (module, renamed, inside):
            if any(tensor.startswith(f"{name}.") for tensor in self.tensors):
                return name
        return renamed

    def files_of(self, module: str) -> list[str]:
        """Names in the file of the tensors of which a parameter consists."""
        return list(dict.fromkeys(part.source.name for part in self.views[module].parts))

    def parameters_of(self, name: str) -> list[str]:
        """Names in memory of the parameters to which a tensor of the file belongs."""
        return [module for module, _ in self._places[name]]

    def in_files(
        self, tensors: Mapping[str, TensorEntry], only: Collection[str] | None = None
    ) -> dict[str, TensorEntry]:
        """Tensors by names in memory under the names, and in the form, of this checkpoint's file.

        Tensors of the file of which a part is not given are left out; with ``only``, all others.

        Raises:
            InputError: a tensor has not the shape that this checkpoint has in memory, and the file
                does not hold it as it is.
        """
        given = {
            name: places
            for name, places in self._places.items()
            if (only is None or name in only) and all(module in tensors for module, _ in places)
        }
        boxes: dict[str, dict[object, Part]] = {}
        return {name: self._in_file(name, tensors, boxes) for name in given}

    def _in_file(
        self,
        name: str,
        tensors: Mapping[str, TensorEntry],
        boxes: dict[str, dict[object, Part]],
    ) -> TensorEntry:
        stored = self.checkpoint.tensors[name]
        places = self._places[name]
        first = places[0][0]
        if len(places) == 1 and is_whole(self.views[first]):
            return replace(tensors[first], name=name)
        parts = []
        for module, part in places:
            entry = tensors[module]
            if entry.shape != self.views[module].shape:
                raise InputError(
                    f"{entry.file}: {entry.name}: shape must be {list(self.views[module].shape)} "
                    f"as in {stored.file}, got {list(entry.shape)}"
                )
            if module not in boxes:
                boxes[module] = _boxes(entry)
            parts.append(_inverse(part, stored.shape, entry, boxes[module]))
        if sum(math.prod(part.sizes) for part in parts) != stored.num_elements:
            raise InputError(f"{stored.file}: {name}: has elements that no parameter takes")
        return entry_of(name, View(stored.shape, tuple(parts)))


def module_names(checkpoint: Checkpoint, config: Checkpoint | None = None) -> ModuleNames:
    """The checkpoint in the names of the class that its own config.json, or ``config``'s, names.

    Raises:
        InputError: two tensors are one parameter, or config.json cannot be read.
    """
    return ModuleNames(checkpoint, model_class((config or checkpoint).path))


def entry_of(name: str, view: View) -> TensorEntry:
    """An entry with a view's values; the source itself, renamed, where the view is all of it."""
    source = view.parts[0].source
    if is_whole(view):
        return replace(source, name=name)
    dtypes = {value_dtype(part.source) for part in view.parts}
    read = sum(
        math.prod(part.sizes) * part.source.num_bytes // max(part.source.num_elements, 1)
        for part in view.parts
    )
    return AssembledEntry(
        name,
        dtypes.pop() if len(dtypes) == 1 else "F64",
        view.shape,
        source.file,
        source.offset,
        read,
        view.parts,
    )


def is_whole(view: View) -> bool:
    """Whether a view is one tensor as it is."""
    if len(view.parts) != 1 or view.parts[0].source.shape != view.shape:
        return False
    part = view.parts[0]
    wide = [d for d, size in enumerate(view.shape) if size > 1]
    strides = contiguous(view.shape)
    return (
        part.start == 0
        and part.sizes == view.shape
        and not any(part.offsets)
        and all(part.strides[d] == strides[d] and _steps(part)[d] == 1 for d in wide)
    )


def _views(
    checkpoint: Checkpoint, kind: ModelClass, shape_of: Callable[[str], Shape | None]
) -> dict[str, View]:
    """Every parameter as boxes of the file's tensors, which stand for themselves by name."""
    renamer = Renamer(kind.rules)
    groups: dict[str, tuple[Rule, defaultdict[int, list[str]]]] = {}
    plain: dict[str, str] = {}
    for name in sorted(checkpoint.tensors, key=natural_order):
        target = name
        rule = None
        source = -1
        if numberless(name) not in kind.kept:
            target, rule, source = renamer.converted(renamer.renamed(name))
        target = kind.with_prefix(target)
        if rule is not None:
            groups.setdefault(target, (rule, defaultdict(list)))[1][source].append(name)
        elif target in plain:
            raise _twice(checkpoint, target, plain[target], name)
        else:
            plain[target] = name
    views = {target: _stored(checkpoint, name) for target, name in plain.items()}
    for target, (rule, sources) in groups.items():
        listed = {
            number: [_stored(checkpoint, name) for name in names]
            for number, names in sources.items()
        }
        try:
            made = convert(rule, listed, target, kind.config, shape_of)
        except ConversionError:  # tensors of another form keep their own names
            made = {name: _stored(checkpoint, name) for names in sources.values() for name in names}
        for module, view in made.items():
            if module in views:
                one = views[module].parts[0].source.name
                raise _twice(checkpoint, module, one, view.parts[0].source.name)
            views[module] = view
    return views


def _stored(checkpoint: Checkpoint, name: str) -> View:
    entry = checkpoint.tensors[name]
    stored = TensorEntry(name, entry.dtype, entry.shape, entry.file, entry.offset, entry.num_bytes)
    return whole(stored)


def _filled(view: View, tensors: Mapping[str, TensorEntry]) -> View:
    parts = tuple(replace(part, source=tensors[part.source.name]) for part in view.parts)
    return View(view.shape, parts)


def _twice(checkpoint: Checkpoint, module: str, one: str, other: str) -> InputError:
    file = checkpoint.tensors[other].file
    return InputError(f"{file}: {other}: is the parameter {module} in memory, as {one} is")


def _boxes(entry: TensorEntry) -> dict[object, Part]:
    """The parts of an assembled tensor by the places that they fill."""
    parts = entry.parts if isinstance(entry, AssembledEntry) else ()
    return {(part.offsets, part.sizes, _steps(part)): part for part in parts}


def _steps(part: Part) -> Shape:
    return part.steps or (1,) * len(part.sizes)


def _inverse(part: Part, shape: Shape, entry: TensorEntry, known: Mapping[object, Part]) -> Part:
    """The box of a file's tensor that ``part`` puts into a parameter, filled from ``entry``.

    Args:
        part: takes elements of a tensor of ``shape`` into a parameter of entry's shape.
        entry: another model's parameter.
        known: its boxes; one that fills the same places gives the values without a detour.
    """
    wide = [k for k, size in enumerate(shape) if size > 1]
    places = contiguous(shape)
    offsets = [0] * len(shape)
    rest = part.start
    for k in wide:
        offsets[k], rest = divmod(rest, places[k])
    box = known.get((part.offsets, part.sizes, _steps(part)))
    strides = contiguous(entry.shape)
    start = sum(offset * stride for offset, stride in zip(part.offsets, strides, strict=True))
    sizes = [1] * len(shape)
    steps = [1] * len(shape)
    taken = [0] * len(shape)
    for d, size in enumerate(part.sizes):
        if size == 1:
            continue
        k = next(k for k in wide if places[k] <= part.strides[d])
        sizes[k] = size
        steps[k] = part.strides[d] // places[k]
        taken[k] = box.strides[d] if box else _steps(part)[d] * strides[d]
    source = box.source if box else entry
    first = box.start if box else start
    return Part(source, tuple(offsets), tuple(sizes), first, tuple(taken), tuple(steps))
