"""Reads the pickles of torch's checkpoints as plain values. No code of a pickle runs.

A small machine knows the opcodes that torch's picklers write for these files (protocols 2 to 5)
and the classes of an allow-list. A class never becomes a Python class: ``Made`` records its name,
its arguments and its state. Values are not hashed, compared or copied here, and nothing is read
recursively, so the work is linear in the bytes.
"""

import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from merit_fast.errors import InputError
from merit_fast.merge.read.files import quote

MAX_PICKLE_BYTES = 100_000_000
_MAX_STACK = 10_000  # a pickler fills lists and dicts in batches of 1000
_MAX_OBJECTS = 6_000_000  # containers; about 15 for each chunk of a tensor
_MAX_TEXT = 4096  # characters of a name


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function that a pickle names."""

    module: str
    name: str


@dataclass(slots=True, repr=False)
class Made:
    """What a pickle makes by a call: ``function(*args)``, or an object of a class."""

    function: Global
    args: Any
    is_object: bool
    state: Any = None

    def __repr__(self) -> str:
        return f"a {self.function.name}"


class Pairs(list[Any]):
    """A dict's keys and values in turn."""

    def __repr__(self) -> str:
        return f"a dict of {len(self) // 2}"

    def fields(self) -> dict[str, Any]:
        """The dict, for keys of text.

        Raises:
            ValueError: a key is no text, or stands twice.
        """
        keys = self[::2]
        if not all(type(key) is str for key in keys):
            raise ValueError("keys must be text")
        values = dict(zip(keys, self[1::2], strict=True))
        if len(values) != len(keys):
            raise ValueError("a key stands twice")
        return values


class _Refused(Exception):
    """A rule that the pickle breaks."""


def read_pickle(
    data: bytes, where: str, allowed: Callable[[str, str], bool] | Collection[tuple[str, str]]
) -> Any:
    """The value of a pickle.

    Args:
        data: the pickle's bytes; the rest after its end is not read.
        where: opens an error's message.
        allowed: pairs of module and name, or a function of both.

    Raises:
        InputError: an opcode or a class that is not known here, a pickle that is cut off or that
            breaks a rule of its opcodes.
    """
    is_allowed = allowed if callable(allowed) else lambda *pair: pair in allowed
    machine = _Machine(data, is_allowed)
    try:
        return machine.run()
    except _Refused as error:
        raise InputError(f"{where}: {error}, at byte {machine.at}") from None
    except (IndexError, struct.error):
        raise InputError(
            f"{where}: the pickle is cut off or damaged near byte {machine.at}"
        ) from None


class _Machine:
    def __init__(self, data: bytes, allowed: Callable[[str, str], bool]) -> None:
        self.data = data
        self.at = 0
        self.allowed = allowed
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []
        self.objects = 0
        self.globals: dict[tuple[str, str], Global] = {}

    def run(self) -> Any:
        data = self.data
        stack = self.stack
        while True:
            code = data[self.at]
            if code == _STOP:
                break
            act = _ACTS.get(code)
            if act is None:
                raise _Refused(f"opcode {bytes([code])!r} is not one that torch writes")
            self.at += 1
            act(self)
            if len(stack) + len(self.marks) > _MAX_STACK:
                raise _Refused(f"holds more than {_MAX_STACK} values at once")
        if len(stack) != 1 or self.marks:
            raise _Refused(f"must end with one value, has {len(stack)}")
        return stack[0]

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
            raise _Refused(f"a text must have at most {_MAX_TEXT} bytes, got {count}")
        try:
            return self.take_bytes(count).decode("utf-8")
        except UnicodeDecodeError:
            raise _Refused("a text must be UTF-8") from None

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
            raise _Refused(f"makes more than {_MAX_OBJECTS} objects")
        self.stack.append(value)

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
            raise _Refused("fills something that is no list or dict")
        return self.stack[-1]

    def find(self, module: object, name: object) -> Global:
        if not (type(module) is str and type(name) is str):
            raise _Refused("a class must be named by two texts")
        found = self.globals.get((module, name))
        if found is None:
            if not self.allowed(module, name):
                raise _Refused(f"names {quote(f'{module}.{name}')}, which is not read")
            found = Global(module, name)
            self.globals[module, name] = found
        return found

    def remember(self, place: int) -> None:
        if place != len(self.memo):
            raise _Refused(
                f"numbers its values out of order: must be {len(self.memo)}, got {place}"
            )
        floor = self.marks[-1] if self.marks else 0
        if len(self.stack) <= floor:
            raise IndexError
        self.memo.append(self.stack[-1])

    def recall(self, place: int) -> None:
        self.stack.append(self.memo[place])


