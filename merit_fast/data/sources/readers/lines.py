"""Reads JSON objects: one per line, or as the items of an array."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from merit_fast.data.sources.readers.opening import open_stream
from merit_fast.data.sources.readers.picker import Picker
from merit_fast.errors import InputError, one_line

RawRow = tuple[str, bytes | dict[str, Any]]  # place, the row's JSON text or its columns

_BOM = codecs.BOM_UTF8
_BLOCK = 1 << 20
_LONGEST_WORD = 16  # characters: -Infinity, or an escaped surrogate pair
_SPACE = re.compile(r"[ \t\n\r]*")


def json_rows(name: str, picker: Picker) -> Iterator[RawRow]:
    """Yields the rows of a JSON file: of an array where it begins with one, else of its lines.

    Raises:
        InputError: the file is unreadable, or an array is broken; names file and place.
    """
    with open_stream(name) as stream:
        head, skipped = _head(stream)
        if head.lstrip()[:1] == b"[":
            yield from _array_rows(name, head, stream, picker)
        else:
            yield from _line_rows(name, head, skipped, stream, picker)


def _head(stream: IO[bytes]) -> tuple[bytes, int]:
    """The first line that holds something, without a byte order mark, and the lines before it."""
    skipped = 0
    line = stream.readline(_BLOCK).removeprefix(_BOM)
    while line and not line.strip():
        skipped += line.endswith(b"\n")
        line = stream.readline(_BLOCK)
    return line, skipped


def _line_rows(
    name: str, head: bytes, skipped: int, stream: IO[bytes], picker: Picker
) -> Iterator[RawRow]:
    if head and not head.endswith(b"\n"):
        head += stream.readline()
    number = skipped + 1
    if head and picker.take():
        yield f"{name}:{number}", head.rstrip()
    # read as bytes: only \n ends a line, and an encoding error can name its line
    while not picker.is_done and (line := stream.readline()):
        number += 1
        if line.strip() and picker.take():
            yield f"{name}:{number}", line.rstrip()


def parse_line(line: bytes, place: str) -> dict[str, Any]:
    """Reads the JSON object of a line.

    Raises:
        InputError: the line is no UTF-8, no JSON, or no object; names the place.
    """
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        byte = f"byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line"
        raise InputError(f"{place}: must be UTF-8 text, got {byte}") from None
    except json.JSONDecodeError as error:
        hint = "; one object per line, or one array of objects, is needed"
        is_spread = line.rstrip().endswith((b"[", b"{", b",")) or error.msg == "Extra data"
        raise InputError(
            f"{place}: must be one JSON object: {error.msg} at column {error.colno}"
            f"{hint if is_spread else ''}"
        ) from None
    # an integer of thousands of digits, or endless nesting
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: must be one JSON object: {one_line(error)}") from None
    return _object(row, place)


def _object(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"{place}: must be a JSON object {{...}}, got {type(row).__name__}")
    return row


def _array_rows(name: str, head: bytes, stream: IO[bytes], picker: Picker) -> Iterator[RawRow]:
    """Yields the items of one array, read block by block."""
    text = _Text(name, head, stream)
    text.pass_one("[")
    number = 0
    while not picker.is_done:
        if text.peek() == "]":
            text.pass_one("]")
            if text.peek():
                raise text.error("the end of the file after ]", text.peek())
            return
        if number:
            text.pass_one(",")
        number += 1
        place = f"{name}: row {number}"
        row = _object(text.value(place), place)
        if picker.take():
            yield place, row


class _Text:
    """The text of a stream, of which only the block around the next value is in memory."""

    def __init__(self, name: str, head: bytes, stream: IO[bytes]) -> None:
        self._name = name
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._bytes = 0  # decoded so far
        self._lines = 0  # before the text
        self._place = 0  # in the text
        self._is_ended = False
        self._text = self._decode(head)
        self._scan = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            match = _SPACE.match(self._text, self._place)
            assert match
            self._place = match.end()
            if self._place < len(self._text) or not self._more():
                return self._text[self._place : self._place + 1]

    def pass_one(self, character: str) -> None:
        """Passes ``character``, which must come next."""
        found = self.peek()
        if found != character:
            raise self.error(character, found)
        self._place += 1

    def value(self, place: str) -> Any:
        """Passes one value and returns it."""
        self.peek()
        while True:
            try:
                value, end = self._scan(self._text, self._place)
            except json.JSONDecodeError as error:
                if self._is_cut(error) and self._more():
                    continue
                where = f"{error.msg} in line {self._line(error.pos)}"
                raise InputError(f"{place}: must be valid JSON: {where}") from None
            except (ValueError, RecursionError) as error:
                raise InputError(f"{place}: must be valid JSON: {one_line(error)}") from None
            if end < len(self._text) or not self._more():
                self._place = end
                return value

    def error(self, expected: str, found: str) -> InputError:
        """An error that names the line."""
        got = repr(found) if found else "the end of the file"
        where = f"{self._name}:{self._line(self._place)}"
        return InputError(
            f"{where}: must be part of one JSON array: expected {expected}, got {got}"
        )

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether the end of the block may be the reason of the error."""
        is_at_end = error.pos > len(self._text) - _LONGEST_WORD
        return is_at_end or error.msg.startswith("Unterminated string")

    def _line(self, place: int) -> int:
        return self._lines + self._text.count("\n", 0, place) + 1

    def _more(self) -> bool:
        """Reads on, at least as much as is there; False at the end."""
        if self._is_ended:
            return False
        self._lines += self._text.count("\n", 0, self._place)
        rest = self._text[self._place :]
        block = self._stream.read(max(_BLOCK, 2 * len(rest)))
        self._is_ended = not block
        self._text = rest + self._decode(block)
        self._place = 0
        return bool(block)

    def _decode(self, block: bytes) -> str:
        try:
            text = self._decoder.decode(block, not block)
        except UnicodeDecodeError as error:
            byte = f"byte 0x{error.object[error.start]:02x} near byte {self._bytes + error.start}"
            raise InputError(f"{self._name}: must be UTF-8 text, got {byte}") from None
        self._bytes += len(block)
        return text
