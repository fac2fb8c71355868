"""Options of a merge's vocabulary: the tokenizer of the output, and rows of single tokens."""

from collections.abc import Callable
from typing import Literal

from merit_fast.options.fields import option, require
from merit_fast.records import record, replace

SOURCES = ("union", "base", "ids")
ZERO = "zero"


@record
class TokenRow:
    """A row that stands in for a token's: zeros, or the row of one model's token or token id."""

    kind: Literal["zero", "model_token"] = option("model_token", "zero, or a token of a model")
    model: str | None = option(None, "the model that gives the row")
    token: str | None = option(None, "text of the token that gives the row")
    token_id: int | None = option(None, "id of the token that gives the row")

    def __post_init__(self) -> None:
        if self.kind == ZERO:
            given = [self.model, self.token, self.token_id]
            require(given == [None] * 3, "kind", "model_token next to model or token", self.kind)
            return
        require(self.model is not None, "model", "given with kind model_token", self.model)
        one = (self.token is None) != (self.token_id is None)
        rule = "given, or token_id instead, and not both"
        require(one, "token", rule, self.token)


@record
class TokenSource:
    """Row of one token for the models that lack it; with ``force`` for every model."""

    source: str | TokenRow | None = option(
        None, "zero, the model that gives the row, or {kind: model_token, model, token or token_id}"
    )
    force: bool = option(False, "use this row for the models that have the token, too")

    def __post_init__(self) -> None:
        require(self.source is not None, "source", "given", None)


@record
class TokenizerOptions:
    """The output's vocabulary, as ``tokenizer:`` of a mergekit recipe describes it."""

    source: str = option(
        "union", "union: tokens of all models; base; ids: rows by id, unchecked; or a model"
    )
    tokens: dict[str, TokenSource] | None = option(
        None, "rows of single tokens, as {TOKEN: {source: ..., force: ...}}; unknown ones are added"
    )
    pad_to_multiple_of: int | None = option(
        None, "fill the matrices with mean rows up to a multiple of this number"
    )

    def __post_init__(self) -> None:
        multiple = self.pad_to_multiple_of
        is_small = multiple is None or 0 < multiple <= 1 << 16
        require(is_small, "pad_to_multiple_of", "between 1 and 65536", multiple)
        if self.source == "ids":
            rule = "absent: source ids keeps every row at its id"
            require(not self.tokens, "tokens", rule, self.tokens)
            require(multiple is None, "pad_to_multiple_of", rule, multiple)


def tokenizer_options(value: str | TokenizerOptions | None) -> TokenizerOptions | None:
    """The options in full, where only the source is named."""
    return TokenizerOptions(value) if isinstance(value, str) else value


def with_names(options: TokenizerOptions, name_of: Callable[[str], str]) -> TokenizerOptions:
    """The options with every model's path replaced by another name of it."""
    tokens = {text: _named(token, name_of) for text, token in (options.tokens or {}).items()}
    source = options.source if options.source in SOURCES else name_of(options.source)
    return replace(options, source=source, tokens=tokens or None)


def _named(token: TokenSource, name_of: Callable[[str], str]) -> TokenSource:
    source = token.source
    if isinstance(source, TokenRow):
        model = None if source.model is None else name_of(source.model)
        return replace(token, source=replace(source, model=model))
    return token if source in (None, ZERO) else replace(token, source=name_of(str(source)))
