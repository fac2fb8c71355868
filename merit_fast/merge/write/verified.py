"""Compares a model's weight files with the checksums in its index, without the engine."""

import json
import re
from pathlib import Path
from typing import Any

from merit_fast.errors import InputError, show
from merit_fast.manifests.hashes import checksum

INDEX_FILE = "model.safetensors.index.json"
CHECKSUM_KEY = "xxh3_128"
_DIGEST = re.compile("[0-9a-f]{32}")


def verify_checksums(directory: Path) -> dict[str, str]:
    """Hashes every weight file of a model and compares it with the checksum in the index.

    Returns:
        file -> checksum, of every weight file.

    Raises:
        InputError: the index holds no checksums; a weight file has none, is absent, is surplus or
            differs; a name leads out of the directory.
    """
    index = directory / INDEX_FILE
    sums, named = _read(index)
    present = {file.name for file in directory.iterdir() if file.suffix == ".safetensors"}
    for name in sorted(named | present):
        if name not in sums:
            where = "the index names it" if name in named else "it lies next to the index"
            raise InputError(f"{index}: metadata.{CHECKSUM_KEY}: lacks {name}: {where}")
    for name in sorted(sums):
        if name not in named:
            raise InputError(f"{index}: weight_map: lacks {name}, which has a checksum")
    for name, wanted in sums.items():
        _compare(directory / name, wanted)
    return sums


def _read(index: Path) -> tuple[dict[str, str], set[str]]:
    """The checksums in an index, and the files that its tensors are in."""
    try:
        values = json.loads(index.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _absent(index) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{index}: is not readable JSON ({error})") from None
    metadata = values.get("metadata") if isinstance(values, dict) else None
    if not isinstance(metadata, dict) or CHECKSUM_KEY not in metadata:
        raise _absent(index)
    sums = metadata[CHECKSUM_KEY]
    weight_map = values.get("weight_map")
    for key, mapping in ((f"metadata.{CHECKSUM_KEY}", sums), ("weight_map", weight_map)):
        if not isinstance(mapping, dict) or not mapping:
            rule = f"{index}: {key}: must be a mapping with at least one entry"
            raise InputError(f"{rule}, found {show(mapping)}")
    for name, digest in sums.items():
        _check_name(index, f"metadata.{CHECKSUM_KEY}", name)
        if not _is_digest(digest):
            rule = f"{index}: metadata.{CHECKSUM_KEY}: {name}: must be 32 hex digits"
            raise InputError(f"{rule}, found {show(digest)}")
    for name in weight_map.values():
        _check_name(index, "weight_map", name)
    return sums, set(weight_map.values())


def _absent(index: Path) -> InputError:
    rule = f"{index}: metadata.{CHECKSUM_KEY}: is absent"
    return InputError(f"{rule}; merge with --checksum writes it")


def _check_name(index: Path, key: str, name: Any) -> None:
    is_plain = isinstance(name, str) and name.isprintable() and not {"/", "\\"} & set(name)
    if not is_plain or not name.endswith(".safetensors"):
        rule = f"{index}: {key}: must name .safetensors files of this directory"
        raise InputError(f"{rule}, found {show(name)}")


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and bool(_DIGEST.fullmatch(value))


def _compare(file: Path, wanted: str) -> None:
    if file.is_symlink() and file.resolve().parent != file.parent.resolve():
        raise InputError(f"{file}: must be a file of this directory, found a link that leaves it")
    if not file.is_file():
        raise InputError(f"{file}: is absent, the index has its checksum")
    actual = checksum(file)
    if actual != wanted:
        raise InputError(f"{file}: {CHECKSUM_KEY} must be {wanted} as in the index, got {actual}")
