"""Makes the text of a commented YAML from the files that ``scan`` found."""

import dataclasses
import os
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from merit_fast.data import DataConfig, DatasetConfig, load_mixture, load_tokenizer_or_processor
from merit_fast.data.mixture.expand import expand_mixture
from merit_fast.data.mixture.folder import folder_entries
from merit_fast.data.mixture.select import MixtureRows
from merit_fast.data.paths import is_hub_id
from merit_fast.errors import InputError
from merit_fast.init.rows import Source, read_source
from merit_fast.init.scan import Candidate, scan
from merit_fast.model import resolve_model
from merit_fast.options.document import commented, flow, option_lines
from merit_fast.options.parser import parse
from merit_fast.pipeline.config import DEFAULT_OUTPUT, RunConfig
from merit_fast.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZED_ROWS = 200  # of each dataset, from which its tokens are estimated
_MANY_DATASETS = 12  # from which four groups are written instead of two, and a folder at once
_PATHS = ("path", "eval_path")


@dataclass(frozen=True)
class Draft:
    """The text of a YAML, the datasets in it, and the files that it cannot use."""

    text: str
    datasets: tuple[str, ...]
    unused: tuple[str, ...]  # "PATH: reason"


@dataclass(frozen=True)
class _Entry:
    """One dataset of the mixture."""

    keys: dict[str, Any]
    comment: str


def draft_config(
    places: Sequence[Path], model: str | None, file: Path, progress: Progress
) -> Draft:
    """Reads the files of rows at ``places`` and makes a YAML that ``run`` accepts.

    Args:
        places: files and directories.
        model: directory, from the current one, or hub id; None: the YAML leaves it to fill in.
        file: where the YAML will lie; its paths count from that folder.
        progress: display of what is read.

    Raises:
        InputError: a place does not exist, no row can be used, or the model is neither a hub id
            nor a folder with a tokenizer.
    """
    found = scan(places)
    unused = list(found.unused)
    is_local = model is not None and (Path(model).is_dir() or not is_hub_id(model))
    base = resolve_model(str(model)) if is_local else None
    tokenizer = None if base is None else load_tokenizer_or_processor(str(base))
    data = _data_keys(tokenizer)
    entries = []
    for candidate in found.candidates:
        progress.note(f"{candidate.path}: reading its rows")
        try:
            entries.append(_entry(candidate, file.parent, tokenizer, data))
        except InputError as error:
            unused.append(str(error))
    if not entries:
        reasons = unused[0] if unused else "found no file of rows"
        shown = " ".join(map(str, places))
        raise InputError(f"{shown}: no rows that a run can use: {reasons}")
    own = model if base is None else _from_folder(base, file.parent)
    if _has_leaks(entries, file.parent):
        data["leaks"] = "drop"
    text = "\n".join(_lines(own, entries, data, unused, file)) + "\n"
    values = yaml.safe_load(text)
    values["mixture"] = expand_mixture(values["mixture"], file.parent, str(file))
    parse(RunConfig, {**values, "model": own or "MODEL"}, str(file))
    names = tuple(entry.keys["name"] for entry in entries)
    return Draft(text, names, tuple(unused))


def _has_leaks(entries: Sequence[_Entry], folder: Path) -> bool:
    """Whether a training row is held out too, by any of the datasets."""
    configs = []
    for entry in entries:
        paths = {key: str(folder / entry.keys[key]) for key in _PATHS if key in entry.keys}
        configs.append(parse(DatasetConfig, {**entry.keys, **paths}, "mixture"))
    selections = MixtureRows(configs, DataConfig(leaks="keep")).select("train")
    return any(selection.num_leaks for selection in selections.values())


def _as_folder(entries: Sequence[_Entry], file: Path) -> dict[str, Any] | None:
    """The item of a mixture that stands for all entries; None if they are no such folder."""
    own = [
        {key: value for key, value in entry.keys.items() if key != "eval_share"}
        for entry in entries
    ]
    folder = (file.parent / own[0]["path"]).parent
    shares = {entry.keys.get("eval_share") for entry in entries if "eval_path" not in entry.keys}
    if len(entries) <= _MANY_DATASETS or len(shares) > 1 or not folder.is_dir():
        return None
    item: dict[str, Any] = {"folder": _from_folder(folder, file.parent)}
    if shares != {None} and shares:
        item["eval_share"] = shares.pop()
    try:
        expanded = folder_entries(folder, str(file))
    except InputError:
        return None  # files that a list of entries can leave out
    located = [
        {key: str((file.parent / value).absolute()) if key in _PATHS else value}
        for entry in own
        for key, value in entry.items()
    ]
    found = [{key: value} for entry in expanded for key, value in entry.items()]
    return item if _normal(located) == _normal(found) else None


