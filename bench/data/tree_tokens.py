"""Tokens of a conversation as a tree, against one text of it and one text per answer.

    python -m bench.data.tree_tokens --turns 10

Each family's template comes from the installed package trl. The tokenizer is the demo model's, with
the control tokens of the family added.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import re
from pathlib import Path
from typing import Any

from merit_fast.data import DataConfig, Example, load_tokenizer
from merit_fast.data.conversation import Conversation, Message
from merit_fast.data.template import ChatEncoder
from merit_fast.data.tree import expand
from merit_fast.demo.model import default_cache, prepare_model

FAMILIES = (
    "qwen3",
    "qwen3_5_think",
    "phi3",
    "gptoss",
    "deepseek_r1_distill",
    "glm4moe",
    "nemotron_3_nano",
    "llama3",
)
WORDS = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "it",
    "was",
    "for",
    "on",
    "are",
    "with",
    "as",
)
_TOKEN = re.compile(r"<[|｜][^<>\s'\"{}]{1,40}[|｜]>")


def main() -> None:
    """Prints one line per family."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--user", type=int, default=60, help="words of a question")
    parser.add_argument("--answer", type=int, default=60, help="words of an answer")
    parser.add_argument("--reasoning", type=int, default=0, help="words of reasoning, each answer")
    args = parser.parse_args()
    model = prepare_model(default_cache())
    print("family               one text   tree   per answer   tree/one   per answer/one")
    for family in FAMILIES:
        tree, apart, whole = measure(str(model), family, args)
        print(
            f"{family:<20} {whole:>8} {tree:>6} {apart:>12} {tree / whole:>10.2f} "
            f"{apart / whole:>16.2f}"
        )


def measure(model: str, family: str, args: argparse.Namespace) -> tuple[int, int, int]:
    """Tokens of the tree, of one text per answer, and of the one text with the last answer."""
    tokenizer: Any = load_tokenizer(model)
    tokenizer.chat_template = _template(family)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": sorted(set(_TOKEN.findall(tokenizer.chat_template)))}
    )
    tokenizer.add_tokens(["<think>", "</think>"])
    encoder = ChatEncoder(tokenizer, DataConfig(max_length=10**6))
    [encoded] = encoder.encode([_conversation(args)], "all")
    if encoded.error:
        raise encoded.error
    texts: list[Example] = [text for example in encoded.examples for text in expand(example)]
    tree = sum(len(example.input_ids) for example in encoded.examples)
    if len(texts) == 1:  # one text shows every answer: a text per answer would end at each
        ends = [i + 1 for i in _answer_ends(texts[0])]
        return tree, sum(ends), ends[-1]
    return tree, sum(len(text.input_ids) for text in texts), len(texts[-1].input_ids)


def _answer_ends(example: Example) -> list[int]:
    is_target = (example.labels >= 0).tolist() + [False]
    return [i for i in range(len(is_target) - 1) if is_target[i] and not is_target[i + 1]]


def _conversation(args: argparse.Namespace) -> Conversation:
    draw = random.Random(0)
    messages = []
    for _ in range(args.turns):
        messages.append(Message("user", " ".join(draw.choices(WORDS, k=args.user))))
        fields = {}
        if args.reasoning:
            fields["reasoning_content"] = " ".join(draw.choices(WORDS, k=args.reasoning))
        answer = " ".join(draw.choices(WORDS, k=args.answer))
        messages.append(Message("assistant", answer, fields=fields))
    return Conversation("conversation", tuple(messages))


def _template(family: str) -> str:
    package = importlib.util.find_spec("trl")
    if package is None or package.origin is None:
        raise SystemExit("tree_tokens: package trl is not installed")
    folder = Path(package.origin).parent / "chat_templates"
    return (folder / f"{family}.jinja").read_text(encoding="utf-8")


if __name__ == "__main__":
    main()
