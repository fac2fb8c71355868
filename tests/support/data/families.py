"""Chat templates of model families, each with a tokenizer that has its control tokens.

The templates lie in the installed package trl. Its training twins mark the answers themselves.
"""

import functools
import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING

from support.data.rows import make_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_TOKEN = re.compile(
    r"<[|｜][^<>\s'\"{}]{1,40}[|｜]>|<(?:start|end)_of_turn>|\[/?[A-Z_]{3,20}\]|</s>"
    r"|<end_of_utterance>|<\|turn>|<turn\|>|<\|?channel\|?>|<\|?tool(?:_\w+)?\|?>"
)
_MARKUP = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # added, but not special
_ENDS = {  # the eos_token that the family's tokenizer names
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "cohere2": "<|END_OF_TURN_TOKEN|>",
    "deepseek_r1_distill": "<｜end▁of▁sentence｜>",
    "deepseekv3": "<｜end▁of▁sentence｜>",
    "gemma": "<eos>",
    "gemma3": "<eos>",
    "glm4moe": "<|endoftext|>",
    "gptoss": "<|return|>",
    "llama3": "<|eot_id|>",
    "llama3_1": "<|eot_id|>",
    "llama3_2": "<|eot_id|>",
    "phi3": "<|endoftext|>",
    "phi3_5": "<|endoftext|>",
}
_NOT_SPECIAL = {"deepseek_r1_distill": ("<｜User｜>", "<｜Assistant｜>")}


def template(name: str) -> str:
    """The text of a template that the package trl ships."""
    package = importlib.util.find_spec("trl")
    assert package and package.origin
    file = Path(package.origin).parent / "chat_templates" / f"{name}.jinja"
    return file.read_text(encoding="utf-8")


@functools.cache
def tokenizer(name: str) -> "PreTrainedTokenizerFast":
    """A tiny byte-level tokenizer with the template of a family and the tokens that it spells."""
    from tokenizers import AddedToken

    source = template(name)
    end = _ENDS.get(name, "<|im_end|>")
    fast = make_tokenizer(source, eos="<|im_end|>", bos="<s>", trim_offsets=False)
    fast.backend_tokenizer.no_truncation()
    plain = _NOT_SPECIAL.get(name, ())
    spelled = sorted({end, *_TOKEN.findall(source)} - set(plain))
    fast.add_special_tokens({"additional_special_tokens": spelled})
    fast.add_tokens([AddedToken(text, special=False) for text in (*plain, *_MARKUP)])
    fast.eos_token = end
    return fast
