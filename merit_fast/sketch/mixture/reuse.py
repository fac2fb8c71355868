"""Takes over the sums of datasets that have not changed, from a killed run or an earlier output.

datasets.json lies next to the files of sums. For each dataset it holds the fingerprint of all that
its sums depend on, the hashes of its files, and the bounds that its check has found.
"""

import functools
import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from merit_fast.manifests.atomic import link_file, replace_file, write_text
from merit_fast.manifests.hashes import checksum
from merit_fast.manifests.sketch_check import SketchCheck
from merit_fast.manifests.sketch_state import state_path

_RECORDS = "datasets.json"
_SUFFIX = ".safetensors"
_TAKEN = ".taken"  # ends the name of a file that replaces the one before
_FINGERPRINT = "fingerprint"
_HASH = "xxh3_128"
_PARTS = "parts"  # part of the model -> hash of its file, where there are parts
_CHECK = "check"  # the bounds of a SketchCheck, where the sums were checked


def reuse_states(
    directory: Path,
    earlier: Sequence[Path],
    fingerprints: Mapping[str, str],
    parts: Sequence[str] = (),
) -> tuple[set[str], set[str]]:
    """Gives every state that is known by its fingerprint the name of its dataset.

    Removes other files of sums from ``directory``, and writes datasets.json of those kept. A file
    that stays under its name is there all the time, so a crash costs nothing.

    Args:
        directory: the output under its temporary name, perhaps with the work of a killed run.
        earlier: earlier outputs; absent folders count as empty.
        fingerprints: dataset -> fingerprint that its sums must have; it covers ``parts``.
        parts: parts of the model, each with a file for every dataset.

    Returns:
        Datasets whose files a killed run left in ``directory``, and those taken from ``earlier``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    checks: dict[str, Any] = {}
    before: dict[str, dict[str, Path]] = {}
    for folder in earlier:
        checks |= _checks(folder)
        before |= _intact_states(folder, parts)
    checks |= _checks(directory)
    own = _intact_states(directory, parts)
    kept = {name for name, digest in fingerprints.items() if digest in own}
    taken = {name for name in fingerprints.keys() - kept if fingerprints[name] in before}
    sources: dict[Path, Path] = {}
    for name in kept | taken:
        files = own.get(fingerprints[name]) or before[fingerprints[name]]
        sources |= {state_path(directory, name, part): files[part] for part in ("", *parts)}
    for file, source in sources.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        link_file(source, _taken(file))
    for file in sources:
        replace_file(_taken(file), file)
    _remove_others(directory, sources)
    records = {}
    for name in kept | taken:
        records[name] = _record(directory, name, fingerprints[name], parts)
        check = checks.get(fingerprints[name])
        if check is not None:
            records[name][_CHECK] = check
    _write(directory, records)
    return kept, taken


def record_state(
    directory: Path,
    name: str,
    fingerprint: str,
    check: SketchCheck | None = None,
    parts: Sequence[str] = (),
) -> None:
    """Adds a dataset whose files of sums are complete to datasets.json."""
    record = _record(directory, name, fingerprint, parts)
    if check is not None:
        record[_CHECK] = check.bounds()
    _write(directory, _read(directory) | {name: record})


def has_states(folders: Sequence[Path], fingerprint: str, parts: Sequence[str] = ()) -> bool:
    """Whether one of these outputs holds undamaged sums of this fingerprint."""
    return any(fingerprint in _intact_states(folder, parts) for folder in folders)


def read_check(directory: Path) -> SketchCheck | None:
    """The bounds that the checks of all datasets keep; None if nothing was checked."""
    records = _read(directory).values()
    checks = [SketchCheck.of_bounds(record[_CHECK]) for record in records if _CHECK in record]
    return functools.reduce(SketchCheck.merged, checks) if checks else None


def _intact_states(directory: Path, parts: Sequence[str]) -> dict[str, dict[str, Path]]:
    """Fingerprint -> part -> file, of the datasets whose files have the recorded hashes.

    The part "" is the whole.
    """
    states = {}
    for name, record in _read(directory).items():
        hashes = {"": record[_HASH], **record.get(_PARTS, {})}
        files = {part: state_path(directory, name, part) for part in hashes}
        has_all = hashes.keys() == {"", *parts}
        if has_all and all(files[p].is_file() and checksum(files[p]) == hashes[p] for p in hashes):
            states[record[_FINGERPRINT]] = files
    return states


def _checks(directory: Path) -> dict[str, Any]:
    """Fingerprint -> bounds of its check."""
    records = _read(directory).values()
    return {r[_FINGERPRINT]: r[_CHECK] for r in records if _CHECK in r}


def _record(directory: Path, name: str, fingerprint: str, parts: Sequence[str]) -> dict[str, Any]:
    record = {_FINGERPRINT: fingerprint, _HASH: checksum(state_path(directory, name))}
    hashes = {part: checksum(state_path(directory, name, part)) for part in parts}
    return record | ({_PARTS: hashes} if hashes else {})


def _read(directory: Path) -> dict[str, dict[str, Any]]:
    try:
        records: Any = json.loads((directory / _RECORDS).read_text(encoding="utf-8"))
        return {
            str(name): {key: str(record[key]) for key in (_FINGERPRINT, _HASH)}
            | {key: dict(record[key]) for key in (_PARTS, _CHECK) if key in record}
            for name, record in records.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # nothing was sketched there, or nothing can be known about it: sketch again


def _write(directory: Path, records: Mapping[str, dict[str, Any]]) -> None:
    text = json.dumps(records, indent=1, sort_keys=True) + "\n"
    write_text(directory / _RECORDS, text)


def _taken(file: Path) -> Path:
    return file.with_name(f"{file.name}{_TAKEN}")


def _remove_others(directory: Path, kept: Container[Path]) -> None:
    """Removes all files of sums but those kept, and folders of parts without any."""
    in_parts = [file for file in (directory / _PARTS).rglob("*") if file.is_file()]
    sums = [file for file in directory.iterdir() if file.name.endswith((_SUFFIX, _TAKEN))]
    for file in (*sums, *in_parts):
        if file not in kept:
            file.unlink()
    for folder in (*(directory / _PARTS).glob("*"), directory / _PARTS):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
