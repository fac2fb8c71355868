"""Reads LLaMA-Factory's ``dataset_info.json``, and the datasets of a run's YAML, as entries."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from merit_fast.data.mixture.locate import absolute_path, dataset_name
from merit_fast.data.mixture.pairs import training_entry
from merit_fast.errors import InputError, show

Entry = dict[str, Any]

_INFO = "dataset_info.json"
_READ = {
    "file_name",
    "hf_hub_url",
    "ms_hub_url",
    "om_hub_url",
    "formatting",
    "columns",
    "tags",
    "subset",
    "split",
    "folder",
    "num_samples",
}
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
_DEFAULT_COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "sharegpt": {"messages": "conversations"},
    "openai": {"messages": "conversations"},
}
_DEFAULT_TAGS = {"role_tag": "from", "content_tag": "value"}
_ROLE_TAGS = {
    "user_tag": ("user", "human"),
    "assistant_tag": ("assistant", "gpt"),
    "observation_tag": ("tool", "observation"),
    "function_tag": ("function_call", "function_call"),
    "system_tag": ("system", "system"),
}
_OPTIONAL = ("system", "tools", "images", "history")
_REFUSED_COLUMNS = {
    "videos": "videos are not read",
    "audios": "audio is not read",
    "kto_tag": "columns: {keep_if: NAME} of an own entry keeps the rows with true",
    "chosen": "columns: {prompt: ..., completion: NAME} of an own entry trains it",
    "rejected": "a rejected answer is not trained",
}
_REFUSED_OF_RUN: dict[str, tuple[Any, ...]] = {
    "train_on_prompt": (False, None),
    "streaming": (False, None),
    "mix_strategy": ("concat", None),
    "interleave_probs": (None,),
    "tokenized_path": (None,),
    "stage": ("sft", None),
    "default_system": (None, ""),
    "tool_format": (None,),
    "enable_thinking": (True, None),
}


def info_entries(info: Mapping[str, Any], file: Path, media: Path | None = None) -> list[Entry]:
    """An entry for each dataset of ``dataset_info.json``.

    Args:
        info: its content: name -> description.
        file: its path; the folder is ``dataset_dir``.
        media: ``media_dir``; None: the folder of ``file``.

    Raises:
        InputError: a key cannot be honoured; the message names it.
    """
    entries: list[Entry] = []
    for name, values in info.items():
        taken = [entry["name"] for entry in entries]
        entry = _entry(values, file.parent, media or file.parent, f"{file}: {name}")
        entries.append({"name": dataset_name(name, taken), **entry})
    return entries


def run_entries(values: Mapping[str, Any], file: Path, read: Callable[[Path], Any]) -> list[Entry]:
    """The entries of the datasets that a run's YAML names.

    Args:
        values: the content of the YAML; keys of the training are not read.
        file: its path, from whose folder ``dataset_dir`` and ``media_dir`` count.
        read: reads a JSON file.

    Raises:
        InputError: a dataset is not described, or a key cannot be honoured.
    """
    for key, allowed in _REFUSED_OF_RUN.items():
        if values.get(key) not in allowed:
            raise _refused(f"{file}: {key}", values[key])
    where = f"{file}: dataset_dir"
    directory = Path(absolute_path(values.get("dataset_dir") or "data", file.parent, where))
    media = values.get("media_dir")
    media_folder = Path(absolute_path(media, file.parent, f"{file}: media_dir")) if media else None
    info = read(directory / _INFO)
    names = _listed(values["dataset"])
    entries = _named(info, names, directory, media_folder, f"{file}: dataset")
    if values.get("template"):
        note = f"LLaMA-Factory's template {values['template']}: here data.chat_template decides"
        entries = [{**entry, "note": note} for entry in entries]
    if values.get("max_samples") is not None:
        entries = [{**entry, "max_examples": values["max_samples"]} for entry in entries]
    if values.get("mask_history"):
        entries = [{**entry, "train_on": "last"} for entry in entries]
    held_out = values.get("eval_dataset")
    share = values.get("val_size")
    if held_out:
        held_out_names = _listed(held_out)
        others = _named(info, held_out_names, directory, media_folder, f"{file}: eval_dataset")
        _add_held_out(entries, others, f"{file}: eval_dataset")
    elif share:
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            raise InputError(f"{file}: val_size: must be a share below 1, got {show(share)}")
        entries = [{**entry, "eval_share": float(share)} for entry in entries]
    return entries


def _listed(names: str | list[str]) -> list[str]:
    """Names with commas between them, or a list of names."""
    parts = names.split(",") if isinstance(names, str) else names
    return [str(name).strip() for name in parts]


def _named(
    info: Any, names: list[str], directory: Path, media: Path | None, where: str
) -> list[Entry]:
    known = info if isinstance(info, dict) else {}
    for name in names:
        if name not in known:
            raise InputError(f"{where}: must name datasets of {directory / _INFO}, got {name!r}")
    return info_entries({name: known[name] for name in names}, directory / _INFO, media)


def _add_held_out(entries: list[Entry], others: list[Entry], where: str) -> None:
    for other in others:
        entry = training_entry(entries, other)
        if entry is None or {"eval_path", "eval_split"} & set(entry):
            rule = (
                "must be held out of one dataset, whose file has its name but for the word of the "
                "split, and one for each; write entries with eval_path"
            )
            raise InputError(f"{where}: {rule}, got {other['name']}")
        for key in ("columns", "roles", "config", "revision", "data_files", "media"):
            if entry.get(key) != other.get(key):
                rule = "must be read as its training rows are"
                raise InputError(f"{where}: {other['name']}: {rule}, got another {key}")
        if entry["path"] != other["path"]:
            entry["eval_path"] = other["path"]
        if "split" in other:
            entry["eval_split"] = other["split"]


def _entry(values: Any, folder: Path, media: Path, where: str) -> Entry:
    if not isinstance(values, dict):
        raise InputError(f"{where}: must be a mapping of keys, got {show(values)}")
    for key, value in values.items():
        if key not in _READ and value not in (None, False, ""):
            raise _refused(f"{where}.{key}", value)
    formatting = values.get("formatting") or "alpaca"
    if formatting not in _DEFAULT_COLUMNS:
        rule = "must be one of alpaca, sharegpt, openai"
        raise InputError(f"{where}.formatting: {rule}, got {show(formatting)}")
    entry = _source(values, folder, where)
    columns = _columns(values.get("columns"), formatting, f"{where}.columns")
    roles: dict[str, list[str]] = {}
    if formatting == "alpaca":
        if values.get("tags"):
            raise _refused(f"{where}.tags", values["tags"])
    else:
        turn_keys, roles = _tags(values.get("tags"), f"{where}.tags")
        columns |= turn_keys
    entry["columns"] = columns
    if roles:
        entry["roles"] = roles
    if columns.get("images"):
        entry["media"] = str(media)
    return entry


def _source(values: Entry, folder: Path, where: str) -> Entry:
    """The keys that tell where the rows are."""
    hub = values.get("hf_hub_url")
    file_name = values.get("file_name")
    if not hub and not file_name:
        raise InputError(f"{where}: must have file_name or hf_hub_url, got {', '.join(values)}")
    entry: Entry = {
        "path": hub or absolute_path(str(file_name), folder, f"{where}.file_name"),
    }
    for key, own in (("config", "subset"), ("split", "split"), ("sample", "num_samples")):
        if values.get(own):
            entry[key] = values[own]
    if values.get("folder"):
        if not hub:
            raise _refused(f"{where}.folder", values["folder"])
        entry["data_files"] = [f"{values['folder'].strip('/')}/**"]
    return entry


def _columns(value: Any, formatting: str, where: str) -> dict[str, str]:
    """The mapping that reads what LLaMA-Factory reads: given columns replace all defaults."""
    if value is not None and not isinstance(value, dict):
        raise InputError(f"{where}: must be a mapping, got {show(value)}")
    given = {key: own for key, own in (value or {}).items() if own}
    defaults = _DEFAULT_COLUMNS[formatting]
    for key, own in given.items():
        if key in _REFUSED_COLUMNS:
            raise InputError(f"{where}.{key}: {_REFUSED_COLUMNS[key]}, got {own!r}")
        if key not in (*defaults, *_OPTIONAL):
            raise _refused(f"{where}.{key}", own)
    named = given or defaults
    columns = {}
    for key in defaults:
        name = _ALPACA.get(key, "messages" if formatting == "openai" else "conversations")
        columns[name] = named.get(key, "")
    for key in _OPTIONAL:
        if key != "history" or formatting == "alpaca":
            columns[key] = named.get(key, "")
    if not columns["images"]:
        del columns["images"]  # a column of images that nobody named is read all the same
    return columns


def _tags(value: Any, where: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The keys of turns, and the words for roles."""
    if value is not None and not isinstance(value, dict):
        raise InputError(f"{where}: must be a mapping, got {show(value)}")
    given = {key: word for key, word in (value or {}).items() if word}
    for key, word in given.items():
        if key not in _DEFAULT_TAGS and key not in _ROLE_TAGS:
            raise _refused(f"{where}.{key}", word)
    keys = {
        name: given[tag]
        for name, tag in (("role", "role_tag"), ("content", "content_tag"))
        if given.get(tag, _DEFAULT_TAGS[tag]) not in ("role", "content", _DEFAULT_TAGS[tag])
    }
    roles = {
        role: [given[tag]]
        for tag, (role, word) in _ROLE_TAGS.items()
        if given.get(tag, word) not in (word, role)
    }
    return keys, roles


def _refused(where: str, value: Any) -> InputError:
    return InputError(f"{where}: cannot be honoured: leave it out or write an entry, got {value!r}")
