"""Writes the values that ``read.dcp.pickles`` reads as a pickle of protocol 2."""

import struct
from collections.abc import Iterator
from itertools import count
from typing import Any

from merit_fast.merge.read.dcp.values import PERSISTENT, Global, Made

_MOST_DEPTH = 200
_CONTAINERS = {"tuple": (b"", b"t"), "list": (b"]", b"e"), "Pairs": (b"}", b"u")}


def write_pickle(value: Any) -> bytes:
    """The pickle of a value; ``pickle.load`` calls each ``Made`` and gives objects their state.

    Texts and classes are written once and then by number.

    Raises:
        ValueError: a value of another type, or one that is nested too deeply.
    """
    return b"".join((b"\x80\x02", *_Writer().value(value, 0), b"."))


class _Writer:
    def __init__(self) -> None:
        self.numbers: dict[Any, int] = {}
        self.next = count()

    def value(self, value: Any, depth: int) -> Iterator[bytes]:
        if depth > _MOST_DEPTH:
            raise ValueError(f"must be nested at most {_MOST_DEPTH} deep")
        if value is None:
            yield b"N"
        elif type(value) is bool:
            yield b"\x88" if value else b"\x89"
        elif type(value) is int:
            yield _int(value)
        elif type(value) is float:
            yield b"G" + struct.pack(">d", value)
        elif type(value) is str:
            yield self.once(value, b"X" + _sized(value.encode("utf-8")))
        elif type(value) is Global:
            name = f"c{value.module}\n{value.name}\n"
            yield self.once(value, name.encode("utf-8"))
        elif type(value) is Made:
            yield from self.made(value, depth)
        else:
            yield from self.container(value, depth)

    def once(self, value: Any, code: bytes) -> bytes:
        """The code of a value, with a number for it; later only the number."""
        number = self.numbers.get(value)
        if number is not None:
            return b"h" + bytes([number]) if number < 256 else b"j" + struct.pack("<I", number)
        number = next(self.next)
        self.numbers[value] = number
        put = b"q" + bytes([number]) if number < 256 else b"r" + struct.pack("<I", number)
        return code + put

    def made(self, value: Made, depth: int) -> Iterator[bytes]:
        if value.function == PERSISTENT:
            yield from self.value(value.args, depth + 1)
            yield b"Q"
            return
        yield from self.value(value.function, depth + 1)
        yield from self.value(value.args, depth + 1)
        yield b"\x81" if value.is_object else b"R"
        if value.state is not None:
            yield from self.value(value.state, depth + 1)
            yield b"b"

    def container(self, value: Any, depth: int) -> Iterator[bytes]:
        kind = type(value).__name__
        if kind not in _CONTAINERS:
            raise ValueError(f"a {kind} cannot be written")
        start, end = _CONTAINERS[kind]
        if type(value) is tuple and not value:
            yield b")"
            return
        yield start + b"("
        for each in value:
            yield from self.value(each, depth + 1)
        yield end


def _int(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _sized(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data
