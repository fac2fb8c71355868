"""Reads the pickles of torch's checkpoints as plain values. No code of a pickle runs.

A small machine knows the opcodes that torch's picklers write for these files (protocols 2 to 5)
and the classes of an allow-list. A class never becomes a Python class: ``Made`` records its name,
its arguments and its state. Values are not hashed, compared or copied here, and nothing is read
recursively, so the work is linear in the bytes.
"""

import gc
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from merit_fast.errors import InputError
from merit_fast.merge.read.dcp.machine import MAX_STACK, Machine, Refused
from merit_fast.merge.read.dcp.values import PERSISTENT, Global, Made, Pairs

MAX_PICKLE_BYTES = 100_000_000


def read_pickle(data: bytes, where: str, allowed: Callable[[str, str], bool]) -> Any:
    """The value of a pickle.

    Args:
        data: the pickle's bytes; the rest after its end is not read.
        where: opens an error's message.
        allowed: whether a module's class or function may be named.

    Raises:
        InputError: an opcode or a class that is not known here, a pickle that is cut off or that
            breaks a rule of its opcodes.
    """
    machine = Machine(data, allowed)
    try:
        with _no_collection():
            return _run(machine)
    except Refused as error:
        raise InputError(f"{where}: {error}, at byte {machine.at}") from None
    except (IndexError, struct.error):
        raise InputError(
            f"{where}: the pickle is cut off or damaged near byte {machine.at}"
        ) from None


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pauses the search for cycles, whose cost would grow with the square of the objects."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _run(machine: Machine) -> Any:
    data = machine.data
    stack = machine.stack
    while True:
        code = data[machine.at]
        if code == _STOP:
            break
        act = _ACTS.get(code)
        if act is None:
            raise Refused(f"opcode {bytes([code])!r} is not one that torch writes")
        machine.at += 1
        act(machine)
        if len(stack) > MAX_STACK:
            raise Refused(f"holds more than {MAX_STACK} values at once")
    if len(stack) != 1 or machine.marks:
        raise Refused(f"must end with one value, has {len(stack)}")
    return stack[0]


_BYTE = struct.Struct("<B")
_SHORT = struct.Struct("<H")
_WORD = struct.Struct("<I")
_INT = struct.Struct("<i")
_LONG = struct.Struct("<Q")
_DOUBLE = struct.Struct(">d")
_STOP = ord(".")


def _protocol(machine: Machine) -> None:
    number = machine.take(_BYTE)
    if machine.at != 2:
        raise Refused("protocol must be named first and once")
    if not 2 <= number <= 5:
        raise Refused(f"protocol must be 2 to 5, got {number}")


def _frame(machine: Machine) -> None:
    machine.take(_LONG)  # a hint for buffers


def _text(form: struct.Struct) -> Callable[[Machine], None]:
    return lambda machine: machine.stack.append(machine.take_text(machine.take(form)))


def _bytes(form: struct.Struct) -> Callable[[Machine], None]:
    return lambda machine: machine.stack.append(machine.take_bytes(machine.take(form)))


def _number(form: struct.Struct) -> Callable[[Machine], None]:
    return lambda machine: machine.stack.append(machine.take(form))


def _byte(machine: Machine) -> None:
    machine.stack.append(machine.data[machine.at])
    machine.at += 1


def _constant(value: object) -> Callable[[Machine], None]:
    return lambda machine: machine.stack.append(value)


def _long(machine: Machine) -> None:
    data = machine.take_bytes(machine.take(_BYTE))
    machine.stack.append(int.from_bytes(data, "little", signed=True))


def _tuple_of(count: int) -> Callable[[Machine], None]:
    def act(machine: Machine) -> None:
        stack = machine.stack
        floor = machine.marks[-1] if machine.marks else 0
        if len(stack) - count < floor:
            raise IndexError
        values = tuple(stack[-count:])
        del stack[-count:]
        machine.made(values)

    return act


def _tuple(machine: Machine) -> None:
    machine.made(tuple(machine.pop_to_mark()))


def _append(machine: Machine) -> None:
    value = machine.pop()
    machine.count(1)
    machine.top(list).append(value)


def _appends(machine: Machine) -> None:
    values = machine.pop_to_mark()
    machine.count(len(values) + 1)
    machine.top(list).extend(values)


def _set_item(machine: Machine) -> None:
    value = machine.pop()
    key = machine.pop()
    machine.count(2)
    machine.top(Pairs).extend((key, value))


def _set_items(machine: Machine) -> None:
    values = machine.pop_to_mark()
    if len(values) % 2:
        raise Refused("a key has no value")
    machine.count(len(values) + 1)
    machine.top(Pairs).extend(values)


def _stack_global(machine: Machine) -> None:
    name = machine.pop()
    module = machine.pop()
    machine.stack.append(machine.find(module, name))


def _global(machine: Machine) -> None:
    module = machine.take_line()
    machine.stack.append(machine.find(module, machine.take_line()))


def _call(is_object: bool) -> Callable[[Machine], None]:
    def act(machine: Machine) -> None:
        args = machine.pop()
        function = machine.pop()
        if type(function) is not Global or type(args) is not tuple:
            raise Refused("calls something that is no class")
        machine.made(Made(function, args, is_object))

    return act


def _build(machine: Machine) -> None:
    state = machine.pop()
    made = machine.top(Made)
    if made.state is not None:
        raise Refused("sets the state of an object twice")
    made.state = state


def _storage(machine: Machine) -> None:
    """A persistent id, which torch uses for a tensor's storage."""
    machine.made(Made(PERSISTENT, machine.pop(), False))


_ACTS: dict[int, Callable[[Machine], None]] = {
    ord(code): act
    for code, act in {
        "\x80": _protocol,
        "\x95": _frame,
        "\x8c": _text(_BYTE),
        "X": _text(_WORD),
        "C": _bytes(_BYTE),
        "K": _byte,
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
        "(": Machine.mark,
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
