"""The ``.metadata`` of a distributed checkpoint that is written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merit_fast.errors import InputError
from merit_fast.kernels.average.dtypes import DTYPES
from merit_fast.manifests.atomic import write_bytes
from merit_fast.merge.read.dcp.metadata import CHECKPOINT, FILESYSTEM, METADATA_FILE, Item, Place
from merit_fast.merge.read.dcp.values import Global, Made, Pairs
from merit_fast.merge.write.distcp.layout import DistributedLayout, PlacedChunk
from merit_fast.merge.write.distcp.pickles import write_pickle

_VERSION = "1.0.0"  # of torch's format
_RENEWED = ("state_dict_metadata", "planner_data", "storage_data", "storage_meta", "version")


def write_metadata(layout: DistributedLayout, directory: Path) -> None:
    """Writes ``.metadata`` for the shards of a layout.

    Fields that other writers add, such as Megatron's, are those of the first input.

    Raises:
        InputError: such a field cannot be written.
    """
    chunks: dict[str, list[PlacedChunk]] = {name: [] for name in layout.tensors}
    for file in layout.files:
        for chunk in file.chunks:
            chunks[chunk.name].append(chunk)
    entries = Pairs()
    places = Pairs()
    storage = Pairs()
    for name, tensor in layout.tensors.items():
        saved = layout.saved_names[name]
        own = sorted(chunks[name], key=lambda chunk: chunk.offsets)
        entries.extend((saved, _tensor(tensor.dtype, tensor.shape, own)))
        places.extend((saved, layout.places[name]))
        for number, chunk in enumerate(own):
            storage.extend((_index(saved, chunk.offsets, number), _info(chunk.item)))
    for file in layout.files:
        for other, at in file.others:
            entries.extend((other.name, _object("BytesStorageMetadata", Pairs())))
            places.extend((other.name, other.place))
            item = Item(file.name, at, other.item.length)
            storage.extend((_index(other.name, None, None), _info(item)))
    state = Pairs(("state_dict_metadata", entries, "planner_data", places))
    state.extend(("storage_data", storage, "storage_meta", None, "version", _VERSION))
    state.extend(_added(layout))
    try:
        data = write_pickle(_object("Metadata", state))
    except ValueError as error:
        assert layout.source is not None
        raise InputError(f"{layout.source.metadata.file}: {error}") from None
    write_bytes(directory / METADATA_FILE, data)


def _added(layout: DistributedLayout) -> list[Any]:
    """Fields of the first input's metadata that torch does not know."""
    if layout.source is None:
        return []
    fields = layout.source.metadata.root.state
    pairs = zip(fields[::2], fields[1::2], strict=True)
    return [each for key, value in pairs if key not in _RENEWED for each in (key, value)]


def _tensor(dtype: str, shape: tuple[int, ...], chunks: Sequence[PlacedChunk]) -> Made:
    boxes = [
        _object(
            "ChunkStorageMetadata",
            Pairs(("offsets", _size(chunk.offsets), "sizes", _size(chunk.sizes))),
        )
        for chunk in chunks
    ]
    layout = Made(Global("torch.serialization", "_get_layout"), ("torch.strided",), False)
    contiguous = Made(Global(CHECKPOINT, "_MEM_FORMAT_ENCODING"), (0,), False)
    name = Global("torch", DTYPES[dtype].torch_name)
    properties = _object("TensorProperties", (name, layout, False, contiguous, False))
    fields = Pairs(("properties", properties, "size", _size(shape), "chunks", boxes))
    return _object("TensorStorageMetadata", fields)


def _index(name: str, offsets: Place | None, number: int | None) -> Made:
    fields = Pairs(("fqn", name, "index", number))
    if offsets is not None:
        fields.extend(("offset", _size(offsets)))
    return _object("MetadataIndex", fields)


def _info(item: Item) -> Made:
    fields = Pairs(("relative_path", item.file, "offset", item.offset, "length", item.length))
    return Made(Global(FILESYSTEM, "_StorageInfo"), (), True, fields)


def _object(name: str, state: Any) -> Made:
    return Made(Global(CHECKPOINT, name), (), True, state)


def _size(numbers: Sequence[Any]) -> Made:
    return Made(Global("torch", "Size"), (tuple(numbers),), False)
