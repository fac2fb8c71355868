"""The state of a pickle that is being read, within bounds."""

import struct
from collections.abc import Callable
from typing import Any

from merit_fast.merge.read.dcp.values import Global
from merit_fast.merge.read.files import quote

MAX_STACK = 10_000  # a pickler fills lists and dicts in batches of 1000
_MAX_OBJECTS = 4_000_000  # containers and their items: about 35 for each chunk of a tensor
_TOO_MANY = f"makes more than {_MAX_OBJECTS} objects"
_MAX_TEXT = 4096  # bytes of a name


class Refused(Exception):
    """A rule that the pickle breaks."""


class Machine:
    """Stack, marks and memo of a pickle, and the bytes that are still to be read."""

    def __init__(self, data: bytes, allowed: Callable[[str, str], bool]) -> None:
        self.data = data
        self.at = 0
        self.allowed = allowed
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []
        self.objects = 0
        self.globals: dict[tuple[str, str], Global] = {}

    def take(self, form: struct.Struct) -> int:
        number: int = form.unpack_from(self.data, self.at)[0]
        self.at += form.size
        return number

    def take_bytes(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.data):
            raise IndexError
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def take_text(self, count: int) -> str:
        if count > _MAX_TEXT:
            raise Refused(f"a text must have at most {_MAX_TEXT} bytes, got {count}")
        try:
            return self.take_bytes(count).decode("utf-8")
        except UnicodeDecodeError:
            raise Refused("a text must be UTF-8") from None

    def take_line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + _MAX_TEXT)
        if end < 0:
            raise IndexError
        text = self.take_text(end - self.at)
        self.at += 1
        return text

    def made(self, value: Any) -> None:
        """Pushes a new container."""
        self.objects += 1
        if self.objects > _MAX_OBJECTS:
            raise Refused(_TOO_MANY)
        self.stack.append(value)

    def count(self, number: int) -> None:
        """Counts what a hostile file could repeat without end."""
        self.objects += number
        if self.objects > _MAX_OBJECTS:
            raise Refused(_TOO_MANY)

    def mark(self) -> None:
        if len(self.marks) > MAX_STACK:
            raise Refused(f"opens more than {MAX_STACK} containers at once")
        self.marks.append(len(self.stack))

    def pop(self) -> Any:
        floor = self.marks[-1] if self.marks else 0
        if len(self.stack) <= floor:
            raise IndexError
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def top(self, kind: type) -> Any:
        """The container that is being filled."""
        floor = self.marks[-1] if self.marks else 0
        if len(self.stack) <= floor or type(self.stack[-1]) is not kind:
            raise Refused("fills something that is no list or dict")
        return self.stack[-1]

    def find(self, module: object, name: object) -> Global:
        if not (type(module) is str and type(name) is str):
            raise Refused("a class must be named by two texts")
        found = self.globals.get((module, name))
        if found is None:
            if not self.allowed(module, name):
                raise Refused(f"names {quote(f'{module}.{name}')}, which is not read")
            found = Global(module, name)
            self.globals[module, name] = found
        return found

    def remember(self, place: int) -> None:
        if place != len(self.memo):
            raise Refused(f"numbers its values out of order: must be {len(self.memo)}, got {place}")
        floor = self.marks[-1] if self.marks else 0
        if len(self.stack) <= floor:
            raise IndexError
        value = self.stack[-1]
        if self.memo and value is self.memo[-1] and type(value) not in (str, int):
            raise Refused("numbers a value twice")
        self.memo.append(value)

    def recall(self, place: int) -> None:
        self.stack.append(self.memo[place])
