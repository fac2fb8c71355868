"""The keys of `mixture:` and `data:`, with their help texts and rules."""

import re
from datetime import date
from typing import Any, Literal

from merit_fast.data.sources.source import Source
from merit_fast.options.fields import REQUIRED, option, require
from merit_fast.records import record, replace

Part = Literal["train", "eval"]
TrainOn = Literal["all", "last"] | tuple[str, ...]


@record
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
    eval_share: float | None = option(
        None,
        "share of path's rows that is held out, chosen by their content; "
        "in place of eval_path and eval_split",
        omit_default=True,
    )
    max_examples: int | None = option(
        None, "train on the first N rows only; held-out rows stay whole"
    )
    sample: int | None = option(
        None, "train on N random rows, chosen by data.seed", omit_default=True
    )
    weight: float = option(
        1.0,
        "times that each training row is seen in an epoch; 0.5: half of them",
        omit_default=True,
    )
    config: str | None = option(None, "configuration of a Hugging Face dataset", omit_default=True)
    revision: str | None = option(
        None, "branch, tag or commit of a Hugging Face dataset", omit_default=True
    )
    data_files: tuple[str, ...] = option(
        (), "files of a Hugging Face dataset or of a directory, as globs", omit_default=True
    )
    columns: dict[str, str] | None = option(
        None,
        "what a format reads -> the column that holds it here",
        omit_default=True,
        form="{A: B}",
    )
    roles: dict[str, tuple[str, ...]] | None = option(
        None, "role -> the words for it in these rows", omit_default=True, form="{A: [B, ...]}"
    )
    media: str | None = option(
        None, "folder from which the paths of images count", omit_default=True
    )
    train_on: TrainOn | None = option(
        None, "in place of data.train_on, for this dataset", omit_default=True
    )
    note: str | None = option(
        None, "a sentence about this dataset that the plan shows", omit_default=True
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
        fraction = self.eval_share
        if fraction is not None:
            require(0 < fraction < 1, "eval_share", "between 0 and 1", fraction)
            is_only = self.eval_path is None and self.eval_split is None
            require(is_only, "eval_share", "absent next to eval_path or eval_split", fraction)
        rows = self.max_examples
        require(rows is None or rows >= 1, "max_examples", "at least 1", rows)
        require(self.sample is None or self.sample >= 1, "sample", "at least 1", self.sample)
        is_finite = 0 < self.weight < float("inf")
        require(is_finite, "weight", "above 0", self.weight)


@record
class DataConfig:
    """The `data:` section: how rows become tokens."""

    max_length: int = option(2048, "longest example in tokens")
    too_long: Literal["truncate", "drop", "error"] = option("truncate", "treatment of longer rows")
    chat_template: str | None = option(
        None,
        "plain: prompt, newline, answer, end token; or the path of a Jinja file; "
        "absent: the tokenizer's own",
    )

    train_on: TrainOn = option(
        "all",
        "turns in the loss: all answers, the last one, or a list of roles; a row's own train or "
        "weight wins",
        omit_default=True,
    )
    special_tokens_in_text: Literal["error", "split", "keep"] = option(
        "split",
        "text that spells a control token: refused, tokenized as plain text, or kept as the token",
        omit_default=True,
    )
    date: str = option("2024-07-26", "the day that a template sees as today", omit_default=True)
    template_arguments: dict[str, Any] | None = option(
        None,
        "further arguments of the chat template, such as {enable_thinking: false}",
        omit_default=True,
        form="{NAME: VALUE}",
    )
    ignore_columns: tuple[str, ...] = option(
        (), "columns that rows may have and nothing reads", omit_default=True
    )
    bad_rows: int = option(
        0, "rows of a dataset that may be skipped because they are wrong", omit_default=True
    )
    leaks: Literal["error", "drop", "keep"] = option(
        "error", "training rows that are held out too, anywhere in the mixture", omit_default=True
    )
    duplicates: Literal["keep", "drop"] = option(
        "keep", "rows that a dataset holds more than once", omit_default=True
    )
    seed: int = option(0, "seed of sample and weight", omit_default=True)

    def __post_init__(self) -> None:
        require(self.max_length >= 2, "max_length", "at least 2", self.max_length)
        require(
            self.chat_template != "",
            "chat_template",
            "plain or the path of a Jinja file",
            self.chat_template,
        )
        require(_is_date(self.date), "date", "a day such as 2024-07-26", self.date)
        require(self.bad_rows >= 0, "bad_rows", "at least 0", self.bad_rows)


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def source(config: DatasetConfig, part: Part) -> Source | None:
    """The source of the training or held-out rows; None for a dataset without held-out rows.

    Configuration, revision and data files belong to ``path``. With ``eval_share`` both parts lie
    in one source, and ``mixture.select`` divides its rows.
    """
    whole = Source(
        config.path,
        config.split,
        config=config.config,
        revision=config.revision,
        data_files=config.data_files,
    )
    if part == "train" or config.eval_share is not None:
        return whole
    if config.eval_path is not None:
        split = config.eval_split or config.split
        return Source(config.eval_path, split, any_split=config.eval_split is None)
    return None if config.eval_split is None else replace(whole, split=config.eval_split)
