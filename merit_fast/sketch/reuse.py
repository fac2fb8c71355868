"""Takes over the sums of datasets that have not changed, from a killed run or an earlier output.

datasets.json lies next to the files of sums. For each dataset it holds the fingerprint of all that
its sums depend on, the hash of its file, and the bounds that its check has found.
"""

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merit_fast.manifests.atomic import link_file, replace_file, write_text
from merit_fast.manifests.hashes import checksum
from merit_fast.manifests.sketch_check import SketchCheck

_RECORDS = "datasets.json"
_SUFFIX = ".safetensors"
_TAKEN = ".taken"  # ends the name of a file that replaces the one before
_FINGERPRINT = "fingerprint"
_HASH = "xxh3_128"
_CHECK = "check"  # the bounds of a SketchCheck, where the sums were checked


def reuse_states(
    directory: Path, earlier: Path | None, fingerprints: Mapping[str, str]
) -> tuple[set[str], set[str]]:
    """Gives every state that is known by its fingerprint the name of its dataset.

    Removes other files of sums from ``directory``, and writes datasets.json of those kept.

    Args:
        directory: the output under its temporary name, perhaps with the work of a killed run.
        earlier: an earlier output; None: there is none.
        fingerprints: dataset -> fingerprint that its sums must have.

    Returns:
        Datasets whose file a killed run left in ``directory``, and those taken from ``earlier``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    checks = _checks(directory) if earlier is None else _checks(earlier) | _checks(directory)
    own = _intact_states(directory)
    before = {} if earlier is None else _intact_states(earlier)
    kept = {name for name, digest in fingerprints.items() if digest in own}
    taken = {name for name in fingerprints.keys() - kept if fingerprints[name] in before}
    _remove(directory, _TAKEN)
    for name in kept | taken:
        digest = fingerprints[name]
        link_file(own.get(digest) or before[digest], directory / f"{name}{_SUFFIX}{_TAKEN}")
    _remove(directory, _SUFFIX)
    for name in kept | taken:
        file = directory / f"{name}{_SUFFIX}"
        replace_file(file.with_name(f"{file.name}{_TAKEN}"), file)
    records = {}
    for name in kept | taken:
        records[name] = _record(directory, name, fingerprints[name])
        check = checks.get(fingerprints[name])
        if check is not None:
            records[name][_CHECK] = check
    _write(directory, records)
    return kept, taken


def record_state(
    directory: Path, name: str, fingerprint: str, check: SketchCheck | None = None
) -> None:
    """Adds a dataset whose file of sums is complete to datasets.json."""
    record = _record(directory, name, fingerprint)
    if check is not None:
        record[_CHECK] = check.bounds()
    _write(directory, _read(directory) | {name: record})


def read_check(directory: Path) -> SketchCheck | None:
    """The bounds that the checks of all datasets keep; None if nothing was checked."""
    records = _read(directory).values()
    checks = [SketchCheck.of_bounds(record[_CHECK]) for record in records if _CHECK in record]
    return functools.reduce(SketchCheck.merged, checks) if checks else None


def _intact_states(directory: Path) -> dict[str, Path]:
    """Fingerprint -> file of every dataset in datasets.json whose file has the recorded hash."""
    states = {}
    for name, record in _read(directory).items():
        file = directory / f"{name}{_SUFFIX}"
        if file.is_file() and checksum(file) == record[_HASH]:
            states[record[_FINGERPRINT]] = file
    return states


def _checks(directory: Path) -> dict[str, Any]:
    """Fingerprint -> bounds of its check."""
    records = _read(directory).values()
    return {r[_FINGERPRINT]: r[_CHECK] for r in records if _CHECK in r}


def _record(directory: Path, name: str, fingerprint: str) -> dict[str, Any]:
    return {_FINGERPRINT: fingerprint, _HASH: checksum(directory / f"{name}{_SUFFIX}")}


def _read(directory: Path) -> dict[str, dict[str, Any]]:
    try:
        records: Any = json.loads((directory / _RECORDS).read_text(encoding="utf-8"))
        return {
            str(name): {key: str(record[key]) for key in (_FINGERPRINT, _HASH)}
            | ({_CHECK: dict(record[_CHECK])} if _CHECK in record else {})
            for name, record in records.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # nothing was sketched there, or nothing can be known about it: sketch again


def _write(directory: Path, records: Mapping[str, dict[str, Any]]) -> None:
    text = json.dumps(records, indent=1, sort_keys=True) + "\n"
    write_text(directory / _RECORDS, text)


def _remove(directory: Path, suffix: str) -> None:
    for file in os.listdir(directory):
        if file.endswith(suffix):
            (directory / file).unlink()
