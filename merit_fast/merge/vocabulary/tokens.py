"""tokenizer.json: which text has which id. Read without the tokenizers library.

A vocabulary is the model's own map (``model.vocab``: a mapping, or a list of [piece, score] in
order of the ids) and ``added_tokens``, a list of {id, content, ...}.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from merit_fast.errors import InputError
from merit_fast.merge.read.files import (
    MAX_JSON_BYTES,
    list_directory,
    open_regular,
    quote,
    read_json,
    size_of,
)
from merit_fast.merge.read.remote import Location
from merit_fast.records import record, replace

TOKENIZER_FILE = "tokenizer.json"
_MOST_IDS = 1 << 24  # bounds memory


@record
class AddedToken:
    """One entry of ``added_tokens``: matched as a whole before the model cuts the text."""

    content: str
    id: int  # that the tokenizers library gives it
    values: Mapping[str, Any]  # the whole entry


@record
class Vocabulary:
    """The tokens of one tokenizer.json.

    Attributes:
        folder: directory of the file.
        own: text -> id of the model's own map.
        added: added tokens, in the file's order. Their ids win over the model's.
        is_cut: whether the file lists tokens that are left out here, as they have no row.
    """

    folder: Location
    own: Mapping[str, int]
    added: tuple[AddedToken, ...]
    is_cut: bool = False

    @property
    def file(self) -> Location:
        return self.folder / TOKENIZER_FILE

    @cached_property
    def ids(self) -> dict[str, int]:
        """text -> id of every token."""
        return {**self.own, **{token.content: token.id for token in self.added}}

    @cached_property
    def texts(self) -> dict[int, str]:
        """id -> text, by rising id; an added token's text wins."""
        by_id = {number: text for text, number in self.own.items()}
        by_id |= {token.id: token.content for token in self.added}
        return dict(sorted(by_id.items()))

    def below(self, num_rows: int) -> "Vocabulary":
        """The vocabulary without tokens that have no row in a matrix of ``num_rows`` rows."""
        own = {text: number for text, number in self.own.items() if number < num_rows}
        added = tuple(token for token in self.added if token.id < num_rows)
        if len(own) == len(self.own) and len(added) == len(self.added):
            return self
        return replace(self, own=own, added=added, is_cut=True)


def read_vocabulary(folder: Location) -> Vocabulary:
    """The tokens of a directory's tokenizer.json; see ``find_vocabulary``.

    Raises:
        InputError: also where the file lists no tokens.
    """
    vocabulary = find_vocabulary(folder)
    if vocabulary is None:
        raise InputError(f"{folder / TOKENIZER_FILE}: model.vocab: must list the tokens, is absent")
    return vocabulary


def find_vocabulary(folder: Location) -> Vocabulary | None:
    """The tokens of a directory's tokenizer.json; None where it lists none.

    An added token has the id that the tokenizers library gives it, whatever the file says: that of
    the same text in the model's map, else the next free one.

    Raises:
        InputError: the file is absent or no JSON; tokens are in another form; ids are no integers
            of at least 0.
    """
    file = folder / TOKENIZER_FILE
    values = read_json(file)
    model = values.get("model")
    if not isinstance(model, dict) or "vocab" not in model:
        return None
    listed = model["vocab"]
    own = _own_tokens(file, listed)
    entries = values.get("added_tokens") or []
    if not isinstance(entries, list):
        raise InputError(f"{file}: added_tokens: must be a list, got {quote(entries)}")
    new: dict[str, int] = {}
    added = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            rule = "must be a mapping with content, a text"
            raise InputError(f"{file}: added_tokens[{number}]: {rule}, got {quote(entry)}")
        text = entry["content"]
        if not text:  # the library leaves it out
            continue
        number = own[text] if text in own else new.setdefault(text, len(own) + len(new))
        added.append(AddedToken(text, number, entry))
    return Vocabulary(folder, own, tuple(added))


def has_vocabulary(folder: Location) -> bool:
    """Whether the directory holds a tokenizer.json."""
    return TOKENIZER_FILE in list_directory(folder)


def list_the_same(folders: Sequence[Location]) -> bool:
    """Whether the tokenizer.json of all directories list the same tokens, by bytes or by values.

    It is quick and checks no form: False where a file is no JSON.
    """
    first = None
    listed = None
    for folder in folders:
        text = _bytes_of(folder / TOKENIZER_FILE)
        if first is None:
            first = text
        elif text != first:
            listed = _listed(first) if listed is None else listed
            if listed is None or _listed(text) != listed:
                return False
    return True


def _bytes_of(file: Location) -> bytes:
    with open_regular(file) as opened:
        size = size_of(opened)
        if size > MAX_JSON_BYTES:
            raise InputError(f"{file}: must hold at most {MAX_JSON_BYTES} bytes, got {size}")
        return opened.read(size)


def _listed(text: bytes) -> tuple[Any, Any] | None:
    """The values of model.vocab and added_tokens; None where there are none."""
    try:
        values = json.loads(text)
        return values["model"]["vocab"], values.get("added_tokens")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None


def _own_tokens(file: Location, listed: Any) -> dict[str, int]:
    if isinstance(listed, dict):
        return {text: _checked_id(file, f"model.vocab.{text}", n) for text, n in listed.items()}
    if not isinstance(listed, list):
        rule = "must be a mapping of token to id, or a list of [token, score]"
        raise InputError(f"{file}: model.vocab: {rule}, got {quote(listed)}")
    own: dict[str, int] = {}
    for number, entry in enumerate(listed):
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            rule = "must be [token, score]"
            raise InputError(f"{file}: model.vocab[{number}]: {rule}, got {quote(entry)}")
        own.setdefault(entry[0], number)
    return own


def _checked_id(file: Location, key: str, number: Any) -> int:
    if type(number) is not int or not 0 <= number < _MOST_IDS:
        rule = f"must be an integer of at least 0 and below {_MOST_IDS}"
        raise InputError(f"{file}: {quote(key)[1:-1]}: {rule}, got {quote(number)}")
    return number
