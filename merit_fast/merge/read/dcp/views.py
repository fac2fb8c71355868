"""data.pkl of an item: one tensor as a view of a storage."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from merit_fast.errors import InputError
from merit_fast.kernels.average.dtypes import ITEM_BYTES
from merit_fast.merge.read.dcp.metadata import TORCH_DTYPES
from merit_fast.merge.read.dcp.pickles import read_pickle
from merit_fast.merge.read.dcp.values import Global, Made
from merit_fast.merge.read.files import quote

STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
}
_REBUILDS = ("_rebuild_tensor_v2", "_rebuild_tensor_v3")


@dataclass(frozen=True, slots=True)
class View:
    """value[i] = storage[start + sum_d strides[d] * i[d]], start and strides in elements."""

    dtype: str
    key: str  # of the storage's record
    num_elements: int  # of the storage
    start: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


@lru_cache(4096)  # chunks of one shape have the same bytes here
def read_view(data: bytes) -> View:
    """The tensor of a data.pkl.

    Raises:
        ValueError: it holds no plain tensor; says what is wrong.
    """
    try:
        tensor = read_pickle(data, "the tensor", _allowed)
    except InputError as error:
        raise ValueError(str(error)) from None
    if type(tensor) is not Made or tensor.function.name not in _REBUILDS or len(tensor.args) < 6:
        raise ValueError(f"must hold one tensor, got {quote(tensor)}")
    storage, start, sizes, strides = tensor.args[:4]
    dtype, key, count = _storage(storage, tensor.args[6:7])
    numbers = all(_is_numbers(each) for each in (sizes, strides, (start, count)))
    if not numbers or len(sizes) != len(strides) or len(sizes) > 64:
        raise ValueError("has no sizes and strides")
    last = start + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
    if 0 not in sizes and last >= count:
        raise ValueError(f"views element {last} of a storage of {count}")
    return View(dtype, key, count, start, sizes, strides)


def _storage(storage: Any, extra: tuple[Any, ...]) -> tuple[str, str, Any]:
    """(dtype, record, elements) of a storage's persistent id."""
    place: Any = storage.args if type(storage) is Made else ()
    right = type(place) is tuple and len(place) == 5 and place[0] == "storage"
    if not right or type(place[1]) is not Global or type(place[2]) is not str:
        raise ValueError("has no storage")
    count = place[4]
    dtype = STORAGES.get(place[1].name)
    if place[1].name == "UntypedStorage":  # its size counts bytes
        named: Any = extra[0] if extra else None
        dtype = TORCH_DTYPES.get(named.name) if type(named) is Global else None
        if dtype is not None and type(count) is int:
            count //= ITEM_BYTES[dtype]
    if dtype is None:
        raise ValueError(f"storage {quote(place[1].name)} is not read")
    return dtype, place[2], count


def _is_numbers(values: Any) -> bool:
    return type(values) is tuple and all(
        type(value) is int and 0 <= value < 2**63 for value in values
    )


def _allowed(module: str, name: str) -> bool:
    if module == "torch._utils":
        return name in _REBUILDS
    if module == "torch.storage":
        return name == "UntypedStorage"
    if module == "torch":
        return name in STORAGES or name in TORCH_DTYPES
    return (module, name) == ("collections", "OrderedDict")