def _normal(pairs: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Keys and values in one form, for comparison."""
    return sorted((key, os.path.normpath(value)) for pair in pairs for key, value in pair.items())


def _data_keys(tokenizer: "PreTrainedTokenizerBase | None") -> dict[str, Any]:
    if tokenizer is None or tokenizer.chat_template:
        return {}
    return {"chat_template": "plain"}  # the tokenizer brings no template of its own


def _entry(
    candidate: Candidate,
    folder: Path,
    tokenizer: "PreTrainedTokenizerBase | None",
    data: dict[str, Any],
) -> _Entry:
    source = read_source(candidate.path)
    keys: dict[str, Any] = {
        "name": candidate.name,
        "path": _from_folder(candidate.path, folder),
    }
    comment = (
        f"{source.num_rows:,} rows ({source.format}), {_size(candidate, source, tokenizer, data)}"
    )
    if candidate.eval_path is not None:
        held_out = read_source(candidate.eval_path)
        keys["eval_path"] = _from_folder(candidate.eval_path, folder)
        comment += f"; held out: {held_out.num_rows:,} rows"
    elif source.held_out is not None:
        keys["eval_share"], count = source.held_out
        comment += f"; {count:,} of them held out, as no file of held-out rows is there"
    else:
        comment += "; too few rows to hold some out: no arm is measured on it"
    for other in candidate.others:
        comment += f"; not used: {other.name}"
    return _Entry(keys, comment)


def _size(
    candidate: Candidate,
    source: Source,
    tokenizer: "PreTrainedTokenizerBase | None",
    data: dict[str, Any],
) -> str:
    """The tokens of the answers where a tokenizer is there, else their characters."""
    if tokenizer is None:
        return f"{source.num_characters:,} characters of answers"
    rows = DatasetConfig(candidate.name, str(candidate.path), max_examples=_TOKENIZED_ROWS)
    (dataset,) = load_mixture([rows], tokenizer, parse(DataConfig, data, "data"), part="train")
    read = min(_TOKENIZED_ROWS, source.num_rows)
    tokens = round(dataset.num_target_tokens / read * source.num_rows)
    about = "about " if read < source.num_rows else ""
    return "; ".join([f"{about}{tokens:,} tokens of answers", *dataset.notes])


def _from_folder(path: Path, folder: Path) -> str:
    return os.path.relpath(path.absolute(), folder.absolute())


def _lines(
    model: str | None,
    entries: Sequence[_Entry],
    data: dict[str, Any],
    unused: Sequence[str],
    file: Path,
) -> list[str]:
    lines = [
        f"# merit-fast run {file.name}",
        "# Paths count from this file's folder. Every option is here: a line that begins with",
        "# '# key: value' shows a default; remove its '# ' to set it.",
        "",
    ]
    if model is None:
        lines += commented("model:", "FILL IN: the base model: a folder, or a hub id as owner/name")
    else:
        lines += commented(f"model: {flow(model)}", "base model")
    lines += ["", "mixture:"]
    whole = _as_folder(entries, file)
    for entry in entries:
        lines.append(f"  # {entry.keys['name']}: {entry.comment}")
        if whole is None:
            lines.append(f"  - {flow(entry.keys)}")
    if whole is not None:
        lines.append(f"  - {flow(whole)}")
    lines += [f"  # not used: {' '.join(reason.split())}" for reason in unused]
    groups = _groups(len(entries))
    controls = {"joint": True, "random": 1}
    chosen = {"data": data, "split": {"groups": groups}, "train": {"controls": controls}}
    hints = typing.get_type_hints(RunConfig)
    for field in dataclasses.fields(RunConfig):
        if dataclasses.is_dataclass(hints[field.name]):
            lines += ["", f"{field.name}:"]
            lines += option_lines(typing.cast(type, hints[field.name]), chosen.get(field.name, {}))
    return [*lines, "", *option_lines(RunConfig, {"output": DEFAULT_OUTPUT}, "")]


def _groups(num_datasets: int) -> int:
    """Groups with enough datasets each that random splits differ from the chosen one."""
    if num_datasets < 2:
        return 1
    return 2 if num_datasets < _MANY_DATASETS else 4
