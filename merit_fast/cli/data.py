"""The command `data`: shows the datasets of a run as a model reads them."""

import argparse
import json
from collections.abc import Callable
from itertools import groupby
from typing import TYPE_CHECKING, Any

from merit_fast.cli.flags import Parser, Work, add_inputs, add_run_flags
from merit_fast.cli.stages import read_config
from merit_fast.errors import InputError

if TYPE_CHECKING:
    from merit_fast.data import Dataset, Example

OPEN, CLOSE = "⟦", "⟧"  # around the text whose tokens enter the loss


def add_data(parser: Parser) -> Work:
    """Adds the arguments of `data`; returns the function that does its work."""
    add_inputs(parser)
    add_run_flags(parser)
    help = f"rows of each dataset to show, with the loss in {OPEN}{CLOSE} [default: 1]"
    parser.add_argument("--rows", metavar="N", type=int, default=1, help=help)
    return _show_data


def _show_data(arguments: argparse.Namespace) -> None:
    if arguments.rows < 0:
        raise InputError(f"command line: --rows: must be at least 0, got {arguments.rows}")
    _, config = read_config("data", arguments)
    from merit_fast.data import load_mixture, load_tokenizer
    from merit_fast.model import resolve_model

    tokenizer = load_tokenizer(str(resolve_model(config.model)))
    shown: dict[str, dict[str, Any]] = {}
    for part in ("train", "eval"):
        datasets = load_mixture(config.mixture, tokenizer, config.data, part=part)
        for dataset in datasets:
            described = _describe(dataset, arguments.rows, tokenizer.decode)
            shown.setdefault(dataset.name, {})[part] = described
    if arguments.as_json:
        print(json.dumps(shown, ensure_ascii=False))
        return
    for name, parts in shown.items():
        print("\n".join(_lines(name, parts)))


def _describe(
    dataset: "Dataset", num_rows: int, decode: Callable[[list[int]], Any]
) -> dict[str, Any]:
    return {
        "examples": dataset.num_examples,
        "tokens": dataset.num_tokens,
        "target_tokens": dataset.num_target_tokens,
        "longest": max(len(example.input_ids) for example in dataset.examples),
        "notes": list(dataset.notes),
        "rows": [_segments(example, decode) for example in dataset.examples[:num_rows]],
    }


def _segments(
    example: "Example", decode: Callable[[list[int]], Any]
) -> list[dict[str, str | bool]]:
    """The row's text, cut where the loss begins and ends."""
    from merit_fast.data import IGNORED_LABEL

    segments: list[dict[str, str | bool]] = []
    pairs = zip(example.input_ids.tolist(), example.labels.tolist(), strict=True)
    for in_loss, group in groupby(pairs, key=lambda pair: pair[1] != IGNORED_LABEL):
        segments.append({"text": str(decode([token for token, _ in group])), "in_loss": in_loss})
    return segments


def _lines(name: str, parts: dict[str, Any]) -> list[str]:
    lines = []
    for part, described in parts.items():
        lines.append(
            f"{name} ({part}): examples: {described['examples']:,}; tokens: "
            f"{described['tokens']:,}, {described['target_tokens']:,} of them in the loss; "
            f"longest example: {described['longest']:,}"
        )
        lines += [f"  note: {note}" for note in described["notes"]]
        for segments in described["rows"] if part == "train" else ():
            marked = [
                f"{OPEN}{segment['text']}{CLOSE}" if segment["in_loss"] else segment["text"]
                for segment in segments
            ]
            lines += ["  | " + line for line in "".join(marked).rstrip("\n").split("\n")]
    if "eval" not in parts:
        lines.append(f"{name} (eval): no held-out rows")
    return lines
