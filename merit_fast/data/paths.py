"""Tells paths of this machine from ids of the Hugging Face hub, and says why a hub gave nothing."""

import re
from pathlib import Path

from merit_fast.errors import one_line

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")  # may be compressed too
ROW_SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".arrow")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
_REASONS = (  # class names, which need no import of the libraries that raise them; first match
    (("OfflineModeIsEnabled",), "the hub is switched off (HF_HUB_OFFLINE)"),
    (("GatedRepoError",), "the hub wants a login"),
    (("RepositoryNotFoundError", "DatasetNotFoundError"), "the hub does not know it"),
    (("HFValidationError",), "the hub has no such names"),
    (
        (
            "LocalEntryNotFoundError",
            "ConnectionError",
            "ConnectError",
            "TimeoutException",
            "NetworkError",
        ),
        "the hub is unreachable",
    ),
)


def container_of(name: str) -> str:
    """The suffix that tells how the rows of a file are written, without its compression's.

    It is one of ROW_SUFFIXES, or empty for a file that is no file of rows.
    """
    for compression in COMPRESSIONS:
        if name.endswith(compression):
            plain = name.removesuffix(compression)
            return next((suffix for suffix in TEXT_SUFFIXES if plain.endswith(suffix)), "")
    return next((suffix for suffix in ROW_SUFFIXES if name.endswith(suffix)), "")


def is_url(text: str) -> bool:
    """Whether ``text`` names a file or a folder in a store, such as s3://bucket/rows.jsonl."""
    return _URL.match(text) is not None


def is_glob(text: str) -> bool:
    """Whether ``text`` holds a wildcard."""
    return any(character in text for character in "*?[")


def is_hub_id(text: str, folder: Path | None = None) -> bool:
    """Whether ``text`` can be NAME or OWNER/NAME on the hub, and not a path.

    A leading ``.``, ``/`` or ``~``, a second ``/``, the suffix of a file of rows, and an owner that
    is a directory in ``folder`` make it a path.

    Args:
        text: a model or a dataset as the user wrote it.
        folder: the folder from which relative paths count; None: the current directory.
    """
    if not _HUB_ID.fullmatch(text) or container_of(text):
        return False
    owner, slash, _ = text.partition("/")
    return not slash or not (folder or Path()).joinpath(owner).is_dir()


def hub_trouble(error: BaseException) -> str:
    """The reason why the hub gave nothing, in a few words."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    classes = {kind.__name__ for kind in type(error).__mro__}
    for names, reason in _REASONS:
        if not classes.isdisjoint(names):
            unreachable = reason == "the hub is unreachable"
            return _REASONS[0][1] if unreachable and HF_HUB_OFFLINE else reason
    return one_line(error)
