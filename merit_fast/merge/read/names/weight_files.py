"""Which safetensors files of a directory hold the model, where their names are not the usual ones.

Usual are model.safetensors.index.json and model.safetensors. Others are transformers' variants
(model.bf16.safetensors), shards without an index, and one file of any name.
"""

import re
from collections.abc import Sequence

from merit_fast.errors import InputError
from merit_fast.merge.read.files import quote
from merit_fast.merge.read.remote import Location
from merit_fast.records import record

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
_VARIANT = re.compile(r"model\.safetensors\.index\.([^./]+)\.json|model\.([^./]+)\.safetensors")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_NO_MODEL = re.compile(r"(adapter_model|optimizer|optim|scheduler|random_states|ema).*")


@record
class WeightFiles:
    """The ``index`` that names the files, or the ``files``. ``note`` says which were taken."""

    index: str | None
    files: tuple[str, ...] = ()
    note: str = ""


def weight_files(path: Location, present: Sequence[str]) -> WeightFiles | None:
    """The files of a model, found by their names; None where a directory holds none.

    Raises:
        InputError: several variants or several sets of shards, of which one must be named; a set
            lacks a shard.
    """
    if INDEX_FILE in present:
        return WeightFiles(INDEX_FILE)
    if SINGLE_FILE in present:
        return WeightFiles(None, (SINGLE_FILE,))
    others = [name for name in present if _is_candidate(name)]
    if not others:
        return None
    if variants := _variants(others):
        return _variant(path, variants)
    if sets := _shard_sets(others):
        return _shards(path, sets)
    if len(others) > 1:
        listed = ", ".join(quote(name)[1:-1] for name in others)
        raise InputError(
            f"{path}: holds neither {INDEX_FILE} nor {SINGLE_FILE}, but {listed}: name the file "
            "that is the model, or write an index"
        )
    return WeightFiles(None, tuple(others), f"{path}: the model is {quote(others[0])[1:-1]}")


def _is_candidate(name: str) -> bool:
    is_index = name.endswith(".json") and _VARIANT.fullmatch(name) is not None
    return (name.endswith(".safetensors") or is_index) and not _NO_MODEL.fullmatch(name)


def _variants(names: Sequence[str]) -> dict[str, str]:
    """Variant -> its index, or its only file. Shards of a variant go with its index."""
    found: dict[str, str] = {}
    for name in names:
        match = _VARIANT.fullmatch(name)
        if match is not None and not _SHARD.fullmatch(name):
            variant = match.group(1) or match.group(2)
            if match.group(1) or variant not in found:
                found[variant] = name
    return found


def _variant(path: Location, variants: dict[str, str]) -> WeightFiles:
    if len(variants) > 1:
        listed = ", ".join(variants.values())
        raise InputError(f"{path}: holds several variants of the model: {listed}: name one of them")
    variant, name = next(iter(variants.items()))
    note = f"{path}: the model is its variant {variant}, {name}"
    if name.endswith(".json"):
        return WeightFiles(name, (), note)
    return WeightFiles(None, (name,), note)


def _shard_sets(names: Sequence[str]) -> dict[tuple[str, int], list[int]]:
    """(name, number of shards) -> numbers of the shards that are there."""
    found: dict[tuple[str, int], list[int]] = {}
    for name in names:
        match = _SHARD.fullmatch(name)
        if match is not None:
            found.setdefault((match.group(1), int(match.group(3))), []).append(int(match.group(2)))
    return found


def _shards(path: Location, sets: dict[tuple[str, int], list[int]]) -> WeightFiles:
    names = [_shard_name(stem, 1, count) for stem, count in sets]
    if len(sets) > 1:
        raise InputError(
            f"{path}: holds several models without an index, from {' and '.join(names)} on: "
            "keep one of them in a directory"
        )
    (stem, count), numbers = next(iter(sets.items()))
    present = set(numbers)
    lacking = next((k for k in range(1, count + 1) if k not in present), None)
    if lacking is not None or len(present) != count:
        number = lacking if lacking is not None else count
        raise InputError(f"{path}: lacks {_shard_name(stem, number, count)}, and has no index")
    files = tuple(_shard_name(stem, number, count) for number in range(1, count + 1))
    return WeightFiles(None, files, f"{path}: has no index; the model is its {count} shards")


def _shard_name(stem: str, number: int, count: int) -> str:
    return f"{quote(stem)[1:-1]}-{number:05d}-of-{count:05d}.safetensors"
