"""Reads the datasets of an axolotl YAML as entries of a mixture.

Keys of the training are not read. Keys that decide what a row becomes are honoured, or refused.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from merit_fast.data.mixture.locate import absolute, absolute_path, dataset_name
from merit_fast.data.mixture.pairs import training_entry
from merit_fast.data.paths import container_of
from merit_fast.data.sources.places import READERS
from merit_fast.errors import InputError, show

Entry = dict[str, Any]

_PROSE = (
    "axolotl writes this type as a prose prompt; here instruction and input are a user's turn of "
    "the chat template"
)
_READ = {"path", "name", "split", "revision", "data_files", "type", "ds_type"}
_CHAT = {
    "field_messages",
    "message_property_mappings",
    "message_field_role",
    "message_field_content",
    "message_field_training",
    "field_thinking",
    "field_tools",
    "field_system",
    "roles",
    "roles_to_train",
}
_HARMLESS: dict[str, tuple[Any, ...]] = {  # key -> values that ask for what happens anyway
    "chat_template": ("tokenizer_default", None),
    "train_on_eos": ("turn", None),
    "train_on_eot": ("turn", None),
    "drop_system_message": (False, None),
    "shards": (1, None),
    "shards_idx": (0, None),
    "conversation": (None,),
    "trust_remote_code": (False, None),
    "message_field_training_detail": (None,),
    "chat_template_jinja": (None,),
    "preprocess_shards": (1, None),
}
_REFUSED_OF_RUN: dict[str, tuple[Any, ...]] = {
    "train_on_inputs": (False, None),
    "pretraining_dataset": (None, []),
    "rl": (None,),
    "reward_model": (False, None),
    "process_reward_model": (False, None),
    "default_system_message": (None,),
    "dataset_exact_deduplication": (False, None),
}
_NOTED_OF_RUN: dict[str, tuple[Any, ...]] = {
    "chat_template": ("tokenizer_default", None),
    "chat_template_jinja": (None,),
    "eot_tokens": (None, []),
}
_DS_TYPES = {"json": (".json", ".jsonl", ".ndjson"), "csv": (".csv", ".tsv")}


def axolotl_entries(values: Mapping[str, Any], file: Path) -> list[Entry]:
    """The entries of ``datasets:``, with the held-out rows of the other keys.

    Args:
        values: the content of the YAML.
        file: its path, from whose folder relative paths count.

    Raises:
        InputError: a key cannot be honoured; the message names it.
    """
    for key, allowed in _REFUSED_OF_RUN.items():
        if values.get(key) not in allowed:
            raise _refused(f"{file}: {key}", values[key])
    datasets = [
        _without_reader(dataset, file.parent, f"{file}: datasets[{i}]")
        for i, dataset in enumerate(_listed(values.get("datasets"), f"{file}: datasets"))
    ]
    entries: list[Entry] = []
    for i, dataset in enumerate(datasets):
        entry = _entry(dataset, file.parent, f"{file}: datasets[{i}]")
        taken = [other["name"] for other in entries]
        entries.append({"name": _name(dataset, taken), **entry})
    held_out = values.get("test_datasets")
    share = values.get("val_set_size")
    if held_out:
        tests = [
            _without_reader(test, file.parent, f"{file}: test_datasets[{i}]")
            for i, test in enumerate(_listed(held_out, f"{file}: test_datasets"))
        ]
        _add_tests(entries, tests, file)
    elif share:
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            raise InputError(f"{file}: val_set_size: must be a share below 1, got {show(share)}")
        entries = [{**entry, "eval_share": float(share)} for entry in entries]
    return _noted(entries, values)


def _noted(entries: list[Entry], values: Mapping[str, Any]) -> list[Entry]:
    """The entries, each with a note on the template that axolotl would write them with."""
    keys = [key for key, plain in _NOTED_OF_RUN.items() if values.get(key) not in plain]
    if not keys:
        return entries
    note = f"axolotl's {', '.join(keys)}: here data.chat_template decides"
    return [{**entry, "note": "; ".join([*_own_note(entry), note])} for entry in entries]


def _own_note(entry: Entry) -> list[str]:
    return [entry["note"]] if "note" in entry else []


def _without_reader(dataset: Entry, folder: Path, where: str) -> Entry:
    """The dataset with its files as path where ``path: json`` names a reader of ``datasets``."""
    if dataset["path"] not in READERS or (folder / dataset["path"]).exists():
        return dataset
    files = dataset.get("data_files")
    listed = [files] if isinstance(files, str) else files
    if not isinstance(listed, list) or not listed or not all(isinstance(f, str) for f in listed):
        raise InputError(f"{where}.data_files: must be a file or a list of them, got {show(files)}")
    paths = [absolute_path(text, folder, f"{where}.data_files") for text in listed]
    if len(paths) == 1:
        return {**dataset, "path": paths[0], "data_files": None}
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return {**dataset, "path": common, "data_files": [os.path.relpath(p, common) for p in paths]}


def _listed(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: must be a list of datasets, got {show(value)}")
    for i, dataset in enumerate(value):
        if not isinstance(dataset, dict) or not isinstance(dataset.get("path"), str):
            raise InputError(f"{where}[{i}]: must be a mapping with a path, got {show(dataset)}")
    return value


def _name(dataset: Entry, taken: list[str]) -> str:
    path = dataset["path"].rstrip("/")
    last = path.rpartition("/")[2]
    suffix = container_of(last)
    stem = last[: last.index(suffix)] if suffix else last
    further = [str(dataset[key]) for key in ("name",) if dataset.get(key)]
    return dataset_name("-".join([stem, *further]), taken)


def _entry(dataset: Entry, folder: Path, where: str) -> Entry:
    """The keys of an entry but its name."""
    kind = dataset.get("type")
    readers: dict[Any, Callable[[Entry, str], Entry]] = {
        "chat_template": _chat,
        "alpaca": _alpaca,
    }
    reader = _own_fields if isinstance(kind, dict) else readers.get(kind)
    if reader is None:
        rule = "must be chat_template, alpaca or a mapping of fields"
        raise InputError(f"{where}.type: {rule}, got {show(kind)}")
    for key, value in dataset.items():
        is_read = key in _READ or (key in _CHAT and reader is _chat)
        if not is_read and value not in _HARMLESS.get(key, (None,)):
            raise _refused(f"{where}.{key}", value)
    entry: Entry = {"path": absolute(dataset["path"], folder, f"{where}.path")}
    _check_container(dataset, where)
    for key, own in (("config", "name"), ("split", "split"), ("revision", "revision")):
        if dataset.get(own) is not None:
            entry[key] = dataset[own]
    if dataset.get("data_files"):
        files = dataset["data_files"]
        entry["data_files"] = [files] if isinstance(files, str) else files
    return {**entry, **reader(dataset, where)}


def _chat(dataset: Entry, where: str) -> Entry:
    columns = {}
    if dataset.get("field_messages"):
        columns["messages"] = dataset["field_messages"]
    mappings = dataset.get("message_property_mappings") or {}
    if not isinstance(mappings, dict):
        raise _refused(f"{where}.message_property_mappings", mappings)
    columns |= mappings
    for name, key in (
        ("role", "message_field_role"),
        ("content", "message_field_content"),
        ("train", "message_field_training"),
        ("reasoning_content", "field_thinking"),
        ("tools", "field_tools"),
        ("system", "field_system"),
    ):
        if dataset.get(key):
            columns[name] = dataset[key]
    columns = {name: own for name, own in columns.items() if name != own or name == "messages"}
    entry: Entry = {"columns": columns} if columns else {}
    roles = dataset.get("roles")
    if roles:
        entry["roles"] = _roles(roles, f"{where}.roles")
    trained = dataset.get("roles_to_train")
    if trained is not None:
        entry["train_on"] = _train_on(trained, entry.get("roles", {}), where)
    return entry


def _roles(roles: Any, where: str) -> dict[str, list[str]]:
    if not isinstance(roles, dict):
        raise InputError(f"{where}: must map roles to lists of words, got {show(roles)}")
    return {
        role: [words] if isinstance(words, str) else list(words) for role, words in roles.items()
    }


def _train_on(trained: Any, roles: Mapping[str, list[str]], where: str) -> str | list[str]:
    """The roles in the loss by the names that a conversation has for them."""
    words = [trained] if isinstance(trained, str) else list(trained)
    common = {"gpt": "assistant", "human": "user"}
    own = {word: role for role, listed in roles.items() for word in listed}
    names = list(dict.fromkeys(own.get(word, common.get(word, word)) for word in words))
    if not names or "all" in words:
        raise InputError(f"{where}.roles_to_train: must be a list of roles, got {show(trained)}")
    return "all" if names == ["assistant"] else names


def _alpaca(dataset: Entry, where: str) -> Entry:
    return {"note": _PROSE}


def _own_fields(dataset: Entry, where: str) -> Entry:
    """The columns that a mapping as ``type`` names; its prompt formats are prose."""
    fields = dict(dataset["type"])
    columns = {}
    for name, key, default in (
        ("instruction", "field_instruction", "instruction"),
        ("input", "field_input", "input"),
        ("output", "field_output", "output"),
        ("system", "field_system", "system"),
    ):
        columns[name] = fields.pop(key, None) or default
    is_prose = any([fields.pop(key, None) for key in ("format", "no_input_format")])
    for key, value in fields.items():
        if value not in (None, ""):
            raise _refused(f"{where}.type.{key}", value)
    columns = {name: own for name, own in columns.items() if name != own}
    entry: Entry = {"columns": columns} if columns else {}
    return {**entry, "note": _PROSE} if is_prose else entry


def _check_container(dataset: Entry, where: str) -> None:
    """Checks that ``ds_type`` says of a file what its name says."""
    kind = dataset.get("ds_type")
    container = container_of(dataset["path"])
    if kind is None or (kind in ("json", "csv", "parquet", "arrow") and not container):
        return
    if container not in _DS_TYPES.get(kind, (f".{kind}",)):
        rule = f"must agree with the name {dataset['path']}"
        raise InputError(f"{where}.ds_type: {rule}, got {show(kind)}")


def _add_tests(entries: list[Entry], tests: list[Entry], file: Path) -> None:
    """Gives each held-out dataset to its training dataset."""
    for i, test in enumerate(tests):
        where = f"{file}: test_datasets[{i}]"
        held_out = _entry(test, file.parent, where)
        entry = training_entry(entries, held_out)
        if entry is None or {"eval_path", "eval_split"} & set(entry):
            raise InputError(
                f"{where}.path: must be the path of one of datasets, or its name but for the word "
                f"of the split, and one for each, got {test['path']}"
            )
        for key in ("columns", "roles", "train_on", "config", "revision", "data_files"):
            if key in held_out and held_out[key] != entry.get(key):
                raise InputError(f"{where}: must be read as its training rows are, got {key}")
        split = held_out.get("split")
        if entry["path"] != held_out["path"]:
            entry["eval_path"] = held_out["path"]
        elif split in (None, entry.get("split", "train")):
            raise InputError(f"{where}.split: must be another split than datasets', got {split}")
        if split is not None:
            entry["eval_split"] = split


def _refused(where: str, value: Any) -> InputError:
    return InputError(f"{where}: cannot be honoured: leave it out or write an entry, got {value!r}")
