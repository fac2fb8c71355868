"""The ``.metadata`` of a distributed checkpoint: its tensors, their chunks, and where these lie."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from merit_fast.errors import InputError
from merit_fast.kernels.average.dtypes import DTYPES
from merit_fast.merge.read.dcp.pickles import MAX_PICKLE_BYTES, read_pickle
from merit_fast.merge.read.dcp.values import Global, Made, Pairs
from merit_fast.merge.read.files import open_regular, quote, size_of
from merit_fast.merge.read.headers import check_name
from merit_fast.merge.read.remote import Location
from merit_fast.records import record

METADATA_FILE = ".metadata"
CHECKPOINT = "torch.distributed.checkpoint.metadata"
FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_OLDER = "torch.distributed._shard.sharded_tensor.metadata"  # of tensor properties, torch < 2.3
_MAX_NUMBER = 2**63 - 1
_MAX_DIMENSIONS = 64
TORCH_DTYPES = {dtype.torch_name: dtype.name for dtype in DTYPES.values()}
_CLASSES = {
    *(
        (CHECKPOINT, name)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    (_OLDER, "TensorProperties"),
    (_OLDER, "MEM_FORMAT_ENCODING"),
    (FILESYSTEM, "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    *(("pathlib", name) for name in ("PosixPath", "PurePosixPath", "Path", "WindowsPath")),
    ("pathlib", "PureWindowsPath"),
    *(("pathlib._local", name) for name in ("PosixPath", "WindowsPath")),  # Python 3.13
}

Place = tuple[str | int, ...]  # keys that lead to a value in the nested state dict


@dataclass(frozen=True, slots=True)
class Item:
    """A run of bytes of a shard: one chunk of a tensor, or another value."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor. ``item`` is None only for a box without elements."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    item: Item | None

    @property
    def has_elements(self) -> bool:
        return 0 not in self.sizes


@record
class SavedTensor:
    """One tensor. ``place`` holds the keys of the state dict that lead to it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    place: Place


@record
class SavedBytes:
    """A value that is no tensor, as a pickle."""

    name: str
    item: Item
    place: Place


@record
class Metadata:
    """A parsed ``.metadata``. ``root`` is the pickle's value, for a writer."""

    file: Location
    tensors: dict[str, SavedTensor]
    others: dict[str, SavedBytes]
    root: Made


def read_metadata(file: Location) -> Metadata:
    """Reads a ``.metadata``.

    Raises:
        InputError: it is too large, no such pickle, or names a class or a function that is not
            read here; a tensor's entry breaks a rule.
    """
    with open_regular(file) as opened:
        size = size_of(opened)
        if size > MAX_PICKLE_BYTES:
            raise InputError(f"{file}: must hold at most {MAX_PICKLE_BYTES} bytes, got {size}")
        data = opened.read(size)
    root = read_pickle(data, str(file), _allowed)
    return _Reader(file).metadata(root)


def _allowed(module: str, name: str) -> bool:
    return (module, name) in _CLASSES or (module == "torch" and name in TORCH_DTYPES)


