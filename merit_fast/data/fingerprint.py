"""The fingerprint of a mixture: 32 hex digits of its files, found without tokenizing."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from merit_fast.data.config import DataConfig, DatasetConfig, Part, source
from merit_fast.data.images import images_hash, reads_images
from merit_fast.data.mixture.checks import check_mixture
from merit_fast.data.sources import local_files, source_content
from merit_fast.data.sources.content import hashed
from merit_fast.data.template import PLAIN, read_template
from merit_fast.manifests.hashes import checksum
from merit_fast.manifests.io import fingerprint

ENCODING_VERSION = 1  # raise it when the same rows give other tokens or labels
_TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "additional_chat_templates/*",
    "processor_config.json",
    "preprocessor_config.json",
)


def mixture_fingerprint(
    configs: Sequence[DatasetConfig],
    data_config: DataConfig,
    model: str,
    *,
    part: Part | None = None,
    file_hash: Callable[[Path], str] = checksum,
) -> str:
    """A fingerprint that changes when the examples, their order or their names may change.

    It covers each dataset's name, file contents and max_examples, the `data:` section with the
    content of a template file, and the files of the tokenizer or the processor. For a model that
    reads images it covers the files below ``media``, or the images below the folder of the rows.
    Paths and times are not covered. A
    Hugging Face id stands for itself, with its split: the content on the hub is not read.

    Args:
        configs: the entries of `mixture:`, in order.
        data_config: the `data:` section.
        model: folder or Hugging Face id of the model whose tokenizer is used.
        part: "train" or "eval" for these rows only; None for both.
        file_hash: the hash of a file's whole content.

    Raises:
        InputError: a file is missing or unreadable, or two datasets share a name.
    """
    check_mixture(configs)
    parts: tuple[Part, ...] = ("train", "eval") if part is None else (part,)
    with_images = reads_images(model)
    mixture = [
        [config.name, [_rows_content(config, part, file_hash, with_images) for part in parts]]
        for config in configs
    ]
    return fingerprint({**_encoding(data_config, model, file_hash), "mixture": mixture})


def dataset_fingerprints(
    configs: Sequence[DatasetConfig],
    data_config: DataConfig,
    model: str,
    *,
    part: Part,
    file_hash: Callable[[Path], str] = checksum,
) -> dict[str, str]:
    """Name -> fingerprint of each dataset's examples in order; it does not cover the name.

    Args:
        configs: the entries of `mixture:`.
        data_config: the `data:` section.
        model: folder or Hugging Face id of the model whose tokenizer is used.
        part: "train" or "eval" rows.
        file_hash: the hash of a file's whole content.

    Raises:
        InputError: a file is missing or unreadable, or two datasets share a name.
    """
    check_mixture(configs)
    encoding = _encoding(data_config, model, file_hash)
    with_images = reads_images(model)
    return {
        config.name: fingerprint(
            {**encoding, "rows": _rows_content(config, part, file_hash, with_images)}
        )
        for config in configs
    }


def _encoding(
    data_config: DataConfig, model: str, file_hash: Callable[[Path], str]
) -> dict[str, Any]:
    """Everything that decides how rows become tokens."""
    template = data_config.chat_template
    if template not in (None, PLAIN):
        template = hashlib.sha256(read_template(str(template)).encode()).hexdigest()
    return {
        "version": ENCODING_VERSION,
        "data": [data_config.max_length, data_config.too_long, template],
        "tokenizer": _tokenizer_content(model, file_hash),
    }


def _rows_content(
    config: DatasetConfig, part: Part, file_hash: Callable[[Path], str], with_images: bool
) -> Any:
    """The rows of a part, and for a model that reads images the images that they may name."""
    content = _source_content(config, part, file_hash)
    selected = source(config, part)
    if selected is None or not with_images:
        return content
    if config.media is not None:
        return [content, images_hash(Path(config.media).expanduser(), file_hash)]
    folders = sorted({file.parent for file in local_files(selected) or ()})
    return [content, [images_hash(path, file_hash, only_images=True) for path in folders]]


def _source_content(config: DatasetConfig, part: Part, file_hash: Callable[[Path], str]) -> Any:
    selected = source(config, part)
    if selected is None:
        return None
    content = source_content(selected, file_hash)
    share = [] if config.eval_share is None else [part, config.eval_share]
    return [content, config.max_examples if part == "train" else None, *share]


def _tokenizer_content(model: str, file_hash: Callable[[Path], str]) -> Any:
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return model
    files = {
        file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()
    }
    return {str(file.relative_to(folder)): hashed(file, file_hash) for file in files}
