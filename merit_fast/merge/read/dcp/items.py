"""One tensor in a shard: a whole file of ``torch.save``, found by its zip directory and data.pkl.

Layout: stored records, each behind a local header; the tensor's bytes are the record ``data/0``;
then the central directory and its end record. Nothing is unpacked: the bytes are read in place.
"""

import struct
from dataclasses import dataclass
from typing import BinaryIO

from merit_fast.errors import InputError
from merit_fast.kernels.average.dtypes import ITEM_BYTES
from merit_fast.merge.read.dcp.metadata import Item
from merit_fast.merge.read.dcp.views import View, read_view
from merit_fast.merge.read.files import quote
from merit_fast.merge.read.remote import Location

END = struct.Struct("<4s4H2IH")
END64 = struct.Struct("<4sQ2H2I4Q")
LOCATOR = struct.Struct("<4sIQI")
CENTRAL = struct.Struct("<4s6H3I5H2I")
LOCAL = struct.Struct("<4s5H3I2H")
_TAIL = 4096  # holds directory and end record of what torch writes
_MAX_DIRECTORY = 1 << 16
_MAX_DATA_PICKLE = 1 << 16
_FOLDER = 0x10  # among the attributes of a file
FULL = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A chunk's storage in a file and the view of it that is the chunk."""

    offset: int  # bytes, from the start of the file
    view: View


@dataclass(frozen=True, slots=True)
class _Record:
    num_bytes: int
    header: int  # bytes from the start of the file


def read_item(opened: BinaryIO, file: Location, name: str, item: Item, size: int) -> StoredChunk:
    """The storage of one item.

    Args:
        opened: the shard.
        size: bytes of the shard.

    Raises:
        InputError: the item is no file of torch.save with one stored tensor in it; names file,
            tensor, rule and value.
    """
    return _Item(opened, file, name, item, size).read()


