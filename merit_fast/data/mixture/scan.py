"""Reads every row of a source once, without tokenizing, and keeps 32 bytes of each."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merit_fast.data.config import DataConfig, DatasetConfig
from merit_fast.data.conversation import Conversation
from merit_fast.data.images.marks import with_marks
from merit_fast.data.rows.reader import LeftOutRow, RowReader
from merit_fast.data.sources import Source, read_raw_rows, read_rows
from merit_fast.data.sources.readers.lines import parse_line
from merit_fast.errors import InputError
from merit_fast.manifests.atomic import write_bytes

SCAN_VERSION = 2  # raise it when the same rows give other keys
KEY_BYTES = 16
PROMPT_BYTES = 8
_VALUE = re.compile(r", (got|found) .*|\[\d+\]")  # what differs between errors of one kind
Keys = NDArray[np.bytes_]


@dataclass(frozen=True, eq=False)
class Scan:
    """The good rows of one source, and those that are wrong."""

    rows: NDArray[np.int64]  # [n] numbers in the source, from 0, ascending
    keys: Keys  # [n] S16, equal for equal conversations
    prompts: Keys  # [n] S8, equal for conversations that are equal up to the last answer
    num_rows: int  # the wrong ones too
    errors: tuple[str, ...] = ()  # one line for each wrong row, in their order

    @property
    def num_left_out(self) -> int:
        """Rows that ``keep_if`` leaves out."""
        return self.num_rows - len(self.rows) - len(self.errors)


@dataclass
class _Columns:
    """A scan while it grows."""

    rows: array[int] = field(default_factory=lambda: array("q"))
    keys: bytearray = field(default_factory=bytearray)
    prompts: bytearray = field(default_factory=bytearray)
    errors: list[str] = field(default_factory=list)

    def finish(self, num_rows: int) -> Scan:
        rows = np.array(self.rows, np.int64)
        keys = np.frombuffer(bytes(self.keys), f"S{KEY_BYTES}")
        prompts = np.frombuffer(bytes(self.prompts), f"S{PROMPT_BYTES}")
        return Scan(rows, keys, prompts, num_rows, tuple(self.errors))


def scan_source(source: Source, config: DatasetConfig, data_config: DataConfig) -> Scan:
    """Reads the rows of a source as conversations and hashes them.

    Args:
        source: the rows of one part of the entry.
        config: the entry, which decides how its rows are read.
        data_config: the `data:` section.

    Raises:
        InputError: the source is missing, empty or unreadable, or more rows than
            ``data.bad_rows`` are wrong.
    """
    reader = RowReader(config, data_config)
    columns = _Columns()
    number = -1
    for number, (place, raw) in enumerate(read_raw_rows(source)):
        try:
            row = parse_line(raw, place) if isinstance(raw, bytes) else raw
            conversation = with_marks(reader.read(row, place), config.media)
        except LeftOutRow:
            continue
        except InputError as error:
            columns.errors.append(str(error))
            check_bad_rows(columns.errors, config, data_config)
            continue
        columns.rows.append(number)
        columns.keys += conversation.key()
        columns.prompts += _prompt_key(conversation)
    if number < 0:
        where = f"{source.path}: dataset {config.name}"
        raise InputError(f"{where}: must have at least one row, found none")
    return columns.finish(number + 1)


def place_of(source: Source, number: int) -> str:
    """The place of one row, as error messages name it; reads the source up to that row."""
    for place, _ in read_rows(source, [number]):
        return place
    raise InputError(f"{source.path}: has changed while it was read: row {number + 1} is gone")


def cached_scan(directory: Path, fingerprint: str, make: Callable[[], Scan]) -> Scan:
    """The scan in ``directory``, made and written there if it is not there or is damaged.

    Args:
        directory: holds one file for each fingerprint.
        fingerprint: covers the source's content and everything that decides how rows are read.
        make: makes the scan.
    """
    file = directory / f"{fingerprint}.scan"
    found = _read(file)
    if found is None:
        found = make()
        directory.mkdir(parents=True, exist_ok=True)
        write_bytes(file, _packed(found))
    return found


def check_bad_rows(errors: Sequence[str], config: DatasetConfig, data_config: DataConfig) -> None:
    """Checks the number of wrong rows of a dataset.

    Args:
        errors: one line for each wrong row so far.
        config: the dataset's entry.
        data_config: the `data:` section.

    Raises:
        InputError: there are more than ``data.bad_rows``.
    """
    limit = data_config.bad_rows
    if len(errors) <= limit:
        return
    if not limit:
        raise InputError(errors[0])
    raise InputError(
        f"mixture: {config.name}: must have at most data.bad_rows = {limit} wrong rows, "
        f"got more; the first: {errors[0]}; the last: {errors[-1]}"
    )


def error_notes(errors: Sequence[str]) -> list[str]:
    """One sentence for each kind of wrong row, with the number of such rows and the first."""
    kinds: dict[str, list[str]] = {}
    for error in errors:
        reason = error.split(": ", 1)[-1]
        kinds.setdefault(_VALUE.sub("", reason), []).append(error)
    return [
        f"{len(lines)} wrong {'row was' if len(lines) == 1 else 'rows were'} skipped; "
        f"the first: {lines[0]}"
        for lines in kinds.values()
    ]


def reading_keys(config: DatasetConfig, data_config: DataConfig) -> dict[str, Any]:
    """Everything but the rows themselves that decides the keys of a scan."""
    return {
        "version": SCAN_VERSION,
        "columns": config.columns,
        "roles": config.roles,
        "train_on": config.train_on or data_config.train_on,
        "ignore_columns": data_config.ignore_columns,
        "bad_rows": data_config.bad_rows,
        "media": config.media,
    }


def _prompt_key(conversation: Conversation) -> bytes:
    """8 bytes of the turns before the last answer. It only serves a note, so it is made fast."""
    messages = conversation.messages
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    asked = messages[: answers[-1]] if answers else messages
    turns = [(turn.role, turn.content, dict(turn.fields)) for turn in asked]
    images = [(image.path, image.content) for image in conversation.images]
    text = repr((turns, images)).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=PROMPT_BYTES).digest()


def _packed(scan: Scan) -> bytes:
    columns = (scan.rows.astype("<i8"), scan.keys, scan.prompts)
    body = b"".join(column.tobytes() for column in columns)
    head = {
        "num_good": len(scan.rows),
        "num_rows": scan.num_rows,
        "errors": scan.errors,
        "checksum": hashlib.sha256(body).hexdigest(),
    }
    return json.dumps(head).encode() + b"\n" + body


def _read(file: Path) -> Scan | None:
    try:
        content = file.read_bytes()
    except OSError:
        return None
    line, _, body = content.partition(b"\n")
    try:
        head = json.loads(line)
        count = int(head["num_good"])
        errors = tuple(head["errors"])
        num_rows = int(head["num_rows"])
        is_whole = head["checksum"] == hashlib.sha256(body).hexdigest()
    except (ValueError, KeyError, TypeError):
        return None
    if not is_whole or len(body) != count * (8 + KEY_BYTES + PROMPT_BYTES):
        return None
    keys_at = 8 * count
    prompts_at = keys_at + KEY_BYTES * count
    return Scan(
        np.frombuffer(body, "<i8", count).astype(np.int64),
        np.frombuffer(body, f"S{KEY_BYTES}", count, keys_at),
        np.frombuffer(body, f"S{PROMPT_BYTES}", count, prompts_at),
        num_rows,
        errors,
    )
