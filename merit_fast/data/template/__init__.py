"""Turns conversations into token ids and labels, with the chat template in force."""

from merit_fast.data.template.encoder import ChatEncoder, Encoded, fit
from merit_fast.data.template.notes import outcome_notes
from merit_fast.data.template.render import Rendered, Renderer
from merit_fast.data.template.stops import check_stops, end_token_ids
from merit_fast.data.template.tokenizer import (
    PLAIN,
    load_tokenizer,
    read_template,
    resolve_template,
)
from merit_fast.data.template.tokens import TextTokenizer, Tokens, label

__all__ = [
    "PLAIN",
    "ChatEncoder",
    "Encoded",
    "Rendered",
    "Renderer",
    "TextTokenizer",
    "Tokens",
    "check_stops",
    "end_token_ids",
    "fit",
    "label",
    "load_tokenizer",
    "outcome_notes",
    "read_template",
    "resolve_template",
]
