"""Turns rendered texts into token ids and labels.

Byte-level tokenizers tell by the lengths of their tokens which bytes a token stands for. All others
are asked for offsets, which takes longer.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from merit_fast.data.dataset import IGNORED_LABEL
from merit_fast.data.template.render import Rendered
from merit_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Tokenizer -> size of its vocabulary, bytes of each token
_KNOWN_SIZES: WeakKeyDictionary[Any, tuple[int, NDArray[np.int64]]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of a text, each with the half-open range of what it stands for."""

    ids: NDArray[np.int32]  # [T]
    starts: NDArray[np.int64]  # [T]
    ends: NDArray[np.int64]  # [T]
    in_bytes: bool = False  # ranges count UTF-8 bytes, not characters


class TextTokenizer:
    """A fast tokenizer that adds nothing to a text.

    Args:
        tokenizer: a fast tokenizer; its settings for padding and truncation are not used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        self._normal = _byte_level_normal(self._backend)
        self._sizes = _byte_sizes(tokenizer) if self._normal else np.empty(0, np.int64)
        self._newline = [] if self._normal else self._encode("\n").ids

    def tokenize(self, texts: Sequence[Rendered]) -> list[Tokens]:
        """Tokenizes texts in one call.

        Raises:
            InputError: a text is not valid Unicode.
        """
        for item in texts:
            _require_unicode(item)
        whole = [item for item in texts if not item.plain]
        encoded = iter(self._tokenize_whole([item.text for item in whole]))
        return [self._in_pieces(item) if item.plain else next(encoded) for item in texts]

    def _tokenize_whole(self, texts: list[str]) -> list[Tokens]:
        if not self._normal:
            return [_with_offsets(encoding) for encoding in self._encode_all(texts)]
        ready = []
        self._reset()
        for text, encoding in zip(
            texts, self._backend.encode_batch_fast(texts, add_special_tokens=False), strict=True
        ):
            ids = np.array(encoding.ids, np.int32)
            ends = np.cumsum(self._sizes[ids])
            length = len(text) if text.isascii() else len(text.encode())
            if self._normal(text) and length == (ends[-1] if len(ends) else 0):
                ready.append(Tokens(ids, ends - self._sizes[ids], ends, in_bytes=True))
            else:
                ready.append(_with_offsets(self._encode(text)))
        return ready

    def _in_pieces(self, item: Rendered) -> Tokens:
        """Tokenizes a text of which some pieces spell control tokens but are text."""
        pieces = []
        for start, end, is_plain in _cut(item):
            text = item.text[start:end]
            found = self._piece(text, start, is_plain)
            spelled = self._backend.token_to_id(text) if is_plain else None
            if spelled is not None and spelled in found.ids:  # no setting hides such a token
                cut = start + 1
                first = self._piece(text[:1], start, is_plain)
                found = _join([first, self._piece(text[1:], cut, is_plain)])
            pieces.append(found)
        return _join(pieces)

    def _piece(self, text: str, start: int, is_plain: bool) -> Tokens:
        """Tokens of a piece that begins at ``start`` of its text."""
        front = "\n" if start and self._newline else ""  # keeps off a space at the beginning
        self._backend.encode_special_tokens = is_plain
        try:
            found = _with_offsets(self._encode(front + text))
            if front and found.ids[: len(self._newline)].tolist() == self._newline:
                rest = slice(len(self._newline), None)
                shift = start - 1
                found = Tokens(found.ids[rest], found.starts[rest], found.ends[rest])
            else:
                found = _with_offsets(self._encode(text))
                shift = start
        finally:
            self._backend.encode_special_tokens = False
        return Tokens(found.ids, found.starts + shift, found.ends + shift)

    def _encode(self, text: str) -> Any:
        self._reset()
        return self._backend.encode(text, add_special_tokens=False)  # the template wrote them

    def _encode_all(self, texts: list[str]) -> Any:
        self._reset()
        return self._backend.encode_batch(texts, add_special_tokens=False)

    def _reset(self) -> None:
        """Undoes what other users of the tokenizer set."""
        if self._backend.truncation is not None:
            self._backend.no_truncation()
        if self._backend.padding is not None:
            self._backend.no_padding()


def label(tokens: Tokens, item: Rendered) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Ids and labels of a text up to its last target.

    A token that holds any character of an answer is a target.

    Returns:
        input_ids [T] and labels [T], IGNORED_LABEL outside the answers and at 0.

    Raises:
        InputError: the text has no target token.
    """
    is_target = np.zeros(len(tokens.ids), dtype=bool)
    # Offsets of byte-level tokenizers leave out spaces: a token of spaces has the empty range where
    # it ends. It lies inside a span that reaches further, and no span ends in whitespace.
    for first, past in _in_units(item, tokens.in_bytes):
        is_target |= (tokens.starts < past) & (tokens.ends > first)
    is_target[:1] = False  # nothing predicts the first token
    targets = np.flatnonzero(is_target)
    if not len(targets):
        rule = "must have an answer of the assistant with at least one token"
        raise InputError(f"{item.place}: {rule}, found none")
    length = int(targets[-1]) + 1
    input_ids = tokens.ids[:length].copy()
    labels = np.where(is_target[:length], input_ids, np.int32(IGNORED_LABEL)).astype(np.int32)
    return input_ids, labels


