"""Turns conversations into token ids and labels, with the chat template in force."""

from merit_fast.data.template.encoder import (
    PLAIN,
    ChatEncoder,
    Rendered,
    load_tokenizer,
    read_template,
)

__all__ = ["PLAIN", "ChatEncoder", "Rendered", "load_tokenizer", "read_template"]
