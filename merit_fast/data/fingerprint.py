"""The fingerprint of a mixture: 32 hex digits of its files, found without tokenizing."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from merit_fast.data.config import DataConfig, DatasetConfig, Part, source
from merit_fast.data.images.files import images_hash
from merit_fast.data.mixture.checks import check_mixture
from merit_fast.data.sources import Source, local_files, source_content
from merit_fast.data.sources.content import hashed
from merit_fast.data.template import PLAIN, read_template
from merit_fast.manifests.hashes import checksum
from merit_fast.manifests.io import fingerprint
from merit_fast.options.parser import to_plain

ENCODING_VERSION = 2  # raise it when the same rows give other tokens or labels
# Keys that change examples; they are covered where they have no default.
_ENCODING_KEYS = ("train_on", "special_tokens_in_text", "date", "template_arguments")
_READING_KEYS = ("columns", "roles", "train_on")
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
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
    *_PROCESSOR_FILES,
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

    It covers each dataset's name, the contents of its files and images, the keys that choose and
    read its rows, the `data:` section with the content of a template file, and the files of the
    tokenizer or the processor. Paths and times are not covered. A Hugging Face id stands for
    itself, with its split and revision: the content on the hub is not read.

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
    contents = _Contents(configs, data_config, model, file_hash)
    mixture = [[config.name, [contents.of(config, part) for part in parts]] for config in configs]
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
    contents = _Contents(configs, data_config, model, file_hash)
    return {
        config.name: fingerprint({**encoding, "rows": contents.of(config, part)})
        for config in configs
    }


def _encoding(
    data_config: DataConfig, model: str, file_hash: Callable[[Path], str]
) -> dict[str, Any]:
    """Everything that decides how rows become tokens."""
    template = data_config.chat_template
    if template not in (None, PLAIN):
        template = hashlib.sha256(read_template(str(template)).encode()).hexdigest()
    plain = to_plain(data_config)
    further = {key: plain[key] for key in _ENCODING_KEYS if key in plain}
    if data_config.bad_rows and data_config.ignore_columns:  # decides which rows are wrong
        further["ignore_columns"] = plain["ignore_columns"]
    return {
        "version": ENCODING_VERSION,
        "data": [data_config.max_length, data_config.too_long, template, *filter(None, [further])],
        "tokenizer": _tokenizer_content(model, file_hash),
    }


def image_hashes(
    config: DatasetConfig, place: Source, model: str, file_hash: Callable[[Path], str]
) -> list[str]:
    """Hashes of the files below the folders in which rows may name images.

    Args:
        config: the dataset's entry.
        place: the rows of one of its parts.
        model: folder or Hugging Face id of the model; one that reads no images has no hashes.
        file_hash: the hash of a file's whole content.

    Raises:
        InputError: a file cannot be read.
    """
    if not any((Path(model) / name).is_file() for name in _PROCESSOR_FILES):
        return []
    if config.media is not None:
        return [images_hash(Path(config.media).expanduser(), file_hash)]
    folders = sorted({file.parent for file in local_files(place) or ()})
    return [images_hash(folder, file_hash, only_images=True) for folder in folders]


class _Contents:
    """Everything that decides which rows the parts of a mixture's datasets hold."""

    def __init__(
        self,
        configs: Sequence[DatasetConfig],
        data_config: DataConfig,
        model: str,
        file_hash: Callable[[Path], str],
    ) -> None:
        self._configs = configs
        self._data_config = data_config
        self._model = model
        self._hash = file_hash

    def of(self, config: DatasetConfig, part: Part) -> Any:
        """The content of one dataset's part, None if it has no such rows.

        A key that has its default adds nothing, so that fingerprints of older runs stay.
        """
        rows = self._rows(config, part)
        if rows is None:
            return None
        training = self._training(config) if part == "train" else {}
        if self._data_config.duplicates == "drop":
            training["duplicates"] = "drop"
        max_examples = config.max_examples if part == "train" else None
        return [rows[0], max_examples, *rows[1:], *filter(None, [training])]

    def _rows(self, config: DatasetConfig, part: Part) -> list[Any] | None:
        """Content of the part's files and images, and the keys that decide how they are read."""
        place = source(config, part)
        if place is None:
            return None
        plain = to_plain(config)
        reading = {key: plain[key] for key in _READING_KEYS if key in plain}
        images = image_hashes(config, place, self._model, self._hash)
        if images:
            reading["images"] = images
        share = [] if config.eval_share is None else [part, config.eval_share, "conversations"]
        return [source_content(place, self._hash), *share, *filter(None, [reading])]

    def _training(self, config: DatasetConfig) -> dict[str, Any]:
        """The keys that choose training rows; dropped leaks depend on every held-out row."""
        plain = to_plain(config)
        chosen: dict[str, Any] = {}
        chosen |= {key: plain[key] for key in ("sample", "weight") if key in plain}
        if chosen:
            chosen["seed"] = self._data_config.seed
        if self._data_config.leaks == "drop":
            held_out = [self._rows(other, "eval") for other in self._configs]
            if any(held_out):
                chosen["held_out"] = fingerprint({"rows": held_out})
        return chosen


def _tokenizer_content(model: str, file_hash: Callable[[Path], str]) -> Any:
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return model
    files = {
        file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()
    }
    return {str(file.relative_to(folder)): hashed(file, file_hash) for file in files}