def _in_units(item: Rendered, in_bytes: bool) -> Iterator[tuple[int, int]]:
    if not in_bytes or item.text.isascii():
        yield from item.spans
        return
    for start, end in item.spans:
        first = len(item.text[:start].encode())
        yield first, first + len(item.text[start:end].encode())


def _cut(item: Rendered) -> Iterator[tuple[int, int, bool]]:
    """Pieces of a text: start, end, and whether the piece is plain."""
    borders = [0, *(border for span in item.plain for border in span), len(item.text)]
    for i, (start, end) in enumerate(pairwise(borders)):
        if start < end:
            yield start, end, bool(i % 2)


def _join(pieces: Sequence[Tokens]) -> Tokens:
    return Tokens(
        np.concatenate([piece.ids for piece in pieces]),
        np.concatenate([piece.starts for piece in pieces]),
        np.concatenate([piece.ends for piece in pieces]),
    )


def _with_offsets(encoding: Any) -> Tokens:
    ranges = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    return Tokens(np.array(encoding.ids, np.int32), ranges[:, 0], ranges[:, 1])


def _byte_level_normal(backend: Any) -> Callable[[str], bool] | None:
    """Tells of a text whether its tokens stand for its bytes; None if that is never known."""
    splitter = _state(backend.pre_tokenizer)
    steps = splitter.get("pretokenizers", [splitter])
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    if not byte_level or any(step.get("add_prefix_space") for step in byte_level):
        return None
    if getattr(backend.model, "unk_token", None):
        return None
    normalizer = _state(backend.normalizer).get("type")
    if normalizer is None:
        return lambda text: True
    if normalizer == "NFC":
        return lambda text: text.isascii() or unicodedata.is_normalized("NFC", text)
    return None


def _state(part: Any) -> dict[str, Any]:
    return {} if part is None else dict(json.loads(part.__getstate__()))


def _byte_sizes(tokenizer: Any) -> NDArray[np.int64]:
    """[V] bytes of each token; kept, since every dataset of a mixture asks for them."""
    size = tokenizer.backend_tokenizer.get_vocab_size()
    known = _KNOWN_SIZES.get(tokenizer)
    if known is None or known[0] != size:
        known = (size, _count_bytes(tokenizer))
        _KNOWN_SIZES[tokenizer] = known
    return known[1]


def _count_bytes(tokenizer: Any) -> NDArray[np.int64]:
    """[V] bytes of each token. A byte-level vocabulary writes each byte as one character."""
    vocabulary = tokenizer.get_vocab()
    sizes = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for text, token_id in vocabulary.items():
        sizes[token_id] = len(text)
    for token_id, token in tokenizer.added_tokens_decoder.items():
        sizes[token_id] = len(token.content.encode())
    return sizes


def _require_unicode(item: Rendered) -> None:
    try:
        item.text.encode()
    except UnicodeEncodeError:
        rule = "must be valid Unicode, got an unpaired surrogate (\\ud800-\\udfff)"
        raise InputError(f"{item.place}: {rule}") from None
