"""Reads and writes the JSON files in which stages meet (``schemas``), and takes fingerprints.

A stage's manifest carries the fingerprint of its options and inputs: an output that has the
expected fingerprint is up to date.
"""

import functools
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any, Protocol, TypeVar

from merit_fast.errors import InputError
from merit_fast.manifests.atomic import write_text
from merit_fast.manifests.schemas.version import SCHEMA_VERSION
from merit_fast.options.parser import parse, to_plain
from merit_fast.records import field, record

STAGE_FILE = "stage.json"
_TOOLS = ("merit_fast", "torch", "transformers", "safetensors", "numpy")

T = TypeVar("T")


@record
class StageManifest:
    """stage.json, written last into a stage's output: the stage, its options and its inputs.

    The same stage with the same ``config`` and inputs gives the same output.
    """

    stage: str
    fingerprint: str  # of stage, schema version, config and inputs
    config: dict[str, Any]
    inputs: dict[str, str]  # name -> fingerprint
    tool_versions: dict[str, str]
    files: dict[str, tuple[int, str]] = field(default_factory=dict)  # bytes, xxh3_128; all others
    schema_version: int = SCHEMA_VERSION


def fingerprint(data: Any) -> str:
    """32 hex digits that depend only on JSON-ready ``data`` (keys sorted)."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Readable(Protocol):
    """A file here or in an object store."""

    def read_text(self, encoding: str = ...) -> str: ...


def read_manifest(cls: type[T], path: Readable) -> T:
    """Reads and validates one manifest.

    Raises:
        InputError: the file is missing, not JSON or of another schema version, or a key is unknown,
            missing or of the wrong type.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: does not exist") from None
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path}: is not readable JSON ({error})") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(f"{path}: schema_version: must be {SCHEMA_VERSION}, got {version!r}")
    return parse(cls, data, where=str(path))


def write_manifest(manifest: Any, path: Path, fsync: bool = True) -> None:
    """Writes a manifest's record as JSON: the same object gives the same bytes."""
    write_text(path, manifest_text(manifest), fsync)


def manifest_text(manifest: Any) -> str:
    """Returns the text that ``write_manifest`` writes: a list of numbers or names is one line."""
    return _indented(to_plain(manifest), "\n") + "\n"


def _indented(value: Any, line: str) -> str:
    """JSON with one space per level; ``line`` begins each line of this level."""
    inner = line + " "
    if isinstance(value, dict) and value:
        items = (f"{_json(key)}: {_indented(item, inner)}" for key, item in value.items())
        return "{" + inner + f",{inner}".join(items) + line + "}"
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        return "[" + inner + f",{inner}".join(_indented(item, inner) for item in value) + line + "]"
    return _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def stage_manifest(stage: str, config: Any, inputs: dict[str, str]) -> StageManifest:
    """The manifest of a stage about to run.

    Its fingerprint covers stage, schema version, config and inputs.
    """
    plain = to_plain(config)
    digest = fingerprint([stage, SCHEMA_VERSION, plain, inputs])
    return StageManifest(stage, digest, plain, inputs, tool_versions())


def tool_versions() -> dict[str, str]:
    """Versions of the packages that can change a result, without importing them."""
    return {package: _version(package) for package in _TOOLS}


@functools.cache
def _version(package: str) -> str:
    """The version of an installed package, or "absent".

    The name of its folder PACKAGE-VERSION.dist-info has it; ``importlib.metadata`` takes 25 ms.
    """
    for folder in sys.path:
        for name in _dist_infos(folder):
            owner, _, version = name.removesuffix(".dist-info").partition("-")
            if owner == package:
                return version
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    try:  # installed in another form: an egg, an archive
        return version_of(package)
    except PackageNotFoundError:
        return "absent"


@functools.cache
def _dist_infos(folder: str) -> list[str]:
    try:
        return [name for name in os.listdir(folder or ".") if name.endswith(".dist-info")]
    except OSError:
        return []