class _Reader:
    """Checks the parts of a ``.metadata`` on their way in."""

    def __init__(self, file: Location) -> None:
        self.file = file

    def metadata(self, root: Any) -> Metadata:
        state = self.fields(root, "Metadata", "the pickle")
        entries = self.pairs(state.get("state_dict_metadata"), "state_dict_metadata")
        items = self.items(state.get("storage_data"))
        places = self.places(state.get("planner_data"))
        tensors: dict[str, SavedTensor] = {}
        others: dict[str, SavedBytes] = {}
        for name, value in entries:
            if type(name) is not str:
                raise self.error("state_dict_metadata", "keys must be text", name)
            check_name(self.file, name)
            if name in tensors or name in others:
                raise InputError(f"{self.file}: {name}: stands twice in state_dict_metadata")
            place = places.get(name, (name,))
            if _is_made(value, "BytesStorageMetadata"):
                item = items.get((name, None))
                if item is None:
                    raise InputError(f"{self.file}: {name}: storage_data has no place of it")
                others[name] = SavedBytes(name, item, place)
            else:
                tensors[name] = self.tensor(name, value, items, place)
        return Metadata(self.file, tensors, others, root)

    def tensor(
        self, name: str, value: Any, items: dict[tuple[str, Any], Item], place: Place
    ) -> SavedTensor:
        state = self.fields(value, "TensorStorageMetadata", name)
        shape = self.size(state.get("size"), f"{name}: size")
        chunks = []
        listed = state.get("chunks")
        if type(listed) is not list:
            raise self.error(f"{name}: chunks", "must be a list", listed)
        for each in listed:
            box = self.fields(each, "ChunkStorageMetadata", f"{name}: a chunk")
            offsets = self.size(box.get("offsets"), f"{name}: offsets")
            sizes = self.size(box.get("sizes"), f"{name}: sizes")
            if not len(offsets) == len(sizes) == len(shape):
                rule = f"a chunk must have {len(shape)} dimensions as the tensor"
                raise self.error(name, rule, [offsets, sizes])
            item = items.get((name, offsets))
            if item is None and 0 not in sizes:
                rule = "storage_data has no place of the chunk at"
                raise InputError(f"{self.file}: {name}: {rule} {quote(list(offsets))}")
            chunks.append(Chunk(offsets, sizes, item))
        dtype = self.dtype(state.get("properties"), name)
        return SavedTensor(name, dtype, shape, tuple(chunks), place)

    def dtype(self, value: Any, name: str) -> str:
        if not _is_made(value, "TensorProperties") or type(value.state) is not tuple:
            raise self.error(name, "must have TensorProperties", value)
        dtype: Any = value.state[0] if value.state else None
        known = type(dtype) is Global and dtype.module == "torch"
        if not known or dtype.name not in TORCH_DTYPES:
            raise self.error(name, f"dtype must be one of {', '.join(TORCH_DTYPES)}", dtype)
        return TORCH_DTYPES[dtype.name]

    def items(self, value: Any) -> dict[tuple[str, Any], Item]:
        """(name, offsets or None) -> place of its bytes."""
        items: dict[tuple[str, Any], Item] = {}
        for index, info in self.pairs(value, "storage_data"):
            key = self.fields(index, "MetadataIndex", "storage_data: a key")
            name = key.get("fqn")
            if type(name) is not str:
                raise self.error("storage_data", "fqn must be text", name)
            offset = key.get("offset")
            at = None if offset is None else self.size(offset, f"{name}: offset")
            items[name, at] = self.item(info, name)
        return items

    def item(self, value: Any, name: str) -> Item:
        state = self.fields(value, "_StorageInfo", f"{name}: its place")
        if state.get("transform_descriptors"):
            rule = "is transformed (compressed); save it without extensions"
            raise self.error(name, rule, state["transform_descriptors"])
        file = state.get("relative_path")
        if type(file) is not str or not _is_plain_name(file):
            raise self.error(name, "must name a file of the checkpoint's folder", file)
        offset = self.number(state.get("offset"), f"{name}: offset")
        return Item(file, offset, self.number(state.get("length"), f"{name}: length"))

    def places(self, value: Any) -> dict[str, Place]:
        """Name -> keys that lead to it; {} where the planner wrote none."""
        if value is None:
            return {}
        places: dict[str, Place] = {}
        for name, place in self.pairs(value, "planner_data"):
            keys = type(place) is tuple and 0 < len(place) <= _MAX_DIMENSIONS
            if type(name) is not str or not keys or not all(type(k) in (str, int) for k in place):
                raise self.error("planner_data", "must map names to tuples of keys", [name, place])
            places[name] = place
        return places

    def size(self, value: Any, where: str) -> tuple[int, ...]:
        """The numbers of a torch.Size."""
        numbers = value
        if type(value) is Made and value.function == _SIZE and len(value.args) == 1:
            numbers = value.args[0]
        if type(numbers) not in (tuple, list) or len(numbers) > _MAX_DIMENSIONS:
            raise self.error(where, f"must be at most {_MAX_DIMENSIONS} integers", value)
        return tuple(self.number(number, where) for number in numbers)

    def number(self, value: Any, where: str) -> int:
        if type(value) is not int or not 0 <= value <= _MAX_NUMBER:
            raise self.error(where, "must be an integer from 0 to 2^63 - 1", value)
        return value

    def fields(self, value: Any, name: str, where: str) -> dict[str, Any]:
        if not _is_made(value, name) or type(value.state) is not Pairs:
            raise self.error(where, f"must be a {name}", value)
        try:
            fields: dict[str, Any] = value.state.fields()
        except ValueError as error:
            raise self.error(where, str(error), value.state) from None
        return fields

    def pairs(self, value: Any, where: str) -> Iterator[tuple[Any, Any]]:
        if type(value) is not Pairs:
            raise self.error(where, "must be a dict", value)
        return zip(value[::2], value[1::2], strict=True)

    def error(self, where: str, rule: str, value: Any) -> InputError:
        return InputError(f"{self.file}: {quote(where)[1:-1]}: {rule}, got {quote(value)}")


_SIZE = Global("torch", "Size")


def _is_plain_name(file: str) -> bool:
    return file.isprintable() and not {"/", "\\"} & set(file) and file not in ("", ".", "..")


def _is_made(value: Any, name: str) -> bool:
    return type(value) is Made and value.function.name == name
