"""The keys of `mixture:` and `data:`, with their help texts and rules."""

import re
from dataclasses import dataclass
from typing import Literal

from merit_fast.options.fields import REQUIRED, option, require

Part = Literal["train", "eval"]


@dataclass(frozen=True)
class DatasetConfig:
    """One entry of `mixture:`. ``path`` is a file, a directory or a Hugging Face dataset id."""

    name: str = option(REQUIRED, "letters, digits, '.', '_' and '-'")
    path: str = option(
        REQUIRED, "JSONL or Parquet file, a directory of such files, or a Hugging Face dataset id"
    )
    eval_path: str | None = option(
        None, "held-out rows: file, directory or Hugging Face dataset id"
    )
    split: str = option("train", "split of a Hugging Face dataset")
    eval_split: str | None = option(
        None, "held-out split of the same Hugging Face dataset, or of eval_path if that is set"
    )
    eval_fraction: float | None = option(
        None,
        "share of path's rows that is held out, chosen by their content; "
        "in place of eval_path and eval_split",
        omit_default=True,
    )
    max_examples: int | None = option(
        None, "train on the first N rows only; held-out rows stay whole"
    )

    def __post_init__(self) -> None:
        named = re.fullmatch(r"[A-Za-z0-9._-]+", self.name) and self.name not in (".", "..")
        require(bool(named), "name", "a file name of letters, digits, '.', '_' and '-'", self.name)
        require(self.path != "", "path", "a file, directory or dataset id", self.path)
        require(
            self.eval_path != "", "eval_path", "a file, directory or dataset id", self.eval_path
        )
        one_source = self.eval_path is None and self.eval_split == self.split
        require(
            not one_source, "eval_split", "another split than the training split", self.eval_split
        )
        fraction = self.eval_fraction
        if fraction is not None:
            require(0 < fraction < 1, "eval_fraction", "between 0 and 1", fraction)
            is_only = self.eval_path is None and self.eval_split is None
            require(is_only, "eval_fraction", "absent next to eval_path or eval_split", fraction)
        rows = self.max_examples
        require(rows is None or rows >= 1, "max_examples", "at least 1", rows)


@dataclass(frozen=True)
class DataConfig:
    """The `data:` section: how rows become tokens."""

    max_length: int = option(2048, "longest example in tokens")
    too_long: Literal["truncate", "drop", "error"] = option("truncate", "treatment of longer rows")
    chat_template: str | None = option(
        None,
        "plain: prompt, newline, answer, end token; or the path of a Jinja file; "
        "absent: the tokenizer's own",
    )

    def __post_init__(self) -> None:
        require(self.max_length >= 2, "max_length", "at least 2", self.max_length)
        require(
            self.chat_template != "",
            "chat_template",
            "plain or the path of a Jinja file",
            self.chat_template,
        )


def source(config: DatasetConfig, part: Part) -> tuple[str, str] | None:
    """(path, split) of the training or held-out rows; None for a dataset without held-out rows.

    Local files ignore the split. With ``eval_fraction`` both parts lie in one source, and
    ``held_out.rows_of_part`` divides its rows.
    """
    if part == "train" or config.eval_fraction is not None:
        return config.path, config.split
    if config.eval_path is None and config.eval_split is None:
        return None
    return config.eval_path or config.path, config.eval_split or config.split
