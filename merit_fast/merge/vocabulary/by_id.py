"""Rows matched by their ids: for models whose vocabularies agree where both have a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from merit_fast.kernels.lazy import np
from merit_fast.merge.option_names import OptionError
from merit_fast.merge.read.files import folder_of, quote
from merit_fast.merge.read.remote import Location
from merit_fast.merge.vocabulary.donors import Donors
from merit_fast.merge.vocabulary.tokens import Vocabulary

if TYPE_CHECKING:
    from merit_fast.merge.vocabulary.rows import RowPlan


def plan_by_id(
    donors: Donors, companions: Location, *, checked: bool
) -> tuple[RowPlan, int] | None:
    """Rows by id, and the model whose tokenizer names them; None where nothing changes.

    An id that is a token of some models is one row of each of these; for the others a row stands
    in. An id that is no token of any is a row of each model that is so long.

    Args:
        companions: the directory that gives config.json, whose tokenizer comes first.
        checked: whether a text must have one id in all models; else only lengths count.

    Raises:
        InputError: a text has another id in another model; a longer model has no tokenizer.json;
            no model's tokenizer has all tokens.
    """
    named: list[set[int] | None]
    if checked:
        vocabularies = _vocabularies(donors)
        _check_texts(donors, vocabularies)
        named = [set(v.texts) if v else None for v in vocabularies]
    else:
        named = [None for _ in donors.all]
    lengths = [donor.num_rows for donor in donors.all]
    count = max(lengths)
    tokens = set[int]().union(*(ids for ids in named if ids))
    if set(lengths) == {count} and all(ids is None or ids == tokens for ids in named):
        return None  # tokenizers that differ in other settings only
    from merit_fast.merge.vocabulary.rows import plan_rows

    sources = np.full((len(lengths), count), -1, np.int64)
    for k, length in enumerate(lengths):
        sources[k, :length] = np.arange(length)
        ids = named[k]
        if ids is not None:
            sources[k, sorted(tokens - ids)] = -1
    plan = plan_rows(sources, np.ones(count, np.bool_), donors.base, {})
    if not any(plan.changes(k, length) for k, length in enumerate(lengths)):
        return None
    return plan, _namer(donors, companions, named, tokens)


def _vocabularies(donors: Donors) -> list[Vocabulary | None]:
    """Each model's tokens. A model that lists none counts as alike if all are equally long."""
    are_equally_long = len({donor.num_rows for donor in donors.all}) == 1
    return [
        donor.listed_vocabulary() if are_equally_long else donor.vocabulary()
        for donor in donors.all
    ]


def _check_texts(donors: Donors, vocabularies: Sequence[Vocabulary | None]) -> None:
    """Checks that a text has one id, and an id one text, in all models together."""
    by_text: dict[str, tuple[int, Vocabulary]] = {}
    by_id: dict[int, tuple[str, Vocabulary]] = {}
    for vocabulary in (vocabularies[donors.home], *vocabularies):
        if vocabulary is None:
            continue
        for number, text in vocabulary.texts.items():
            other, first = by_id.setdefault(number, (text, vocabulary))
            if other != text:
                raise _disagreement(first, other, number, vocabulary)
        for text, number in vocabulary.ids.items():
            id, first = by_text.setdefault(text, (number, vocabulary))
            if id != number:
                raise _disagreement(first, text, id, vocabulary)


def _disagreement(first: Vocabulary, text: str, id: int, other: Vocabulary) -> OptionError:
    """An error about a token of ``first`` that has another id in ``other``, or none."""
    found = other.ids.get(text)
    theirs = "no such token" if found is None else f"id {found}"
    if id in other.texts:
        theirs += f"; id {id} is {quote(other.texts[id])}"
    rule = f"{other.file}: {quote(text)}: must have id {id} as in {first.file}, got {theirs}"
    remedy = "{} or base matches rows by token, ids by their ids"
    return OptionError(rule, "tokenizer", remedy, "union")


def _namer(
    donors: Donors, companions: Location, named: Sequence[set[int] | None], tokens: set[int]
) -> int:
    """The first model whose tokenizer has all tokens; without tokens, the first of the longest."""
    count = len(donors.all)
    order = sorted(range(count), key=lambda k: folder_of(donors.all[k].path) != companions)
    longest = max(donor.num_rows for donor in donors.all)
    for k in order:
        if named[k] == tokens if tokens else donors.all[k].num_rows == longest:
            return k
    rule = "tokenizer.json: no model has the tokens of all others"
    raise OptionError(rule, "tokenizer", "{} joins them", "union")
