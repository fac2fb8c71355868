"""Rows matched by the text of their tokens, for the tokenizer that the options name."""

from collections.abc import Sequence

import numpy as np

from merit_fast.errors import InputError
from merit_fast.merge.read.files import quote
from merit_fast.merge.tokenizer_options import ZERO, TokenizerOptions, TokenRow, TokenSource
from merit_fast.merge.vocabulary.donors import Donors, foreign_vocabulary
from merit_fast.merge.vocabulary.rows import Override, RowPlan, plan_rows
from merit_fast.merge.vocabulary.tokens import Vocabulary
from merit_fast.merge.vocabulary.union import OutputTokens, add_tokens, plain_entry, unite


def plan_by_token(donors: Donors, options: TokenizerOptions) -> tuple[RowPlan, OutputTokens]:
    """Rows for the tokens of the chosen tokenizer, and these tokens.

    Raises:
        InputError: a model has no tokenizer.json, or shares no token with the others; the source
            or the row of a token names no model; see ``read_vocabulary``.
    """
    vocabularies = [donor.vocabulary() for donor in donors.all]
    tokens = _output_tokens(donors, vocabularies, options.source)
    known = tokens.vocabulary.ids
    new = [(text, plain_entry(text)) for text in options.tokens or {} if text not in known]
    tokens = add_tokens(tokens, new)
    count = tokens.num_rows
    multiple = options.pad_to_multiple_of or 1
    count = -(-count // multiple) * multiple
    sources = np.full((len(vocabularies), count), -1, np.int64)
    is_token = np.zeros(count, np.bool_)
    texts = tokens.vocabulary.texts
    is_token[list(texts)] = True
    for k, vocabulary in enumerate(vocabularies):
        ids = vocabulary.ids
        shared = [(number, ids[text]) for number, text in texts.items() if text in ids]
        if not shared:
            path = donors.all[k].path
            raise InputError(f"{path}: shares no token with {tokens.vocabulary.file}")
        numbers, own = zip(*shared, strict=True)
        sources[k, list(numbers)] = own
    overrides = _overrides(donors, vocabularies, tokens, options)
    return plan_rows(sources, is_token, donors.base, overrides), tokens


def _output_tokens(donors: Donors, vocabularies: Sequence[Vocabulary], source: str) -> OutputTokens:
    home = vocabularies[donors.home]
    if source == "base":
        return OutputTokens(home)
    if source == "union":
        others = [v for k, v in enumerate(vocabularies) if k != donors.home]
        return unite(home, others)
    number = donors.number_of(source)
    return OutputTokens(foreign_vocabulary(source) if number is None else vocabularies[number])


def _overrides(
    donors: Donors,
    vocabularies: Sequence[Vocabulary],
    tokens: OutputTokens,
    options: TokenizerOptions,
) -> dict[int, Override]:
    """The rows of single tokens by the token's id in the output."""
    overrides = {}
    for text, token in (options.tokens or {}).items():
        key = f"tokenizer.tokens.{text}.source"
        number = tokens.vocabulary.ids[text]
        model, row = _giver(key, text, token, donors, vocabularies)
        overrides[number] = Override(key, model, row, token.force)
    return overrides


def _giver(
    key: str, text: str, token: TokenSource, donors: Donors, vocabularies: Sequence[Vocabulary]
) -> tuple[int | None, int | None]:
    """(model, row) that gives a token's row; (None, None): zeros."""
    source = token.source
    row = source if isinstance(source, TokenRow) else None
    if source == ZERO or (row is not None and row.kind == ZERO):
        return None, None
    named = str(row.model if row is not None else source)
    model = donors.number_of(named)
    if model is None:
        paths = ", ".join(str(donor.path) for donor in donors.all)
        raise InputError(f"{key}: must be zero or one of {paths}, got {named!r}")
    donor = donors.all[model]
    if row is not None and row.token_id is not None:
        if not 0 <= row.token_id < donor.num_rows:
            rule = f"must be at least 0 and below {donor.num_rows}, the rows of {donor.path}"
            raise InputError(f"{key}.token_id: {rule}, got {row.token_id}")
        return model, row.token_id
    wanted = text if row is None or row.token is None else row.token
    if wanted not in vocabularies[model].ids:
        raise InputError(f"{key}: {donor.path} has no token {quote(wanted)} with a row")
    return model, vocabularies[model].ids[wanted]
