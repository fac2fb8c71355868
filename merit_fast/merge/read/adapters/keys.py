"""Names in adapter_model.safetensors: which module a tensor belongs to, and what it is there.

    base_model.model.MODULE.lora_A.weight        factor [r, in, ...]; lora_B.weight [out, r, ...]
    base_model.model.MODULE.lora_embedding_A     factor [r, rows]; lora_embedding_B [columns, r]
    base_model.model.MODULE.lora_B.bias          added to MODULE.bias
    base_model.model.MODULE.lora_magnitude_vector     lengths of DoRA
    base_model.model.MODULE.token_adapter.trainable_tokens_delta      new rows of an embedding
    base_model.model.NAME                        a whole tensor of the model

``base_layer`` within a name stands for a wrapped layer. After a module it counts wrappers: the
outermost has none, and each wraps one parameter of the module.
"""

import re
from collections.abc import Iterable, Mapping

from merit_fast.errors import InputError
from merit_fast.kernels.average.dtypes import FLOAT_DTYPES
from merit_fast.merge.read.entries import TensorEntry
from merit_fast.records import record, replace

PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+?)\.(?:"
    r"(?P<a>lora_A\.weight|lora_embedding_A)|(?P<b>lora_B\.weight|lora_embedding_B)|"
    r"(?P<bias>lora_B\.bias)|(?P<magnitude>lora_magnitude_vector(?:\.weight)?)|"
    r"(?P<rows>(?:token_adapter\.)?trainable_tokens_delta))"
)
_NOT_WHOLE = re.compile(
    r"(.+\.)?(lora_|trainable_tokens|token_adapter|modules_to_save\.|original_module\.).*"
)
_INSIDE_ATTENTION = ".base_layer.out_proj"
_KINDS = ("a", "b", "bias", "magnitude", "rows")


@record
class Layer:
    """The factors of one LoRA wrapper."""

    module: str  # its name in the model
    depth: int  # wrappers of the same module around it
    a: TensorEntry
    b: TensorEntry
    bias: TensorEntry | None = None
    magnitude: TensorEntry | None = None
    times: int = 1  # PEFT adds the change of out_proj in torch's MultiheadAttention twice

    @property
    def is_embedding(self) -> bool:
        return self.a.name.endswith("lora_embedding_A")


@record
class Parts:
    """An adapter's tensors by what they do."""

    layers: tuple[Layer, ...]
    rows: Mapping[str, TensorEntry]  # new rows of embeddings, by module
    whole: Mapping[str, TensorEntry]  # by the model's tensor

    @property
    def factors(self) -> list[TensorEntry]:
        return [entry for layer in self.layers for entry in (layer.a, layer.b)]

    @property
    def stored(self) -> list[TensorEntry]:
        """All tensors but those of DoRA and of lora_bias."""
        return [*self.factors, *self.rows.values(), *self.whole.values()]


def split_keys(entries: Iterable[TensorEntry]) -> Parts:
    """The tensors of an adapter, grouped by layer.

    Raises:
        InputError: a name has another form, a factor has no partner, a tensor is named twice, a
            factor's dtype is no float.
    """
    found: dict[tuple[str, int], dict[str, TensorEntry]] = {}
    doubled: set[str] = set()
    whole: dict[str, TensorEntry] = {}
    rows: dict[str, TensorEntry] = {}
    for entry in entries:
        name = _stripped(entry)
        match = _PART.fullmatch(name)
        if match is None:
            name = _without_wrappers(name)
            if _NOT_WHOLE.fullmatch(name) or name in whole:
                raise InputError(f"{entry.file}: {entry.name}: is no tensor of a LoRA adapter")
            whole[name] = entry
            continue
        _check_dtype(entry)
        path = match["module"]
        module = _without_wrappers(path)
        kind = next(each for each in _KINDS if match[each])
        depth = len(path.split(".")) - len(_trimmed(path).split("."))
        if path.endswith(_INSIDE_ATTENTION):
            doubled.add(module)
        place = rows if kind == "rows" else found.setdefault((module, depth), {})
        slot = module if kind == "rows" else kind
        if slot in place:
            raise InputError(f"{entry.file}: {entry.name}: stands for {place[slot].name} too")
        place[slot] = entry
    layers = tuple(
        replace(_layer(module, depth, parts), times=2 if module in doubled else 1)
        for (module, depth), parts in found.items()
    )
    return Parts(layers, rows, whole)


def _layer(module: str, depth: int, parts: Mapping[str, TensorEntry]) -> Layer:
    for kind, partner in (("a", "b"), ("b", "a"), ("bias", "b"), ("magnitude", "b")):
        if kind in parts and partner not in parts:
            entry = parts[kind]
            missing = f"lora_{partner.upper()}"
            raise InputError(f"{entry.file}: {entry.name}: has no {missing} next to it")
    layer = Layer(module, depth, parts["a"], parts["b"], parts.get("bias"), parts.get("magnitude"))
    if layer.is_embedding != layer.b.name.endswith("lora_embedding_B"):
        raise InputError(f"{layer.a.file}: {layer.a.name}: has no partner of its kind next to it")
    return layer


def _stripped(entry: TensorEntry) -> str:
    if not entry.name.startswith(PREFIX):
        raise InputError(f"{entry.file}: {entry.name}: must begin with {PREFIX}")
    return entry.name.removeprefix(PREFIX)


def _without_wrappers(path: str) -> str:
    return ".".join(word for word in path.split(".") if word != "base_layer")


def _trimmed(path: str) -> str:
    """A path without the wrappers at its end."""
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return path


def _check_dtype(entry: TensorEntry) -> None:
    if entry.dtype not in FLOAT_DTYPES:
        raise InputError(
            f"{entry.file}: {entry.name}: dtype must be one of {', '.join(FLOAT_DTYPES)}, got "
            f"{entry.dtype}"
        )
