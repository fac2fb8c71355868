"""quantization_config of a model: the method by name, and what its tensors cannot tell."""

from collections.abc import Iterator, Mapping
from typing import Any

from merit_fast.errors import InputError
from merit_fast.merge.read.files import quote, read_json
from merit_fast.merge.read.remote import Location
from merit_fast.records import record

KEY = "quantization_config"
MODELOPT_FILE = "hf_quant_config.json"
COMPRESSED_TENSORS = "compressed-tensors"
MODELOPT = "modelopt"
FP8_METHODS = ("fp8", "mxfp8", "fbgemm_fp8")
METHODS = (*FP8_METHODS, "mxfp4", COMPRESSED_TENSORS, MODELOPT, "modelopt_fp4")
_FP8_BLOCK = (128, 128)  # transformers' default for quant_method fp8


@record
class Scheme:
    """The part of a quantization config that decides how tensors are read.

    Attributes:
        method: quant_method; "": the model has no such config.
        file: the file that gives it, for messages.
        blocks: shapes of blocks with one scale each that the config names, or implies.
        names_blocks: whether the config names them; other blocks are then an error.
        widths: bits of integer weights that the config names.
    """

    method: str
    file: Location | None
    blocks: tuple[tuple[int, int], ...] = ()
    names_blocks: bool = False
    widths: tuple[int, ...] = ()
    values: Mapping[str, Any] | None = None


def read_scheme(path: Location) -> Scheme:
    """The scheme of a model directory, from config.json or hf_quant_config.json.

    Raises:
        InputError: the method is not known here, or a value is of a wrong form.
    """
    file = path / "config.json"
    values = _quantization(read_json(file)) if file.exists() else None
    if values is None and (path / MODELOPT_FILE).exists():
        file = path / MODELOPT_FILE
        inner = read_json(file).get("quantization")
        if not isinstance(inner, dict):
            raise InputError(f"{file}: quantization: must be a mapping, got {quote(inner)}")
        values = {"quant_method": MODELOPT, **inner}
    if values is None:
        return Scheme("", None)
    where = f"{file}: {KEY}"
    method = values.get("quant_method")
    if method is None and "config_groups" in values:
        method = COMPRESSED_TENSORS
    if method not in METHODS:
        raise InputError(
            f"{where}: quant_method must be one of {', '.join(METHODS)} or absent, "
            f"got {quote(method)}"
        )
    _check_plain_basis(where, values)
    named = tuple(dict.fromkeys(_blocks(where, values)))
    blocks = named or ((_FP8_BLOCK,) if method == "fp8" else ())
    widths = {group["num_bits"] for group in _groups(values) if type(group.get("num_bits")) is int}
    return Scheme(str(method), file, blocks, bool(named), tuple(sorted(widths)), values)


def _quantization(config: Mapping[str, Any]) -> dict[str, Any] | None:
    text = config.get("text_config")
    for holder in (config, text if isinstance(text, dict) else {}):
        values = holder.get(KEY) or holder.get("compression_config")
        if isinstance(values, dict):
            return values
    return None


def _check_plain_basis(where: str, values: Mapping[str, Any]) -> None:
    """Refuses weights that are rotated or pruned into another form than a matrix's own."""
    sparsity = values.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise InputError(
            f"{where}: sparsity_config: format must be dense, got {quote(sparsity.get('format'))}"
        )
    transforms = values.get("transform_config")
    if isinstance(transforms, dict) and transforms.get("config_groups"):
        raise InputError(
            f"{where}: transform_config: must be absent: weights in a rotated basis "
            "cannot be merged"
        )


def _groups(values: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The weights' settings of every group of compressed-tensors and ModelOpt."""
    groups = values.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else []:
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            yield weights


def _blocks(where: str, values: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    size = values.get("weight_block_size")
    if size is not None:
        yield _pair(where, "weight_block_size", size)
    for weights in _groups(values):
        if weights.get("block_structure") is not None:
            yield _pair(where, "block_structure", weights["block_structure"])
    for holder in (values, *_groups(values)):
        group = holder.get("group_size")
        if type(group) is int and group > 0:
            yield 1, group


def _pair(where: str, key: str, size: Any) -> tuple[int, int]:
    is_pair = isinstance(size, list) and len(size) == 2
    if not is_pair or not all(type(n) is int and n > 0 for n in size):
        raise InputError(f"{where}: {key}: must be two positive integers, got {quote(size)}")
    return size[0], size[1]