class _Item:
    def __init__(self, opened: BinaryIO, file: Location, name: str, item: Item, size: int) -> None:
        self.opened = opened
        self.where = f"{file}: {name}"
        self.first = item.offset
        self.end = item.offset + item.length
        if self.end > size:
            raise InputError(f"{self.where}: ends at byte {self.end}, the file at {size}")

    def read(self) -> StoredChunk:
        records = self.records()
        order = records.get("byteorder")
        if order is not None and self.content(order, 16) != b"little":
            raise InputError(f"{self.where}: must hold little-endian numbers")
        pickle = records.get("data.pkl")
        if pickle is None:
            raise InputError(f"{self.where}: has no record data.pkl")
        try:
            view = read_view(self.content(pickle, _MAX_DATA_PICKLE))
        except ValueError as error:
            raise InputError(f"{self.where}: data.pkl: {error}") from None
        return self.chunk(view, records)

    def records(self) -> dict[str, _Record]:
        """The zip's records by name, without the name of its root folder."""
        start = max(self.first, self.end - _TAIL)
        tail = self.bytes_at(start, self.end - start)
        if len(tail) < END.size or tail[-END.size :][:4] != b"PK\5\6":
            raise InputError(
                f"{self.where}: must be a file of torch.save, which ends as a zip does"
            )
        end = END.unpack(tail[-END.size :])
        count = end[4]
        num_bytes = end[5]
        at = end[6]
        locator = tail[-END.size - LOCATOR.size : -END.size]
        if locator[:4] == b"PK\6\7":
            count, num_bytes, at = self.large_directory(LOCATOR.unpack(locator)[2])
        if num_bytes > _MAX_DIRECTORY:
            rule = f"its directory must hold at most {_MAX_DIRECTORY} bytes"
            raise InputError(f"{self.where}: {rule}, got {num_bytes}")
        directory = self.bytes_at(self.first + at, num_bytes)
        return self.parse(directory, count)

    def large_directory(self, at: int) -> tuple[int, int, int]:
        """(records, bytes, offset) of the directory of a zip64."""
        record = self.bytes_at(self.first + at, END64.size)
        fields = END64.unpack(record)
        if fields[0] != b"PK\6\6":
            raise InputError(f"{self.where}: has no zip64 end record at byte {at}")
        return fields[7], fields[8], fields[9]

    def parse(self, directory: bytes, count: int) -> dict[str, _Record]:
        records: dict[str, _Record] = {}
        at = 0
        for _ in range(min(count, len(directory))):
            if at + CENTRAL.size > len(directory) or directory[at : at + 4] != b"PK\1\2":
                raise InputError(f"{self.where}: its zip directory is damaged")
            fields = CENTRAL.unpack_from(directory, at)
            method = fields[4]
            packed, num_bytes = fields[8:10]
            lengths = fields[10:13]
            attributes = fields[15]
            header = fields[16]
            at += CENTRAL.size
            name = directory[at : at + lengths[0]].decode("utf-8", "replace")
            extra = directory[at + lengths[0] : at + lengths[0] + lengths[1]]
            at += sum(lengths)
            if FULL in (packed, num_bytes, header):
                packed, num_bytes, header = _large(extra, packed, num_bytes, header)
            if method != 0 or packed != num_bytes:
                raise InputError(f"{self.where}: {quote(name)}: must be stored, is compressed")
            if attributes & _FOLDER:  # torch reads nothing then, and gives what the memory held
                raise InputError(f"{self.where}: {quote(name)}: must be a file, is a folder")
            records[name.partition("/")[2]] = _Record(num_bytes, self.first + header)
        return records

    def content(self, record: _Record, most: int) -> bytes:
        if record.num_bytes > most:
            rule = f"a record must hold at most {most} bytes"
            raise InputError(f"{self.where}: {rule}, got {record.num_bytes}")
        return self.bytes_at(self.start_of(record), record.num_bytes)

    def start_of(self, record: _Record) -> int:
        """First byte of a record's content; its local header may be longer than the directory's."""
        header = self.bytes_at(record.header, LOCAL.size)
        fields = LOCAL.unpack(header)
        if fields[0] != b"PK\3\4":
            raise InputError(f"{self.where}: has no record at byte {record.header}")
        start: int = record.header + LOCAL.size + fields[9] + fields[10]
        if start + record.num_bytes > self.end:
            rule = f"a record ends at byte {start + record.num_bytes}"
            raise InputError(f"{self.where}: {rule}, its item at {self.end}")
        return start

    def bytes_at(self, at: int, count: int) -> bytes:
        if not self.first <= at <= at + count <= self.end:
            raise InputError(f"{self.where}: points to byte {at} outside its item")
        self.opened.seek(at)
        data = self.opened.read(count)
        if len(data) != count:
            raise InputError(f"{self.where}: the file ends before byte {at + count}")
        return data

    def chunk(self, view: View, records: dict[str, _Record]) -> StoredChunk:
        """The storage that the tensor of data.pkl views."""
        record = records.get(f"data/{view.key}")
        num_bytes = view.num_elements * ITEM_BYTES[view.dtype]
        if record is None or record.num_bytes != num_bytes:
            found = "none" if record is None else record.num_bytes
            raise InputError(
                f"{self.where}: record data/{view.key} must hold {num_bytes} bytes, got {found}"
            )
        return StoredChunk(self.start_of(record), view)


def _large(extra: bytes, packed: int, num_bytes: int, header: int) -> tuple[int, int, int]:
    """Sizes and offset of a zip64 record: extra field 1 holds, in order, those that are full."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            count = min(length, len(extra) - at - 4) // 8
            numbers = iter(struct.unpack_from(f"<{count}Q", extra, at + 4))
            num_bytes = next(numbers, num_bytes) if num_bytes == FULL else num_bytes
            packed = next(numbers, packed) if packed == FULL else packed
            header = next(numbers, header) if header == FULL else header
            break
        at += 4 + length
    return packed, num_bytes, header
