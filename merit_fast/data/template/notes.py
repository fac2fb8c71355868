"""Sentences on what happened to the rows of a dataset on their way to tokens."""

from collections.abc import Iterator, Mapping

from merit_fast.data.template.forms import FOLDED
from merit_fast.data.template.render import OPENED, REWRITTEN, SPLIT

_TOO_LONG = {
    "truncated": "truncated",
    "dropped": "dropped",
    "unanswered": "dropped because truncation would leave no answer",
}
_TEMPLATE = {  # outcome: what it means for one row, for several, and why
    REWRITTEN: (
        "shows each answer behind a history of its own",
        "show each answer behind a history of its own",
        " because the chat template rewrites earlier turns",
    ),
    FOLDED: (
        "has its system message in front of the user's turn",
        "have their system message in front of the user's turn",
        " because the chat template has no place for it",
    ),
    OPENED: ("begins with an answer", "begin with an answer", ", which is not in the loss"),
    SPLIT: (
        "spells control tokens",
        "spell control tokens",
        ", which are tokenized as text (data.special_tokens_in_text)",
    ),
}


def outcome_notes(outcomes: Mapping[str, int], max_length: int) -> Iterator[str]:
    """A sentence for each outcome that occurred.

    Args:
        outcomes: outcome -> rows.
        max_length: `data.max_length`.
    """
    for key, outcome in _TOO_LONG.items():
        if count := outcomes.get(key):
            verb = "was" if count == 1 else "were"
            yield f"{_rows(count)} longer than {max_length} tokens {verb} {outcome}"
    for key, (one, several, reason) in _TEMPLATE.items():
        if count := outcomes.get(key):
            yield f"{_rows(count)} {one if count == 1 else several}{reason}"


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"
