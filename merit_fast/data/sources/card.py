"""Reads which files are which split from the dataset card, the README.md of a clone of the hub."""

from dataclasses import dataclass
from typing import Any

import yaml

from merit_fast.data.sources.source import Folder, Source
from merit_fast.errors import InputError, one_line

_CARD = "README.md"
_READ = ("config_name", "data_files", "data_dir", "default", "description", "drop_labels")


@dataclass(frozen=True)
class CardPatterns:
    """Globs of a configuration by split; none where only its folder is given."""

    config: str
    by_split: dict[str, list[str]]
    data_dir: str  # ends in /, or is empty


def card_patterns(folder: Folder, source: Source) -> CardPatterns | None:
    """The configuration that ``source`` names, or the default one; None for a card without any.

    Raises:
        InputError: the card is broken, or has no such configuration, or needs a choice.
    """
    configs = _configs(folder)
    if not configs:
        if source.config is not None:
            raise InputError(
                f"{source.path}: config: must be one of the configs in {_CARD}, "
                f"got {source.config!r}; it declares none"
            )
        return None
    chosen = _choose(configs, source)
    name = str(chosen.get("config_name"))
    for key in chosen:
        if key not in _READ:
            raise InputError(
                f"{folder.join(_CARD)}: configs: {name}: {key}: is an option of the reader in "
                "datasets, which is not followed; name the files in data_files"
            )
    data_dir = str(chosen.get("data_dir") or "").strip("/")
    prefix = f"{data_dir}/" if data_dir else ""
    patterns = {
        split: [prefix + pattern for pattern in globs]
        for split, globs in _by_split(chosen.get("data_files"), folder, name).items()
    }
    return CardPatterns(name, patterns, prefix)


def _configs(folder: Folder) -> list[dict[str, Any]]:
    if _CARD not in folder.names():
        return []
    text = folder.text(_CARD).replace("\r\n", "\n").removeprefix("\ufeff")
    if not text.startswith("---\n"):
        return []
    head = text[4:].partition("\n---")[0]
    try:
        card = yaml.safe_load(head)
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{folder.join(_CARD)}: must be YAML: {one_line(error)}") from None
    configs = card.get("configs") if isinstance(card, dict) else None
    if configs is None:
        return []
    if not isinstance(configs, list) or not all(isinstance(config, dict) for config in configs):
        raise InputError(f"{folder.join(_CARD)}: configs: must be a list of mappings")
    return configs


def _choose(configs: list[dict[str, Any]], source: Source) -> dict[str, Any]:
    names = [str(config.get("config_name")) for config in configs]
    if source.config is not None:
        if source.config in names:
            return configs[names.index(source.config)]
        raise InputError(
            f"{source.path}: config: must be one of {', '.join(names)}, got {source.config!r}"
        )
    if len(configs) == 1:
        return configs[0]
    for config, name in zip(configs, names, strict=True):
        if config.get("default") or name == "default":
            return config
    raise InputError(f"{source.path}: config: must be one of {', '.join(names)}, got none")


def _by_split(data_files: Any, folder: Folder, config: str) -> dict[str, list[str]]:
    if data_files is None:
        return {}
    if isinstance(data_files, dict):
        return {str(split): _globs(globs) for split, globs in data_files.items()}
    items = data_files if isinstance(data_files, list) else [data_files]
    if all(isinstance(item, str) for item in items):
        return {"train": items}
    if not all(isinstance(item, dict) and set(item) == {"split", "path"} for item in items):
        raise InputError(
            f"{folder.join(_CARD)}: configs: {config}: data_files: must be globs or "
            f"a list of {{split, path}}, got {data_files!r}"
        )
    return {str(item["split"]): _globs(item["path"]) for item in items}


def _globs(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]
