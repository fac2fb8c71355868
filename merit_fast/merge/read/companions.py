"""Files next to the weights: which go into the output, and config.json made to fit the tensors."""

import fnmatch
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from merit_fast.errors import InputError
from merit_fast.kernels.average.dtypes import DTYPES, FLOAT_DTYPES
from merit_fast.manifests.atomic import write_text
from merit_fast.merge.read.checkpoint import Checkpoint
from merit_fast.merge.read.entries import TensorEntry
from merit_fast.merge.read.files import (
    check_folder,
    copy_file,
    folder_of,
    is_directory,
    list_directory,
    open_regular,
    quote,
    read_json,
)
from merit_fast.merge.read.remote import Location

CONFIG_FILE = "config.json"
# Copied if the model has them, in any case of letters. A license holds for works made from the
# weights; a model card describes another model and is not copied.
COMPANIONS = (
    CONFIG_FILE,
    "generation_config.json",
    "tokenizer*",
    "*.model",  # SentencePiece, under many names
    "*.spm",
    "*.tiktoken",
    "tekken.json",
    "vocab*",
    "*_vocab.json",
    "merges.txt",
    "bpe.codes",
    "emoji.json",
    "dict.txt",
    "byte_maps.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "*processor_config.json",
    "audio_tokenizer_config.json",
    "license*",
    "notice*",
    "use_policy*",
)
TEMPLATE_FOLDER = "additional_chat_templates"
_NEVER = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".index.json", ".part", ".tmp")
_SAME = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_WHOLE = ("", "text_config")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_HEADS = ("lm_head.weight", "embed_out.weight")
_BLOCK_BYTES = 1 << 20


def list_companions(source: Location) -> tuple[str, ...]:
    """Files next to the weights that an output gets; code only if a config names it.

    Raises:
        InputError: one of them is no regular file, cannot be read, or should be JSON and is not.
    """
    present = list_directory(source)
    names = [
        name
        for name in present
        if any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in COMPANIONS)
    ]
    names = [
        name for name in names if not name.endswith(_NEVER) and not is_directory(source / name)
    ]
    if is_directory(source / CONFIG_FILE):
        raise InputError(f"{source / CONFIG_FILE}: must be a regular file")
    configs = [name for name in names if name.endswith("config.json")]
    if any("auto_map" in read_json(source / name) for name in configs):
        names += [name for name in present if name.endswith(".py")]
    if is_directory(source / TEMPLATE_FOLDER):
        check_folder(source / TEMPLATE_FOLDER)
        folder = list_directory(source / TEMPLATE_FOLDER)
        names += [f"{TEMPLATE_FOLDER}/{name}" for name in folder if name.endswith(".jinja")]
    for name in names:
        with open_regular(source / name):
            pass
    return tuple(names)


def copy_companions(
    source: Location, directory: Path, dtypes: Sequence[str] = (), *, dequantized: bool = False
) -> None:
    """Copies ``list_companions`` into an output; config.json then agrees with the output's tensors.

    Args:
        source: the model directory that gives them.
        directory: the output, still under its temporary name.
        dtypes: of the output's tensors, as ``output_dtypes`` gives them. (): config.json's dtypes
            stay.
        dequantized: the output holds no quantised tensor, so quantization_config goes.

    Raises:
        InputError: as ``list_companions``; a file cannot be copied.
    """
    for name in list_companions(source):
        target = directory / name
        try:
            target.parent.mkdir(exist_ok=True)
            copy_file(source / name, target)
        except OSError as error:
            raise InputError(
                f"{source / name}: cannot be copied to {target}: {error.strerror}"
            ) from None
    if (directory / CONFIG_FILE).exists():
        values = read_json(directory / CONFIG_FILE)
        _write_if_changed(directory / CONFIG_FILE, _agreeing(values, dtypes, dequantized))


def output_dtypes(tensors: Iterable[tuple[str, int]]) -> tuple[str, ...]:
    """Float dtypes among tensors (dtype, elements), as config.json names them; most common first.

    Those of quantised tensors do not count: a model does not compute in them.
    """
    elements = {DTYPES[name].torch_name: 0 for name in FLOAT_DTYPES}
    for dtype, count in tensors:
        if dtype in FLOAT_DTYPES:
            elements[DTYPES[dtype].torch_name] += count
    return tuple(
        sorted(
            (name for name, count in elements.items() if count), key=lambda name: -elements[name]
        )
    )


def check_configs(checkpoints: Sequence[Checkpoint], *, any_depth: bool = False) -> None:
    """Refuses models whose configs give tensors different meanings.

    A key counts where both configs have it, in text_config or at the top; a model without
    config.json is not checked. ``any_depth``: they may differ in num_hidden_layers.

    Raises:
        InputError: such a difference, with both values; a config.json that is not JSON.
    """
    configs = [
        (c, read_json(folder_of(c.path) / CONFIG_FILE))
        for c in checkpoints
        if CONFIG_FILE in list_directory(folder_of(c.path))
    ]
    for other, values in configs[1:]:
        first, wanted = configs[0]
        same = [key for key in _SAME if not (any_depth and key == "num_hidden_layers")]
        if not _ending([*checkpoints[0].tensors, *other.tensors], _HEADS):
            same.append("tie_word_embeddings")  # else values decide
        for key in same:
            mine = _value(wanted, key)
            theirs = _value(values, key)
            if mine is None or theirs is None or mine == theirs:
                continue
            if key == "model_type" and _are_siblings(wanted, values):
                continue
            raise InputError(
                f"{folder_of(other.path) / CONFIG_FILE}: {key}: must be {quote(mine)} as in "
                f"{first.path}, got {quote(theirs)}"
            )