_BYTE = struct.Struct("<B")
_SHORT = struct.Struct("<H")
_WORD = struct.Struct("<I")
_INT = struct.Struct("<i")
_LONG = struct.Struct("<Q")
_DOUBLE = struct.Struct(">d")
_STOP = ord(".")


def _protocol(machine: _Machine) -> None:
    number = machine.take(_BYTE)
    if not 2 <= number <= 5:
        raise _Refused(f"protocol must be 2 to 5, got {number}")


def _frame(machine: _Machine) -> None:
    machine.take(_LONG)  # a hint for buffers


def _text(form: struct.Struct) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(machine.take_text(machine.take(form)))


def _bytes(form: struct.Struct) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(machine.take_bytes(machine.take(form)))


def _number(form: struct.Struct) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(machine.take(form))


def _constant(value: object) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(value)


def _long(machine: _Machine) -> None:
    data = machine.take_bytes(machine.take(_BYTE))
    machine.stack.append(int.from_bytes(data, "little", signed=True))


def _tuple_of(count: int) -> Callable[[_Machine], None]:
    def act(machine: _Machine) -> None:
        values = [machine.pop() for _ in range(count)]
        machine.made(tuple(values[::-1]))

    return act


def _tuple(machine: _Machine) -> None:
    machine.made(tuple(machine.pop_to_mark()))


def _append(machine: _Machine) -> None:
    value = machine.pop()
    machine.top(list).append(value)


def _appends(machine: _Machine) -> None:
    values = machine.pop_to_mark()
    machine.top(list).extend(values)


def _set_item(machine: _Machine) -> None:
    value = machine.pop()
    key = machine.pop()
    machine.top(Pairs).extend((key, value))


def _set_items(machine: _Machine) -> None:
    values = machine.pop_to_mark()
    if len(values) % 2:
        raise _Refused("a key has no value")
    machine.top(Pairs).extend(values)


def _stack_global(machine: _Machine) -> None:
    name = machine.pop()
    module = machine.pop()
    machine.stack.append(machine.find(module, name))


def _global(machine: _Machine) -> None:
    module = machine.take_line()
    machine.stack.append(machine.find(module, machine.take_line()))


def _call(is_object: bool) -> Callable[[_Machine], None]:
    def act(machine: _Machine) -> None:
        args = machine.pop()
        function = machine.pop()
        if type(function) is not Global or type(args) is not tuple:
            raise _Refused("calls something that is no class")
        machine.made(Made(function, args, is_object))

    return act


def _build(machine: _Machine) -> None:
    state = machine.pop()
    made = machine.top(Made)
    if made.state is not None:
        raise _Refused("sets the state of an object twice")
    made.state = state


def _storage(machine: _Machine) -> None:
    """A persistent id, which torch uses for a tensor's storage."""
    machine.made(Made(PERSISTENT, machine.pop(), False))


PERSISTENT = Global("", "storage")
_ACTS: dict[int, Callable[[_Machine], None]] = {
    ord(code): act
    for code, act in {
        "\x80": _protocol,
        "\x95": _frame,
        "\x8c": _text(_BYTE),
        "X": _text(_WORD),
        "C": _bytes(_BYTE),
        "K": _number(_BYTE),
        "M": _number(_SHORT),
        "J": _number(_INT),
        "G": _number(_DOUBLE),
        "\x8a": _long,
        "N": _constant(None),
        "\x88": _constant(True),
        "\x89": _constant(False),
        ")": _constant(()),
        "]": lambda machine: machine.made([]),
        "}": lambda machine: machine.made(Pairs()),
        "(": lambda machine: machine.marks.append(len(machine.stack)),
        "\x85": _tuple_of(1),
        "\x86": _tuple_of(2),
        "\x87": _tuple_of(3),
        "t": _tuple,
        "a": _append,
        "e": _appends,
        "s": _set_item,
        "u": _set_items,
        "\x93": _stack_global,
        "c": _global,
        "\x81": _call(True),
        "R": _call(False),
        "b": _build,
        "Q": _storage,
        "\x94": lambda machine: machine.remember(len(machine.memo)),
        "q": lambda machine: machine.remember(machine.take(_BYTE)),
        "r": lambda machine: machine.remember(machine.take(_WORD)),
        "h": lambda machine: machine.recall(machine.take(_BYTE)),
        "j": lambda machine: machine.recall(machine.take(_WORD)),
    }.items()
}
