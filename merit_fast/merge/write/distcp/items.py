"""One tensor as ``torch.save`` writes it: a zip of stored records, the tensor's bytes the last."""

import struct
from functools import lru_cache
from zlib import crc32

from merit_fast.kernels.average.dtypes import DTYPES, ITEM_BYTES
from merit_fast.merge.read.dcp.items import CENTRAL, END, END64, FULL, LOCAL, LOCATOR
from merit_fast.merge.read.dcp.values import PERSISTENT, Global, Made
from merit_fast.merge.read.dcp.views import STORAGES
from merit_fast.merge.write.distcp.pickles import write_pickle
from merit_fast.records import record

ALIGNMENT = 64  # of a tensor's first byte, as in torch
_ROOT = "archive/"
_DATA = "data/0"
_VERSION = 45  # of the zip format, with sizes of 64 bits
_STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}


@record
class ItemForm:
    """The bytes around a tensor's own, and where the checksum of those must be filled in."""

    head: bytes
    tail: bytes
    crc_places: tuple[int, int]  # from the item's start

    @property
    def start(self) -> int:
        """First byte of the tensor, from the item's start."""
        return len(self.head)


@lru_cache(4096)
def item_form(dtype: str, sizes: tuple[int, ...], num_bytes: int) -> ItemForm:
    """The item of a tensor in row-major order.

    ``head + tensor + tail`` is a file that ``torch.load`` reads; both checksums are 0. The head
    has a length of a multiple of 64.
    """
    records = {
        "data.pkl": write_pickle(_view(dtype, sizes)),
        "byteorder": b"little",
        "version": b"3\n",
    }
    head = b""
    directory = b""
    for name, content in records.items():
        directory += _central(name, crc32(content), len(content), len(head))
        head += _local(name, crc32(content), len(content), b"") + content
    at = len(head)
    head += _local_data(at, num_bytes)
    crc_of_directory = len(head) + num_bytes + len(directory) + _CRC_IN_CENTRAL
    directory += _central(_DATA, 0, num_bytes, at)
    count = len(records) + 1
    tail = directory + _end(count, len(directory), len(head) + num_bytes)
    return ItemForm(head, tail, (at + _CRC_IN_LOCAL, crc_of_directory))


_CRC_IN_LOCAL = 14
_CRC_IN_CENTRAL = 16


def _view(dtype: str, sizes: tuple[int, ...]) -> Made:
    """data.pkl: a tensor that views the whole of storage 0."""
    strides = []
    count = 1
    for size in reversed(sizes):
        strides.append(count)
        count *= size
    hooks = Made(Global("collections", "OrderedDict"), (), False)
    storage_name = _STORAGE_NAMES.get(dtype)
    if storage_name is not None:
        storage = ("storage", Global("torch", storage_name), "0", "cpu", count)
        rebuild = Global("torch._utils", "_rebuild_tensor_v2")
        extra: tuple[Global, ...] = ()
    else:
        num_bytes = count * ITEM_BYTES[dtype]
        storage = ("storage", Global("torch.storage", "UntypedStorage"), "0", "cpu", num_bytes)
        rebuild = Global("torch._utils", "_rebuild_tensor_v3")
        extra = (Global("torch", DTYPES[dtype].torch_name),)
    view = (Made(PERSISTENT, storage, False), 0, sizes, tuple(reversed(strides)), False, hooks)
    return Made(rebuild, (*view, *extra), False)


def _local(name: str, crc: int, num_bytes: int, extra: bytes) -> bytes:
    path = (_ROOT + name).encode()
    size = min(num_bytes, FULL)
    times = (0, 0x21)  # the first day of 1980
    fields = (b"PK\3\4", _VERSION, 0, 0, *times, crc, size, size, len(path), len(extra))
    return LOCAL.pack(*fields) + path + extra


def _local_data(at: int, num_bytes: int) -> bytes:
    """Local header of the tensor's record, as long as its first byte's alignment needs."""
    large = struct.pack("<2H2Q", 1, 16, num_bytes, num_bytes) if num_bytes >= FULL else b""
    bare = len(_local(_DATA, 0, num_bytes, large)) + 4
    padding = -(at + bare) % ALIGNMENT
    return _local(_DATA, 0, num_bytes, large + struct.pack("<2sH", b"FB", padding) + b"Z" * padding)


def _central(name: str, crc: int, num_bytes: int, header: int) -> bytes:
    path = (_ROOT + name).encode()
    size = min(num_bytes, FULL)
    large = struct.pack("<2H2Q", 1, 16, num_bytes, num_bytes) if num_bytes >= FULL else b""
    times = (0, 0x21)
    lengths = (len(path), len(large), 0)
    fields = (
        b"PK\1\2",
        _VERSION,
        _VERSION,
        0,
        0,
        *times,
        crc,
        size,
        size,
        *lengths,
        0,
        0,
        0,
        header,
    )
    return CENTRAL.pack(*fields) + path + large


def _end(count: int, num_bytes: int, at: int) -> bytes:
    """End of the zip's directory; its record of 64 bits where the offset needs it."""
    large = b""
    if at >= FULL:
        fields = (b"PK\6\6", END64.size - 12, _VERSION, _VERSION, 0, 0, count, count, num_bytes, at)
        large = END64.pack(*fields) + LOCATOR.pack(b"PK\6\7", 0, at + num_bytes, 1)
    return large + END.pack(b"PK\5\6", 0, 0, count, count, num_bytes, min(at, FULL), 0)