def _are_siblings(config: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    from merit_fast.merge.read.names.model_class import are_siblings

    return are_siblings(config, other)


def is_embedding(name: str) -> bool:
    """Whether a tensor is an input embedding, by its name."""
    return bool(_ending([name], _EMBEDDINGS))


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the model's head is its input embedding, by config.json and tensor names."""
    file = folder_of(checkpoint.path) / CONFIG_FILE
    tied = file.exists() and _value(read_json(file), "tie_word_embeddings") is True
    return tied and not _ending(checkpoint.tensors, _HEADS)


def find_head(tensors: Mapping[str, TensorEntry]) -> tuple[TensorEntry, TensorEntry] | None:
    """(input embedding, output head) of a model that holds one of each."""
    names = head_pair(tensors)
    return (tensors[names[0]], tensors[names[1]]) if names else None


def head_pair(names: Collection[str]) -> tuple[str, str] | None:
    """Names of the input embedding and the output head, where there is one of each."""
    embeddings = _ending(names, _EMBEDDINGS)
    heads = _ending(names, _HEADS)
    return (embeddings[0], heads[0]) if len(embeddings) == len(heads) == 1 else None


def find_embedding(tensors: Mapping[str, TensorEntry]) -> TensorEntry | None:
    """The input embedding of a model that holds exactly one."""
    names = _ending(tensors, _EMBEDDINGS)
    return tensors[names[0]] if len(names) == 1 else None


def head_name(tensors: Iterable[str]) -> str | None:
    """The name of the output head among tensors that hold exactly one."""
    names = _ending(tensors, _HEADS)
    return names[0] if len(names) == 1 else None


def untie_if_different(directory: Path, embedding: TensorEntry, head: TensorEntry) -> bool:
    """Sets tie_word_embeddings to false if the output's head differs from its embedding.

    Returns:
        Whether the two differ. They are compared in blocks of 1 MiB.
    """
    differ = (embedding.dtype, embedding.shape) != (head.dtype, head.shape) or not same_bytes(
        embedding, head
    )
    file = directory / CONFIG_FILE
    if differ and file.exists():
        values = read_json(file)
        for key, config in _configs(values):
            if not key or "tie_word_embeddings" in config:
                config["tie_word_embeddings"] = False
        _write_if_changed(file, values)
    return differ


def _agreeing(values: dict[str, Any], dtypes: Sequence[str], dequantized: bool) -> dict[str, Any]:
    """The config with the output's dtypes; a nested one keeps a dtype that tensors have."""
    for name, config in _configs(values):
        for key in ("dtype", "torch_dtype"):
            dtype = config.get(key)
            agrees = dtype == dtypes[0] if name in _WHOLE and dtypes else dtype in dtypes
            if dtypes and key in config and not agrees:
                config[key] = dtypes[0]
        if dequantized:
            config.pop("quantization_config", None)
    return values


def _configs(values: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The config itself and the configs nested in it (text_config, vision_config, ...)."""
    nested = [
        (key, value)
        for key, value in values.items()
        if key.endswith("_config") and key != "quantization_config" and isinstance(value, dict)
    ]
    return [("", values), *nested]


def _value(values: Mapping[str, Any], key: str) -> Any:
    text = values.get("text_config")
    if key in ("model_type", "tie_word_embeddings") and values.get(key) is not None:
        return values[key]
    return text[key] if isinstance(text, dict) and text.get(key) is not None else values.get(key)


def _ending(tensors: Iterable[str], endings: Sequence[str]) -> list[str]:
    tails = tuple(f".{ending}" for ending in endings)
    return [name for name in tensors if name in endings or name.endswith(tails)]


def same_bytes(first: TensorEntry, second: TensorEntry) -> bool:
    """Whether two tensors in files hold the same bytes, compared in blocks of 1 MiB."""
    with open_regular(first.file) as a, open_regular(second.file) as b:
        for at in range(0, first.num_bytes, _BLOCK_BYTES):
            count = min(_BLOCK_BYTES, first.num_bytes - at)
            blocks = [
                _block(file, entry.offset + at, count) for file, entry in ((a, first), (b, second))
            ]
            if blocks[0] != blocks[1]:
                return False
    return True


def _block(file: BinaryIO, start: int, count: int) -> bytes:
    file.seek(start)
    return file.read(count)


def _write_if_changed(file: Path, values: dict[str, Any]) -> None:
    if values != read_json(file):
        write_text(file, json.dumps(values, indent=2) + "\n")
