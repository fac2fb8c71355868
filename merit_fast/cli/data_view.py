"""Describes tokenized datasets for people and as JSON: counts, lengths, texts with their loss."""

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from merit_fast.data import Dataset, DatasetConfig, Example
    from merit_fast.data.mixture.select import MixtureRows, Selection

OPEN, CLOSE = "⟦", "⟧"  # around the text whose tokens enter the loss
_GREEN, _PLAIN = "\033[32m", "\033[0m"
_COLUMNS = ("rows", "examples", "tokens", "in the loss", "median", "90 %", "longest", "skipped")
Description = dict[str, Any]


def describe(
    dataset: "Dataset",
    selection: "Selection",
    part: str,
    num_shown: int,
    decode: Callable[[list[int]], Any],
) -> Description:
    """The description of one dataset's part; keys that begin with "_" are not for JSON.

    Args:
        dataset: the examples.
        selection: the rows that they are made of.
        part: "train" or "eval".
        num_shown: number of examples to show.
        decode: token ids -> text.
    """
    lengths = dataset.lengths
    return {
        "name": dataset.name,
        "part": part,
        "num_rows": len(selection.order),
        "num_examples": dataset.num_examples,
        "num_tokens": dataset.num_tokens,
        "num_target_tokens": dataset.num_target_tokens,
        "skipped": _count_skipped(dataset, selection),
        "notes": list(dataset.notes),
        "examples": [
            shown
            for index in range(min(num_shown, dataset.num_examples))
            for shown in _texts(dataset.examples[index], decode)
        ],
        "_lengths": [int(np.quantile(lengths, share)) for share in (0.5, 0.9, 1)],
    }


def part_lines(
    described: Sequence[Description], configs: Sequence["DatasetConfig"]
) -> Iterator[str]:
    """A table of all parts; then the notes and the examples of each dataset."""
    cells = [_cells(item) for item in described]
    heads = ("dataset", *_COLUMNS)
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    for row in (heads, *cells):
        first, *others = (text.rjust(width) for text, width in zip(row, widths, strict=True))
        yield "  ".join([first.strip().ljust(widths[0]), *others]).rstrip()
    held_out = {item["name"] for item in described if item["part"] == "eval"}
    for item in described:
        if not (item["notes"] or (item["part"] == "train" and item["examples"])):
            continue
        yield ""
        yield f"{item['name']} ({item['part']})"
        yield from (f"  note: {note}" for note in item["notes"])
        for example in item["examples"] if item["part"] == "train" else ():
            yield from ("  | " + line for line in _marked(example).rstrip("\n").split("\n"))
    bare = [config.name for config in configs if config.name not in held_out]
    if bare:
        yield ""
        yield f"no held-out rows: {', '.join(bare)}"


def shared_lines(rows: "MixtureRows", num_leaks: int) -> Iterator[str]:
    """Lines on conversations that are in two datasets, or trained and held out."""
    shared = rows.shared_rows()
    if shared or num_leaks:
        yield ""
    for (first, second), count in shared.items():
        yield f"training conversations in both {first} and {second}: {count:,}"
    if num_leaks:
        yield f"training rows that are held out too: {num_leaks:,}"


def _cells(item: Description) -> tuple[str, ...]:
    counts = [item[key] for key in ("num_rows", "num_examples", "num_tokens", "num_target_tokens")]
    numbers = [*counts, *item["_lengths"], item["skipped"]]
    return (f"{item['name']} ({item['part']})", *(f"{number:,}" for number in numbers))


def _count_skipped(dataset: "Dataset", selection: "Selection") -> int:
    """Number of rows that are wrong, or too long to leave an example."""
    from merit_fast.data.store.examples import StoredExamples

    assert isinstance(dataset.examples, StoredExamples)
    num_used = len(np.unique(dataset.examples.rows))
    return len(selection.errors) + len(np.unique(selection.order)) - num_used


def _texts(example: "Example", decode: Callable[[list[int]], Any]) -> Iterator[dict[str, Any]]:
    """The texts of an example: one, or those that share their beginnings."""
    from merit_fast.data.tree import expand

    for text in expand(example):
        yield _text(text, decode)


def _text(example: "Example", decode: Callable[[list[int]], Any]) -> dict[str, Any]:
    from merit_fast.data import IGNORED_LABEL

    text = ""
    loss: list[list[int]] = []
    pairs = zip(example.input_ids.tolist(), example.labels.tolist(), strict=True)
    for in_loss, group in groupby(pairs, key=lambda pair: pair[1] != IGNORED_LABEL):
        start = len(text)
        text += str(decode([token for token, _ in group]))
        if in_loss:
            loss.append([start, len(text)])
    return {
        "text": text,
        "loss": loss,
        "input_ids": example.input_ids.tolist(),
        "labels": example.labels.tolist(),
    }


def _marked(example: dict[str, Any]) -> str:
    """The text with its loss in colour on a terminal, else in brackets."""
    in_colour = sys.stdout.isatty()
    before = _GREEN if in_colour else OPEN
    after = _PLAIN if in_colour else CLOSE
    text: str = example["text"]
    marked = ""
    past = 0
    for start, end in example["loss"]:
        marked += f"{text[past:start]}{before}{text[start:end]}{after}"
        past = end
    return marked + text[past:]
