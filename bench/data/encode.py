"""Time per row of reading, rendering and tokenizing in one process, and of the tokenizer by itself.

    TOKENIZERS_PARALLELISM=false python -m bench.data.encode --model DIR

Rows hold English text of Python's own documentation: single turns of 120 words, and five turns of
60 words under the model's template and under one that rewrites history (qwen3, from trl).
"""

import argparse
import importlib.util
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from merit_fast.data import DataConfig, DatasetConfig, load_mixture, load_tokenizer

_ROWS = 1000


def main() -> None:
    """Prints one line for each kind of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    model = parser.parse_args().model
    print(f"{'rows':<24} {'tokens':>8} {'ms a row':>9} {'tokenizer':>10}")
    with tempfile.TemporaryDirectory() as folder:
        for name, turns, words, template in (
            ("1 turn", 1, 60, None),
            ("5 turns", 5, 30, None),
            ("5 turns, qwen3", 5, 30, "qwen3"),
        ):
            tokenizer = load_tokenizer(model)
            if template:
                tokenizer.chat_template = _template(template)
            path = Path(folder, f"{turns}.jsonl")
            texts = list(_conversations(turns, words))
            path.write_text("".join(json.dumps({"messages": text}) + "\n" for text in texts))
            _report(name, path, texts, tokenizer)


def _report(name: str, path: Path, texts: list[Any], tokenizer: Any) -> None:
    config = DataConfig(max_length=8192)
    rendered = [tokenizer.apply_chat_template(text, tokenize=False) for text in texts]
    seconds = []
    floor = []
    for _ in range(3):
        start = time.perf_counter()
        entries = [DatasetConfig("a", str(path))]
        (dataset,) = load_mixture(entries, tokenizer, config, part="train", num_workers=0)
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        for first in range(0, _ROWS, 64):
            tokenizer.backend_tokenizer.encode_batch_fast(rendered[first : first + 64])
        floor.append(time.perf_counter() - start)
    tokens = dataset.num_tokens / _ROWS
    times = [1000 * sorted(values)[1] / _ROWS for values in (seconds, floor)]
    print(f"{name:<24} {tokens:8.0f} {times[0]:9.2f} {times[1]:10.2f}")


def _conversations(turns: int, words: int) -> Iterator[list[dict[str, str]]]:
    from pydoc_data import topics  # type: ignore[import-untyped,unused-ignore]

    text = " ".join(topics.topics.values()).split(" ")
    generator = random.Random(0)
    for _ in range(_ROWS):
        start = generator.randrange(len(text) - 2 * turns * words)
        messages = []
        for turn in range(2 * turns):
            first = start + turn * words
            role = ("user", "assistant")[turn % 2]
            messages.append({"role": role, "content": " ".join(text[first : first + words])})
        yield messages


def _template(name: str) -> str:
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.submodule_search_locations
    (found,) = Path(spec.submodule_search_locations[0]).rglob(f"{name}.jinja")
    return found.read_text()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
