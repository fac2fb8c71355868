"""Loads tokenizers, and finds the chat template that `data.chat_template` puts in force."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from merit_fast.errors import InputError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = "plain"
_PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
)


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Loads the fast tokenizer of a model folder or hub id. Runs no code from the model's files.

    Raises:
        InputError: the tokenizer is missing, broken, or slow (without character offsets).
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # the Rust library raises bare Exception for a broken tokenizer.json
        raise InputError(f"{model}: no tokenizer could be loaded: {one_line(error)}") from error
    require_offsets(tokenizer)
    return tokenizer  # type: ignore[no-any-return]


def read_template(chat_template: str) -> str:
    """Reads the Jinja file that `data.chat_template` names.

    Raises:
        InputError: the file does not exist, or is not UTF-8.
    """
    try:
        return Path(chat_template).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        rule = f"must be {PLAIN} or the path of a Jinja file"
        raise InputError(
            f"data.chat_template: {rule}, got {chat_template!r} ({one_line(error)})"
        ) from None


def resolve_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> str:
    """The Jinja text of the template in force.

    Args:
        tokenizer: a tokenizer, or a processor with a template of its own.
        chat_template: the value of `data.chat_template`.

    Raises:
        InputError: there is no template or template file, or "plain" has no end token.
    """
    if chat_template == PLAIN:
        if not tokenizer.eos_token:
            rule = f"{PLAIN} needs an end token, but the tokenizer has no eos_token"
            raise InputError(f"data.chat_template: {rule}")
        return ("{{ bos_token }}" if _adds_bos(tokenizer) else "") + _PLAIN_TEMPLATE
    if chat_template is None:
        if not tokenizer.chat_template:
            raise InputError(
                f"the tokenizer has no chat template; set data.chat_template: {PLAIN} "
                "(prompt, newline, answer, end token) or the path of a Jinja file"
            )
        try:
            return str(tokenizer.get_chat_template())
        except ValueError as error:  # several named templates, none of them the default
            raise InputError(
                f"data.chat_template: must be set for this tokenizer: {one_line(error)}"
            ) from None
    return read_template(chat_template)


def require_offsets(tokenizer: Any) -> None:
    """Raises InputError for a tokenizer that does not tell which characters a token stands for."""
    if not getattr(tokenizer, "is_fast", False):
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise InputError(
            f"{name}: needs a fast tokenizer (tokenizer.json), whose character offsets tell "
            f"which tokens are the answer's; got the slow {type(tokenizer).__name__}"
        )


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model expects its begin token before plain text: Llama does, GPT-2 does not."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
