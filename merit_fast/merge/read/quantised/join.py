"""Codes joined with their scales: the first step after a checkpoint's headers are read."""

import re
from collections.abc import Iterable, Iterator, Mapping

from merit_fast.errors import InputError
from merit_fast.merge.option_names import OptionError
from merit_fast.merge.read.checkpoint import Checkpoint
from merit_fast.merge.read.entries import DecodedEntry, TensorEntry
from merit_fast.merge.read.files import folder_of
from merit_fast.merge.read.quantised.codes import FLOAT_CODES
from merit_fast.merge.read.quantised.formats import FORMATS, LAYER_SCALES
from merit_fast.merge.read.quantised.scheme import read_scheme
from merit_fast.merge.read.remote import Location
from merit_fast.records import replace

_CODE_DTYPES = {dtype for form in FORMATS for dtype in form.stored}
# Names that mean a quantised tensor; a checkpoint in which nobody uses one is not understood.
_RESERVED = re.compile(
    r"(.*[._])?(weight_(scale|scale_inv|scale_2|global_scale|zero_point|g_idx|packed|shape)"
    r"|scale_inv|qscale_weight|pre_quant_scale)"
)
_RESERVED_ENDING = re.compile(r"[._](scale_inv|scale|scale_2|packed|scales|blocks)$")
_FOREIGN = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "SCB": "bitsandbytes",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "W_q": "HQQ",
    "_data": "quanto or torchao",
    "codebooks": "AQLM",
}
_BLOCKS = re.compile(r".*_(blocks|scales)")
_PLAIN = ("weight", "bias")  # endings of nearly all names, which mean no part of a quantised tensor


def join_scales(checkpoint: Checkpoint, unscaled: bool = False) -> Checkpoint:
    """The checkpoint with quantised tensors in place of their codes, scales and zero points.

    Args:
        unscaled: whether 8-bit floats without a scale are taken as values.

    Raises:
        InputError: codes have no scale, a scale no codes, shapes do not fit, the format is not in
            the table, or a config names a quantisation and no tensor is quantised.
    """
    scheme = read_scheme(folder_of(checkpoint.path))
    stored = checkpoint.tensors
    joined: dict[str, TensorEntry] = {}  # by the codes' name
    used: set[str] = set()
    for entry in stored.values():
        if entry.dtype not in _CODE_DTYPES:
            continue
        from merit_fast.merge.read.quantised.match import match_codes

        match = match_codes(entry, stored, scheme)
        if match is not None:
            tensor, decoded = match
            if tensor.name != entry.name and tensor.name in stored:
                raise InputError(f"{entry.file}: {entry.name}: {tensor.name} is there too")
            joined[entry.name] = tensor
            used.update(part.name for _, part in decoded.parts)
    for entry in stored.values():
        is_left = entry.dtype in FLOAT_CODES and entry.name not in used
        if is_left and _is_unscaled(entry, unscaled):
            joined[entry.name] = DecodedEntry(*_fields(entry), codes=entry)
    if joined:
        used.update(name for name in stored if name.rpartition(".")[2] in LAYER_SCALES)
    read = used | joined.keys()
    left = (entry for entry in stored.values() if entry.name not in read)
    _check_left(left, stored)
    if scheme.method and not joined:
        raise InputError(
            f"{scheme.file}: quantization_config: is of {scheme.method}, but no "
            "tensor is quantised; remove the key if the weights are plain"
        )
    return _replaced(checkpoint, joined, used) if joined else checkpoint


def _is_unscaled(entry: TensorEntry, unscaled: bool) -> bool:
    """True if the codes are taken as values; E8M0 is a scale of another tensor."""
    if entry.dtype == "F8_E8M0":
        return False
    if unscaled:
        return True
    rule = f"{entry.file}: {entry.name}: is {entry.dtype} and has no scale next to it"
    raise OptionError(rule, "unscaled_fp8", "{} takes the codes as values", "True")


def _fields(entry: TensorEntry) -> tuple[str, str, tuple[int, ...], Location, int, int]:
    return entry.name, entry.dtype, entry.shape, entry.file, entry.offset, entry.num_bytes


def _check_left(left: Iterable[TensorEntry], stored: Mapping[str, TensorEntry]) -> None:
    """Refuses tensors that belong to a quantised one by their names, which nobody has read."""
    for entry in left:
        ending = entry.name.rpartition(".")[2]
        if ending in _PLAIN and entry.dtype != "F8_E8M0":
            continue
        where = f"{entry.file}: {entry.name}"
        if ending in _FOREIGN:
            known = ", ".join(form.name for form in FORMATS)
            raise InputError(
                f"{where}: is of {_FOREIGN[ending]}, which is not read; formats: {known}"
            )
        is_scale = entry.dtype == "F8_E8M0" or _RESERVED.fullmatch(entry.name)
        if is_scale or (entry.dtype == "U8" and _BLOCKS.fullmatch(entry.name)):
            weight = _RESERVED_ENDING.sub("", entry.name)
            other = stored.get(weight) or stored.get(f"{weight}.weight")
            found = f"; {other.name} is {other.dtype}" if other else ""
            raise InputError(f"{where}: is part of a quantised tensor that is not there{found}")


def _replaced(
    checkpoint: Checkpoint, joined: Mapping[str, TensorEntry], used: set[str]
) -> Checkpoint:
    """The checkpoint with joined tensors where their codes were."""

    def kept(names: Iterable[str]) -> Iterator[TensorEntry]:
        for name in names:
            if name in joined:
                yield joined[name]
            elif name not in used:
                yield checkpoint.tensors[name]

    tensors = {entry.name: entry for entry in kept(checkpoint.tensors)}
    shards = [
        (file, tuple(entry.name for entry in kept(names))) for file, names in checkpoint.shards
    ]
    return replace(checkpoint, tensors=tensors, shards=tuple(each for each in shards if each[1]))
