"""A merge of some towers of a model: each tower by models and numbers of its own, others copied."""

from collections.abc import Mapping, Sequence

from merit_fast.errors import InputError
from merit_fast.kernels.average.dtypes import SHORT_NAMES
from merit_fast.merge.combine.combination import Combination, Rule
from merit_fast.merge.config import MergeConfig
from merit_fast.merge.engine.geometry import Array
from merit_fast.merge.engine.layout import OutputFile, OutputTensor, cut_files
from merit_fast.merge.engine.prepare import Inputs, read_inputs
from merit_fast.merge.option_names import OptionError
from merit_fast.merge.read.checkpoint import Checkpoint
from merit_fast.merge.read.decoded import read_input
from merit_fast.merge.read.entries import TensorEntry, is_float, is_quantised, own_dtype
from merit_fast.merge.read.names.modules import module_names
from merit_fast.merge.read.names.towers import TEXT, Tower, towers_of
from merit_fast.merge.read.remote import Location
from merit_fast.merge.read.slices import Slice
from merit_fast.merge.rules.values import Coefficients
from merit_fast.merge.sizes import parse_bytes
from merit_fast.records import record, replace


@record
class Module:
    """One tower's merge: as the arguments of ``read_inputs``. ``name``: see ``names.towers``."""

    name: str
    models: tuple[Location, ...]
    weights: tuple[float, ...]
    base: Location | None
    config: MergeConfig
    slices: tuple[Slice, ...] = ()


def read_modules(modules: Sequence[Module], companions: Location) -> Inputs:
    """Checked headers of a merge of towers.

    Args:
        modules: one per tower that is merged; all of one method and dtype.
        companions: the model that gives every other tower, the names of all tensors, config.json
            and the tokenizer.

    Raises:
        InputError: a tower is unknown (the known ones are listed); slices change the depth of a
            tower; see ``read_inputs``.
    """
    donor = read_input(companions, None)
    towers = towers_of(module_names(donor))
    known = sorted(set(towers.values()))
    for module in modules:
        if module.name not in known:
            raise InputError(
                f"{donor.path}: has no tower {module.name}; there are {', '.join(known)}"
            )
    parts = {module.name: _read(module, donor, towers) for module in modules}
    files = _files(donor, towers, parts, modules[0].config)
    text = parts.get(TEXT) or next(iter(parts.values()))
    tensors = [tensor for file in files for tensor in file.tensors]
    copied = [name for name in known if name not in parts]
    note = f"{donor.path}: gives {', '.join(copied)} as they are"
    notes = dict.fromkeys(line for part in parts.values() for line in part.notes)
    return replace(
        text,
        combination=_combination(towers, parts),
        checkpoints=max((part.checkpoints for part in parts.values()), key=len),
        files=files,
        companions=companions,
        dequantized=any(is_quantised(e) for tensor in tensors for e in tensor.inputs),
        models=tuple(dict.fromkeys(path for module in modules for path in module.models)),
        notes=(*notes, *([note] if copied else [])),
    )


def tower_names(model: Location) -> list[str]:
    """The towers of a model, sorted. Raises InputError as ``read_input``."""
    return sorted(set(towers_of(module_names(read_input(model, None))).values()))


def _read(module: Module, donor: Checkpoint, towers: Mapping[str, str]) -> Inputs:
    tower = Tower(module.name, donor, towers)
    inputs = read_inputs(
        module.models,
        module.weights,
        module.base,
        module.config,
        module.slices,
        donor.path,
        tower,
        to_memory=True,  # towers of one file share a dtype
    )
    made = {tensor.name: tensor.shape for file in inputs.files for tensor in file.tensors}
    own = [name for name, place in towers.items() if place == module.name]
    for name in own if module.slices else ():
        if name not in made or len(made) != len(own):
            raise InputError(
                f"{donor.path}: slices of the tower {module.name} must keep its depth: {name} "
                f"and {len(own) - 1} others must come out, got {len(made)} tensors"
            )
    return inputs


def _files(
    donor: Checkpoint,
    towers: Mapping[str, str],
    parts: Mapping[str, Inputs],
    config: MergeConfig,
) -> tuple[OutputFile, ...]:
    """The donor's files with the merged towers' tensors in place of its own."""
    made = {
        tensor.name: tensor
        for part in parts.values()
        for file in part.files
        for tensor in file.tensors
    }
    dtype = SHORT_NAMES[config.dtype] if config.dtype else None
    files = []
    for file, names in donor.shards:
        tensors = []
        for name in names:
            if towers[name] not in parts:
                tensors.append(_copied(donor.tensors[name], dtype))
            elif name in made:
                tensors.append(made.pop(name))
        files.append(OutputFile(file, tuple(tensors)))
    files[-1] = OutputFile(files[-1].name, (*files[-1].tensors, *made.values()))
    if config.shard_size:
        tensors = [tensor for each in files for tensor in each.tensors]
        return cut_files(tensors, parse_bytes("shard_size", config.shard_size))
    return tuple(each for each in files if each.tensors)


def _copied(entry: TensorEntry, dtype: str | None) -> OutputTensor:
    if dtype is None and is_quantised(entry):
        rule = f"{entry.file}: {entry.name}: is {own_dtype(entry)}"
        raise OptionError(rule, "dtype", "{} must choose the output's dtype")
    chosen = dtype if dtype and is_float(entry) else entry.dtype
    return OutputTensor(entry.name, chosen, entry.shape, (entry,))


def _combination(towers: Mapping[str, str], parts: Mapping[str, Inputs]) -> Combination:
    """Each tower's rule; the only input of a copied tensor counts once."""
    combinations = {
        tensor.name: part.combination
        for part in parts.values()
        for file in part.files
        for tensor in file.tensors
    }
    first = next(iter(parts.values())).combination

    def rule(entry: TensorEntry) -> Rule:
        combination = combinations.get(entry.name)
        return (1.0,) if combination is None else combination.rule(entry)

    def from_gram(name: str, gram: Array) -> Coefficients:
        combination = combinations.get(name)
        if combination is None or combination.from_gram is None:
            return (1.0,)
        return combination.from_gram(name, gram)

    paths = dict.fromkeys(path for part in parts.values() for path in part.combination.paths)
    has_gram = first.from_gram is not None
    return Combination(
        tuple(paths), rule, from_gram if has_gram else None, first.gram_from_base, True
    )
