"""Files of the output's tokenizer, and its chat template."""

import fnmatch
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merit_fast.errors import InputError
from merit_fast.manifests.atomic import write_text
from merit_fast.merge.read.companions import TEMPLATE_FOLDER, list_companions
from merit_fast.merge.read.files import copy_file, list_directory, quote, read_json
from merit_fast.merge.read.remote import Location
from merit_fast.merge.vocabulary.configs import CONFIG_FILES, check_configs_fit, fitted_config
from merit_fast.merge.vocabulary.match import OutputVocabulary
from merit_fast.merge.vocabulary.tokens import TOKENIZER_FILE
from merit_fast.merge.vocabulary.union import OutputTokens

_TEMPLATE = "chat_template.jinja"
_CONFIG = "tokenizer_config.json"
_ADDED = "added_tokens.json"
# Other forms of the tokens that the model itself has, without the added ones.
_OWN_TOKENS = (
    "*.model",
    "*.spm",
    "*.tiktoken",
    "tekken.json",
    "vocab*",
    "*_vocab.json",
    "merges.txt",
    "bpe.codes",
)
_TOKENIZER = (
    "tokenizer*",
    *_OWN_TOKENS,
    _ADDED,
    "special_tokens_map.json",
    "chat_template*",
    f"{TEMPLATE_FOLDER}/*",
)


def write_vocabulary(directory: Path, companions: Location, output: OutputVocabulary) -> None:
    """Makes tokenizer and configs of an output agree with its rows.

    Args:
        directory: the output, still under its temporary name, with the files of ``companions``.

    Raises:
        InputError: a file cannot be read or copied; see ``fitted_config``.
    """
    for name in CONFIG_FILES:
        if (directory / name).exists():
            values = read_json(directory / name)
            _write(directory / name, fitted_config(name, values, companions, output), values)
    if output.folder != companions:
        _replace_tokenizer(directory, output.folder)
    if output.tokens is not None:
        _fit_tokens(directory, output.tokens)


def write_template(directory: Path, text: str) -> None:
    """Makes ``text`` the only chat template of an output, as transformers 5 writes it."""
    for name in ("chat_template.json", TEMPLATE_FOLDER):
        path = directory / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for name in (_CONFIG, "processor_config.json"):
        if (directory / name).exists():
            values = read_json(directory / name)
            kept = {key: value for key, value in values.items() if key != "chat_template"}
            _write(directory / name, kept, values)
    write_text(directory / _TEMPLATE, text)


def _replace_tokenizer(directory: Path, folder: Location) -> None:
    """Puts the tokenizer's files of another directory in place of an output's."""
    present = [file for file in directory.rglob("*") if file.is_file()]
    for file in present:
        if _matches(file.relative_to(directory).as_posix(), _TOKENIZER):
            file.unlink()
    for name in list_companions(folder):
        target = directory / name
        is_new_code = name.endswith(".py") and not target.exists()
        if _matches(name, _TOKENIZER) or is_new_code:
            try:
                target.parent.mkdir(exist_ok=True)
                copy_file(folder / name, target)
            except OSError as error:
                reason = f"cannot be copied to {target}: {error.strerror}"
                raise InputError(f"{folder / name}: {reason}") from None


def check_files(companions: Location, output: OutputVocabulary) -> None:
    """Checks all files that ``write_vocabulary`` changes.

    Raises:
        InputError: one of them cannot be read, or is in another form than transformers writes; see
            ``check_configs_fit``.
    """
    check_configs_fit(companions, output)
    list_companions(output.folder)
    if output.tokens is None:
        return
    if _ADDED in list_directory(output.folder):
        read_json(output.folder / _ADDED)
    if output.tokens.vocabulary.is_cut:
        file = output.folder / TOKENIZER_FILE
        _keep_own(file, read_json(file)["model"], output.tokens.vocabulary.own)


def _fit_tokens(directory: Path, tokens: OutputTokens) -> None:
    """Adds the new tokens to the tokenizer's files, and removes those that have no row."""
    vocabulary = tokens.vocabulary
    if not (vocabulary.is_cut or tokens.new):
        return
    file = directory / TOKENIZER_FILE
    values = read_json(file)
    removed = vocabulary.is_cut and _keep_own(file, values["model"], vocabulary.own)
    ids = {token.content: token.id for token in vocabulary.added}
    kept = [
        {**entry, "id": ids[entry["content"]]}
        for entry in values.get("added_tokens") or []
        if entry["content"] in ids
    ]
    added = [*kept, *({**token.values, "id": token.id} for token in tokens.new)]
    values["added_tokens"] = sorted(added, key=lambda entry: entry["id"])
    write_text(file, _json_text(values))
    if removed:
        for path in directory.iterdir():
            if _matches(path.name, _OWN_TOKENS):
                path.unlink()
    _fit_other_files(directory, added, len(vocabulary.own))


def _keep_own(file: Location, model: dict[str, Any], own: Mapping[str, int]) -> bool:
    """Removes the tokens of a tokenizer's model that are not in ``own``; whether there were any.

    Raises:
        InputError: a rule of BPE is no pair of texts.
    """
    listed = model["vocab"]
    if isinstance(listed, list):  # ids are positions, so that those without a row stand at its end
        kept: Any = listed[: max(own.values(), default=-1) + 1]
    else:
        kept = {text: number for text, number in listed.items() if text in own}
    if len(kept) == len(listed):
        return False
    model["vocab"] = kept
    prefix = model.get("continuing_subword_prefix")
    cut = len(prefix) if isinstance(prefix, str) else 0
    if "merges" in model:
        rules = [(_pair(file, rule), rule) for rule in model["merges"] or []]
        model["merges"] = [rule for (a, b), rule in rules if {a, b, a + b[cut:]} <= own.keys()]
    return True


def _pair(file: Location, rule: Any) -> tuple[str, str]:
    """The two tokens that a rule of BPE joins."""
    pair = rule.split(" ") if isinstance(rule, str) else rule
    is_pair = isinstance(pair, list) and len(pair) == 2
    if not is_pair or not all(isinstance(text, str) for text in pair):
        raise InputError(f"{file}: model.merges: must be pairs of tokens, got {quote(rule)}")
    return pair[0], pair[1]


def _fit_other_files(directory: Path, added: list[dict[str, Any]], num_own: int) -> None:
    """Makes the older lists of added tokens agree, where they are there."""
    file = directory / _ADDED
    if file.exists():
        ids = {entry["content"]: entry["id"] for entry in added if entry["id"] >= num_own}
        _write(file, ids, read_json(file))
    file = directory / _CONFIG
    values = read_json(file) if file.exists() else {}
    if "added_tokens_decoder" in values:
        decoder = {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
            for entry in added
        }
        _write(file, {**values, "added_tokens_decoder": decoder}, values)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in patterns)


def _write(file: Path, values: dict[str, Any], before: dict[str, Any]) -> None:
    if values != before:
        write_text(file, _json_text(values))


def _json_text(values: dict[str, Any]) -> str:
    """The JSON of a file, with escapes where a text is no Unicode: half of a surrogate pair."""
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(values, indent=2) + "\n"
    return text
