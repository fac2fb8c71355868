"""config.json and generation_config.json for the output's vocabulary: its size, ids of tokens."""

from collections.abc import Mapping
from typing import Any

from merit_fast.errors import InputError
from merit_fast.merge.read.files import list_directory, quote, read_json
from merit_fast.merge.read.remote import Location
from merit_fast.merge.vocabulary.match import OutputVocabulary

CONFIG_FILES = ("config.json", "generation_config.json")
_ID_ENDINGS = ("_token_id", "_token_ids", "_token_index", "suppress_tokens")
# Values that hold ids in forms of their own.
_NOT_RENUMBERED = (
    "forced_decoder_ids",
    "bad_words_ids",
    "sequence_bias",
    "lang_to_id",
    "task_to_id",
)


def fitted_config(
    name: str, values: Mapping[str, Any], companions: Location, output: OutputVocabulary
) -> dict[str, Any]:
    """The values of a config file with the output's number of rows and its ids of tokens.

    A token that the output lacks gives way to the one of the same key in the config or tokenizer
    that gives the output its tokens.

    Args:
        name: of the file, one of ``CONFIG_FILES``.
        companions: the directory of the file, for messages.

    Raises:
        InputError: a token has no id in the output, or ids are in a form that is not known.
    """
    fitted: dict[str, Any] = _renumbered(values, f"{companions / name}", output, "")
    has_other_size = name == CONFIG_FILES[0] and output.num_rows != output.config_rows
    if has_other_size and not _set_size(fitted, output):
        nested = fitted.get("text_config")
        (nested if isinstance(nested, dict) else fitted)["vocab_size"] = output.num_rows
    return fitted


def check_configs_fit(companions: Location, output: OutputVocabulary) -> None:
    """Raises InputError as ``fitted_config`` for each of the companions' files."""
    present = list_directory(companions)
    for name in CONFIG_FILES:
        if name in present:
            fitted_config(name, read_json(companions / name), companions, output)


def _set_size(config: dict[str, Any], output: OutputVocabulary) -> bool:
    """Replaces every vocab_size of the old number of rows; returns whether there was one."""
    found = config.get("vocab_size") == output.config_rows
    if found:
        config["vocab_size"] = output.num_rows
    for value in config.values():
        if isinstance(value, dict):
            found = _set_size(value, output) or found
    return found


def _renumbered(value: Mapping[str, Any], where: str, output: OutputVocabulary, key: str) -> Any:
    result: dict[str, Any] = {}
    for name, item in value.items():
        inner = f"{key}.{name}" if key else name
        if isinstance(item, dict) and name not in _NOT_RENUMBERED:
            result[name] = _renumbered(item, where, output, inner)
        elif name.endswith(_ID_ENDINGS):
            result[name] = _new_ids(item, where, output, inner)
        else:
            result[name] = item
            if name in _NOT_RENUMBERED and item and output.ids:
                raise InputError(f"{where}: {inner}: holds ids of tokens that cannot be renumbered")
    return result


def _new_ids(value: Any, where: str, output: OutputVocabulary, key: str) -> Any:
    if isinstance(value, list):
        ids = [output.ids.get(n, n) for n in value if type(n) is int]
        kept = [number for number in ids if number >= 0]
        return kept if kept or not value else _from_tokenizer(value, where, output, key)
    if type(value) is not int or output.ids.get(value, value) >= 0:
        return output.ids.get(value, value) if type(value) is int else value
    return _from_tokenizer(value, where, output, key)


def _from_tokenizer(value: Any, where: str, output: OutputVocabulary, key: str) -> Any:
    """The value of a key whose tokens the output lacks, by the output's own tokenizer."""
    name = key.rpartition(".")[2]
    present = list_directory(output.folder)
    for file in CONFIG_FILES:
        values = read_json(output.folder / file) if file in present else {}
        for config in (values, values.get("text_config")):
            if isinstance(config, dict) and config.get(name) is not None:
                return config[name]
    token_key = name.removesuffix("_id")
    config = {}
    if "tokenizer_config.json" in present:
        config = read_json(output.folder / "tokenizer_config.json")
    if token_key in config and output.tokens is not None:
        token = config[token_key]
        text = token.get("content") if isinstance(token, dict) else token
        if text is None or text in output.tokens.vocabulary.ids:
            return None if text is None else output.tokens.vocabulary.ids[text]
    raise InputError(
        f"{where}: {key}: {quote(value)} is a token that the output's vocabulary, of "
        f"{output.folder}, lacks"
    )
