"""The tokens of the output: those of one tokenizer, or those of all models."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from merit_fast.merge.vocabulary.tokens import AddedToken, Vocabulary
from merit_fast.records import field, record, replace

# How a text that no model adds becomes an added token: as the tokenizers library adds a plain text.
_PLAIN = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": True,
    "special": False,
}


@record
class OutputTokens:
    """The output's vocabulary.

    Attributes:
        vocabulary: every token of the output. Its folder gives the tokenizer's files.
        new: added tokens that the folder's tokenizer.json lacks, or has as plain tokens.
        made_plain: texts of ordinary tokens of other models that are added tokens now.
    """

    vocabulary: Vocabulary
    new: tuple[AddedToken, ...] = ()
    made_plain: tuple[str, ...] = field(default=())

    @property
    def num_rows(self) -> int:
        """Rows that the tokens need: the highest id + 1."""
        return max(self.vocabulary.ids.values(), default=-1) + 1


def unite(base: Vocabulary, others: Sequence[Vocabulary]) -> OutputTokens:
    """The tokens of all vocabularies, with the ids that ``base`` has for its own.

    Tokens that only others have follow, model by model and by their ids there: first ordinary ones,
    then added ones. All become added tokens, as in mergekit: no rule that cuts text, such as BPE's
    merges, is joined. Of added tokens with several settings the first model's count.
    """
    entries: dict[str, Mapping[str, Any]] = {}
    for vocabulary in (base, *others):
        for token in vocabulary.added:
            entries.setdefault(token.content, token.values)
    plain: dict[str, None] = {}
    for vocabulary in others:
        for text in vocabulary.texts.values():
            if text not in base.ids and text not in entries:
                plain[text] = None
    in_base = {token.content for token in base.added}
    added = {text: values for text, values in entries.items() if text not in in_base}
    new = [(text, plain_entry(text)) for text in plain] + list(added.items())
    return replace(add_tokens(OutputTokens(base), new), made_plain=tuple(plain))


def add_tokens(tokens: OutputTokens, new: Iterable[tuple[str, Mapping[str, Any]]]) -> OutputTokens:
    """The vocabulary with more added tokens; a text that it has keeps its id.

    Args:
        new: (text, entry of ``added_tokens``) each.
    """
    vocabulary = tokens.vocabulary
    own = vocabulary.own
    counted = {token.content: token.id for token in vocabulary.added if token.content not in own}
    made = []
    for text, values in new:  # ids as the tokenizers library counts them
        is_own = text in own
        number = own[text] if is_own else counted.setdefault(text, len(own) + len(counted))
        made.append(AddedToken(text, number, values))
    larger = replace(vocabulary, added=(*vocabulary.added, *made))
    return replace(tokens, vocabulary=larger, new=(*tokens.new, *made))


def plain_entry(text: str) -> dict[str, Any]:
    """The settings of an added token that is made of a text."""
    return {"content": text, **_PLAIN}
